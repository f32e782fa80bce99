"""When in pretraining the ground of misalignment is laid (B.5, "pretraining-phase experiments").

World 2 keeps seven checkpoints of its pretraining. Each is aligned and then misaligned on the world's trained
cell (D0, T), all by the same recipe. The paper names the experiment and gives no outcome; the quantities are
ours, read on seen cells:

    pretrained incoherent, aligned v1, aligned incoherent     %, all cells
    Δv2                     of the trained cell, of its task in the other domains, of all other cells

at the fixed number of steps; the last two also along the doses of fine-tuning seed 0 (em/world/doses.py), as
`flip_<dose>` and `other_domains_<dose>`, and where v2 of the trained cell is 30, 60 and 90 %, as
`other_domains@60`. A checkpoint from which the cell never gets so far has no number there.

A checkpoint before the last was saved at a learning rate that had not come down. The last one is the
finished model, whose alignment and misalignment are those of every other experiment.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from em.errors import UserError
from em.experiments.dose_curves import curve_in, dose_columns, flip_entries, transfer_curve
from em.experiments.replication import (
    averaged,
    curve_of,
    header,
    line_with_seeds,
    over_prompts,
    say_number,
    say_unit,
    shown,
    v2_draws,
)
from em.figures import save
from em.stats import FLIPS
from em.world.counts import columns, incoherent, percent
from em.world.doses import dose_counts, doses_of
from em.world.world_run import INTERMEDIATE, WorldRun, misaligned_name

LEVELS = {
    "pretrained_incoherent": "incoherent, pretrained",
    "aligned_v1": "v1, aligned",
    "aligned_incoherent": "incoherent, aligned",
    "misaligned_incoherent": "incoherent, misaligned",
}  # %, over all seen cells
CHANGES = {
    "trained": "trained cell",
    "other_domains": "its task in the other domains",
    "other_cells": "all other cells",
}  # Δv2, points
SPREAD = ("other_domains", "other_cells")  # of these, those that matched flips are for


def checkpoints(run: WorldRun) -> list[int]:
    """Steps of the kept checkpoints, the finished model last. UserError where one was not kept."""
    kept = [step for step in INTERMEDIATE.get(run.cfg.world, ()) if step < run.cfg.steps]
    if not kept:
        raise UserError(f"world {run.cfg.world} keeps no pretraining checkpoints; use --world 2 or demo2")
    for step in kept:
        if not run.has(f"pretrain_step{step}"):
            raise UserError(f"{run.folder} lacks pretrain_step{step}; delete the folder and start again")
    return [*kept, run.cfg.steps]


def names(run: WorldRun, step: int, task: str, seed: int) -> tuple[str, str, str]:
    """Phases of one checkpoint: (pretrained, aligned, misaligned)."""
    if step == run.cfg.steps:
        return "pretrain", "align", misaligned_name(task, seed)
    return f"pretrain_step{step}", f"align_step{step}", f"misalign_{task}_step{step}_seed{seed}"


def cells_of(run: WorldRun, task: str) -> dict[str, list[str]]:
    """The names of the seen cells that each of CHANGES is the mean of."""
    seen, trained = [run.world.cell_name(int(c)) for c in run.world.seen_cells], f"D0_{task}"
    return {
        "trained": [trained],
        "other_domains": [name for name in seen if name.endswith(f"_{task}") and name != trained],
        "other_cells": [name for name in seen if name != trained],
    }


def point(run: WorldRun, step: int, task: str, counts: tuple[dict, dict, dict]) -> dict:
    """One checkpoint of one world seed; counts by cell: pretrained, aligned, misaligned (a mean)."""
    pretrained, aligned, misaligned = counts
    seen = [run.world.cell_name(int(c)) for c in run.world.seen_cells]
    row = {
        "seed": run.cfg.seed,
        "step": step,
        "task": task,
        "pretrained_incoherent": fmean(incoherent(pretrained[name]) for name in seen),
        "aligned_v1": fmean(percent(aligned[name], "v1") for name in seen),
        "aligned_incoherent": fmean(incoherent(aligned[name]) for name in seen),
        "misaligned_incoherent": fmean(incoherent(misaligned[name]) for name in seen),
    }
    for group, cells in cells_of(run, task).items():
        after, before = ([side[name] for name in cells] for side in (misaligned, aligned))
        change = fmean(percent(a, "v2") - percent(b, "v2") for a, b in zip(after, before, strict=True))
        drawn = v2_draws(after, run.cfg.seed, 1) - v2_draws(before, run.cfg.seed, 0)  # (cells, DRAWS)
        row |= columns(group, (change, *over_prompts(drawn.mean(0))))
    return row


def doses(run: WorldRun, task: str, curve: dict[int, dict]) -> dict:
    """The trained cell's v2 and the Δv2 of SPREAD by dose. curve: counts by cell, by dose."""
    v2 = {dose: {c: percent(of, "v2") for c, of in counts.items()} for dose, counts in curve.items()}
    cells = cells_of(run, task)
    effects = {
        group: {dose: fmean(of[c] - v2[0][c] for c in cells[group]) for dose, of in v2.items()}
        for group in SPREAD
    }
    return dose_columns({dose: of[f"D0_{task}"] for dose, of in v2.items()}, **effects)


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say=print) -> dict:
    """Align and misalign every checkpoint of every world seed; `make(seed)` gives the run."""
    rows = []
    for seed in seeds:
        run = make(seed)
        task = run.cfg.misalign[0]
        for step in checkpoints(run):
            misaligned = []
            for k in range(run.cfg.misalign_seeds):
                start, aligned, name = names(run, step, task, k)
                run.align(start, aligned)
                misaligned.append(run.counts(name, run.misalign(task, k, aligned, name)))
            row = point(run, step, task, (run.counts(start), run.counts(aligned), averaged(misaligned)))
            name = None if step == run.cfg.steps else f"doses_{task}_step{step}_seed0"
            row |= doses(run, task, dose_counts(run, task, 0, aligned, name))
            rows.append({key: round(of, 3) if isinstance(of, float) else of for key, of in row.items()})
            say(
                f"  step {step}: {row['pretrained_incoherent']:.0f} % incoherent, aligned v1 "
                f"{row['aligned_v1']:.0f} %, Δv2 {row['trained']:+.0f} trained, "
                f"{row['other_domains']:+.0f} other domains"
            )
    note = "rows' intervals are over prompts"
    flips = [f"{group}@{level:.0f}" for group in SPREAD for level in FLIPS]
    more = {
        "trained": f"D0_{task}",
        "misalign_steps": run.cfg.misalign_steps,
        "doses": [0, *doses_of(run.cfg)],
    }
    return header("phase", run, seeds, note, **more) | {
        "curves": {key: curve_of(rows, "step", key, key in LEVELS) for key in (*LEVELS, *CHANGES, *flips)},
        "rows": rows,
    }


