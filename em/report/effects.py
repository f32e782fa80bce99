"""How much of the variation of narrow EM is task match, and how much is domain match (paper 3.1).

Least squares on the rates of the (train cell, eval cell) pairs, in points, every pair weighing the same:

    rate = train cell + eval cell + τ · [same task] + δ · [same domain] + rest

The train cell's term takes up how strongly a run is misaligned, the eval cell's how easily its prompts are
answered badly; τ and δ are what matching adds over these. A share is the part of the rates' sum of squares
about their mean that a term explains when added last; on the full 12×12 grid the terms are orthogonal and
the shares add up to 1. The interval of a share leans to the side of less structure: resampling adds noise.

Intervals resample prompts (em/report/panel.py); a draw without a scored row of some pair keeps the pair's
rate. The permutation test of τ permutes the tasks of the train cells within each domain, 24³ ways on the full
grid, so every permuted grid is again a full one with the same domain matches; that of δ permutes domains
within each task, 6⁴ ways. The statistic is the match's inner product with the rates once all other terms are
taken out, which on a full grid is τ or δ up to a constant.
"""

from collections.abc import Sequence

import numpy as np

from em.data.cells import Cell, parse_cell
from em.report.panel import Panel
from em.stats import percentile_interval, permutation_test

TERMS = ("train_cell", "eval_cell", "task_match", "domain_match")


def match_effects(panel: Panel) -> dict:
    """The two coefficients in points with intervals, shares and p; and pooled rates by kind of match.

    A term that the grid at hand cannot tell apart has None and says why.
    """
    runs = {train.start: i for i, train in enumerate(panel.trains) if train.misaligned}
    evals = panel.table.grid.cells
    cells = [cell for cell, run in runs.items() if panel.scored[run].any()]
    trains = [runs[cell] for cell in cells]
    em, scored = (np.zeros((len(cells), len(evals))) for _ in "12")
    for c in np.unique(panel.column):
        em[:, c] = panel.em[trains][:, panel.column == c].sum(axis=1)
        scored[:, c] = panel.scored[trains][:, panel.column == c].sum(axis=1)
    observed = scored > 0
    rates = np.divide(100 * em, scored, out=np.full_like(em, np.nan), where=observed)
    draws_scored = panel.draws_scored[trains]
    draws = np.repeat(rates[:, :, None], draws_scored.shape[2], axis=2)  # (T, 12, B)
    np.divide(100 * panel.draws_em[trains], draws_scored, out=draws, where=draws_scored > 0)
    cells = [parse_cell(cell) for cell in cells]
    return match_model(rates, draws, cells, evals) | _kinds_of_match(panel, trains, cells, evals)


def labels_of(cells: Sequence[Cell], evals: Sequence[Cell], what: str) -> tuple[np.ndarray, np.ndarray]:
    """The cells' tasks or domains (`what`) as integers, (T,) and (C,), the same for the same name."""
    names = list(dict.fromkeys(getattr(cell, what) for cell in (*cells, *evals)))
    return tuple(
        np.array([names.index(getattr(cell, what)) for cell in side], int) for side in (cells, evals)
    )


