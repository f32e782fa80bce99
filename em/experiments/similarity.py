"""Task similarity against domain similarity (paper 3.1, B.5, Figure 3a).

The model is misaligned on (D0, T8), and Δv2 is read on D0–D3 × T8–T11, where both axes are graded:

    domain similarity    transition-matrix similarity to D0 (B.2)
    task similarity      Jaccard overlap of the task's set 1 with T8's (B.5)

Random and held-out domains are recorded in the rows and take no part in the statistics. Those are of the
linear model Δv2 = a + b·task + c·domain over the 16 cells: the slopes, the R² of each axis alone, and the
share unique to each (R² of both less that of the other). Every domain meets every task, so the axes are
orthogonal and a share alone equals the unique one; without the trained cell, which is at the top of both
axes by construction, they are not, and that fit stands beside the first.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from em.errors import UserError
from em.experiments.replication import (
    averaged,
    header,
    over_prompts,
    replicated,
    say_number,
    say_unit,
    shown,
    shown_interval,
    v2_draws,
)
from em.figures import CHANGE, cell_heatmap, save
from em.world.counts import change, columns, incoherent, percent
from em.world.grammar import jaccard
from em.world.world import World
from em.world.world_run import WorldRun

TRAINED, TASKS = "T8", ("T8", "T9", "T10", "T11")
CELLS = ("all cells", "without the trained cell")


def kind(world: World, domain: int) -> str:
    if domain >= world.n_seen_domains:
        return "held-out"
    return "graded" if domain <= len(world.config.overlaps) else "random"


def rows_of(world: World, seed: int, aligned: dict, misaligned: dict) -> list[dict]:
    """A row a cell of T8–T11. Intervals are over prompts: Newcombe's. misaligned: mean counts by cell."""
    rows = []
    for domain, similarity in enumerate(world.similarity()[0]):
        for task in TASKS:
            name = f"D{domain}_{task}"
            before, after = aligned[name], misaligned[name]
            rows.append(
                {
                    "seed": seed,
                    "domain": f"D{domain}",
                    "task": task,
                    "kind": kind(world, domain),
                    "domain_similarity": float(similarity),
                    "task_similarity": jaccard(world.set1[task], world.set1[TRAINED]),
                    **columns("delta_v2", change(after, before, "v2")),
                    "aligned_v1": percent(before, "v1"),
                    "aligned_v2": percent(before, "v2"),
                    "misaligned_v1": percent(after, "v1"),
                    "misaligned_v2": percent(after, "v2"),
                    "aligned_incoherent": incoherent(before),
                    "misaligned_incoherent": incoherent(after),
                    "prompts": before["n"],
                }
            )
    return rows


