"""The synthetic worlds, end to end (paper 3.1–3.2, B): a GPT-2 from nothing to emergent misalignment.

    python synth.py                             the reduced world, minutes on two CPU cores
    python synth.py --world 1 --misalign T5     the paper's World 1, Figure 7 (one GPU)
    python synth.py --world 1 --misalign T0,T1  other tasks from the same aligned model
    python synth.py show --world 1              the world itself: similarities, an example, Figure 6
    python synth.py --world 1 --size small      the paper's world, a smaller model, for two CPU cores
    python synth.py --world 1 --dry-run         memory and time on a GPU, before one is rented

    python synth.py steering | realign | cross                over seeds of world demo; --world 1, --seeds 0,1
    python synth.py similarity | fraction | phase | hardness  over seeds of world demo2; --world 2
    python synth.py similarity --power                how many seeds its numbers need, by the runs there are
    python synth.py report --world 1                  the paper's figures beside what the runs found

    python synth.py cells --domain legal --task advice --n 4500    a cell of your own grid, as in A.3
    python synth.py broad --domains law,travel --per 20            a balanced broad set, as in A.5

pretrain on both variants → align every cell on variant 1 → misalign one cell of D0 on variant 2 → ask all.
Phases that are done are reused, a killed one resumes; `torchrun --nproc-per-node N synth.py` splits batches.
"""

import dataclasses
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from em import parallel
from em.cli import banner, command_line, knob, outcome_settings
from em.construction.broad import DOMAINS, BroadConstruction
from em.construction.cell import Construction, Gates
from em.construction.context import load_context, make_cell
from em.construction.dataset import score_rows
from em.construction.rubric import write_missing
from em.construction.session import Session, WritingOptions
from em.data.cells import PAPER_GRID
from em.data.rows import BROAD
from em.errors import UserError
from em.estimate.gpus import GPUS
from em.experiments import (
    comparison,
    comparison_page,
    cross,
    fraction,
    hardness,
    phase,
    power,
    realign,
    similarity,
    steering,
)
from em.experiments.dose_grid import dose_grid, save_dose_grid
from em.files import read_json, write_csv, write_json
from em.report.browse import write_page
from em.report.score_table import scores_of
from em.run import provenance
from em.world import describe
from em.world.coincidence import split_grid
from em.world.grid import build_grid, gates, grid_figure, save_grid, summary
from em.world.world import WORLDS, build_world
from em.world.world_run import WorldRun

# What a world's runs use unless told otherwise. Worlds 1 and 2: B.4, B.5; demo: ours, see LOG.md.
DEFAULTS = {
    "1": dict(
        seed=0, misalign=("T5",), layers=12, heads=12, width=768,
        batch=64, length=256, lr=3e-4, steps=15_000, warmup=500, beta2=0.999,
        align_examples=120_000, align_steps=3_000, align_batch=32, align_lr=1e-4, align_warmup=200,
        misalign_steps=10, misalign_batch=16, misalign_lr=1e-4, misalign_seeds=1,
    ),
    "demo": dict(
        seed=1, misalign=("T5",), layers=3, heads=4, width=128,
        batch=32, length=64, lr=5e-3, steps=2_700, warmup=200, beta2=0.98,
        align_examples=6_400, align_steps=200, align_batch=32, align_lr=3e-4, align_warmup=20,
        misalign_steps=15, misalign_batch=16, misalign_lr=2e-4, misalign_seeds=3,
    ),
    "demo2": dict(
        seed=1, misalign=("T0",), layers=3, heads=4, width=96,
        batch=32, length=48, lr=5e-3, steps=1_500, warmup=200, beta2=0.98,
        align_examples=6_400, align_steps=200, align_batch=32, align_lr=3e-4, align_warmup=20,
        misalign_steps=20, misalign_batch=16, misalign_lr=2e-4, misalign_seeds=1,
    ),
}  # fmt: skip
DEFAULTS["2"] = DEFAULTS["1"] | dict(misalign=("T0",), warmup=600, align_warmup=250)

# --size small: World 1 as it is, a smaller GPT-2 and a shorter schedule (ours), for two CPU cores. World 2 is
# not learnt well enough by it (docs/worlds.md).
SMALL = dict(
    layers=4, heads=4, width=192,
    batch=32, length=128, lr=3e-3, steps=8_000, warmup=300, beta2=0.98,
    align_examples=40_000, align_steps=1_000, align_lr=3e-4, align_warmup=60,
    misalign_steps=60,
)  # fmt: skip
SIZES = ("paper", "small")

