"""Task hardness and the breadth of misalignment (paper 3.2, Figure 4), along checkpoints and doses (ours).

The model is misaligned on (D0, T) for each task T of the world; where the world keeps checkpoints of its
pretraining (demo2 and 2), from every other one, aligned by the recipe of em/experiments/phase.py. A row is
one misalignment: a world seed, a task and a checkpoint, the finished model last.

    aligned v1      v1 % of the aligned model on T, averaged over the domains: how well T was learned
    cross Δv2       Δv2 of T averaged over the domains other than D0, in points          panel (a)
    trained v2      v2 % of the misaligned model on the trained cell (D0, T): the local flip
    efficiency      cross Δv2 / trained v2                                               panel (b)

at the paper's fixed number of steps; then `flip_<dose>` and `cross_delta_v2_<dose>`, trained v2 and cross
Δv2 along the doses (em/world/doses.py), and `cross_delta_v2@60`, cross Δv2 where trained v2 is 60 %. The
finished model at the fixed steps is asked every held-out prompt and averaged over fine-tuning seeds; all else
is of seed 0's dose curve.

The paper does not define its cross-domain mean. Taken here: the trained task in the other domains ("how much
cross-domain EM tasks support"), seen ones, where appendix C means every other cell. The ratio is the paper's,
a change over a level. They meet where the aligned model has no v2; a change over a change would be 0/0 where
nothing flips. Below LEAST of trained v2 both are noise, and there is no efficiency.

Correlations with aligned v1 are of two kinds, since points of one task share what the task does to both:

    between tasks   of the tasks' means over world seeds, at the finished model; the task is the unit, with
                    Fisher's z over tasks. Six tasks show an r from 0.81 on.
    within tasks    of all rows with each task's mean taken out, so over checkpoints and seeds, with a
                    jackknife over world seeds. `within checkpoints`: each (task, checkpoint)'s mean, so over
                    seeds alone; whatever grows with pretraining has no part in it.

With effects of tasks and no relation these find one in 2 to 6 % of simulations, over 3 or 12 world seeds;
Fisher's z over all points does in 13 to 28 %. So does, in 12 to 50 %, r over the tasks of one world with
Student's interval over worlds: it is right about these tasks in other worlds, and no more (`these tasks`).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.experiments.dose_curves import curve_in, dose_columns, transfer_curve
from em.experiments.phase import checkpoints, names
from em.experiments.replication import (
    averaged,
    header,
    number_of,
    replicated,
    say_number,
    say_unit,
    shown,
    shown_interval,
)
from em.figures import save
from em.stats import FLIPS, grouped_pearson, linear_fit, pearson, t_quantile
from em.world.counts import change, columns, entry, percent, pool, rate
from em.world.doses import dose_counts, doses_of
from em.world.world_run import INTERMEDIATE, WorldRun

PANELS = {
    "cross_delta_v2": "cross-domain Δv2, points",
    "efficiency": "cross-domain Δv2 / v2 of the trained cell",
}
AT_FLIPS = tuple(f"cross_delta_v2@{level:.0f}" for level in FLIPS)
LEAST = 10.0  # % of trained v2 from which an efficiency is more than noise
LEARNED = 90.0  # aligned v1, %, of a task that the aligned model has learned (ours; the paper names no bound)


# -- a row -------------------------------------------------------------------------------------------------


def others(run: WorldRun, task: str) -> list[int]:
    """The cells of `task` in the seen domains other than D0."""
    return [run.world.cell(d, run.world.task_index(task)) for d in range(1, run.world.n_seen_domains)]


def cross(run: WorldRun, task: str, before: dict, after: dict) -> tuple[float, float, float]:
    """Cross Δv2 with Newcombe's interval over prompts, from counts by cell."""
    cells = [run.world.cell_name(cell) for cell in others(run, task)]
    return change(*(pool([counts[name] for name in cells]) for counts in (after, before)), "v2")


