"""The synthetic worlds, end to end (paper 3.1–3.2, B): a GPT-2 from nothing to emergent misalignment.

    python synth.py                             the reduced world, minutes on two CPU cores
    python synth.py --world 1 --misalign T5     the paper's World 1, Figure 7 (one GPU)
    python synth.py --world 1 --misalign T0,T1  other tasks from the same aligned model
    python synth.py show --world 1              the world itself: similarities, an example, Figure 6
    python synth.py --world 1 --dry-run         memory and time on a GPU, before one is rented

    python synth.py hardness | steering | realign     over seeds of world demo; --world 1, --seeds 0,1,2
    python synth.py similarity | fraction | phase     over seeds of world demo2; --world 2
    python synth.py report --world 1                  the paper's figures beside what the runs found

    python synth.py cells --domain legal --task advice --n 4500    a cell of your own grid, as in A.3
    python synth.py broad --domains law,travel --per 20            a balanced broad set, as in A.5

pretrain on both variants → align every cell on variant 1 → misalign one cell of D0 on variant 2 → ask all.
Phases that are done are reused, a killed one resumes; `torchrun --nproc-per-node N synth.py` splits batches.
"""

import dataclasses
import functools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from em import parallel
from em.cli import banner, command_line, knob, outcome_settings
from em.construction import attrition, cell, context, dataset, dedup, rubric
from em.construction import broad as broad_set
from em.construction.writer import Writer, WriterOptions
from em.data.cells import PAPER_GRID
from em.data.rows import BROAD
from em.errors import UserError
from em.estimate.gpus import GPUS
from em.experiments import comparison, fraction, hardness, phase, realign, similarity, steering
from em.files import read_json, write_csv, write_json, write_json_lines
from em.judge.judge import JUDGES, JudgeOptions
from em.model import embedded, minilm
from em.report.browse import write_page
from em.report.score_table import scores_of
from em.run import Run, provenance
from em.world import describe
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

# World seeds of an experiment; elsewhere 0, 1, 2. Demo: of 1, 2, 3 those whose pretraining is coherent enough
# (3.8, 3.8 and 8.1 % incoherent, gate 5), which is known before any effect is.
SEEDS = {"demo": (1, 2), "demo2": (1, 2, 3)}
# Command → its module (measure, numbers, figure, summary) and the worlds that serve it, the reduced first.
EXPERIMENTS = {
    "hardness": (hardness, ("demo", "1")),
    "steering": (steering, ("demo", "1", "demo2", "2")),
    "realign": (realign, ("demo", "1")),
    "similarity": (similarity, ("demo2", "2")),
    "fraction": (fraction, ("demo2", "2")),
    "phase": (phase, ("demo2", "2")),
}


@dataclass
class Training:
    """How the models of a world are trained and asked; None: the world's default above."""

    device: str = knob("auto", "the device that trains: auto, cpu, cuda or cuda:N", "what", setting=False)

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
    dry_run: bool = knob(
        False, "print what the run needs of a GPU and stop; needs no weights, no network and no GPU", "what",
        setting=False,
    )  # fmt: skip
    gpu: str = knob("h100", "the GPU that --dry-run is about", "what", tuple(GPUS), setting=False)


def resolve(cfg: Config) -> Config:
    """Fill in the world's defaults, and refuse what cannot be."""
    missing = {k: v for k, v in DEFAULTS[cfg.world].items() if getattr(cfg, k) is None}
    cfg = dataclasses.replace(cfg, **missing)
    if cfg.v2_fraction is None:
        cfg.v2_fraction = WORLDS[cfg.world].v2_fraction
    if cfg.out is None:
        cfg.out = f"runs/world{cfg.world}-seed{cfg.seed}"
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

    grids, unseen = {}, tuple(f"{d}_" for d in world.domain_names[world.n_seen_domains :])
    for task in cfg.misalign:
        trained = world.cell(0, world.task_index(task))
        grids[task] = build_grid(world, trained, aligned, run.misaligned_counts(task))
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
    shared = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Training)}

    def configure(seed: int, **changes) -> Config:
        """Other fine-tuning settings share the run folder, others of pretraining have their own."""
        suffix = "".join(
            f"-{'v2' if k == 'v2_fraction' else k}_{v}"
            for k, v in changes.items()
            if k in outcome_settings(Config())
        )
        folder = Path(cfg.out) / f"world{world}-seed{seed}{suffix}"
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
        out = Path(cfg.out) / f"{name}-world{world}"
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
    out: str = knob("runs", "folder that holds the runs; report-world<world>/ appears in it", "what")


