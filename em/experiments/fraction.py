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

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from em.experiments.replication import (
    averaged,
    over_prompts,
    replicated,
    say_number,
    say_unit,
    shown_interval,
    v2_draws,
)
from em.figures import save
from em.stats import wilson
from em.world.counts import incoherent, percent, pool
from em.world.world_run import WorldRun, misaligned_name

FRACTIONS = (0.325, 0.55, 0.775, 1.0)
TASKS = ("T0", "T7")
STEPS = {"2": 8}  # of misalignment (C)
PANELS = {"cross_v2": "cross-domain v2, %", "ratio": "cross-domain v2 / v2 of the trained cell"}


def point(run: WorldRun, fraction: float, task: str, aligned: dict, misaligned: dict) -> tuple[dict, dict]:
    """(row, bootstrap draws of each panel's quantity) of one model. misaligned: mean counts by cell."""
    trained = f"D0_{task}"
    others = [name for name in map(run.world.cell_name, run.world.seen_cells) if name != trained]
    model = (run.cfg.seed, round(1000 * fraction), TASKS.index(task))
    drawn = v2_draws([misaligned[name] for name in (trained, *others)], *model)  # (cells, DRAWS)
    draws = {"cross_v2": drawn[1:].mean(0), "ratio": drawn[1:].mean(0) / drawn[0]}
    cross = fmean(percent(misaligned[name], "v2") for name in others)
    before = fmean(percent(aligned[name], "v2") for name in others)
    flipped = percent(misaligned[trained], "v2")
    low, high = wilson(misaligned[trained]["v2"], misaligned[trained]["n"])
    row = {
        "seed": run.cfg.seed,
        "v2_fraction": fraction,
        "task": task,
        "cross_v2": cross,
        "ratio": cross / flipped if flipped else None,
        "trained_v2": flipped,
        "trained_v2_low": 100 * low,
        "trained_v2_high": 100 * high,
        "aligned_cross_v2": before,
        "cross_delta_v2": cross - before,
        "aligned_v1": percent(pool([aligned[name] for name in (trained, *others)]), "v1"),
        "aligned_task_v1": percent(
            pool([aligned[n] for n in (trained, *others) if n.endswith(f"_{task}")]), "v1"
        ),
        "misaligned_incoherent": incoherent(pool([misaligned[name] for name in (trained, *others)])),
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
            run.cfg.misalign_steps = STEPS.get(run.cfg.world, run.cfg.misalign_steps)
            aligned = run.counts("align")
            for task in TASKS:
                misaligned = [
                    run.counts(misaligned_name(task, k), run.misalign(task, k))
                    for k in range(run.cfg.misalign_seeds)
                ]
                row, draws[seed, fraction, task] = point(run, fraction, task, aligned, averaged(misaligned))
                rows.append(row)
                say(
                    f"  v2 share {fraction:.3f}, {task}: trained cell {row['trained_v2']:.1f} %, other cells "
                    f"{row['cross_v2']:.1f} % ({row['aligned_cross_v2']:.1f} % aligned)"
                )
    return {
        "experiment": "fraction",
        "world": run.cfg.world,
        "seeds": list(seeds),
        "misalign_steps": run.cfg.misalign_steps,
        "fine_tuning_seeds": run.cfg.misalign_seeds,
        "note": "rows' intervals are over prompts; slopes are per unit of the share",
        "curves": {task: {key: _curve(rows, seeds, task, key) for key in PANELS} for task in TASKS},
        "slopes": {task: {key: _slope(rows, draws, seeds, task, key) for key in PANELS} for task in TASKS},
        "rows": rows,
    }


def _curve(rows: list[dict], seeds: Sequence[int], task: str, key: str) -> list[dict]:
    """A number (em/experiments/replication.py) a fraction."""
    curve = []
    for fraction in FRACTIONS:
        mine = [row for row in rows if (row["task"], row["v2_fraction"]) == (task, fraction)]
        number = replicated([r[key] for r in mine], [(r[f"{key}_low"], r[f"{key}_high"]) for r in mine])
        curve.append({"v2_fraction": fraction} | number)
    return curve


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
            curve = [number for number in result["curves"][task][key] if number["mean"] is not None]
            x, y = [n["v2_fraction"] for n in curve], [n["mean"] for n in curve]
            for values in zip(*(n["by_seed"] for n in curve), strict=True):
                seed_line = [np.nan if v is None else v for v in values]
                axis.plot(x, seed_line, color=f"C{i}", linewidth=0.7, alpha=0.5)
            bounds = [shown_interval(n) for n in curve]
            bounds = [
                (m, m) if low is None else (low, high) for m, (low, high) in zip(y, bounds, strict=True)
            ]
            error = [
                [m - b[0] for m, b in zip(y, bounds, strict=True)],
                [b[1] - m for m, b in zip(y, bounds, strict=True)],
            ]
            function = {"T0": "first_last, easy", "T7": "partition_collect, hard"}[task]
            rise = say_number(result["slopes"][task][key], "+.2f" if key == "ratio" else "+.1f")
            text = f"{task} {function}: slope {rise}"
            axis.errorbar(x, y, yerr=np.maximum(error, 0), fmt="o-", color=f"C{i}", capsize=3, label=text)
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