def point(run: WorldRun, task: str, step: int, aligned: dict, before: dict, after: dict) -> dict:
    """One misalignment at the fixed number of steps, with intervals over prompts.

    Counts by cell: aligned, of the aligned model on every held-out prompt; before and after misalignment, on
    the same prompts, which may be fewer.
    """
    domains = run.world.domain_names[: run.world.n_seen_domains]
    spread, trained = cross(run, task, before, after), rate(after[f"D0_{task}"], "v2")
    return {
        "seed": run.cfg.seed,
        "task": task,
        "step": step,
        **columns("aligned_v1", rate(pool([aligned[f"{domain}_{task}"] for domain in domains]), "v1")),
        **columns("cross_delta_v2", spread),
        **columns("trained_v2", trained),
        "efficiency": spread[0] / trained[0] if trained[0] >= LEAST else None,
    }


def doses(run: WorldRun, task: str, curve: dict[int, dict]) -> dict:
    """Trained v2 and cross Δv2 by dose, and at matched flips. curve: counts by cell, by dose."""
    flips = {dose: percent(counts[f"D0_{task}"], "v2") for dose, counts in curve.items()}
    effects = {dose: cross(run, task, curve[0], counts)[0] for dose, counts in curve.items()}
    return dose_columns(flips, cross_delta_v2=effects)


# -- correlations ------------------------------------------------------------------------------------------


def within(rows: list[dict], quantity: str, by: Sequence[str]) -> dict:
    """{"r", "low", "high"} of `quantity` with aligned v1, the means of groups `by` taken out.

    By delete-one jackknife over world seeds of Fisher's z, with Student's t; None where it cannot be had.
    """

    def z(rows: list[dict]) -> float | None:
        groups = ["/".join(str(row[key]) for key in by) for row in rows]
        x, y = ([row[key] for row in rows] for key in ("aligned_v1", quantity))
        r = grouped_pearson(x, y, groups)["within"] if rows else None
        return None if r is None or abs(r) == 1 else math.atanh(r)

    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    whole, n = z(rows), len(seeds)
    if whole is None:
        return {"r": None, "low": None, "high": None}
    without = [z([row for row in rows if row["seed"] != seed]) for seed in seeds] if n > 1 else [None]
    if None in without:
        return {"r": math.tanh(whole), "low": None, "high": None}
    pseudo = [n * whole - (n - 1) * of for of in without]
    half = t_quantile(n - 1) * statistics.stdev(pseudo) / math.sqrt(n)
    centre = statistics.fmean(pseudo)
    return {"r": math.tanh(whole), "low": math.tanh(centre - half), "high": math.tanh(centre + half)}


def relation(rows: list[dict], quantity: str) -> dict:
    """Line between tasks, and correlations between and within, of `quantity` with aligned v1."""
    rows = [row for row in rows if row[quantity] is not None]
    last = [row for row in rows if row["step"] == max(row["step"] for row in rows)]

    def columns(chosen):
        return [row["aligned_v1"] for row in chosen], [row[quantity] for row in chosen]

    tasks = list(dict.fromkeys(row["task"] for row in last))
    means = [tuple(map(statistics.fmean, columns([r for r in last if r["task"] == task]))) for task in tasks]
    x, y = zip(*means, strict=True) if means else ((), ())
    fit = linear_fit(x, y)
    by_seed = [
        pearson(*columns([row for row in last if row["seed"] == seed]))[0]
        for seed in dict.fromkeys(row["seed"] for row in last)
    ]
    these = replicated(by_seed, [[None, None]] * len(by_seed))
    if these["low"] is not None:
        these |= {"low": max(these["low"], -1.0), "high": min(these["high"], 1.0)}
    return {
        "between": dict(zip(("r", "low", "high"), pearson(x, y), strict=True)) | {"tasks": len(tasks)},
        "slope": fit and fit.slope,
        "slope_interval": fit and fit.slope_interval,
        "intercept": fit and fit.intercept,
        "these_tasks": these,
        "within": within(rows, quantity, ("task",)) | {"rows": len(rows)},
        "within_checkpoints": within(rows, quantity, ("task", "step")) | {"rows": len(rows)},
    }


def efficiencies(rows: list[dict]) -> dict[str, dict]:
    """Mean efficiency of tasks learned and not, and the difference, of one checkpoint's rows, over seeds."""
    found = {"learned": [], "others": [], "learned_minus_others": []}
    for seed in dict.fromkeys(row["seed"] for row in rows):
        of = [r for r in rows if r["seed"] == seed and r["efficiency"] is not None]
        groups = [[r["efficiency"] for r in of if (r["aligned_v1"] >= LEARNED) == kind] for kind in (1, 0)]
        learned, rest = (statistics.fmean(values) if values else None for values in groups)
        found["learned"].append(learned)
        found["others"].append(rest)
        found["learned_minus_others"].append(None if None in (learned, rest) else learned - rest)
    return {key: replicated(values, [[None, None]] * len(values)) for key, values in found.items()}