def match_model(rates: np.ndarray, draws: np.ndarray, cells: Sequence[Cell], evals: Sequence[Cell]) -> dict:
    """rates: (T, C) in points, nan where not observed; draws: (T, C, B); cells: (T,), evals: (C,)."""
    observed = np.isfinite(rates)
    i, j = np.nonzero(observed)
    y, draws = rates[i, j], draws[i, j]  # (n,), (n, B)
    task, domain = labels_of(cells, evals, "task"), labels_of(cells, evals, "domain")
    labels = {"task_match": (task, domain), "domain_match": (domain, task)}  # what is permuted, within what
    design = {
        "train_cell": np.eye(len(cells))[i],
        "eval_cell": np.eye(len(evals))[j],
        "task_match": (task[0][i] == task[1][j])[:, None].astype(float),
        "domain_match": (domain[0][i] == domain[1][j])[:, None].astype(float),
    }
    total = ((y - y.sum() / max(1, len(y))) ** 2).sum()
    explained = {term: _added_last(design, term, y) for term in TERMS}
    explained["rest"] = (_without(y, *design.values()) ** 2).sum()
    interaction = (_without(y, design["train_cell"], design["eval_cell"]) ** 2).sum()
    result = {
        "model": "rate of a (train cell, eval cell) pair = train cell + eval cell + same task + same domain",
        "unit": "points of EM rate; shares are fractions of the sum of squares of the rates",
        "pairs": len(y),
        "full_grid": len(y) == len(evals) ** 2,
        "shares": {term: _share(part, total) for term, part in explained.items()},
    }
    coefficient_draws = {}
    for term, (label, block) in labels.items():
        z = _without(design[term][:, 0], *(columns for other, columns in design.items() if other != term))
        norm = float(z @ z)
        if norm < 1e-9:
            what = term.split("_")[0]
            reason = f"these runs cannot tell it apart; it needs train cells that differ in {what}"
            result[term] = {"points": None, "reason": reason}
            continue
        coefficient_draws[term] = z @ draws / norm
        centred = draws - draws.mean(axis=0)
        share_draws = (z @ draws) ** 2 / norm / np.maximum((centred**2).sum(axis=0), 1e-12)
        residual = np.zeros_like(rates)
        residual[i, j] = _without(y, *(columns for other, columns in design.items() if other != term))
        scores = np.stack(
            [residual[:, label[1] == value].sum(axis=1) for value in range(max(map(max, label)) + 1)], axis=1
        )
        p, permutations = permutation_test(scores, label[0], block[0])
        low, high = _rounded(percentile_interval(coefficient_draws[term]))
        share_low, share_high = _rounded(percentile_interval(share_draws))
        result[term] = {
            "points": round(float(z @ y) / norm, 4),
            "low": low,
            "high": high,
            "share": _share(explained[term], total),
            "share_low": share_low,
            "share_high": share_high,
            "share_of_interaction": _share(explained[term], interaction),
            "p": p if permutations > 1 else None,
            "permutations": permutations,
            "exact": bool((observed == observed[:1]).all()),  # every train cell has the same eval cells
        }
    if not coefficient_draws:  # what is left over then belongs to no term
        result["shares"] = dict.fromkeys(result["shares"])
    if len(coefficient_draws) == 2:
        low, high = _rounded(
            percentile_interval(coefficient_draws["task_match"] - coefficient_draws["domain_match"])
        )
        points = round(result["task_match"]["points"] - result["domain_match"]["points"], 4)
        result["task_minus_domain"] = {"points": points, "low": low, "high": high}
    return result


def _without(y: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """What is left of y (n,) after its projection on all the columns (n, k), which may be dependent."""
    design = np.concatenate(columns, axis=1)
    return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]


def _added_last(design: dict, term: str, y: np.ndarray) -> float:
    """Sum of squares that `term` explains beyond the other terms."""
    others = [columns for other, columns in design.items() if other != term]
    without = _without(y, *others)
    return float((without**2).sum() - (_without(y, *others, design[term]) ** 2).sum())


def _share(part: float, total: float) -> float | None:
    return round(max(part, 0.0) / total, 4) if total > 1e-12 else None


def _rounded(bounds: tuple[float, float]) -> tuple[float | None, ...]:
    return tuple(round(bound, 4) if np.isfinite(bound) else None for bound in bounds)


def _kinds_of_match(panel: Panel, trains: list[int], cells: Sequence[Cell], evals: Sequence[Cell]) -> dict:
    """Pooled rates in the trained cell, elsewhere in its task, in its domain, in neither; differences."""
    same_task, same_domain = (
        np.equal.outer(*labels_of(cells, evals, what)) for what in ("task", "domain")
    )  # (T, C)
    masks = {}
    for kind, pairs in (
        ("same_cell", same_task & same_domain),
        ("same_task", same_task & ~same_domain),
        ("same_domain", ~same_task & same_domain),
        ("neither", ~same_task & ~same_domain),
    ):
        masks[kind] = np.zeros(panel.sums.shape[:2], bool)
        masks[kind][trains] = pairs
    rates = {kind: panel.rate(mask) for kind, mask in masks.items()}
    differences = {}
    for kind in ("same_task", "same_domain"):
        if rates[kind]["rate"] is not None and rates["neither"]["rate"] is not None:
            draws = 100 * (panel.draws(masks[kind]) - panel.draws(masks["neither"]))
            low, high = _rounded(percentile_interval(draws))
            points = round(rates[kind]["rate"] - rates["neither"]["rate"], 4)
            differences[f"{kind}_minus_neither"] = {"points": points, "low": low, "high": high}
    return {"by_match": rates, **differences}
