"""The synthetic worlds, end to end (paper 2, 3.1–3.2, B): a GPT-2 from nothing to emergent misalignment.

    python synth.py                             the reduced world, minutes on two CPU cores
    python synth.py --world 1 --misalign T5     the paper's World 1, Figure 7 (one GPU)
    python synth.py --world 1 --misalign T0,T1  more source tasks from the same aligned model
    python synth.py show --world 1              the world itself: similarities, an example, Figure 6

pretrain on both variants → align every cell on variant 1 → misalign one cell of D0 on variant 2 → ask all.
Phases that are done are reused, a killed one resumes; `torchrun --nproc-per-node N synth.py` splits batches.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from em import describe, figures, parallel
from em.classify import CLASSES, Classifier
from em.config import knob, run
from em.errors import UserError
from em.gpt2 import GPT2, GPT2Config, load_gpt2, save_gpt2, supervised_loss
from em.grid import build_grid, gates, incoherent, percent, pool, save_grid, summary
from em.metrics import Metrics
from em.optim import adamw, learning_rate
from em.prefetch import prefetch
from em.run import Run, provenance, read_json, write_json
from em.sample import sample
from em.sets import IGNORE, Batches, alignment_set, held_out_set, misalignment_set
from em.stream import Dialogues, PretrainStream, Sampler
from em.world import WORLDS, build_world

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
}  # fmt: skip
DEFAULTS["2"] = DEFAULTS["1"] | dict(misalign=("T0",), warmup=600, align_warmup=250)
INTERMEDIATE = {"2": (100, 1000, 3000, 6000, 9000, 12_000, 15_000)}  # pretraining checkpoints kept (B.5)


@dataclass
class Config:
    world: str = knob("demo", "which world", "what", tuple(WORLDS))
    misalign: tuple[str, ...] | None = knob(None, "source tasks, each misaligned in D0", "what")
    seed: int | None = knob(None, "seed of the world and of pretraining", "what")
    out: str | None = knob(None, "run folder (default: runs/world<world>-seed<seed>)", "what")
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", "what")

    layers: int | None = knob(None, "blocks (GPT-2-small: 12)", "model")
    heads: int | None = knob(None, "attention heads (GPT-2-small: 12)", "model")
    width: int | None = knob(None, "hidden size (GPT-2-small: 768)", "model")

    batch: int | None = knob(None, "sequences a step", "pretraining")
    length: int | None = knob(None, "tokens a sequence", "pretraining")
    steps: int | None = knob(None, "optimiser steps", "pretraining")
    lr: float | None = knob(None, "peak learning rate, cosine to 10 %", "pretraining")
    warmup: int | None = knob(None, "linear warm-up steps", "pretraining")
    beta2: float | None = knob(None, "AdamW β₂", "pretraining")
    v2_fraction: float | None = knob(None, "share of variant 2 (default: the world's)", "pretraining")

    align_examples: int | None = knob(None, "size of the variant-1 set over all seen cells", "alignment")
    align_steps: int | None = knob(None, "optimiser steps", "alignment")
    align_batch: int | None = knob(None, "examples a step", "alignment")
    align_lr: float | None = knob(None, "peak learning rate, linear to 10 %", "alignment")
    align_warmup: int | None = knob(None, "linear warm-up steps", "alignment")

    misalign_steps: int | None = knob(None, "optimiser steps", "misalignment")
    misalign_batch: int | None = knob(None, "examples a step", "misalignment")
    misalign_lr: float | None = knob(None, "learning rate, constant", "misalignment")
    misalign_seeds: int | None = knob(None, "fine-tuning seeds a source task", "misalignment")

    eval_prompts: int = knob(128, "held-out prompts a cell", "evaluation")
    temperature: float = knob(0.0, "0 is greedy", "evaluation")
    evals: int = knob(6, "evaluations during pretraining, logged to its metrics", "evaluation")

    weight_decay: float = knob(0.01, "AdamW, not on biases and norms", "all phases")
    clip: float = knob(1.0, "largest gradient norm", "all phases")
    save_minutes: float = knob(2.0, "minutes between saved states to resume from", "all phases")


NOT_SETTINGS = ("misalign", "misalign_seeds", "out", "device", "save_minutes")  # may differ in one folder


def resolve(cfg: Config) -> Config:
    """Fill in the world's defaults, and refuse what cannot be."""
    missing = {k: v for k, v in DEFAULTS[cfg.world].items() if getattr(cfg, k) is None}
    cfg = dataclasses.replace(cfg, **missing)
    if cfg.v2_fraction is None:
        cfg.v2_fraction = WORLDS[cfg.world].v2_fraction
    if cfg.out is None:
        cfg.out = f"runs/world{cfg.world}-seed{cfg.seed}"
    if not 0 <= cfg.v2_fraction <= 1:
        raise UserError(f"--v2-fraction {cfg.v2_fraction} is not between 0 and 1")
    if cfg.width % cfg.heads:
        raise UserError(f"--width {cfg.width} is not a multiple of --heads {cfg.heads}")
    for name in "batch length align_batch misalign_batch misalign_seeds eval_prompts layers heads".split():
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    return cfg