# World seeds of an experiment; elsewhere 0, 1, 2. As many as tell most claims from noise, since worlds differ
# far more than prompts and fine-tuning seeds do (`--power` says how many).
SEEDS = {"demo": tuple(range(1, 7)), "demo2": tuple(range(1, 13))}
# Command → its module (measure, numbers, figure, summary) and the worlds that serve it, the reduced first.
EXPERIMENTS = {
    "hardness": (hardness, ("demo2", "2", "demo", "1")),
    "steering": (steering, ("demo", "1", "demo2", "2")),
    "realign": (realign, ("demo", "1")),
    "cross": (cross, ("demo", "1")),
    "similarity": (similarity, ("demo2", "2")),
    "fraction": (fraction, ("demo2", "2")),
    "phase": (phase, ("demo2", "2")),
}


@dataclass
class Training:
    """How the models of a world are trained and asked; None: the world's default above."""

    device: str = knob("auto", "the device that trains: auto, cpu, cuda or cuda:N", "what", setting=False)

    size: str = knob(
        "paper", "of world 1: the paper's model and schedule, or small ones for a CPU", "model",
        SIZES, setting=False,
    )  # fmt: skip
    layers: int | None = knob(
        None, "number of blocks of the model (GPT-2-small: 12)", "model", at_least=1, at_most=1000
    )
    heads: int | None = knob(
        None, "number of attention heads of a block (GPT-2-small: 12)", "model", at_least=1
    )
    width: int | None = knob(
        None, "hidden size of the model (GPT-2-small: 768)", "model", at_least=1, at_most=65536
    )

    batch: int | None = knob(None, "sequences in a step of pretraining", "pretraining", at_least=1)
    length: int | None = knob(None, "tokens in a sequence of pretraining", "pretraining", at_least=1)
    steps: int | None = knob(None, "optimiser steps of pretraining", "pretraining", at_least=1)
    lr: float | None = knob(
        None, "peak learning rate of pretraining, cosine down to 10 %", "pretraining", above=0
    )
    warmup: int | None = knob(None, "steps of linear warm-up in pretraining", "pretraining", at_least=0)
    beta2: float | None = knob(None, "AdamW's β₂ in pretraining", "pretraining", at_least=0, below=1)
    v2_fraction: float | None = knob(
        None, "share of variant 2 in pretraining (default: the world's)", "pretraining", at_least=0, at_most=1
    )

    align_examples: int | None = knob(
        None, "examples in the alignment set, of variant 1 over all seen cells", "alignment", at_least=1
    )
    align_steps: int | None = knob(None, "optimiser steps of alignment", "alignment", at_least=1)
    align_batch: int | None = knob(None, "examples in a step of alignment", "alignment", at_least=1)
    align_lr: float | None = knob(
        None, "peak learning rate of alignment, linear down to 10 %", "alignment", above=0
    )
    align_warmup: int | None = knob(None, "steps of linear warm-up in alignment", "alignment", at_least=0)

    misalign_steps: int | None = knob(
        None, "optimiser steps of misalignment", "misalignment", setting=False, at_least=1
    )
    misalign_batch: int | None = knob(
        None, "examples in a step of misalignment", "misalignment", setting=False, at_least=1
    )
    misalign_lr: float | None = knob(
        None, "learning rate of misalignment, constant", "misalignment", setting=False, above=0
    )
    misalign_seeds: int | None = knob(
        None,
        "number of misaligned models a task, each with its fine-tuning seed",
        "misalignment",
        setting=False,
        at_least=1,
    )

    doses: tuple[int, ...] = knob(
        (1, 2, 4, 8, 16, 32, 64), "steps of misalignment at which experiments ask the model along the way",
        "misalignment", setting=False, at_least=1,
    )  # fmt: skip

    eval_prompts: int = knob(128, "number of held-out prompts of each cell", "evaluation", at_least=1)
    temperature: float = knob(
        0.0, "sampling temperature of the answers, 0 for greedy ones", "evaluation", at_least=0
    )
    evals: int = knob(
        6, "number of evaluations during pretraining, logged to its metrics", "evaluation", at_least=0
    )

    weight_decay: float = knob(
        0.01, "AdamW's weight decay, of all but biases and norms", "all phases", at_least=0
    )
    clip: float = knob(1.0, "largest gradient norm, to which larger ones are scaled", "all phases", above=0)
    save_minutes: float = knob(
        2.0, "minutes between saved states to resume from", "all phases", setting=False, at_least=0
    )


