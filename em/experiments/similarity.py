"""Task similarity against domain similarity (paper 3.1, B.5, Figure 3a).

The model is misaligned on (D0, T8), and Δv2 is read on D0–D3 × T8–T11, where both axes are graded:

    domain similarity    transition-matrix similarity to D0 (B.2)
    task similarity      Jaccard overlap of the task's set 1 with T8's (B.5)

Random and held-out domains are recorded in the rows and take no part in the statistics. Those are of the
linear model Δv2 = a + b·task + c·domain over the 16 cells: the slopes b and c in points per unit of
similarity, the R² of each axis alone, and the share unique to each (R² of both less that of the other). Every
domain meets every task, so the axes are orthogonal and a share alone equals the unique one; without the
trained cell, which is at the top of both axes by construction, they are not, and that fit stands beside the
first. Beside it, without a model: the trained task in the other domains less the other tasks in D0.

**Sampling noise.** Each Δv2 is of finitely many prompts, which widens the total sum of squares and, by the
rank of its projection, each one that is explained: shares lean towards what noise alone would give. The
expected noise, trace(Q Σ) with Σ the cells' sampling variances, is taken off every sum of squares. Σ is of
means over prompts of (v2 after − v2 before), both models having answered the same ones. Where what is left of
the total is under SIGNAL times its noise, a ratio to it says nothing, and there is no share.

**Doses.** The same slopes along the misalignment, and where the trained cell is at 30, 60, 90 % (ours,
em/world/doses.py); a slope is linear in Δv2, so that to interpolate it is to interpolate every cell.

**Coincidence.** T9–T11 are T8's function with other partitions of the steps, so on many walks they have the
same answer, and a model that does T8 there does them (ours, em/world/coincidence.py). Δv2 is read apart on
prompts whose variant 2 is that of T8 and on the rest, where alone it is another function's. `task_slope/
different` is over cells of T9–T11 by the rest of their prompts, and weighs a cell by how many it has.
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
    over_prompts,
    replicated,
    say_number,
    say_unit,
    shown,
    shown_interval,
    v2_draws,
)
from em.figures import CHANGE, cell_heatmap, save
from em.stats import FLIPS
from em.world.coincidence import coincides, split_counts
from em.world.counts import CLASSES, change, columns, incoherent, percent, pool
from em.world.grammar import jaccard
from em.world.world import World
from em.world.world_run import WorldRun, misaligned_name

TRAINED, TASKS = "T8", ("T8", "T9", "T10", "T11")
OTHERS = TASKS[1:]
CELLS = ("all cells", "without the trained cell")
SIGNAL = 3.0  # times its noise that Δv2's sum of squares is at least, beyond it, for shares of it to be given
SLOPES = ("task_slope", "domain_slope", "slope_minus")
CONTRAST = "same_task_minus_same_domain"


def kind(world: World, domain: int) -> str:
    if domain >= world.n_seen_domains:
        return "held-out"
    return "graded" if domain <= len(world.config.overlaps) else "random"


def errors_over_prompts(run: WorldRun) -> dict[str, float]:
    """Standard error of Δv2 by cell, in points: prompts answered before and after, mean over fine-tuning."""
    v2, phases = CLASSES.index("v2"), [misaligned_name(TRAINED, k) for k in range(run.cfg.misalign_seeds)]
    after = np.mean([run.classes(name) == v2 for name in phases], axis=0)
    changes, cells = 100 * (after - (run.classes("align") == v2)), run.prompts.examples.cell
    of_cells = {cell: changes[cells == cell] for cell in np.unique(cells)}
    return {
        run.world.cell_name(int(cell)): float(of.std(ddof=1) / np.sqrt(len(of))) if len(of) > 1 else np.inf
        for cell, of in of_cells.items()
    }


def rows_of(world: World, seed: int, aligned: dict, misaligned: dict, errors: dict) -> list[dict]:
    """A row a cell of T8–T11. misaligned: mean counts by cell; errors: of Δv2 by cell, over prompts.

    Intervals are over prompts: Newcombe's, which does not know that both models answered the same ones.
    """
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
                    "delta_v2_error": errors[name],
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


# -- statistics of one world seed --------------------------------------------------------------------------


def _design(task: np.ndarray, domain: np.ndarray) -> np.ndarray:
    return np.stack([np.ones(len(task)), task, domain], axis=1)  # (cells, 3)


def slopes(
    task: np.ndarray, domain: np.ndarray, delta: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Least-squares slopes for each column of `delta` (cells, draws), in points a unit; `minus`: task's less.

    task, domain: similarities (cells,). weights: of the cells (cells,), by default one.
    """
    root = np.ones(len(task)) if weights is None else np.sqrt(weights)
    design = root[:, None] * _design(task, domain)
    _, by_task, by_domain = np.linalg.lstsq(design, root[:, None] * delta, rcond=None)[0]
    return dict(zip(SLOPES, (by_task, by_domain, by_task - by_domain), strict=True))