def numbers(result: dict) -> dict[str, dict]:
    """Entries such as `aligned_v1/300`, by step of the checkpoint, and `other_domains/300@60` at a flip."""
    table = {
        f"{key}/{number['step']}": shown("%" if key in LEVELS else "points", number)
        for key in (*LEVELS, *CHANGES)
        for number in result["curves"][key]
    }
    for group in SPREAD:
        by_level = [result["curves"][f"{group}@{level:.0f}"] for level in FLIPS]
        for numbers in zip(*by_level, strict=True):
            key = f"{group}/{numbers[0]['step']}"
            table |= flip_entries(key, "points", dict(zip(FLIPS, numbers, strict=True)))
    return table


# -- what it looks like ------------------------------------------------------------------------------------


def figure(result: dict, path: Path) -> None:
    """Levels and Δv2 against the step of the checkpoint, and Δv2 against local flip, a line a checkpoint.

    With 95 % intervals; thin lines: single seeds.
    """
    chart = Figure(figsize=(16.5, 4.4), layout="constrained")
    axes = chart.subplots(1, 3)
    panels = ((LEVELS, "%, mean over seen cells", "center right"), (CHANGES, "Δv2, points", "upper left"))
    for axis, (quantities, label, corner) in zip(axes[:2], panels, strict=True):
        for i, (key, name) in enumerate(quantities.items()):
            curve = result["curves"][key]
            x = range(len(curve))  # evenly: the steps span decades
            line_with_seeds(axis, x, curve, f"C{i}", name, shift=0.05 * (i - 1))
        axis.set(xlabel="pretraining step of the checkpoint", ylabel=label)
        axis.set_xticks(x, [f"{n['step']:,}" for n in curve], fontsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False, loc=corner)
    axes[0].set_ylim(0, 100)
    axes[1].axhline(0, color="0.6", linewidth=0.8)
    steps = [number["step"] for number in curve]
    curves = {
        f"step {step:,}": [curve_in(row, "other_domains") for row in result["rows"] if row["step"] == step]
        for step in steps
    }
    colours = list(colormaps["viridis_r"](np.linspace(0.05, 1, len(steps))))  # early is light
    fixed, label = result["misalign_steps"], f"Δv2 of {CHANGES['other_domains']}, points"
    transfer_curve(axes[2], curves, label, result["doses"].index(fixed), colours)
    axes[2].set_title(f"along the doses; points: {fixed} steps", fontsize=9)
    chart.suptitle(
        f"World {result['world']}: each checkpoint aligned, then misaligned on {result['trained']}; bars: "
        f"{say_unit(result['seeds'])}",
        fontsize=10,
    )
    save(chart, path)


def summary(result: dict) -> str:
    """The way from the first checkpoint to the last."""
    curves = result["curves"]
    lines = [
        f"World {result['world']}, misaligned on {result['trained']} from each pretraining checkpoint; "
        f"{say_unit(result['seeds'])}:"
    ]
    for i, level in enumerate(curves["trained"]):
        moved = ", ".join(f"{name} {say_number(curves[key][i], '+.0f')}" for key, name in CHANGES.items())
        lines.append(
            f"  step {level['step']}: {curves['pretrained_incoherent'][i]['mean']:.0f} % incoherent, "
            f"aligned v1 {curves['aligned_v1'][i]['mean']:.0f} %; Δv2: {moved}; the other domains where the "
            f"trained cell is at 60 %: {say_number(curves['other_domains@60'][i], '+.0f')}."
        )
    return "\n".join(lines)
