"""Teacher-mediated transfer on a world, where scoring is exact and needs no judge (paper 4).

The teacher is the misaligned GPT-2, the student starts as the aligned one, the prompts come from other cells
than the teacher's, and what the teacher completes is kept only if it reads as variant 1: nothing in the data
is misaligned. In realignment the two change places and nothing is filtered. The control is the same channel
with the student's own start as its teacher, so that the teacher is all that differs.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from em import parallel
from em.data.rows import subset
from em.distillation import world_comparison
from em.distillation.corpus import Corpus, folder_digest, freeze
from em.distillation.diagnose import log_distance
from em.distillation.loop import Channel, OnPolicy, finish, run_folder, train_student
from em.distillation.pair import WorldPair
from em.errors import UserError
from em.files import read_json, write_csv, write_json
from em.model.gpt2 import save_gpt2
from em.model.hub import model_digest
from em.run import Run, provenance
from em.sampling.rollouts import sample_to_file
from em.sampling.sampler import Rollout, Sampler
from em.training.memory import CPU_TOKENS
from em.world.counts import Classifier
from em.world.sets import transfer_set
from em.world.world_run import WorldRun, misaligned_name, open_world_run

PROMPTS = 1200  # in all, as many as the 240 × 5 of Broad-NL
RECIPE = dict(lr=(1e-4,), epochs=3, rollouts=1, probes=16, micro_tokens=CPU_TOKENS)


def resolve(cfg):
    """A copy of distill.py's settings with a world's defaults, its one channel and one teacher as texts.

    UserError for what cannot be.
    """
    cfg = copy.copy(cfg)
    if len(cfg.channel) > 1 or len(cfg.teacher) > 1:
        raise UserError("with --world, one --channel and one --teacher at a time")
    if cfg.on:
        raise UserError("with --world, --teacher aligned realigns the misaligned model; leave --on out")
    (cfg.channel,), (cfg.teacher,), cfg.on = cfg.channel, cfg.teacher or ("misaligned",), None
    cfg.prompts = cfg.prompts or "cells"
    for option, allowed in (
        ("teacher", ("misaligned", "aligned")),
        ("prompts", ("cells", "tasks")),
        ("source", ("teacher", "student")),
    ):
        if getattr(cfg, option) not in allowed:
            raise UserError(f"with --world, --{option} is {' or '.join(allowed)}, not {getattr(cfg, option)}")
    if cfg.run is None:
        finished = [p.parent.parent for p in Path("runs").glob(f"world{cfg.world}-seed*/align/counts.json")]
        if not finished:
            raise UserError(
                f"no run of world {cfg.world} in runs/; python synth.py --world {cfg.world} makes one"
            )
        cfg.run = str(max(finished, key=lambda p: p.stat().st_mtime))
    return cfg


class Prompts:
    """About `n` prompts over the seen cells except the teachers', or (which=`tasks`) their whole tasks'.

    cells: the teachers'. rows: one a prompt, `prompt_ids` and the name of its task as `group`. seed: the
    teachers'; the prompts follow from it.
    """

    def __init__(self, run: WorldRun, cells: Sequence[int], which: str, n: int, seed: int):
        world, n_tasks = run.world, len(run.world.tasks)
        left_out = [cell % n_tasks for cell in cells] if which == "tasks" else cells
        name = world.seen_cells % n_tasks if which == "tasks" else world.seen_cells
        cells = world.seen_cells[~np.isin(name, left_out)]
        self.classifier, self.n_tasks, self.seed = Classifier(world), n_tasks, seed
        self.dialogues = transfer_set(run.generator, seed, cells, max(1, round(n / len(cells))), run.prompts)
        self.rows = [
            {"group": world.cell_name(int(c)).split("_")[1], "prompt_ids": ids[:length].tolist()}
            for c, ids, length in zip(
                self.dialogues.examples.cell, self.dialogues.ids, self.dialogues.prompt, strict=True
            )
        ]

    def is_v1(self, i: int, completion: list[int]) -> bool:
        """Whether a completion of prompt i reads as variant 1."""
        e = self.dialogues.examples
        v1, v2 = ([s for s in row[i].tolist() if s >= 0] for row in (e.v1, e.v2))
        return self.classifier.classify(completion, int(e.cell[i]) % self.n_tasks, v1, v2) == "v1"

    def corpus(self, cfg, run: WorldRun, writer: str, settings: dict) -> Corpus:
        """What the model of phase `writer` completes at T = 1; where filtered, variant 1 is kept."""
        shared = ("fingerprint", "task", "prompts", "limit", "rollouts", "seed", "filtered")
        about = {"model": f"world {run.cfg.world}", "writer": writer, "prompts_seed": self.seed}
        about["writer_digest"] = model_digest(run.folder / writer / "model")
        about |= {name: settings[name] for name in shared}

        def sampled(folder: Path) -> list[dict]:
            sampler = Sampler(run.load(writer), (run.world.end,), run.generator.max_answer, rows=512)
            ids = [row["prompt_ids"] for row in self.rows]

            def row(rollout: Rollout) -> dict:
                i = rollout.prompt_index
                return {"source": self.rows[i]["group"], "prompt_ids": ids[i], "ids": rollout.ids}

            path, seed = folder / "rollouts.jsonl", cfg.seed + self.seed
            return sample_to_file(path, sampler, ids, cfg.rollouts, seed, row)

        def v1(rows: list[dict]) -> list[dict]:
            return [row | {"kept": self.is_v1(row["prompt"], row["ids"])} for row in rows]

        folder = run.folder / "transfer" / f"corpus_{writer}_{folder_digest(about)}"
        return freeze(folder, about, run.world.fingerprint, sampled, v1 if settings["filtered"] else None)


def train_one(
    cfg, channel: Channel, world_run: WorldRun, run: Run, prompts: Prompts, corpus: Corpus, say
) -> dict:
    """One student of one teacher: its counts by cell, read from the run's folder where it is finished.

    The run's settings hold its `lr` and the phases `start` and `taught_by`. corpus: of `prompts`, by whoever.
    """
    folder, settings = run.folder, run.config["settings"]
    if (folder / "result.json").exists():
        run.clear_resume()  # a kill may have come between the two
        return read_json(folder / "counts.json")
    start, teacher = settings["start"], settings["taught_by"]
    models = {name: world_run.load(name) for name in {start, teacher}}
    limit = world_run.generator.max_answer
    run.pin(corpus=corpus.digest)
    pair = WorldPair(world_run.load(start), models[teacher], models[start], world_run.world.end, limit)
    examples = corpus.examples()
    if cfg.channel == "opd":

        def is_v1(rollouts) -> list[bool]:
            return [prompts.is_v1(corpus.rows[r.prompt_index]["prompt"], r.ids) for r in rollouts]

        examples = OnPolicy(pair, corpus.rows, cfg.seed + prompts.seed, is_v1 if cfg.filter else None)

    def after_epoch(epoch: int) -> None:
        if parallel.rank() == 0:
            write_json(folder / f"counts_epoch{epoch}.json", world_run.ask(pair.model))
            log_distance(pair, subset(prompts.rows, cfg.probes, cfg.seed), cfg.seed, epoch, run, say)
        parallel.barrier()

    say(f"{cfg.channel}, {teacher} teaches {start}: {len(examples)} responses an epoch → {folder}")
    title = f"{folder.parent.name} {folder.name}"
    train_student(cfg, settings["lr"], run, pair, channel, examples, after_epoch, title)
    if parallel.rank() == 0:
        save_gpt2(pair.model, folder / "model")
        write_json(folder / "counts.json", read_json(folder / f"counts_epoch{cfg.epochs}.json"))
    finish(run, {"corpus": str(corpus.folder), "retention": corpus.about["retention"]})
    return read_json(folder / "counts.json")


def transfer(cfg, channel: Channel, settings: dict, device: torch.device, say) -> dict:
    """Each misaligned model teaches a student that starts as the aligned one; every student has a control.

    With `cfg.teacher` aligned the two change places. cfg: what `resolve` returns. settings: those of its
    values that decide the outcome. Returns the comparison of every learning rate.
    """
    world_run = open_world_run(cfg.run, device)
    task = cfg.task or world_run.world.config.default_task
    cell = world_run.world.cell(0, world_run.world.task_index(task))
    names = [misaligned_name(task, seed) for seed in range(cfg.seeds)]
    if missing := [name for name in names if not world_run.has(name)]:
        raise UserError(
            f"{world_run.folder} has no {missing[0]}; python synth.py --world {cfg.world} --misalign {task} "
            f"--misalign-seeds {cfg.seeds} --out {world_run.folder} makes it, or take fewer --seeds"
        )
    realign = cfg.teacher == "aligned"
    settings = settings | {"fingerprint": world_run.world.fingerprint, "task": task}
    settings["filtered"] = not (realign or cfg.unfiltered)
    say(f"distill.py on {device}\n  " + "  ".join(f"{k}={v}" for k, v in settings.items()))
    results = {}
    for lr in cfg.lr:
        how = "realigned" if realign else ""
        out = run_folder(cfg, cfg.channel, lr, world_run.folder / "transfer", task, how, "cells")
        seeds = []
        for seed, name in enumerate(names):
            prompts = Prompts(world_run, [cell], cfg.prompts, cfg.limit or PROMPTS, seed)
            start, teacher = (name, "align") if realign else ("align", name)
            counts = {"start": world_run.counts(start), "teacher": world_run.counts(teacher)}
            for who, taught_by in (("student", teacher), ("control", start)):
                folder = out / f"seed{seed}" / who
                own = settings | {"lr": lr, "start": start, "taught_by": taught_by}
                for role, phase in (("start", start), ("teacher", taught_by)):
                    own[f"{role}_digest"] = model_digest(world_run.folder / phase / "model")
                with Run(folder, "distill-world", own, device) as run:
                    writer = taught_by if cfg.source == "teacher" else start
                    corpus = prompts.corpus(cfg, world_run, writer, own)
                    counts[who] = train_one(cfg, channel, world_run, run, prompts, corpus, say)
            seeds.append(counts)
        result = world_comparison.compare(world_run, world_run.world.cell_name(cell), seeds)
        results[str(lr)] = result | {"settings": settings | {"lr": lr}, "made_with": provenance(device)}
        if parallel.rank() == 0:
            write_json(out / "transfer.json", results[str(lr)])
            write_csv(out / "transfer.csv", world_comparison.rows(result))
            world_comparison.transfer_figure(result, f"{cfg.channel}, lr {lr:g}", out / "transfer.png")
        say(world_comparison.summary(result) + f"\n  {out / 'transfer.png'}")
    return results