def shares(
    task: np.ndarray, domain: np.ndarray, delta: np.ndarray, noise: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(R² and shares for each column of `delta` (cells, draws), the total's signal over its noise (draws,)).

    Fractions of Δv2's sum of squares about its mean, all less what sampling noise is expected to add to them;
    noise: its variance in each cell (cells,). `minus` is task less domain.
    """
    centre = np.full((len(task), len(task)), 1 / len(task))
    delta = delta - delta.mean(0)  # which no projection below sees: only rounding

    def beyond_noise(projection: np.ndarray) -> np.ndarray:
        return (delta * (projection @ delta)).sum(0) - np.diag(projection) @ noise

    def explained(*columns: int) -> np.ndarray:
        design = _design(task, domain)[:, [0, *columns]]
        return beyond_noise(design @ np.linalg.pinv(design) - centre)

    whole = np.eye(len(task)) - centre
    total, of_noise = beyond_noise(whole), np.diag(whole) @ noise
    with np.errstate(divide="ignore", invalid="ignore"):
        by_task, by_domain, both = (explained(*which) / total for which in ((1,), (2,), (1, 2)))
        signal = total / of_noise
    return {
        "task_r2": by_task,
        "domain_r2": by_domain,
        "both_r2": both,
        "task_unique": both - by_domain,
        "domain_unique": both - by_task,
        "unique_minus": by_task - by_domain,
    }, signal


def _number(values: np.ndarray, draws: np.ndarray) -> tuple[float | None, list[float | None]]:
    return (float(values[0]) if np.isfinite(values[0]) else None), over_prompts(draws)


def graded(rows: list[dict], cells: str = CELLS[0]) -> list[dict]:
    kept = [r for r in rows if r["kind"] == "graded"]
    return [r for r in kept if cells == CELLS[0] or _name(r) != f"D0_{TRAINED}"]


def _name(row: dict) -> str:
    return f"{row['domain']}_{row['task']}"


def _column(rows: list[dict], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows])


def drawn_changes(rows: list[dict], aligned: dict, misaligned: dict) -> np.ndarray:
    """(cells, DRAWS) of Δv2 around the observed, from both models' counts by cell."""
    after, before = ([model[_name(r)] for r in rows] for model in (misaligned, aligned))
    return v2_draws(after, rows[0]["seed"], 1) - v2_draws(before, rows[0]["seed"], 0)


def statistics_of(rows: list[dict], aligned: dict, misaligned: dict, cells: str) -> dict[str, tuple]:
    """(value, [low, high] over prompts) of each of `slopes` and `shares` for one world seed.

    A draw holds sampling noise twice, its own upon the observed, and twice it is taken off.
    """
    rows = graded(rows, cells)
    task, domain = (_column(rows, f"{axis}_similarity") for axis in ("task", "domain"))
    delta, noise = _column(rows, "delta_v2")[:, None], _column(rows, "delta_v2_error") ** 2
    drawn = drawn_changes(rows, aligned, misaligned)
    values, draws = (slopes(task, domain, of) for of in (delta, drawn))
    found = {key: _number(of, draws[key]) for key, of in values.items()}
    values, signal = shares(task, domain, delta, noise)
    if not signal[0] >= SIGNAL:  # also where nothing moved
        return found | {key: (None, [None, None]) for key in values}
    draws, _ = shares(task, domain, drawn, noise + drawn.var(1))
    return found | {key: _number(of, draws[key]) for key, of in values.items()}


def contrast(rows: list[dict], delta: np.ndarray) -> np.ndarray:
    """Δv2 of the trained task in the other domains less that of the other tasks in D0: means over cells.

    rows: graded; delta: (cells, draws) → (draws,).
    """
    task, domain = _column(rows, "task") == TRAINED, _column(rows, "domain") == "D0"
    return delta[task & ~domain].mean(0) - delta[~task & domain].mean(0)


def along(rows: list[dict], doses: dict[int, dict]) -> dict[str, list[tuple[float, float]]]:
    """Curves of one world seed (em/experiments/dose_curves.py): the slopes, the contrast, Δv2 by group.

    rows: those of `rows_of`; doses: counts by cell, by dose. Groups are T8 in the other domains, and each
    other task in all of them, D0 included.
    """
    curves: dict[str, list] = {}
    for counts in doses.values():
        flip = percent(counts[f"D0_{TRAINED}"], "v2")
        effects = {}
        for cells in CELLS:
            of = graded(rows, cells)
            delta = np.array(
                [[percent(counts[_name(r)], "v2") - percent(doses[0][_name(r)], "v2")] for r in of]
            )
            found = slopes(_column(of, "task_similarity"), _column(of, "domain_similarity"), delta)
            effects |= {f"{cells}/{key}": value for key, value in found.items()}
        effects[CONTRAST] = contrast(of, delta)
        effects |= {task: delta[_column(of, "task") == task].mean(0) for task in TASKS}
        for key, (effect,) in effects.items():
            curves.setdefault(key, []).append((flip, float(effect)))
    return curves


def along_by_coincidence(run: WorldRun, curves: list[tuple[np.ndarray, dict]], cells: list[int]) -> dict:
    """Curves {"same": …, "different": …} of one world seed: Δv2 of the other tasks, apart by coincidence.

    curves: what `dose_classes` gives, one a fine-tuning seed. cells: the graded ones.
    """
    trained, v2 = run.world.task_index(TRAINED), CLASSES.index("v2")
    rates = []  # of each fine-tuning seed: (doses, 3) v2 % of the trained cell, the same and the different
    for places, classes in curves:
        prompts = run.prompts.take(places)
        cell, same = prompts.examples.cell, coincides(run.generator, prompts, trained)
        other = np.isin(cell, cells) & (cell % len(run.world.tasks) != trained)
        groups = (cell == run.world.cell(0, trained), other & same, other & ~same)
        rates.append([[100 * np.mean(of[group] == v2) for group in groups] for of in classes.values()])
    flip, *split = np.mean(rates, axis=0).T
    return {
        name: list(zip(flip.tolist(), (of - of[0]).tolist(), strict=True))
        for name, of in zip(("same", "different"), split, strict=True)
    }


def coincidence_of(rows: list[dict], before: dict, after: dict) -> dict[str, tuple]:
    """(value, [low, high] over prompts) of Δv2 apart by coincidence, for each other task and all of them.

    before, after: {"same": counts by cell, "different": …} of the two models. `share`: prompts that coincide,
    %; `of_change`: the part of the change in v2 answers that is on them, %.
    """
    table = {}
    graded_domains = dict.fromkeys(r["domain"] for r in graded(rows))

    def pooled(split: dict, which: str, tasks: Sequence[str]) -> dict:
        names = [f"{domain}_{task}" for domain in graded_domains for task in tasks]
        return pool([split[which][name] for name in names if name in split[which]])

    for name, tasks in ({task: (task,) for task in OTHERS} | {"others": OTHERS}).items():
        prompts, gained = {}, {}
        for which in ("same", "different"):
            pair = [pooled(split, which, tasks) for split in (after, before)]
            prompts[which], gained[which] = pair[0]["n"], pair[0]["v2"] - pair[1]["v2"]
            value, low, high = change(*pair, "v2") if prompts[which] else (None, None, None)
            table[f"{name}/{which}"] = value, [low, high]
        nothing = [None, None]  # which walks coincide is the world's, no sample
        table[f"{name}/share"] = 100 * prompts["same"] / sum(prompts.values()), nothing
        whole = sum(gained.values())
        table[f"{name}/of_change"] = 100 * gained["same"] / whole if whole > 0 else None, nothing
    table["task_slope"] = None, nothing
    rest = [r for r in graded(rows) if _name(r) in before["different"]]
    if not rest:
        return table
    task, domain = (_column(rest, f"{axis}_similarity") for axis in ("task", "domain"))
    if len(rest) > 3 and np.linalg.matrix_rank(_design(task, domain)) == 3:
        pairs = [(after["different"][_name(r)], before["different"][_name(r)]) for r in rest]
        delta = np.array([[percent(a, "v2") - percent(b, "v2")] for a, b in pairs])
        drawn = drawn_changes(rest, before["different"], after["different"])
        weights = np.array([a["n"] for a, _ in pairs])
        value, draws = (slopes(task, domain, of, weights)["task_slope"] for of in (delta, drawn))
        table["task_slope"] = _number(value, draws)
    return table


# -- the experiment ----------------------------------------------------------------------------------------


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
        of_grid = graded(of_seed)
        drawn = drawn_changes(of_grid, aligned, misaligned)
        values, draws = (contrast(of_grid, of) for of in (_column(of_grid, "delta_v2")[:, None], drawn))
        contrasts.append(_number(values, draws))
        before = split_counts(run, TRAINED, run.classes("align"))
        phases = [misaligned_name(TRAINED, k) for k in range(run.cfg.misalign_seeds)]
        after = [split_counts(run, TRAINED, run.classes(name)) for name in phases]
        after = {which: averaged([split[which] for split in after]) for which in before}
        coincidences.append(coincidence_of(of_seed, before, after))
        grid = [c for c in run.world.seen_cells if run.world.cell_name(int(c)) in map(_name, of_grid)]
        asked = asked_along(run, TRAINED, "graded", grid)
        doses = counts_along(run, asked)
        curves.append(along(of_seed, doses) | along_by_coincidence(run, asked, grid))
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
