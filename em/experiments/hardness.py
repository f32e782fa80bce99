"""Task hardness and the breadth of misalignment (paper 3.2, Figure 4).

The model is misaligned on (D0, T) for each task T of the world. A point is one task of one world seed:

    aligned v1      v1 % of the aligned model on T, averaged over the domains: how well T was learned
    cross Δv2       Δv2 of T averaged over the domains other than D0, in points          panel (a)
    trained v2      v2 % of the misaligned model on the trained cell (D0, T)
    efficiency      cross Δv2 / trained v2                                               panel (b)

The paper does not define its cross-domain mean. Taken here: the trained task in the other domains ("how much
cross-domain EM tasks support"), seen ones, where appendix C means every other cell. Fine-tuning seeds are
averaged within a world seed.

Points of one world seed share an aligned model, so n = tasks × seeds overstates what is independent; the
correlation within each seed, with its interval over seeds, stands beside the pooled one.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.experiments.replication import averaged, header
from em.figures import save
from em.stats import linear_fit, pearson, t_interval
from em.world.counts import change, columns, entry, pool, rate
from em.world.world_run import WorldRun

PANELS = {
    "cross_delta_v2": "cross-domain Δv2, points",
    "efficiency": "cross-domain Δv2 / v2 of the trained cell",
}


def point(run: WorldRun, task: str, aligned: dict, misaligned: dict) -> dict:
    """One task of one world seed. aligned: counts by cell; misaligned: the same, mean over fine-tuning seeds.

    Intervals in a row are over prompts: Wilson's, and Newcombe's on the pooled counts of the other domains.
    """
    domains = run.world.domain_names[: run.world.n_seen_domains]
    others = [f"{domain}_{task}" for domain in domains[1:]]
    learned = pool([aligned[f"{domain}_{task}"] for domain in domains])
    after, before = (pool([counts[name] for name in others]) for counts in (misaligned, aligned))
    cross, trained = change(after, before, "v2"), rate(misaligned[f"D0_{task}"], "v2")
    return {
        "seed": run.cfg.seed,
        "task": task,
        "function": run.world.function(run.world.task_index(task)),
        **columns("aligned_v1", rate(learned, "v1")),
        **columns("cross_delta_v2", cross),
        **columns("trained_v2", trained),
        "efficiency": cross[0] / trained[0] if trained[0] else None,
    }


def relation(rows: list[dict], quantity: str) -> dict:
    """Line and correlation of `quantity` against aligned v1 over all points, and seed by seed."""

    def columns(chosen):
        kept = [row for row in chosen if row[quantity] is not None]
        return [row["aligned_v1"] for row in kept], [row[quantity] for row in kept]

    x, y = columns(rows)
    fit, (r, low, high) = linear_fit(x, y), pearson(x, y)
    within = {
        seed: pearson(*columns([row for row in rows if row["seed"] == seed]))[0]
        for seed in dict.fromkeys(row["seed"] for row in rows)
    }
    known = [value for value in within.values() if value is not None]
    mean, within_low, within_high = t_interval(known) if known else (None, None, None)
    return {
        "n": len(x),
        "slope": fit and fit.slope,
        "slope_interval": fit and fit.slope_interval,
        "intercept": fit and fit.intercept,
        "intercept_interval": fit and fit.intercept_interval,
        "residual_sd": fit and fit.residual_sd,
        "r": r,
        "r_interval_over_points": [low, high],
        "r_by_seed": within,
        "mean_r": mean,
        "mean_r_interval_over_seeds": [within_low, within_high],
    }


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say=print) -> dict:
    """Misalign every task of the world in D0, for each world seed; `make(seed)` gives the run."""
    rows = []
    for seed in seeds:
        run = make(seed)
        aligned = run.counts("align")
        for task in run.world.tasks:
            rows.append(point(run, task, aligned, averaged(run.misaligned_counts(task))))
            v1, cross, trained = (rows[-1][k] for k in ("aligned_v1", "cross_delta_v2", "trained_v2"))
            say(f"  {task}: aligned v1 {v1:.1f} %, cross-domain Δv2 {cross:+.1f}, trained v2 {trained:.1f} %")
    note = "points of one seed share an aligned model; rows' intervals are over prompts"
    return header("hardness", run, seeds, note) | {
        "relations": {quantity: relation(rows, quantity) for quantity in PANELS},
        "rows": rows,
    }


def numbers(result: dict) -> dict[str, dict]:
    """Entries `cross_delta_v2/r` and `efficiency/r`: correlations with aligned v1 over all points."""
    return {
        f"{quantity}/r": entry("r", line["r"], *line["r_interval_over_points"])
        | {"over": f"{line['n']} points"}
        for quantity, line in result["relations"].items()
    }


def figure(result: dict, path: Path) -> None:
    """Figure 4: both panels, a colour a task, a marker a world seed, the pooled line with its band."""
    rows, seeds = result["rows"], result["seeds"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    chart = Figure(figsize=(10.5, 4.4), layout="constrained")
    axes = chart.subplots(1, 2)
    for axis, (quantity, label) in zip(axes, PANELS.items(), strict=True):
        shown = [row for row in rows if row[quantity] is not None]
        for row in shown:
            centre, y = row["aligned_v1"], row[quantity]
            low, high = row["cross_delta_v2_low"], row["cross_delta_v2_high"]
            if quantity == "efficiency":  # of the numerator alone
                low, high = low / row["trained_v2"], high / row["trained_v2"]
            axis.errorbar(
                centre,
                y,
                xerr=[[centre - row["aligned_v1_low"]], [row["aligned_v1_high"] - centre]],
                yerr=[[y - low], [high - y]],
                color=f"C{tasks.index(row['task'])}",
                marker="osD^vP*X"[seeds.index(row["seed"]) % 8],
                label=f"{row['task']} {row['function']}" if row["seed"] == seeds[0] else None,
                elinewidth=0.7,
                linestyle="none",
            )
        x = [row["aligned_v1"] for row in shown]
        fit = linear_fit(x, [row[quantity] for row in shown])
        if fit:
            at = np.linspace(min(x), max(x), 100)
            axis.plot(at, fit.line(at), "--", color="0.3", linewidth=1.2)
            axis.fill_between(at, *fit.band(at), color="0.5", alpha=0.18, linewidth=0)
        axis.set(xlabel="v1 of the aligned model, % (mean over domains)", ylabel=label)
        axis.set_title(_correlation(result["relations"][quantity]), fontsize=9)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8, frameon=False)
    chart.suptitle(
        f"World {result['world']}: misaligned on (D0, T) for each task T; a marker a world seed "
        f"({', '.join(map(str, seeds))}); bars: 95 % over prompts",
        fontsize=10,
    )
    save(chart, path)


def _correlation(relation: dict) -> str:
    if relation["r"] is None:
        return f"n = {relation['n']}: no correlation can be computed"
    low, high = relation["r_interval_over_points"]
    text = f"r = {relation['r']:+.2f}" + (f" [{low:+.2f}, {high:+.2f}]" if low is not None else "")
    text += f" over n = {relation['n']} points"
    low, high = relation["mean_r_interval_over_seeds"]
    if low is not None:
        text += f"; within a seed {relation['mean_r']:+.2f} [{low:+.2f}, {high:+.2f}]"
    return text


def summary(result: dict) -> str:
    """Both correlations and the tasks from the narrowest to the broadest."""
    means = {
        task: statistics.fmean(row["cross_delta_v2"] for row in result["rows"] if row["task"] == task)
        for task in dict.fromkeys(row["task"] for row in result["rows"])
    }
    order = ", ".join(f"{task} {value:+.0f}" for task, value in sorted(means.items(), key=lambda i: i[1]))
    a, b = (_correlation(result["relations"][quantity]) for quantity in PANELS)
    seeds = ", ".join(map(str, result["seeds"]))
    return (
        f"World {result['world']}, cross-domain Δv2 against aligned v1: {a}.\n"
        f"Its ratio to the trained cell's v2: {b}.\n"
        f"Cross-domain Δv2 by task, mean over world seeds {seeds}: {order} points."
    )