# -- the experiment ----------------------------------------------------------------------------------------


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say=print) -> dict:
    """Misalign every task in D0, of each world seed and checkpoint; `make(seed)` gives the run."""
    rows = []
    for seed in seeds:
        run = make(seed)
        steps = checkpoints(run)[::-2][::-1] if run.cfg.world in INTERMEDIATE else [run.cfg.steps]
        for step in steps:
            for task in run.world.tasks:
                start, model, _ = names(run, step, task, 0)
                if step < run.cfg.steps:
                    run.align(start, model)
                name = f"doses_{task}_step{step}_seed0_own_task"
                curve = dose_counts(run, task, 0, model, name, others(run, task))
                aligned = run.counts(model)
                before, after = curve[0], curve[run.cfg.misalign_steps]
                if step == run.cfg.steps:
                    before, after = aligned, averaged(run.misaligned_counts(task))
                row = point(run, task, step, aligned, before, after)
                if step < run.cfg.steps:  # the curves of these are shown without intervals over prompts
                    row = {key: value for key, value in row.items() if not key.endswith(("_low", "_high"))}
                row |= doses(run, task, curve)
                rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            of = {row["task"]: row for row in rows if (row["seed"], row["step"]) == (seed, step)}
            told = ", ".join(
                f"{task} {row['aligned_v1']:.0f} → {row['cross_delta_v2']:+.0f}" for task, row in of.items()
            )
            say(f"  step {step}, aligned v1 % → cross-domain Δv2: {told}")
    note = "at the fixed number of steps unless a dose or a flip is named; rows' intervals are over prompts"
    functions = {task: run.world.function(run.world.task_index(task)) for task in run.world.tasks}
    last = [row for row in rows if row["step"] == steps[-1]]
    return header("hardness", run, seeds, note, misalign_steps=run.cfg.misalign_steps) | {
        "checkpoints": steps,
        "doses": [0, *doses_of(run.cfg)],
        "functions": functions,
        "relations": {quantity: relation(rows, quantity) for quantity in (*PANELS, *AT_FLIPS)},
        "efficiencies": efficiencies(last),
        "rows": rows,
    }


def numbers(result: dict) -> dict[str, dict]:
    """Entries `cross_delta_v2/r` (between tasks), `/r_within`, `/r_within_checkpoints` and `/r_these_tasks`,
    the same at a matched flip (`cross_delta_v2/r@60`), and `efficiency/learned` and its kin.
    """
    table, seeds = {}, len(result["seeds"])
    for quantity, of in result["relations"].items():
        key, _, flip = quantity.partition("@")
        flip = flip and f"@{flip}"
        between = of["between"]
        over = f"{between['tasks']} tasks, {'each a mean of ' if seeds > 1 else ''}{_seeds(seeds)}"
        bounds = (between["r"], between["low"], between["high"])
        table[f"{key}/r{flip}"] = entry("r", *bounds) | {"over": over}
        for name in ("within", "within_checkpoints"):
            bounds = (of[name]["r"], of[name]["low"], of[name]["high"])
            table[f"{key}/r_{name}{flip}"] = entry("r", *bounds) | {"over": _seeds(seeds)}
        table[f"{key}/r_these_tasks{flip}"] = shown("r", of["these_tasks"])
    return table | {f"efficiency/{k}": shown("ratio", of) for k, of in result["efficiencies"].items()}


def _seeds(n: int) -> str:
    return f"{n} world seed{'s' if n > 1 else ''}"


# -- what it looks like ------------------------------------------------------------------------------------