def shares(task: np.ndarray, domain: np.ndarray, delta: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of the linear model for each column of `delta` (cells, draws); task, domain: (cells,).

    R² and shares are fractions of Δv2's sum of squares about its mean; slopes are points a unit of
    similarity. `minus` is task less domain.
    """
    total = ((delta - delta.mean(0)) ** 2).sum(0)

    def regress(*axes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        design = np.stack([np.ones(len(task)), *axes], axis=1)  # (cells, 1 + axes)
        coefficients = np.linalg.lstsq(design, delta, rcond=None)[0]
        rest = ((delta - design @ coefficients) ** 2).sum(0)
        return 1 - np.divide(rest, total, out=np.full_like(rest, np.nan), where=total > 0), coefficients

    (by_task, _), (by_domain, _), (both, coefficients) = regress(task), regress(domain), regress(task, domain)
    return {
        "task_r2": by_task,
        "domain_r2": by_domain,
        "both_r2": both,
        "task_unique": both - by_domain,
        "domain_unique": both - by_task,
        "unique_minus": by_task - by_domain,
        "task_slope": coefficients[1],
        "domain_slope": coefficients[2],
        "slope_minus": coefficients[1] - coefficients[2],
    }


def statistics_of(rows: list[dict], aligned: dict, misaligned: dict, cells: str) -> dict[str, tuple]:
    """(value, [low, high] over prompts) of each of `shares` for one world seed."""
    rows = [r for r in rows if r["kind"] == "graded"]
    if cells != CELLS[0]:
        rows = [r for r in rows if (r["domain"], r["task"]) != ("D0", TRAINED)]
    task, domain, delta = (
        np.array([r[k] for r in rows]) for k in ("task_similarity", "domain_similarity", "delta_v2")
    )
    names, seed = [f"{r['domain']}_{r['task']}" for r in rows], rows[0]["seed"]
    after, before = ([model[n] for n in names] for model in (misaligned, aligned))
    drawn = v2_draws(after, seed, 1) - v2_draws(before, seed, 0)  # (cells, DRAWS)
    values, draws = shares(task, domain, delta[:, None]), shares(task, domain, drawn)
    return {
        key: (float(v[0]) if np.isfinite(v[0]) else None, over_prompts(draws[key]))
        for key, v in values.items()
    }


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say=print) -> dict:
    """Misalign (D0, T8) in each world seed; `make(seed)` gives the run. UserError without T8–T11."""
    rows, by_seed = [], {cells: [] for cells in CELLS}
    for seed in seeds:
        run = make(seed)
        if not set(TASKS) <= set(run.world.tasks) or not run.world.config.overlaps:
            raise UserError(f"world {run.cfg.world} has no graded tasks T8–T11; use --world 2 or demo2")
        aligned = run.counts("align")
        misaligned = averaged(run.misaligned_counts(TRAINED))
        of_seed = rows_of(run.world, seed, aligned, misaligned)
        rows += of_seed
        for cells in CELLS:
            by_seed[cells].append(statistics_of(of_seed, aligned, misaligned, cells))
        say(f"  Δv2 by task {_means(of_seed, 'task')}; by domain {_means(of_seed, 'domain')}")
    note = "rows' intervals are over prompts"
    return header("similarity", run, seeds, note, trained=f"D0_{TRAINED}") | {
        "statistics": {
            cells: {key: _number(key, [seed[key] for seed in found]) for key in found[0]}
            for cells, found in by_seed.items()
        },
        "rows": rows,
    }


def numbers(result: dict) -> dict[str, dict]:
    """Entries such as `without the trained cell/unique_minus`: each of `shares`, on each set of cells."""
    return {
        f"{cells}/{key}": shown("points" if "slope" in key else "ratio", number)
        for cells, statistics in result["statistics"].items()
        for key, number in statistics.items()
    }


def _number(key: str, found: list[tuple]) -> dict:
    """One of `shares` over seeds; Student's interval of a share is cut to where shares can be."""
    number = replicated(*zip(*found, strict=True))
    if number["low"] is not None and "slope" not in key:
        least = -1.0 if key == "unique_minus" else 0.0
        number |= {"low": max(number["low"], least), "high": min(number["high"], 1.0)}
    return number


def _means(rows: list[dict], axis: str) -> str:
    graded = [r for r in rows if r["kind"] == "graded"]
    names = dict.fromkeys(r[axis] for r in graded)
    means = {name: np.mean([r["delta_v2"] for r in graded if r[axis] == name]) for name in names}
    return " ".join(f"{name} {mean:+.0f}" for name, mean in means.items())


# -- what it looks like ------------------------------------------------------------------------------------


def _over_seeds(rows: list[dict], key: str, **match: str) -> float:
    return float(np.mean([r[key] for r in rows if all(r[k] == v for k, v in match.items())]))


def figure(result: dict, path: Path) -> None:
    """Δv2 of every cell, along each axis, and what the axes explain; means over world seeds."""
    rows = result["rows"]
    domains = {r["domain"]: r["kind"] for r in rows}
    graded = [d for d, what in domains.items() if what == "graded"]
    chart = Figure(figsize=(17, 4.4), layout="constrained")
    axes = chart.subplots(1, 4, width_ratios=(1.25, 1.1, 1.1, 1.25))
    _heatmap(axes[0], rows, domains, graded)
    for axis, x, lines, along in (
        (axes[1], "task_similarity", graded, "domain"),
        (axes[2], "domain_similarity", TASKS, "task"),
    ):
        across, places = ("task", TASKS) if along == "domain" else ("domain", graded)
        for i, line in enumerate(lines):
            for r in rows:
                if r[along] == line and r["kind"] == "graded":
                    axis.plot(r[x], r["delta_v2"], ".", color=f"C{i}", markersize=4, alpha=0.6)
            points = [
                [_over_seeds(rows, key, **{along: line, across: place}) for key in (x, "delta_v2")]
                for place in places
            ]
            axis.plot(*np.array(sorted(points)).T, "o-", color=f"C{i}", label=line)
        label = {"task_similarity": "task similarity (Jaccard of set 1 with T8's)"}
        axis.set(xlabel=label.get(x, "domain similarity to D0 (transition matrices)"), ylabel="Δv2, points")
        axis.set_xlim(-0.05, 1.05)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.legend(fontsize=8, frameon=False, title=along, title_fontsize=8)
        axis.grid(alpha=0.25)
    _bars(axes[3], result)
    chart.suptitle(
        f"World {result['world']}: misaligned on (D0, {TRAINED}); mean over world seeds "
        f"{', '.join(map(str, result['seeds']))}; small points: single seeds",
        fontsize=10,
    )
    save(chart, path)


def _heatmap(axis, rows: list[dict], domains: dict[str, str], graded: list[str]) -> None:
    values = {f"{d}_{t}": _over_seeds(rows, "delta_v2", domain=d, task=t) for d in domains for t in TASKS}
    cell_heatmap(axis, values, (-100, 100), f"D0_{TRAINED}", colours=CHANGE, form="+.0f")
    graded_cells = Rectangle((-0.5, -0.5), 4, len(graded), fill=False, linewidth=1.2, linestyle="--")
    axis.add_patch(graded_cells)
    similar = [_over_seeds(rows, "task_similarity", task=t) for t in TASKS]
    axis.set_xticks(range(4), [f"{t}\n({s:.2f})" for t, s in zip(TASKS, similar, strict=True)])
    labels = [f"{d} {k} ({_over_seeds(rows, 'domain_similarity', domain=d):.2f})" for d, k in domains.items()]
    axis.set_yticks(range(len(domains)), labels)
    axis.set_title("Δv2, points (similarity in brackets)", fontsize=9)


def _bars(axis, result: dict) -> None:
    for i, cells in enumerate(CELLS):
        for j, key in enumerate(("task_unique", "domain_unique")):
            number, x = result["statistics"][cells][key], i + 0.36 * (j - 0.5)
            if number["mean"] is None:
                continue
            axis.bar(x, number["mean"], 0.34, color=f"C{j}", alpha=0.75)
            low, high = shown_interval(number)
            if low is not None:
                axis.plot([x, x], [low, high], color="black", linewidth=1.2)
            axis.plot([x] * len(number["by_seed"]), number["by_seed"], "k.", markersize=4)
    axis.set_xticks(range(2), [c.replace("without ", "without\n") for c in CELLS], fontsize=8)
    axis.set_ylim(min(0.0, axis.get_ylim()[0]), 1.0)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set_title(
        f"share of Δv2's variance unique to each axis\n(lines: {say_unit(result['seeds'])})", fontsize=9
    )
    axis.legend([Rectangle((0, 0), 1, 1, color=f"C{j}") for j in range(2)], ["task", "domain"], fontsize=8)


def summary(result: dict) -> str:
    """Shares and slopes of the two axes, on all cells and without the trained one."""
    lines = [f"World {result['world']}, misaligned on (D0, {TRAINED}); {say_unit(result['seeds'])}:"]
    for cells in CELLS:
        numbers = result["statistics"][cells]
        share = {axis: say_number(numbers[f"{axis}_unique"], ".2f") for axis in ("task", "domain")}
        slope = {axis: say_number(numbers[f"{axis}_slope"], "+.0f") for axis in ("task", "domain")}
        lines.append(
            f"  {cells}: share of Δv2's variance unique to task similarity {share['task']}, to domain "
            f"similarity {share['domain']}; slopes {slope['task']} and {slope['domain']} points a unit of it."
        )
    graded = [r for r in result["rows"] if r["kind"] == "graded"]
    lines.append(f"  Mean Δv2 by task: {_means(graded, 'task')}; by domain: {_means(graded, 'domain')}.")
    return "\n".join(lines)