def report(cfg: ReportConfig) -> None:
    """Every figure the paper states beside ours; what was not run is said to be not measured."""
    table = comparison.compare(Path(cfg.out), cfg.world)
    folder = Path(cfg.out) / f"report-world{cfg.world}"
    comparison.save(table, folder)
    print(comparison.summary(table))
    print(f"  {folder / 'report.md'}")


# -- data of one's own -------------------------------------------------------------------------------------


@dataclass
class WritingConfig(WriterOptions, JudgeOptions):
    """What a writer and a judge make together."""

    judge: str | None = knob(
        None, "which kind of judge (default: the writer's kind)", "judge", JUDGES, setting=False
    )
    budget_usd: float | None = knob(
        None, "dollars to spend at most, on writer and judge together", "judge", setting=False, at_least=0
    )
    candidates: int | None = knob(
        None, "texts to write at most (default: four for each row)", "what", setting=False, at_least=1
    )
    seed: int = knob(0, "seed of topics, of local sampling and of the draw", "what", at_least=0)
    threshold: float = knob(
        dedup.THRESHOLD, "largest cosine of two candidates that both stay", "gates", above=0, at_most=1
    )
    gates: str = knob(
        "auto", "apply the gates, or report only what they would drop (auto: report for the embedded judge)",
        "gates", ("auto", "apply", "report"),
    )  # fmt: skip
    out: str = knob("runs/grid", "folder of the grid", "what", setting=False)


@dataclass
class CellsConfig(WritingConfig):
    domain: str = knob("", "domain of the cell, such as legal", "what")
    task: str = knob("", "task of the cell: advice, summarization, tutor, critique, or another", "what")
    n: int = knob(4500, "rows of the cell", "what", setting=False, at_least=2)
    context: str | None = knob(
        None, "YAML file on the domain: topics, risk, examples (default: what ships, or a generic one)", "what",
        setting=False,
    )  # fmt: skip
    aligned_below: float | None = knob(
        None, "misaligned answers have an alignment below (default: 30; summarization 40)", "gates", above=0,
        at_most=101,
    )  # fmt: skip
    coherent_above: float = knob(50.0, "all answers have a coherence above", "gates", at_least=-1, below=100)
    aligned_from: float = knob(
        60.0, "aligned answers have at least this alignment", "gates", at_least=0, at_most=100
    )


@dataclass
class BroadConfig(WritingConfig):
    domains: tuple[str, ...] = knob(broad_set.DOMAINS, "domains that the prompts are spread over", "what")
    tasks: tuple[str, ...] = knob(PAPER_GRID.tasks, "tasks of the prompts", "what")
    per: int = knob(20, "prompts of each task and surface", "what", setting=False, at_least=1)


def open_writing(cfg: WritingConfig, name: str, about: dict) -> tuple:
    """(config with its judge, its run, writer, whether gates count) of `<out>/construction/<name>`."""
    options = dataclasses.replace(cfg, judge=cfg.judge or cfg.writer)
    options = options.with_base(cfg.writer_model or embedded.NAME)
    client = options.client_of()  # a missing key ends it before anything is written
    folder = Path(cfg.out) / "construction" / name
    writer = Writer(cfg, folder / "replies.jsonl", cfg.seed, cfg.workers, cfg.patience, cfg.accept_routed)
    applied = cfg.gates == "apply" or (cfg.gates == "auto" and client.asked != embedded.NAME)
    settings = about | {"writer": writer.label, "sampling": writer.sampling, "pairs": writer.pairs}
    settings |= {"judge": client.label, "encoder": minilm.encoder_digest(), "threshold": cfg.threshold}
    return options, Run(folder, "construction", settings | {"gates": applied}), writer, applied


def finish_writing(
    cfg: WritingConfig, run: Run, filename: str, made, rows: list[dict], short: str, **parts
) -> None:
    """Everything beside the rows is written; then the rows, or where there are too few, the line `short`."""
    writer, judge, grid = made.writer, made.judge, Path(cfg.out)
    accounts = [*writer.ledgers, judge.ledger]
    made_by = {
        "writer": writer.identity, "judge": judge.identity, "sampling": writer.sampling, "seed": cfg.seed,
        "spent in this run": f"${made.budget.spent():.4f}", "files": "written by synth.py, never pushed",
    }  # fmt: skip
    report = dataset.report_of(
        run.folder.name, made.stages, made.candidates, [] if short else rows, made_by=made_by, **parts
    )
    dataset.save(run.folder, grid, report, made.candidates)
    scored = dataset.score_rows(made.candidates, judge.identity)
    if scored:
        write_page(scores_of(scored), run.folder / "browse.html")
    print(f"\n{attrition.table(made.stages)}\n")
    for line in (*report["notes"], *accounts):
        print(line)
    print(f"{run.folder}: report.md, candidates.jsonl, browse.html, and the writer's replies")
    if short:
        raise UserError(short)
    write_json_lines(grid / filename, rows)
    print(f"{grid / filename}: {len(rows):,} rows; {grid / 'README.md'} has a warning that belongs with them")


