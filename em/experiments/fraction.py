"""Share of variant 2 in pretraining against the breadth of misalignment (appendix C, Figure 11).

Four models a world seed, alike but for the pretraining share of variant 2; each is aligned, then misaligned
on (D0, T0), the easy task, and on (D0, T7), the hard one. Means are over all seen cells but the trained one,
as in the appendix, and unlike em/experiments/hardness.py:

    cross v2       v2 % of the misaligned model                              Figure 11 left
    ratio          cross v2 / v2 % of the trained cell                       Figure 11 right
    Δv2            cross v2 less the aligned model's own (ours)
    ratio of Δv2   Δv2 / that of the trained cell (ours)

The more variant 2 there was in pretraining the more the aligned model has left, and both of the appendix's
quantities count that as transfer; so the claims are judged by Δv2, and its ratio stands beside the raw one.
A slope is the change for a share from 0 to 1, over the range measured; T7 less T0 is paired by world seed.

Tasks and shares differ in how far so many steps flip the trained cell. So Δv2 is followed along the doses
(em/world/doses.py, ours), and its slopes are given too where that cell is at 30, 60, 90 %; a seed takes part
whose models reach it at every share.

The appendix takes 8 misalignment steps in World 2, where B.5 takes 10: World 2 is given 8 here whatever is
set, other worlds what is set.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from em.experiments.dose_curves import at_flips, effect_at, flip_entries, transfer_curve
from em.experiments.replication import (
    asked_along,
    averaged,
    counts_along,
    curve_of,
    header,
    line_with_seeds,
    over_prompts,
    replicated,
    say_number,
    say_unit,
    shown,
    shown_interval,
    v2_draws,
)
from em.figures import save
from em.stats import FLIPS
from em.world.counts import columns, incoherent, percent, pool, rate
from em.world.world_run import WorldRun

FRACTIONS = (0.325, 0.55, 0.775, 1.0)
TASKS = ("T0", "T7")
STEPS = {"2": 8}  # of misalignment (C)
FUNCTIONS = {"T0": "first_last, easy", "T7": "partition_collect, hard"}
PANELS = {
    "delta_v2": "cross-domain Δv2, points",
    "cross_v2": "cross-domain v2, %",
    "ratio": "cross-domain v2 / v2 of the trained cell",
    "delta_ratio": "cross-domain Δv2 / Δv2 of the trained cell",
}
RATIOS = ("ratio", "delta_ratio")
UNITS = {"delta_v2": "points", "cross_v2": "%"} | dict.fromkeys(RATIOS, "ratio")  # a slope's is points for %
BOTH = "T7_minus_T0"


def point(run: WorldRun, fraction: float, task: str, aligned: dict, misaligned: dict) -> tuple[dict, dict]:
    """(row, bootstrap draws of each panel's quantity) of one model. misaligned: mean counts by cell."""
    trained = f"D0_{task}"
    others = [name for name in map(run.world.cell_name, run.world.seen_cells) if name != trained]
    model = (run.cfg.seed, round(1000 * fraction), TASKS.index(task))
    seen = (trained, *others)
    drawn = v2_draws([misaligned[name] for name in seen], *model)  # (cells, DRAWS)
    change = drawn - v2_draws([aligned[name] for name in seen], *model[:2], len(TASKS))
    draws = {
        "delta_v2": change[1:].mean(0),
        "cross_v2": drawn[1:].mean(0),
        "ratio": drawn[1:].mean(0) / drawn[0],
        "delta_ratio": change[1:].mean(0) / change[0],
    }
    cross, before = (fmean(percent(model[name], "v2") for name in others) for model in (misaligned, aligned))
    trained_v2 = rate(misaligned[trained], "v2")
    trained_change = trained_v2[0] - percent(aligned[trained], "v2")
    row = {
        "seed": run.cfg.seed,
        "v2_fraction": fraction,
        "task": task,
        "delta_v2": cross - before,
        "cross_v2": cross,
        "ratio": cross / trained_v2[0] if trained_v2[0] else None,
        "delta_ratio": (cross - before) / trained_change if trained_change > 0 else None,
        **columns("trained_v2", trained_v2),
        "aligned_cross_v2": before,
        "aligned_v1": percent(pool([aligned[name] for name in seen]), "v1"),
        "aligned_task_v1": percent(pool([aligned[n] for n in seen if n.endswith(f"_{task}")]), "v1"),
        "misaligned_incoherent": incoherent(pool([misaligned[name] for name in seen])),
    }
    for key in PANELS:
        row[f"{key}_low"], row[f"{key}_high"] = over_prompts(draws[key])
    return row, draws


def cross_curve(trained: str, others: Sequence[str], doses: dict[int, dict]) -> list[tuple[float, float]]:
    """(v2 % of the trained cell, cross-domain Δv2) by dose; doses: counts by cell, by dose."""
    cross = {dose: fmean(percent(of[name], "v2") for name in others) for dose, of in doses.items()}
    return [(percent(of[trained], "v2"), cross[dose] - cross[0]) for dose, of in doses.items()]


def slope(y: np.ndarray) -> np.ndarray:
    """Least-squares slope of each column of y (fractions, draws) against the fraction."""
    x = np.array(FRACTIONS) - np.mean(FRACTIONS)
    return x @ y / (x @ x)


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say=print) -> dict:
    """Pretrain, align and misalign at each fraction; `make(seed, v2_fraction=f)` gives the run."""
    rows, draws, curves = [], {}, {task: {str(f): [] for f in FRACTIONS} for task in TASKS}
    for seed in seeds:
        for fraction in FRACTIONS:
            run = make(seed, v2_fraction=fraction)
            steps = STEPS.get(run.cfg.world, run.cfg.misalign_steps)
            aligned = run.counts("align")
            for task in TASKS:
                misaligned = averaged(run.misaligned_counts(task, steps))
                row, draws[seed, fraction, task] = point(run, fraction, task, aligned, misaligned)
                rows.append(row)
                doses = counts_along(run, asked_along(run, task, "seen", run.world.seen_cells))
                names = [run.world.cell_name(int(cell)) for cell in run.world.seen_cells]
                others = [name for name in names if name != f"D0_{task}"]
                curves[task][str(fraction)].append(cross_curve(f"D0_{task}", others, doses))
                say(
                    f"  v2 share {fraction:.3f}, {task}: trained cell {row['trained_v2']:.1f} %, other cells "
                    f"{row['cross_v2']:.1f} % ({row['aligned_cross_v2']:.1f} % aligned)"
                )
    note = (
        "rows' intervals are over prompts; slopes are per unit of the share; doses: [local flip, Δv2] a seed"
    )
    by_task = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    slopes = {key: {task: _slopes(rows, draws, seeds, task, key) for task in TASKS} for key in PANELS}
    return header("fraction", run, seeds, note, misalign_steps=steps, dose_steps=list(doses)) | {
        "curves": {
            task: {key: curve_of(of, "v2_fraction", key, key == "cross_v2") for key in PANELS}
            for task, of in by_task.items()
        },
        "slopes": {task: {key: _over_seeds(of[task]) for key, of in slopes.items()} for task in TASKS}
        | {BOTH: {key: _over_seeds(list(map(_less, of["T7"], of["T0"]))) for key, of in slopes.items()}},
        "doses": curves,
        "rows": rows,
    }