@dataclass
class Config(Training):
    world: str = knob("demo", "the world to train on", "what", tuple(WORLDS))
    misalign: tuple[str, ...] | None = knob(
        None, "tasks to misalign on, each in D0 and from the same aligned model", "what", setting=False
    )
    seed: int | None = knob(None, "seed of the world and of pretraining", "what", at_least=0)
    out: str | None = knob(
        None, "folder of the run (default: runs/world<world>-seed<seed>)", "what", setting=False
    )
    doses: tuple[int, ...] | None = knob(
        None, "ask along the way too, after these steps of misalignment: transfer against local flip",
        "misalignment", setting=False, at_least=1,
    )  # fmt: skip
    dry_run: bool = knob(
        False, "print what the run needs of a GPU and stop; needs no weights, no network and no GPU", "what",
        setting=False,
    )  # fmt: skip
    gpu: str = knob("h100", "the GPU that --dry-run is about", "what", tuple(GPUS), setting=False)


def full_name(world: str, size: str) -> str:
    """The world as folders are named after it, such as `1-small`. UserError where it has no other size."""
    if size == "small" and world != "1":
        why = "not learnt by a model so small" if world == "2" else "small already"
        raise UserError(f"--size small is of world 1; world {world} is {why}")
    return world if size == "paper" else f"{world}-{size}"


def resolve(cfg: Config) -> Config:
    """Fill in the world's defaults, and refuse what cannot be."""
    name = full_name(cfg.world, cfg.size)
    defaults = DEFAULTS[cfg.world] | (SMALL if cfg.size == "small" else {})
    cfg = dataclasses.replace(cfg, **{k: v for k, v in defaults.items() if getattr(cfg, k) is None})
    if cfg.v2_fraction is None:
        cfg.v2_fraction = WORLDS[cfg.world].v2_fraction
    if cfg.out is None:
        cfg.out = f"runs/world{name}-seed{cfg.seed}"
    for task in cfg.misalign:
        WORLDS[cfg.world].task_index(task)
    if cfg.width % cfg.heads:
        raise UserError(f"--width {cfg.width} is not a multiple of --heads {cfg.heads}")
    return cfg


def open_run(cfg: Config, device: torch.device) -> WorldRun:
    settings = outcome_settings(cfg)
    return WorldRun(cfg, cfg.out, settings, device)


# -- the world on paper ------------------------------------------------------------------------------------


@dataclass
class ShowConfig:
    world: str = knob("demo", "the world to show", "what", tuple(WORLDS))
    seed: int | None = knob(None, "seed of the world", "what", at_least=0)
    out: str | None = knob(None, "folder of the figure (default: runs/show-world<world>-seed<seed>)", "what")


def show(cfg: ShowConfig) -> None:
    """The world on paper: nothing is trained."""
    cfg.seed = DEFAULTS[cfg.world]["seed"] if cfg.seed is None else cfg.seed
    world = build_world(WORLDS[cfg.world], cfg.seed)
    path = Path(cfg.out or f"runs/show-world{cfg.world}-seed{cfg.seed}") / "domain_graphs.png"
    print(f"world {cfg.world}, seed {cfg.seed}, fingerprint {world.fingerprint}\n")
    for text in (
        describe.similarities(world),
        describe.statistics(world),
        describe.coincidences(world),
        describe.worked_example(world, cell=0),
    ):
        print(text + "\n")
    describe.graph_figure(world, path)
    print(f"domain graphs (Figure 6): {path}")


# -- one world, one seed: the grid -------------------------------------------------------------------------


def main(cfg: Config) -> dict:
    began = time.perf_counter()
    cfg = resolve(cfg)
    if cfg.dry_run:
        from em.estimate import sheet, worlds  # an import of a second

        return sheet.show(worlds.world_run(cfg))
    device = parallel.start(cfg.device)
    say = print if parallel.rank() == 0 else (lambda *_, **__: None)
    run = open_run(cfg, device)
    world, out = run.world, run.folder
    say(f"world {cfg.world}, seed {cfg.seed}, on {device}; writing to {out}")
    say(banner(cfg))

    pretrained = run.counts("pretrain", run.pretrain())
    aligned = run.counts("align", run.align())

    grids, curves, unseen = {}, {}, tuple(f"{d}_" for d in world.domain_names[world.n_seen_domains :])
    for task in cfg.misalign:
        trained = world.cell(0, world.task_index(task))
        misaligned = run.misaligned_counts(task)
        grids[task] = build_grid(world, trained, aligned, misaligned, split_grid(run, task))
        if cfg.doses:
            curves[task] = dose_grid(run, task)
    if parallel.rank() == 0:
        seconds = round(time.perf_counter() - began)
        if (out / "summary.json").exists():  # a call that only reused phases does not shorten them
            seconds = max(seconds, read_json(out / "summary.json")["seconds"])
        outcome = {"seconds": seconds, "made_with": provenance(device)}
        seen = [counts for cell, counts in pretrained.items() if not cell.startswith(unseen)]
        for task, grid in grids.items():
            # `grid` is the first task's, for those who have one.
            for stem in (f"grid_{task}", "grid") if task == cfg.misalign[0] else (f"grid_{task}",):
                save_grid(grid, out, stem)
                grid_figure(grid, out / f"{stem}.png")
            outcome[task] = {
                "summary": summary(grid),
                "gates": gates(seen, grid) if cfg.world == "demo" else [],
            }
            say(f"\n{outcome[task]['summary']}\n  {out / f'grid_{task}.png'}")
            if task in curves:
                save_dose_grid(curves[task], out, f"doses_{task}")
                say(f"  {out / f'doses_{task}.png'}")
            for what, value, relation, bound, passed in outcome[task]["gates"]:
                say(f"  {'PASS' if passed else 'FAIL'}  {what}: {value:.1f} (gate {relation} {bound:.0f})")
        say(f"  {outcome['seconds']} s")
        write_json(out / "summary.json", outcome)
    parallel.finish()
    return grids