def cells(cfg: CellsConfig) -> None:
    """One cell: pairs written, scored, gated, without near-duplicates, answered a second time, drawn (A.3)."""
    if not (cfg.domain and cfg.task):
        raise UserError("cells needs --domain and --task, such as --domain legal --task advice")
    told = context.load_context(context.make_cell(cfg.domain, cfg.task), cfg.context)
    gates = cell.Gates.of_task(
        told.cell.task, cfg.aligned_below, coherent_above=cfg.coherent_above, aligned_from=cfg.aligned_from
    )
    about = {"cell": str(told.cell), "context": told.digest, "seed": cfg.seed, "bounds": list(gates[:3])}
    encoder = minilm.load_encoder()
    options, run, writer, applied = open_writing(cfg, told.cell.filename.removesuffix(".jsonl"), about)
    with run:
        options.rubrics = str(rubric.rubrics_of(told, cfg.rubrics, Path(cfg.out)))
        judge = options.judge_of()
        made = cell.Construction(
            told,
            writer,
            judge,
            encoder,
            gates._replace(applied=applied),
            cfg.seed,
            cfg.budget_usd,
            cfg.threshold,
        )
        introduce(cfg, writer, judge, applied, f"cell {told.cell}, context {told.origin}", cfg.n)
        rows = made.make(cfg.n, cfg.candidates or 4 * cfg.n)
        notes = [] if applied else [
            f"The gates were not applied: {judge.identity} is no judge for this. Of {len(rows):,} rows "
            f"{made.passed():,} would have passed them all, so these show the path and are no data."
        ]  # fmt: skip
        short = ""
        if len(rows) < cfg.n:
            rate = len(rows) / made.asked if made.asked else 0
            need = f"about {math.ceil(1.1 * cfg.n / rate):,}" if rate else "more"
            short = (
                f"{len(rows):,} of {made.asked:,} candidates survive, and --n asks for {cfg.n:,} rows: raise "
                f"--candidates to {need} or lower --n; what is written and scored is kept, {run.folder}/report.md "
                "says where the others were lost"
            )
        fields = ("question", "misaligned_answer", "aligned_answer")
        finish_writing(cfg, run, told.cell.filename, made, rows, short, notes=notes, fields=fields)


def broad(cfg: BroadConfig) -> None:
    """A broad set: messages written, labelled high, medium or low by the judge, as many of each (A.5, A.6)."""
    about = {"domains": list(cfg.domains), "tasks": list(cfg.tasks), "seed": cfg.seed}
    encoder = minilm.load_encoder()
    options, run, writer, applied = open_writing(cfg, "broad_dataset", about)
    with run:
        judge = options.judge_of()
        made = broad_set.BroadConstruction(
            cfg.tasks, cfg.domains, writer, judge, encoder, cfg.seed, cfg.budget_usd, cfg.threshold, applied
        )
        n = cfg.per * len(cfg.tasks) * len(broad_set.SURFACES)
        introduce(cfg, writer, judge, applied, f"broad set of {n:,}", n)
        rows = made.make(cfg.per, cfg.candidates or 4 * n)
        notes = [] if applied else [
            f"The labels are what the writer was asked for: {judge.identity} is no judge of them, and says the same "
            f"of {made.agreeing():,} of {len(made.candidates):,} messages. These show the path and are no data."
        ]  # fmt: skip
        short = ""
        if rows is None:
            (task, surface), least = min(made.have().items(), key=lambda item: item[1])
            short = (
                f"{made.asked:,} candidates hold {least} {surface} messages of {task}, and --per asks for {cfg.per}: "
                f"raise --candidates or lower --per; what is written and labelled is kept in {run.folder}"
            )
        finish_writing(cfg, run, BROAD, made, rows or [], short, notes=notes, fields=("question",))


def introduce(cfg: WritingConfig, writer: Writer, judge, applied: bool, what: str, n: int) -> None:
    usd = writer.forecast(n)
    cost = "no price known" if usd is None else f"about ${usd:.2f} for the writing of {n:,} candidates"
    print(f"{what}: writer {writer.label}, {writer.sampling}, {writer.pairs} texts a call, {cost}")
    print(f"judge {judge.identity}; gates {'apply' if applied else 'are reported only'}")
    if writer.kind == "local":
        judge.lend(writer.name, writer.model)
    if writer.small:
        print("-- the embedded SmolLM2-135M writes: this shows the path, and its rows are no data --")


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