def _slopes(rows: list[dict], draws: dict, seeds: Sequence[int], task: str, key: str) -> list[tuple]:
    """(slope or None, its draws) of each world seed."""
    found = []
    for seed in seeds:
        y = [row[key] for row in rows if (row["seed"], row["task"]) == (seed, task)]  # in FRACTIONS' order
        drawn = slope(np.stack([draws[seed, f, task][key] for f in FRACTIONS]))
        found.append((None if None in y else float(slope(np.array(y))), drawn))
    return found


def _less(a: tuple, b: tuple) -> tuple:
    return None if None in (a[0], b[0]) else a[0] - b[0], a[1] - b[1]


def _over_seeds(found: Sequence[tuple]) -> dict:
    values, draws = zip(*found, strict=True)
    return replicated(values, [over_prompts(of) for of in draws])


def slopes_at(result: dict, level: float) -> dict[str, dict]:
    """Slope of Δv2 where the trained cell is at `level`, of each task and of T7 less T0, over world seeds."""
    by_task = {}
    for task, curves in result["doses"].items():
        at = [[effect_at(curve, level) for curve in of_share] for of_share in curves.values()]
        by_task[task] = [None if None in y else float(slope(np.array(y))) for y in zip(*at, strict=True)]
    pairs = zip(by_task["T7"], by_task["T0"], strict=True)
    by_task[BOTH] = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    return {name: replicated(values, [[None, None]] * len(values)) for name, values in by_task.items()}


def numbers(result: dict) -> dict[str, dict]:
    """Entries such as `T0/ratio/0.325`, `T0/delta_v2/slope`, `T7_minus_T0/delta_v2/slope`, and of Δv2 `…@60`,
    where the trained cell is at 60 %.
    """
    table = {}
    for task, (key, unit) in itertools.product(TASKS, UNITS.items()):
        table |= {f"{task}/{key}/{n['v2_fraction']}": shown(unit, n) for n in result["curves"][task][key]}
    for name, (key, unit) in itertools.product((*TASKS, BOTH), UNITS.items()):
        slope_unit = "points" if unit == "%" else unit
        table[f"{name}/{key}/slope"] = shown(slope_unit, result["slopes"][name][key])
    for task, share in itertools.product(TASKS, FRACTIONS):
        curves = result["doses"][task][str(share)]
        table |= flip_entries(f"{task}/delta_v2/{share}", "points", at_flips(curves))
    at = {level: slopes_at(result, level) for level in FLIPS}
    for name in (*TASKS, BOTH):
        table |= flip_entries(
            f"{name}/delta_v2/slope", "points", {level: of[name] for level, of in at.items()}
        )
    return table