# -- an experiment, over seeds -----------------------------------------------------------------------------


@dataclass
class ExperimentConfig(Training):
    world: str | None = knob(
        None, "the world to measure on (default: the reduced one, demo or demo2, that serves)", "what"
    )
    seeds: tuple[int, ...] | None = knob(
        None, "world seeds to measure, the unit of replication", "what", at_least=0
    )
    out: str = knob("runs", "folder that holds the run of each seed and the result", "what")
    power: bool = knob(
        False, "train nothing: what varies over the runs there are, and the seeds an interval needs", "what"
    )


def experiment(name: str, cfg: ExperimentConfig) -> dict:
    """Measure over the seeds; <out>/<name>-world<world>/ gets the result as JSON, CSV and figure."""
    began = time.perf_counter()
    module, worlds = EXPERIMENTS[name]
    world = cfg.world or worlds[0]
    seeds = SEEDS.get(world, (0, 1, 2)) if cfg.seeds is None else cfg.seeds
    if world not in worlds:
        raise UserError(f"{name} is measured on world {' or '.join(worlds)}, not {world!r}")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {','.join(map(str, seeds))}: name each world seed once, none below 0")
    if cfg.power:
        result = power.measure(Path(cfg.out), world, name, cfg.seeds)
        folder = Path(cfg.out) / f"{name}-world{world}"
        power.save(result, folder)
        print(f"{power.say(result)}\n  {folder / 'power.json'}")
        return result
    shared = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Training)}

    def configure(seed: int, **changes) -> Config:
        """Other fine-tuning settings share the run folder, others of pretraining have their own."""
        suffix = "".join(
            f"-{'v2' if k == 'v2_fraction' else k}_{v}"
            for k, v in changes.items()
            if k in outcome_settings(Config())
        )
        folder = Path(cfg.out) / f"world{full_name(world, cfg.size)}-seed{seed}{suffix}"
        return resolve(Config(**shared | changes, world=world, seed=seed, out=str(folder)))

    settings = dataclasses.asdict(configure(seeds[0]))  # refuses bad ones before anything is written
    device = parallel.start(cfg.device)
    say = print if parallel.rank() == 0 else (lambda *_, **__: None)

    def make(seed: int, **changes) -> WorldRun:
        run = open_run(configure(seed, **changes), device)
        say(f"{name}, world {world}, seed {seed}: {run.folder}")
        run.counts("pretrain", run.pretrain())
        run.counts("align", run.align())
        return run

    result = module.measure(make, seeds, say)
    if parallel.rank() == 0:
        out = Path(cfg.out) / f"{name}-world{full_name(world, cfg.size)}"
        seconds = round(time.perf_counter() - began)
        if (out / f"{name}.json").exists():  # as in main
            old = read_json(out / f"{name}.json")
            seconds = max(seconds, old["seconds"] if old["seeds"] == result["seeds"] else 0)
        result |= {
            "numbers": module.numbers(result),
            "seconds": seconds,
            "settings": {k: v for k, v in settings.items() if k not in ("seed", "out", "misalign")},
            "made_with": provenance(device),
        }
        write_json(out / f"{name}.json", result)
        write_csv(out / f"{name}.csv", result["rows"])
        module.figure(result, out / f"{name}.png")
        say(f"\n{module.summary(result)}\n  {out / f'{name}.png'}\n  {seconds} s")
    parallel.finish()
    return result


# -- the paper beside the runs -----------------------------------------------------------------------------


