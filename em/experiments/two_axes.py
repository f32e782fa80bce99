"""Task against domain similarity in one world seed's Δv2 (paper B.5, Figure 3a).

The linear model Δv2 = a + b·task + c·domain over the 16 graded cells, D0–D3 × T8–T11: the slopes b and c in
points per unit of similarity, the R² of each axis alone, and the share unique to each (R² of both less that
of the other). Every domain meets every task, so the axes are orthogonal and a share alone equals the unique
one; without the trained cell, which is at the top of both axes by construction, they are not, and that fit
stands beside the first. Beside it, without a model: the trained task in the other domains less the other
tasks in D0.

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

from collections.abc import Sequence

import numpy as np

from em.experiments.replication import (
    over_prompts,
    v2_draws,
)
from em.world.coincidence import coincides
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


def graded_cells(world: World) -> list[int]:
    """The numbers of those cells in the world."""
    tasks = [world.task_index(task) for task in TASKS]
    return [world.cell(domain, task) for domain in range(len(world.config.overlaps) + 1) for task in tasks]


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


def contrast_of(rows: list[dict], aligned: dict, misaligned: dict) -> tuple:
    """(value, [low, high] over prompts) of `contrast` for one world seed, from its rows of all cells."""
    rows = graded(rows)
    drawn = drawn_changes(rows, aligned, misaligned)
    values, draws = (contrast(rows, of) for of in (_column(rows, "delta_v2")[:, None], drawn))
    return _number(values, draws)


def curves_of(rows: list[dict], doses: dict[int, dict]) -> dict[str, list[tuple[float, float]]]:
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


def curves_by_coincidence(run: WorldRun, curves: list[tuple[np.ndarray, dict]], cells: list[int]) -> dict:
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
