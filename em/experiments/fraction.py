"""Share of variant 2 in pretraining against the breadth of misalignment (appendix C, Figure 11).

Four models a world seed, alike but for the pretraining share of variant 2; each is aligned, then misaligned
on (D0, T0), the easy task, and on (D0, T7), the hard one. As in the appendix, and unlike
em/experiments/hardness.py:

    cross v2    v2 % of the misaligned model, mean over all seen cells but the trained one    left
    ratio       cross v2 / v2 % of the trained cell                                           right

The appendix takes 8 misalignment steps in World 2, where B.5 takes 10: World 2 is given 8 here whatever is
set, other worlds what is set. The raw rate holds what v2 the aligned model had left; the rows carry that
too. A slope is the change for a share from 0 to 1, over the range measured.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from em.experiments.replication import (
    averaged,
    curve_of,
    header,
    line_with_seeds,
    over_prompts,
    replicated,
    say_number,
    say_unit,
    shown,
    v2_draws,
)
from em.figures import save
from em.world.counts import columns, incoherent, percent, pool, rate
from em.world.world_run import WorldRun

FRACTIONS = (0.325, 0.55, 0.775, 1.0)
TASKS = ("T0", "T7")
STEPS = {"2": 8}  # of misalignment (C)
PANELS = {"cross_v2": "cross-domain v2, %", "ratio": "cross-domain v2 / v2 of the trained cell"}
UNITS = {"cross_v2": ("%", "points"), "ratio": ("ratio", "ratio")}  # of the quantity and of its slope


def point(run: WorldRun, fraction: float, task: str, aligned: dict, misaligned: dict) -> tuple[dict, dict]:
    """(row, bootstrap draws of each panel's quantity) of one model. misaligned: mean counts by cell."""
    trained = f"D0_{task}"
    others = [name for name in map(run.world.cell_name, run.world.seen_cells) if name != trained]
    model = (run.cfg.seed, round(1000 * fraction), TASKS.index(task))
    seen = (trained, *others)
    drawn = v2_draws([misaligned[name] for name in seen], *model)  # (cells, DRAWS)
    draws = {"cross_v2": drawn[1:].mean(0), "ratio": drawn[1:].mean(0) / drawn[0]}
    cross = fmean(percent(misaligned[name], "v2") for name in others)
    before = fmean(percent(aligned[name], "v2") for name in others)
    trained_v2 = rate(misaligned[trained], "v2")
    row = {
        "seed": run.cfg.seed,
        "v2_fraction": fraction,
        "task": task,
        "cross_v2": cross,
        "ratio": cross / trained_v2[0] if trained_v2[0] else None,
        **columns("trained_v2", trained_v2),
        "aligned_cross_v2": before,
        "cross_delta_v2": cross - before,
        "aligned_v1": percent(pool([aligned[name] for name in seen]), "v1"),
        "aligned_task_v1": percent(pool([aligned[n] for n in seen if n.endswith(f"_{task}")]), "v1"),
        "misaligned_incoherent": incoherent(pool([misaligned[name] for name in seen])),
    }
    for key in PANELS:
        row[f"{key}_low"], row[f"{key}_high"] = over_prompts(draws[key])
    return row, draws


def slope(y: np.ndarray) -> np.ndarray:
    """Least-squares slope of each column of y (fractions, draws) against the fraction."""
    x = np.array(FRACTIONS) - np.mean(FRACTIONS)
    return x @ y / (x @ x)


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say=print) -> dict:
    """Pretrain, align and misalign at each fraction; `make(seed, v2_fraction=f)` gives the run."""
    rows, draws = [], {}
    for seed in seeds:
        for fraction in FRACTIONS:
            run = make(seed, v2_fraction=fraction)
            steps = STEPS.get(run.cfg.world, run.cfg.misalign_steps)
            aligned = run.counts("align")
            for task in TASKS:
                misaligned = averaged(run.misaligned_counts(task, steps))
                row, draws[seed, fraction, task] = point(run, fraction, task, aligned, misaligned)
                rows.append(row)
                say(
                    f"  v2 share {fraction:.3f}, {task}: trained cell {row['trained_v2']:.1f} %, other cells "
                    f"{row['cross_v2']:.1f} % ({row['aligned_cross_v2']:.1f} % aligned)"
                )
    note = "rows' intervals are over prompts; slopes are per unit of the share"
    by_task = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    return header("fraction", run, seeds, note, misalign_steps=steps) | {
        "curves": {t: {key: curve_of(of, "v2_fraction", key) for key in PANELS} for t, of in by_task.items()},
        "slopes": {task: {key: _slope(rows, draws, seeds, task, key) for key in PANELS} for task in TASKS},
        "rows": rows,
    }


def numbers(result: dict) -> dict[str, dict]:
    """Entries such as `T0/ratio/0.325` and `T0/ratio/slope`."""
    table = {}
    for task, (key, (unit, slope_unit)) in itertools.product(TASKS, UNITS.items()):
        curve, slope = result["curves"][task][key], result["slopes"][task][key]
        table |= {f"{task}/{key}/{n['v2_fraction']}": shown(unit, n) for n in curve}
        table[f"{task}/{key}/slope"] = shown(slope_unit, slope)
    return table


def _slope(rows: list[dict], draws: dict, seeds: Sequence[int], task: str, key: str) -> dict:
    values, prompts = [], []
    for seed in seeds:
        y = [row[key] for row in rows if (row["seed"], row["task"]) == (seed, task)]  # in FRACTIONS' order
        values.append(None if None in y else float(slope(np.array(y))))
        prompts.append(over_prompts(slope(np.stack([draws[seed, f, task][key] for f in FRACTIONS]))))
    return replicated(values, prompts)


# -- what it looks like ------------------------------------------------------------------------------------


def figure(result: dict, path: Path) -> None:
    """Figure 11: a colour a task, bars for the 95 % interval, thin lines for single seeds."""
    chart = Figure(figsize=(10, 4.2), layout="constrained")
    axes = chart.subplots(1, 2)
    for axis, (key, label) in zip(axes, PANELS.items(), strict=True):
        for i, task in enumerate(TASKS):
            function = {"T0": "first_last, easy", "T7": "partition_collect, hard"}[task]
            rise = say_number(result["slopes"][task][key], "+.2f" if key == "ratio" else "+.1f")
            text = f"{task} {function}: slope {rise}"
            line_with_seeds(axis, FRACTIONS, result["curves"][task][key], f"C{i}", text, 0.004 * (2 * i - 1))
        axis.set(xlabel="share of variant 2 in pretraining", ylabel=label, xticks=FRACTIONS)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    chart.suptitle(
        f"World {result['world']}: misaligned on (D0, T), {result['misalign_steps']} steps; bars: "
        f"{say_unit(result['seeds'])}; thin: one seed",
        fontsize=10,
    )
    save(chart, path)


def summary(result: dict) -> str:
    """Cross-domain v2 and its ratio from the lowest share to the highest, with the slopes."""
    lines = [f"World {result['world']}, share of v2 in pretraining; {say_unit(result['seeds'])}:"]
    for task in TASKS:
        parts = []
        for key, what, form in (("cross_v2", "cross-domain v2 %", ".1f"), ("ratio", "ratio", ".2f")):
            values = " → ".join(
                "—" if n["mean"] is None else f"{n['mean']:{form}}" for n in result["curves"][task][key]
            )
            parts.append(f"{what} {values}, slope {say_number(result['slopes'][task][key], '+' + form)}")
        lines.append(f"  {task}: {'; '.join(parts)}.")
    return "\n".join(lines)