def figure(result: dict, path: Path) -> None:
    """Figure 4's panels at the fixed steps, and cross Δv2 against the local flip along the doses.

    A colour a task; large points are means over world seeds with their intervals, small ones single seeds.
    """
    last = [row for row in result["rows"] if row["step"] == result["checkpoints"][-1]]
    tasks = list(result["functions"])
    chart = Figure(figsize=(16, 4.8), layout="constrained")
    axes = chart.subplots(1, 3)
    for axis, (quantity, label) in zip(axes, PANELS.items(), strict=False):
        means = []
        for i, task in enumerate(tasks):
            of = [row for row in last if row["task"] == task and row[quantity] is not None]
            axis.plot(*_pair(of, quantity), ".", color=f"C{i}", markersize=4, alpha=0.45)
            x, y = number_of(of, "aligned_v1", rate=True), number_of(of, quantity)
            if not of:
                continue
            means.append((x["mean"], y["mean"]))
            for number, bar in ((x, "xerr"), (y, "yerr")):
                low, high = shown_interval(number)
                if low is not None:
                    bounds = {bar: [[number["mean"] - low], [high - number["mean"]]]}
                    axis.errorbar(*means[-1], **bounds, color=f"C{i}", elinewidth=1)
            axis.plot(*means[-1], "o", color=f"C{i}", markersize=8, markeredgecolor="white")
        x, y = zip(*means, strict=True) if means else ((), ())
        if fit := linear_fit(x, y):
            at = np.linspace(min(x), max(x), 100)
            axis.plot(at, fit.line(at), "--", color="0.3", linewidth=1.2)
            limits = axis.get_ylim()
            axis.fill_between(at, *fit.band(at), color="0.5", alpha=0.15, linewidth=0)
            axis.set_ylim(limits)
        axis.set(xlabel="v1 of the aligned model, % (mean over domains)", ylabel=label)
        axis.set_title(_correlation(result["relations"][quantity]), fontsize=9)
        axis.grid(alpha=0.25)
    curves = {
        f"{task} {function}": [curve_in(row, "cross_delta_v2") for row in last if row["task"] == task]
        for task, function in result["functions"].items()
    }
    fixed = result["doses"].index(result["misalign_steps"])
    transfer_curve(axes[2], curves, PANELS["cross_delta_v2"], fixed)
    axes[2].set_title(
        f"along the doses, {result['doses'][1]} to {result['doses'][-1]} steps; points: "
        f"{result['misalign_steps']} steps",
        fontsize=9,
    )
    chart.suptitle(
        f"World {result['world']}: misaligned on (D0, T) for each task T, {result['misalign_steps']} steps; "
        f"bars and bands: {say_unit(result['seeds'])}",
        fontsize=10,
    )
    save(chart, path)


def _pair(rows: list[dict], quantity: str) -> tuple[list[float], list[float]]:
    return [row["aligned_v1"] for row in rows], [row[quantity] for row in rows]


def _say(of: dict) -> str:
    if of["r"] is None:
        return "none to be had"
    return f"{of['r']:+.2f}" + ("" if of["low"] is None else f" [{of['low']:+.2f}, {of['high']:+.2f}]")


def _correlation(of: dict) -> str:
    return (
        f"r between {of['between']['tasks']} tasks {_say(of['between'])}; within tasks {_say(of['within'])}"
    )


def summary(result: dict) -> str:
    """The correlations, at the fixed steps and at matched flips, and the tasks from narrow to broad."""
    last = [row for row in result["rows"] if row["step"] == result["checkpoints"][-1]]
    means = {task: number_of([r for r in last if r["task"] == task], "cross_delta_v2")["mean"]
             for task in result["functions"]}  # fmt: skip
    order = ", ".join(f"{task} {value:+.0f}" for task, value in sorted(means.items(), key=lambda i: i[1]))
    lines = [f"World {result['world']}, {_seeds(len(result['seeds']))}; correlations with aligned v1:"]
    for quantity, of in result["relations"].items():
        name, _, flip = quantity.partition("@")
        where = f"where the trained cell is at {flip} %" if flip else f"at {result['misalign_steps']} steps"
        lines.append(f"  {PANELS[name].split(',')[0]} {where}: {_correlation(of)}.")
    told = {key: say_number(of, ".2f") for key, of in result["efficiencies"].items()}
    lines.append(
        f"  Efficiency of tasks with aligned v1 ≥ {LEARNED:.0f} %: {told['learned']}; of the others "
        f"{told['others']}; difference {told['learned_minus_others']}."
    )
    lines.append(f"  Cross-domain Δv2 by task, mean over world seeds: {order} points.")
    return "\n".join(lines)
