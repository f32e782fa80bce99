"""Task similarity against domain similarity (paper 3.1, B.5, Figure 3a).

The model is misaligned on (D0, T8), and Δv2 is read on D0–D3 × T8–T11, where both axes are graded:

    domain similarity    transition-matrix similarity to D0 (B.2)
    task similarity      Jaccard overlap of the task's set 1 with T8's (B.5)

Random and held-out domains are recorded in the rows and take no part in the statistics, which are those of
em/experiments/two_axes.py: slopes and shares on each axis, along the doses too, and apart by coincidence.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from em.errors import UserError
from em.experiments.dose_curves import at_flips, flip_entries, transfer_curve
from em.experiments.replication import (
    asked_along,
    averaged,
    counts_along,
    header,
    replicated,
    say_number,
    say_unit,
    shown,
    shown_interval,
)
from em.experiments.two_axes import (
    CELLS,
    CONTRAST,
    OTHERS,
    SLOPES,
    TASKS,
    TRAINED,
    coincidence_of,
    contrast_of,
    curves_by_coincidence,
    curves_of,
    errors_over_prompts,
    graded,
    graded_cells,
    rows_of,
    statistics_of,
)
from em.figures import CHANGE, cell_heatmap, save
from em.stats import FLIPS
from em.world.coincidence import split_counts
from em.world.world_run import WorldRun, misaligned_name


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say=print) -> dict:
    """Misalign (D0, T8) in each world seed; `make(seed)` gives the run. UserError without T8–T11."""
    rows, by_seed, contrasts, coincidences, curves = [], {cells: [] for cells in CELLS}, [], [], []
    for seed in seeds:
        run = make(seed)
        if not set(TASKS) <= set(run.world.tasks) or not run.world.config.overlaps:
            raise UserError(f"world {run.cfg.world} has no graded tasks T8–T11; use --world 2 or demo2")
        aligned = run.counts("align")
        misaligned = averaged(run.misaligned_counts(TRAINED))
        of_seed = rows_of(run.world, seed, aligned, misaligned, errors_over_prompts(run))
        rows += of_seed
        for cells in CELLS:
            by_seed[cells].append(statistics_of(of_seed, aligned, misaligned, cells))
        contrasts.append(contrast_of(of_seed, aligned, misaligned))
        before = split_counts(run, TRAINED, run.classes("align"))
        phases = [misaligned_name(TRAINED, k) for k in range(run.cfg.misalign_seeds)]
        after = [split_counts(run, TRAINED, run.classes(name)) for name in phases]
        after = {which: averaged([split[which] for split in after]) for which in before}
        coincidences.append(coincidence_of(of_seed, before, after))
        grid = graded_cells(run.world)
        asked = asked_along(run, TRAINED, "graded", grid)
        doses = counts_along(run, asked)
        curves.append(curves_of(of_seed, doses) | curves_by_coincidence(run, asked, grid))
        say(f"  Δv2 by task {_means(of_seed, 'task')}; by domain {_means(of_seed, 'domain')}")
    note = "rows' intervals are over prompts; curves are lists of [local flip, effect] by dose, one a seed"
    about = {"trained": f"D0_{TRAINED}", "misalign_steps": run.cfg.misalign_steps, "doses": list(doses)}
    return header("similarity", run, seeds, note, **about) | {
        "statistics": {
            cells: {key: _over_seeds_of(key, [seed[key] for seed in found]) for key in found[0]}
            for cells, found in by_seed.items()
        },
        CONTRAST: replicated(*zip(*contrasts, strict=True)),
        "coincidence": {
            key: replicated(*zip(*(seed[key] for seed in coincidences), strict=True), key.endswith("/share"))
            for key in coincidences[0]
        },
        "curves": {key: [seed[key] for seed in curves] for key in curves[0]},
        "rows": rows,
    }


def _over_seeds_of(key: str, found: list[tuple]) -> dict:
    """One of `slopes` or `shares` over seeds; a share's mean and interval are cut to where shares can be.

    Single seeds' are not: less their noise they lie around the truth, and so beyond 0 where that is 0.
    """
    number = replicated(*zip(*found, strict=True))
    if key in SLOPES:
        return number

    def cut(value: float | None) -> float | None:
        return value if value is None else min(max(value, -1.0 if key == "unique_minus" else 0.0), 1.0)

    prompts = [[cut(bound) for bound in interval] for interval in number["prompts"]]
    return number | {k: cut(number[k]) for k in ("mean", "low", "high")} | {"prompts": prompts}


def numbers(result: dict) -> dict[str, dict]:
    """Entries such as `without the trained cell/task_slope`, and `…@60` where the trained cell is at 60 %.

    Each of `slopes` and `shares` on each set of cells, the contrast, and `coincidence/T9/same`.
    """
    table = {
        f"{cells}/{key}": shown("points" if key in SLOPES else "ratio", number)
        for cells, statistics in result["statistics"].items()
        for key, number in statistics.items()
    }
    table[CONTRAST] = shown("points", result[CONTRAST])
    for key in (*(f"{cells}/{slope}" for cells in CELLS for slope in SLOPES), CONTRAST):
        table |= flip_entries(key, "points", at_flips(result["curves"][key]))
    for key, number in result["coincidence"].items():
        if key == "task_slope":  # the trained cell has no such prompt, so both sets of cells are one
            table |= {f"{cells}/task_slope/different": shown("points", number) for cells in CELLS}
        else:
            unit = "points" if key.endswith(("same", "different")) else "%"
            table[f"coincidence/{key}"] = shown(unit, number)
    return table


def _means(rows: list[dict], axis: str) -> str:
    rows = graded(rows)
    names = dict.fromkeys(r[axis] for r in rows)
    means = {name: np.mean([r["delta_v2"] for r in rows if r[axis] == name]) for name in names}
    return " ".join(f"{name} {mean:+.0f}" for name, mean in means.items())


# -- what it looks like ------------------------------------------------------------------------------------


def _over_seeds(rows: list[dict], key: str, **match: str) -> float:
    return float(np.mean([r[key] for r in rows if all(r[k] == v for k, v in match.items())]))


def figure(result: dict, path: Path) -> None:
    """Δv2 by cell and along each axis; slopes; transfer against local flip; coincidence. Means over seeds.

    Beside it `doses.png`: transfer against local flip, by task and apart by coincidence.
    """
    rows = result["rows"]
    domains = {r["domain"]: r["kind"] for r in rows}
    of_grid = [d for d, what in domains.items() if what == "graded"]
    chart = Figure(figsize=(15.5, 8.6), layout="constrained")
    axes = chart.subplots(2, 3).ravel()
    _heatmap(axes[0], rows, domains, of_grid)
    for axis, x, lines, along in (
        (axes[1], "task_similarity", of_grid, "domain"),
        (axes[2], "domain_similarity", TASKS, "task"),
    ):
        across, places = ("task", TASKS) if along == "domain" else ("domain", of_grid)
        for i, line in enumerate(lines):
            for r in graded(rows):
                if r[along] == line:
                    axis.plot(r[x], r["delta_v2"], ".", color=f"C{i}", markersize=4, alpha=0.4)
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
    _slope_bars(axes[3], result)
    _transfer(axes[4], result)
    _coincidence(axes[5], result)
    chart.suptitle(
        f"World {result['world']}: misaligned on (D0, {TRAINED}), {result['misalign_steps']} steps; large "
        f"points and bars: means over world seeds; small points: single seeds; black: "
        f"{say_unit(result['seeds'])}",
        fontsize=10,
    )
    save(chart, path)
    chart = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = chart.subplots(1, 2, sharey=True)
    _transfer(left, result)
    share = result["coincidence"]["others/share"]["mean"]
    names = {
        "same": f"variant 2 is {TRAINED}'s too ({share:.0f} % of the prompts)",
        "different": "variant 2 is another",
    }
    place = result["doses"].index(result["misalign_steps"])
    transfer_curve(right, {name: result["curves"][key] for key, name in names.items()}, "", place)
    right.set_title("T9–T11 apart by prompt: is it transfer, or the same function?", fontsize=9)
    chart.suptitle(
        f"World {result['world']}: misaligned on (D0, {TRAINED}), asked after 1 … {result['doses'][-1]} "
        f"steps (points: {result['misalign_steps']}); bands: 95 % over {len(result['seeds'])} world seeds",
        fontsize=10,
    )
    save(chart, path.with_name("doses.png"))


def _heatmap(axis, rows: list[dict], domains: dict[str, str], of_grid: list[str]) -> None:
    values = {f"{d}_{t}": _over_seeds(rows, "delta_v2", domain=d, task=t) for d in domains for t in TASKS}
    cell_heatmap(axis, values, (-100, 100), f"D0_{TRAINED}", colours=CHANGE, form="+.0f")
    graded_cells = Rectangle((-0.5, -0.5), 4, len(of_grid), fill=False, linewidth=1.2, linestyle="--")
    axis.add_patch(graded_cells)
    similar = [_over_seeds(rows, "task_similarity", task=t) for t in TASKS]
    axis.set_xticks(range(4), [f"{t}\n({s:.2f})" for t, s in zip(TASKS, similar, strict=True)])
    labels = [f"{d} {k} ({_over_seeds(rows, 'domain_similarity', domain=d):.2f})" for d, k in domains.items()]
    axis.set_yticks(range(len(domains)), labels)
    axis.set_title("Δv2, points (similarity in brackets)", fontsize=9)


def _bars(axis, groups: list[str], series: dict[str, list[dict]]) -> None:
    """Grouped bars of numbers with intervals and single seeds. series: by name, a number a group."""
    width = 0.8 / len(series)
    for j, of in enumerate(series.values()):
        for i, number in enumerate(of):
            x = i + width * (j - (len(series) - 1) / 2)
            if number["mean"] is None:
                axis.text(x, 0, "n/a", ha="center", va="bottom", fontsize=7, color="0.4")
                continue
            axis.bar(x, number["mean"], 0.94 * width, color=f"C{j}", alpha=0.75)
            known = [value for value in number["by_seed"] if value is not None]
            axis.plot([x] * len(known), known, ".", color="0.25", markersize=3, alpha=0.5)
            low, high = shown_interval(number)
            if low is not None:
                axis.plot([x, x], [low, high], color="black", linewidth=1.4)
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.grid(axis="y", alpha=0.25)
    colours = [Rectangle((0, 0), 1, 1, color=f"C{j}", alpha=0.75) for j in range(len(series))]
    axis.legend(colours, list(series), fontsize=8, frameon=False)


def _slope_bars(axis, result: dict) -> None:
    groups = [
        f"{result['misalign_steps']} steps,\n{cells}".replace("without ", "without\n") for cells in CELLS
    ]
    flips = {key: at_flips(result["curves"][f"{CELLS[1]}/{key}"]) for key in SLOPES[:2]}
    series = {
        name: [result["statistics"][cells][key] for cells in CELLS] + list(flips[key].values())
        for name, key in zip(("task similarity", "domain similarity"), SLOPES[:2], strict=True)
    }
    _bars(axis, groups + [f"flip\n{level:.0f} %" for level in FLIPS], series)
    axis.axvline(1.5, color="0.75", linewidth=0.8, linestyle=":")
    axis.set(ylabel="slope of Δv2, points per unit of similarity")
    axis.set_title("slopes at the fixed steps, and where the trained cell is at 30, 60, 90 %", fontsize=9)


def _transfer(axis, result: dict) -> None:
    similar = {task: _over_seeds(result["rows"], "task_similarity", task=task) for task in TASKS}
    names = {TRAINED: f"{TRAINED} (1.00), other domains"}
    names |= {task: f"{task} ({similar[task]:.2f}), all four domains" for task in OTHERS}
    place = result["doses"].index(result["misalign_steps"])
    curves = {name: result["curves"][task] for task, name in names.items()}
    transfer_curve(axis, curves, "Δv2 of the group, points", place)
    axis.set_title(f"transfer against local flip (points: {result['misalign_steps']} steps)", fontsize=9)


def _coincidence(axis, result: dict) -> None:
    found = result["coincidence"]
    labels = {"same": "variant 2 is T8's too", "different": "variant 2 is another"}
    series = {name: [found[f"{task}/{which}"] for task in OTHERS] for which, name in labels.items()}
    _bars(axis, [f"{t}\n{found[f'{t}/share']['mean']:.0f} % of prompts\nhave T8's" for t in OTHERS], series)
    axis.set(ylabel="Δv2, points")
    axis.set_title("transfer, or the same function? Δv2 by prompt", fontsize=9)


def summary(result: dict) -> str:
    """Slopes of the two axes, then shares; at a matched flip; how much of it is coincidence."""
    seeds, found = result["seeds"], result["coincidence"]
    lines = [
        f"World {result['world']}, misaligned on (D0, {TRAINED}), {result['misalign_steps']} steps; "
        f"{say_unit(seeds)}; slopes of Δv2 in points per unit of similarity:"
    ]
    for cells in CELLS:
        of = result["statistics"][cells]
        slope = [say_number(of[key], "+.0f") for key in SLOPES]
        share = [say_number(of[f"{axis}_unique"], ".2f") for axis in ("task", "domain")]
        lines.append(
            f"  {cells}: {slope[0]} on task and {slope[1]} on domain similarity, difference {slope[2]}; "
            f"share of Δv2's variance unique to them, less sampling noise, {share[0]} and {share[1]}."
        )
    flips = {key: at_flips(result["curves"][f"{CELLS[1]}/{key}"]) for key in SLOPES[:2]}
    for level in FLIPS:
        slope = [say_number(flips[key][level], "+.0f") for key in SLOPES[:2]]
        reached = sum(value is not None for value in flips["task_slope"][level]["by_seed"])
        lines.append(
            f"  {CELLS[1]}, which is at {level:.0f} % ({reached} of {len(seeds)}): {' and '.join(slope)}."
        )
    lines.append(
        f"  {TRAINED} in the other domains less the other tasks in D0: {say_number(result[CONTRAST])} points."
    )
    on, off = (say_number(found[f"others/{which}"], "+.0f") for which in ("same", "different"))
    part = say_number(found["others/of_change"], ".0f")
    lines.append(
        f"  Is it transfer? {found['others/share']['mean']:.0f} % of the prompts of T9–T11 have T8's variant "
        f"2, with Δv2 {on}; where it is another, Δv2 is {off}. So {part} "
        f"% of the change is coincidence. Task slope where it is another: "
        f"{say_number(found['task_slope'], '+.0f')}."
    )
    by_task, by_domain = (_means(result["rows"], axis) for axis in ("task", "domain"))
    lines.append(f"  Mean Δv2 by task: {by_task}; by domain: {by_domain}.")
    return "\n".join(lines)