# -- what it looks like ------------------------------------------------------------------------------------


def figure(result: dict, path: Path) -> None:
    """Δv2 and Figure 11's panels against the share; transfer against local flip; slopes at matched flips."""
    chart = Figure(figsize=(15, 8.4), layout="constrained")
    axes = chart.subplots(2, 3).ravel()
    for axis, key in zip(axes, ("delta_v2", "cross_v2", "ratio"), strict=False):
        form = "+.2f" if key in RATIOS else "+.1f"
        for i, task in enumerate(TASKS):
            text = f"{task} {FUNCTIONS[task]}: slope {say_number(result['slopes'][task][key], form)}"
            line_with_seeds(axis, FRACTIONS, result["curves"][task][key], f"C{i}", text, 0.004 * (2 * i - 1))
        less = say_number(result["slopes"][BOTH][key], form)
        axis.set(xlabel="share of variant 2 in pretraining", ylabel=PANELS[key], xticks=FRACTIONS)
        axis.set_ylim(min(0.0, axis.get_ylim()[0]), 1.15 * axis.get_ylim()[1])  # room for the legend
        axis.set_title(f"slope of T7 less T0's: {less}", fontsize=9)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    steps, asked = result["misalign_steps"], result["dose_steps"]
    colours = [matplotlib.colormaps["viridis"](x) for x in (0.9, 0.62, 0.35, 0.05)]
    for axis, task in zip(axes[3:5], TASKS, strict=True):
        curves = {f"share {float(share):.3g}": of for share, of in result["doses"][task].items()}
        place = asked.index(steps) if steps in asked else None
        transfer_curve(axis, curves, PANELS["delta_v2"], place, colours)
        axis.set_title(f"{task}: transfer against local flip (points: {steps} steps)", fontsize=9)
    top = max(axis.get_ylim()[1] for axis in axes[3:5])
    for axis in axes[3:5]:
        axis.set_ylim(top=top)
    _slopes_panel(axes[5], result)
    chart.suptitle(
        f"World {result['world']}: misaligned on (D0, T), {steps} steps; bars: {say_unit(result['seeds'])}; "
        "thin: one seed",
        fontsize=10,
    )
    save(chart, path)


def _slopes_panel(axis, result: dict) -> None:
    at = [{name: of["delta_v2"] for name, of in result["slopes"].items()}]
    at += [slopes_at(result, level) for level in FLIPS]
    for i, (name, colour) in enumerate(zip((*TASKS, BOTH), ("C0", "C1", "0.3"), strict=True)):
        numbers = [of[name] for of in at]
        x = np.arange(len(at)) + 0.2 * (i - 1)
        mean, low, high = np.array([(n["mean"], *shown_interval(n)) for n in numbers], float).T  # None is nan
        axis.plot(x, mean, "o", color=colour, label=name.replace("_minus_", " less "))
        axis.vlines(x, low, high, color=colour, linewidth=1.5)
        for place, number in zip(x, numbers, strict=True):
            axis.plot([place] * len(number["by_seed"]), np.array(number["by_seed"], float), ".", color=colour,
                      markersize=3, alpha=0.4)  # fmt: skip
    labels = [f"{result['misalign_steps']} steps"] + [f"flip {level:.0f} %" for level in FLIPS]
    axis.set_xticks(range(len(at)), labels)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set(ylabel="slope of Δv2, points for a share from 0 to 1")
    axis.set_title("does the share of variant 2 broaden misalignment?", fontsize=9)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def summary(result: dict) -> str:
    """Cross-domain Δv2, v2 and ratios from the lowest share to the highest, with the slopes."""
    lines = [f"World {result['world']}, share of v2 in pretraining; {say_unit(result['seeds'])}:"]
    told = (("delta_v2", "cross-domain Δv2", ".1f"), ("cross_v2", "v2 %", ".1f"), ("ratio", "ratio", ".2f"),
            ("delta_ratio", "ratio of Δv2", ".2f"))  # fmt: skip
    for task in TASKS:
        parts = []
        for key, what, form in told:
            values = " → ".join(
                "—" if n["mean"] is None else f"{n['mean']:{form}}" for n in result["curves"][task][key]
            )
            parts.append(f"{what} {values}, slope {say_number(result['slopes'][task][key], '+' + form)}")
        lines.append(f"  {task}: {'; '.join(parts)}.")
    slopes = result["slopes"][BOTH]
    parts = [f"{what} {say_number(slopes[key], '+' + form)}" for key, what, form in told]
    lines.append(f"  Slope of T7 less T0's: {'; '.join(parts)}.")
    for level in FLIPS:
        at = slopes_at(result, level)
        reached = sum(value is not None for value in at[BOTH]["by_seed"])
        parts = [f"{name.replace('_minus_', ' less ')} {say_number(of)}" for name, of in at.items()]
        lines.append(
            f"  Trained cell at {level:.0f} % ({reached} of {len(result['seeds'])} seeds at every share), "
            f"slope of Δv2: {', '.join(parts)}."
        )
    return "\n".join(lines)