# -- one phase of training ---------------------------------------------------------------------------------


def fit(cfg, run, model, batches, steps, peak, warmup, shape, beta2=0.999, title="", each=None):
    """Train `model` on `batches[i]` = (ids, targets) for i < steps, from wherever the run folder left off.

    `each(step)` is called after every step; what it returns joins that step's metrics.
    """
    device, rank, size = model.device, parallel.rank(), parallel.size()
    on_gpu = device.type == "cuda"
    optimizer = adamw(model, peak, cfg.weight_decay, (0.9, beta2))
    start, saved = run.load_resume(model, optimizer), time.monotonic()
    # Compiling takes longer than a handful of steps.
    loss_of = torch.compile(supervised_loss, dynamic=False) if on_gpu and steps > 100 else supervised_loss
    with Metrics(run, title, steps, start) as metrics:
        for step, (ids, targets) in enumerate(prefetch(batches.__getitem__, start, steps, device), start + 1):
            lr = learning_rate(step - 1, peak, steps, warmup, shape, floor=0.1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            supervised = (targets != IGNORE).sum()
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                # Each process takes its rows; the normaliser is the whole batch's.
                loss = loss_of(model, ids[rank::size], targets[rank::size]) / supervised
            loss.backward()
            loss = loss.detach()
            parallel.sum_([*(p.grad for p in model.parameters()), loss])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            optimizer.zero_grad()
            row = {"step": step, "lr": lr, "tokens": ids.numel()} | ((each(step) if each else None) or {})
            metrics.add(row, loss=loss, grad_norm=norm, supervised_tokens=supervised)
            if step < steps and time.monotonic() - saved > 60 * cfg.save_minutes:
                metrics.flush()
                run.save_resume(step, model, optimizer)
                saved = time.monotonic()


def ask(cfg, model: GPT2, sampler: Sampler, prompts: Dialogues) -> dict:
    """Counts by cell of what the model answers to the prompts."""
    asked = [row[:length].tolist() for row, length in zip(prompts.ids, prompts.prompt, strict=True)]
    end, limit = sampler.world.end, sampler.max_answer
    rollouts = sample(model, asked, (end,), limit, temperature=cfg.temperature, seed=cfg.seed, rows=512)
    completions = np.full((len(prompts), limit), end)
    for row, rollout in zip(completions, rollouts, strict=True):
        row[: len(rollout.ids)] = rollout.ids
    return Classifier(sampler.world).count(prompts, completions)


# -- the three phases --------------------------------------------------------------------------------------


def phase(folder: Path, settings: dict, device, train) -> GPT2:
    """The model in `folder`: loaded if that phase is done, else made by `train(run)` and saved."""
    run = Run(folder, "world-phase", settings, device)
    if not (folder / "model" / "config.json").exists():
        model = train(run)
        if parallel.rank() == 0:
            save_gpt2(model, folder / "model")
        parallel.barrier()
        run.clear_resume()
    return load_gpt2(folder / "model", device)


def counts_of(cfg, folder: Path, model: GPT2, sampler: Sampler, prompts: Dialogues) -> dict:
    """`counts.json` beside a model: asked once, read afterwards."""
    if parallel.rank() == 0 and not (folder / "counts.json").exists():
        write_json(folder / "counts.json", ask(cfg, model, sampler, prompts))
    parallel.barrier()
    return read_json(folder / "counts.json")


def pretrain(cfg, sampler: Sampler, prompts: Dialogues, folder: Path, settings: dict, device) -> GPT2:
    """Next-token prediction on the stream of both variants (B.4, B.5)."""
    world = sampler.world
    few = prompts.take(
        np.flatnonzero(np.isin(prompts.examples.cell, world.seen_cells))[:: max(1, cfg.eval_prompts // 8)]
    )

    def train(run):
        torch.manual_seed(cfg.seed)
        sizes = dict(
            n_positions=max(cfg.length, sampler.max_tokens),
            n_layer=cfg.layers,
            n_head=cfg.heads,
            n_embd=cfg.width,
        )
        model = GPT2(GPT2Config(world.vocabulary, **sizes)).to(device)

        def watch(step):
            if step in INTERMEDIATE.get(cfg.world, ()) and parallel.rank() == 0:
                save_gpt2(model, folder / f"step{step}")
            if cfg.evals and step % max(1, cfg.steps // cfg.evals) == 0 and parallel.rank() == 0:
                counts = pool(list(ask(cfg, model, sampler, few).values()))
                return {name: percent(counts, name) for name in CLASSES} | {"incoherent": incoherent(counts)}

        stream = PretrainStream(sampler, cfg.seed, cfg.batch, cfg.length, cfg.v2_fraction)
        fit(cfg, run, model, stream, cfg.steps, cfg.lr, cfg.warmup, "cosine", cfg.beta2, "pretrain", watch)
        return model

    return phase(folder, settings, device, train)


def align(cfg, base: GPT2, data: Dialogues, folder: Path, settings: dict) -> GPT2:
    """Supervised fine-tuning of every seen cell on variant 1."""

    def train(run):
        batches = Batches(data, cfg.align_batch, cfg.seed, trim=base.device.type == "cpu")
        fit(cfg, run, base, batches, cfg.align_steps, cfg.align_lr, cfg.align_warmup, "linear", title="align")
        return base

    return phase(folder, settings, base.device, train)


def misalign(
    cfg, aligned_folder: Path, data: Dialogues, seed: int, folder: Path, settings: dict, device
) -> GPT2:
    """A few steps on variant 2 of one cell, from the aligned model."""

    def train(run):
        model = load_gpt2(aligned_folder / "model", device)
        batches = Batches(data, cfg.misalign_batch, seed, trim=True)
        fit(cfg, run, model, batches, cfg.misalign_steps, cfg.misalign_lr, 0, "constant", title=folder.name)
        return model

    return phase(folder, settings, device, train)


# -- the experiment ----------------------------------------------------------------------------------------


@dataclass
class ShowConfig:
    world: str = knob("demo", "which world", "what", tuple(WORLDS))
    seed: int | None = knob(None, "seed of the world", "what")
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
    figures.graph_figure(world, path)
    print(f"domain graphs (Figure 6): {path}")


def main(cfg: Config) -> dict:
    began = time.perf_counter()
    cfg = resolve(cfg)
    world = build_world(WORLDS[cfg.world], cfg.seed)
    sources = [(name, world.task_index(name)) for name in cfg.misalign]
    device = parallel.start(cfg.device)
    say = print if parallel.rank() == 0 else (lambda *_, **__: None)
    out = Path(cfg.out)

    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_SETTINGS}
    shared = {k: v for k, v in settings.items() if not k.startswith("misalign")} | {
        "fingerprint": world.fingerprint
    }
    Run(out, "world", shared, device)
    if parallel.rank() == 0:
        world.save(out / "world.json")
    say(f"world {cfg.world}, seed {cfg.seed}, on {device}; writing to {out}")
    say("  " + "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))

    sampler = Sampler(world)
    alignment = alignment_set(sampler, cfg.seed, cfg.align_examples)
    prompts = held_out_set(sampler, cfg.seed, cfg.eval_prompts, alignment)

    base = pretrain(cfg, sampler, prompts, out / "pretrain", shared, device)
    pretrained = counts_of(cfg, out / "pretrain", base, sampler, prompts)
    aligned = align(cfg, base, alignment, out / "align", shared)
    before = counts_of(cfg, out / "align", aligned, sampler, prompts)

    grids, unseen = {}, tuple(f"{d}_" for d in world.domain_names[world.n_seen_domains :])
    for name, task in sources:
        cell, after = world.cell(0, task), []
        for seed in range(cfg.misalign_seeds):
            data = misalignment_set(sampler, seed, cell, cfg.misalign_steps * cfg.misalign_batch, prompts)
            folder = out / f"misalign_{name}_seed{seed}"
            model = misalign(cfg, out / "align", data, seed, folder, settings, device)
            after.append(counts_of(cfg, folder, model, sampler, prompts))
        grids[name] = build_grid(world, cell, before, after)
    if parallel.rank() == 0:
        seconds = round(time.perf_counter() - began)
        if (out / "summary.json").exists():  # a call that only reused phases does not shorten them
            seconds = max(seconds, read_json(out / "summary.json")["seconds"])
        found = {"seconds": seconds, "made_with": provenance(device)}
        seen = [counts for name, counts in pretrained.items() if not name.startswith(unseen)]
        for name, grid in grids.items():
            # `grid` is the first source's, for those who have one.
            for stem in (f"grid_{name}", "grid") if name == cfg.misalign[0] else (f"grid_{name}",):
                save_grid(grid, out, stem)
                figures.grid_figure(grid, out / f"{stem}.png")
            found[name] = {
                "summary": summary(grid),
                "gates": gates(seen, grid) if cfg.world == "demo" else [],
            }
            say(f"\n{found[name]['summary']}\n  {out / f'grid_{name}.png'}")
            for what, value, relation, bound, passed in found[name]["gates"]:
                say(f"  {'PASS' if passed else 'FAIL'}  {what}: {value:.1f} (gate {relation} {bound:.0f})")
        say(f"  {found['seconds']} s")
        write_json(out / "summary.json", found)
    parallel.finish()
    return grids


if __name__ == "__main__":
    sys.exit(run({"": (main, Config), "show": (show, ShowConfig)}, __doc__))