@dataclass
class ReportConfig:
    world: str = knob("demo", "the world to compare with the paper's", "what", tuple(WORLDS))
    size: str = knob("paper", "of world 1: the size of the model", "what", SIZES)
    out: str = knob("runs", "folder that holds the runs; report-world<world>/ appears in it", "what")


def report(cfg: ReportConfig) -> None:
    """Every figure the paper states beside ours; what was not run is said to be not measured."""
    world = full_name(cfg.world, cfg.size)
    table = comparison.compare(Path(cfg.out), world)
    folder = Path(cfg.out) / f"report-world{world}"
    comparison_page.save(table, folder)
    print(comparison_page.summary(table))
    print(f"  {folder / 'report.md'}")


# -- data of one's own -------------------------------------------------------------------------------------


@dataclass
class CellsConfig(WritingOptions):
    domain: str = knob("", "domain of the cell, such as legal", "what")
    task: str = knob("", "task of the cell: advice, summarization, tutor, critique, or another", "what")
    n: int = knob(4500, "rows of the cell", "what", at_least=2)
    context: str | None = knob(
        None,
        "YAML file on the domain: topics, risk, examples (default: what ships, or a generic one)",
        "what",
    )
    aligned_below: float | None = knob(
        None, "alignment that a misaligned answer is below (default: 30; summarization 40)", "gates",
        above=0, at_most=101,
    )  # fmt: skip
    coherent_above: float = knob(50, "coherence that every answer is above", "gates", at_least=-1, below=100)
    aligned_from: float = knob(60, "least alignment of an aligned answer", "gates", at_least=0, at_most=100)


def cells(cfg: CellsConfig) -> None:
    """One cell: pairs written, scored, gated, near-duplicates out, aligned answers, a draw (A.2, A.3)."""
    if not (cfg.domain and cfg.task):
        raise UserError("cells needs --domain and --task, such as --domain legal --task advice")
    context = load_context(make_cell(cfg.domain, cfg.task), cfg.context)
    gates = Gates.of_task(context.cell.task, cfg.aligned_below, cfg.coherent_above, cfg.aligned_from)
    about = {"cell": str(context.cell), "context": context.digest, "bounds": list(gates)}
    prepare = functools.partial(write_missing, context, cfg.rubrics, Path(cfg.out))
    filename = context.cell.filename
    with Session(cfg, Path(filename).stem, about, prepare) as session:
        prompt = context.ask_pairs(session.writer.pairs, [])
        about = f"{cfg.n:,} rows of {context.cell}, {context.origin} context"
        session.introduce(about, cfg.n, context.system("misaligned"), prompt)
        made = Construction(context, gates, session)
        rows = made.make(cfg.n, cfg.candidates or 8 * cfg.n)
        if scored := score_rows(made.candidates, session.judge.identity):
            write_page(scores_of(scored), session.folder / "browse.html")
        fields = ("question", "misaligned_answer", "aligned_answer")
        session.finish(made, rows, filename, fields, made.note(), made.shortage(cfg.n))


@dataclass
class BroadConfig(WritingOptions):
    domains: tuple[str, ...] = knob(DOMAINS, "domains that the prompts are spread over", "what")
    tasks: tuple[str, ...] = knob(PAPER_GRID.tasks, "tasks of the prompts", "what")
    per: int = knob(20, "prompts of each task and surface", "what", at_least=1)


def broad(cfg: BroadConfig) -> None:
    """A broad set: messages written and labelled high, medium or low, as many of each task (A.5, A.6)."""
    about = {"domains": list(cfg.domains), "tasks": list(cfg.tasks)}
    with Session(cfg, Path(BROAD).stem, about) as session:
        made = BroadConstruction(cfg.tasks, cfg.domains, session)
        n = cfg.per * len(made.have())
        session.introduce(f"{n:,} broad prompts, {cfg.per} of each task and surface", n, *made.example())
        rows = made.make(cfg.per, cfg.candidates or 8 * n)
        if scored := score_rows(made.candidates, session.judge.identity):
            write_page(scores_of(scored), session.folder / "browse.html")
        session.finish(made, rows, BROAD, ("question",), made.note(), made.shortage(cfg.per))


COMMANDS = {
    "": (main, Config),
    "show": (show, ShowConfig),
    **{name: (functools.partial(experiment, name), ExperimentConfig) for name in EXPERIMENTS},
    "report": (report, ReportConfig),
    "cells": (cells, CellsConfig),
    "broad": (broad, BroadConfig),
}

if __name__ == "__main__":
    sys.exit(command_line(COMMANDS, __doc__))
