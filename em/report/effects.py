"""How far misalignment keeps to the task, and how far to the domain, that it was trained in (paper 3.1).

Two fits over the (train cell, eval cell) pairs of any grid. One is least squares in points, and describes,

    rate = train cell + eval cell + τ · [same task] + δ · [same domain] + rest

and one is a logistic regression of the pairs' counts, and tests,

    log odds = train cell + eval cell + γ · strength · ease + τ · [same task] + δ · [same domain]

The train cell's term takes up how strongly a run is misaligned, the eval cell's how easily its prompts are
answered badly; τ and δ are what matching adds. Where strong runs differ more on easy prompts, and the tasks
that make strong runs have easy prompts too, the product looks like a match, so it has a term of its own.

The test of τ gives the eval prompts' tasks other names, the same in every domain: with four tasks in 4! = 24
ways. Its statistic is the sum over tasks t of the EM that the other terms leave in the pairs (t, name of t);
p is the part of all ways in which it is as far from 0 as with the true names, to either side. It asks whether
the match matters more than another pairing of the same tasks would, whatever structure tasks by tasks has,
and can be no less than 1/24. That of δ renames domains: with three, p can be no less than 1/6.

Intervals are of the coefficients, to first order, with prompts as clusters: what other prompts would give
from these runs. Where every train cell has three runs or more, which differ in seed, the runs are clusters
too, and the intervals are for runs like these. Neither speaks of other tasks; only the test does.

A share is the part of the rates' sum of squares about their mean that a term explains when added last; on a
full grid the terms are orthogonal and the shares add up to 1. Its interval leans to the side of less
structure: resampling adds noise. A draw without a scored row of some pair keeps the pair's rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from em.clusters import LEAST_SEEDS, cluster_variance
from em.data.cells import Cell, parse_cell
from em.report.match_fit import MATCHES, TERMS, MatchDesign, fit_log_odds, labels_of, without
from em.report.panel import Panel
from em.report.score_table import joined
from em.stats import percentile_interval, t_quantile


def match_effects(panel: Panel) -> dict:
    """Both coefficients in points and log odds with intervals, shares and p; pooled rates by kind of match.

    A term that the grid at hand cannot tell apart has None and says why.
    """
    runs = {train.start: i for i, train in enumerate(panel.trains) if train.misaligned}
    runs = {parse_cell(cell): i for cell, i in runs.items() if panel.scored[i].any()}
    cells, evals = list(runs), panel.table.grid.cells
    trains = list(runs.values())
    counts = _run_counts(panel, trains)
    result = effects_of(counts, panel.draws_em[trains], panel.draws_scored[trains], cells, evals)
    return result | _kinds_of_match(panel, trains, cells, evals)


def effects_of(
    counts: "RunCounts", draws_em: np.ndarray, draws_scored: np.ndarray, cells: Sequence[Cell],
    evals: Sequence[Cell],
) -> dict:  # fmt: skip
    """`match_effects` without the pooled rates. draws: (T, C, B) EM and scored rows, resampled."""
    k, n = counts.pairs(len(evals))
    rates = np.divide(100 * k, n, out=np.full_like(k, np.nan), where=n > 0)
    draws = np.repeat(rates[:, :, None], draws_scored.shape[2], axis=2)  # (T, C, B)
    np.divide(100 * draws_em, draws_scored, out=draws, where=draws_scored > 0)
    result, tests = match_model(rates, draws, cells, evals), log_odds_effects(counts, cells, evals)
    design = MatchDesign(n > 0, cells, evals)
    per_row = {t: design.square(100 * design.weights(t) / n[design.at]) for t in design.known}
    for name, slope in with_difference(per_row).items():
        half = counts.half_width(slope, rates / 100)
        result[name] |= _bounds("low", "high", result[name]["points"], half) | tests[name]
    return result | {name: tests[name] for name in ("scope", "test")}


def with_difference(by_match: dict) -> dict:
    """And "task_minus_domain", where there are both."""
    if len(by_match) < 2:
        return by_match
    return by_match | {"task_minus_domain": by_match["task_match"] - by_match["domain_match"]}


# -- in points, to describe ----------------------------------------------------------------------------


def match_model(rates: np.ndarray, draws: np.ndarray, cells: Sequence[Cell], evals: Sequence[Cell]) -> dict:
    """Coefficients and shares. rates: (T, C) in points, nan where not observed; draws: (T, C, B)."""
    fit = MatchDesign(np.isfinite(rates), cells, evals)
    y, design, draws = rates[fit.at], fit.terms, draws[fit.at]  # (n,), (n, B)
    weights = {term: fit.weights(term) for term in fit.known}
    points = {name: float(w @ y) for name, w in with_difference(weights).items()}
    total = ((y - y.sum() / max(1, len(y))) ** 2).sum()
    explained = {term: _added_last(design, term, y) for term in TERMS}
    explained["rest"] = (without(y, *design.values()) ** 2).sum()
    interaction = (without(y, design["train_cell"], design["eval_cell"]) ** 2).sum()
    result = {
        "model": "rate of a (train cell, eval cell) pair = train cell + eval cell + same task + same domain; "
        "its log odds the same + train cell × eval cell",
        "unit": "points of EM rate, log odds; shares are fractions of the sum of squares of the rates",
        "pairs": len(y),
        "full_grid": len(y) == len(evals) ** 2,
        "shares": {term: _share(part, total) for term, part in explained.items()},
    }
    for term in MATCHES:
        if term not in points:
            what = term.removesuffix("_match")
            reason = f"these runs cannot tell it apart; it needs train cells that differ in {what}"
            result[term] = {"points": None, "reason": reason}
            continue
        weight, centred = weights[term], draws - draws.mean(axis=0)
        share_draws = (weight @ draws) ** 2 / (weight @ weight) / np.maximum((centred**2).sum(axis=0), 1e-12)
        share_low, share_high = _rounded(*percentile_interval(share_draws))
        result[term] = {
            "points": round(points[term], 4),
            "low": None,
            "high": None,
            "share": _share(explained[term], total),
            "share_low": share_low,
            "share_high": share_high,
            "share_of_interaction": _share(explained[term], interaction),
        }
    if not points:  # what is left over then belongs to no term
        result["shares"] = dict.fromkeys(result["shares"])
    if "task_minus_domain" in points:
        gap = round(points["task_minus_domain"], 4)
        result["task_minus_domain"] = {"points": gap, "low": None, "high": None}
    return result


def _added_last(design: dict, term: str, y: np.ndarray) -> float:
    """Sum of squares that `term` explains beyond the other terms."""
    others = [columns for other, columns in design.items() if other != term]
    left = without(y, *others)
    return float((left**2).sum() - (without(y, *others, design[term]) ** 2).sum())


def _share(part: float, total: float) -> float | None:
    return round(max(part, 0.0) / total, 4) if total > 1e-12 else None


def _rounded(*bounds: float) -> tuple[float | None, ...]:
    return tuple(round(bound, 4) if np.isfinite(bound) else None for bound in bounds)


def _bounds(low: str, high: str, value: float, half: float) -> dict:
    return dict(zip((low, high), _rounded(value - half, value + half), strict=True))


# -- in log odds, to test ------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunCounts:
    """EM and scored rows of each run and prompt, (R, P); several runs may be of one train cell.

    cell (R,): a run's place among the train cells; column and stratum (P,) as in a Panel.
    """

    em: np.ndarray
    scored: np.ndarray
    cell: np.ndarray
    column: np.ndarray
    stratum: np.ndarray

    @classmethod
    def of_pairs(cls, em: np.ndarray, scored: np.ndarray) -> "RunCounts":
        """From the counts (T, C) of one run a train cell, where nothing else is known of the rows.

        Every row gets a prompt of its own. Intervals are then too wide rather than too narrow where runs
        were asked the same prompts, since matches compare runs on one eval cell.
        """
        run, column = (np.repeat(a.ravel(), scored.ravel().astype(int)) for a in np.indices(scored.shape))
        place = np.concatenate([np.arange(n) for n in scored.ravel().astype(int)])
        is_em = place < em[run, column]
        ems, ones = np.zeros((2, len(scored), len(run)))
        ems[run, np.arange(len(run))], ones[run, np.arange(len(run))] = is_em, 1
        return cls(ems, ones, np.arange(len(scored)), column, column)

    def pairs(self, n_columns: int) -> tuple[np.ndarray, np.ndarray]:
        """EM and scored rows of each (train cell, eval cell), (T, C), its runs pooled."""
        size = (self.cell.max(initial=-1) + 1, n_columns)
        bins = (self.cell[:, None] * n_columns + self.column).ravel()
        k, n = (np.bincount(bins, x.ravel(), size[0] * size[1]) for x in (self.em, self.scored))
        return k.reshape(size), n.reshape(size)

    @property
    def runs_vary(self) -> bool:
        """Whether every train cell has runs enough to say how they vary."""
        return len(self.cell) > 0 and bool(np.bincount(self.cell).min() >= LEAST_SEEDS)

    def half_width(self, per_row: np.ndarray, rates: np.ndarray) -> float:
        """Half the interval of a number; what one EM more in a pair adds to it, and its rate, both (T, C)."""
        place = self.cell[:, None], self.column
        errors = per_row[place] * (self.em - np.nan_to_num(rates)[place] * self.scored)  # (R, P)
        asked = self.scored.any(axis=0)
        of_prompt, stratum = errors.sum(axis=0)[asked], self.stratum[asked]
        freedom = len(of_prompt) - len(np.unique(stratum))
        variance = cluster_variance(of_prompt, stratum)
        if self.runs_vary:  # clustered both ways, by run and by prompt (Cameron, Gelbach and Miller 2011)
            of_run = cluster_variance(errors.sum(axis=1), self.cell)
            variance = max(variance, of_run, variance + of_run - float((errors**2).sum()))
            freedom = len(self.cell) - len(np.unique(self.cell))
        return t_quantile(max(freedom, 1)) * math.sqrt(variance)


def _run_counts(panel: Panel, trains: list[int]) -> RunCounts:
    """The runs of a panel's trains, told apart by their condition, such as their seed."""
    table, n_prompts = panel.table, len(panel.column)
    mine = np.isin(table.train, trains)
    run = np.unique(joined(table.train, table.condition)[mine], return_inverse=True)[1]
    first = np.unique(run, return_index=True)[1]
    bins, size = run * n_prompts + panel.row_prompt[mine], (len(first), n_prompts)
    em, scored = (
        np.bincount(bins, flag[mine], len(first) * n_prompts).reshape(size)
        for flag in (table.em(), table.scored)
    )
    cell = np.array([trains.index(t) for t in table.train[mine][first]], int)
    return RunCounts(em, scored, cell, panel.column, panel.stratum)


def log_odds_effects(counts: RunCounts, cells: Sequence[Cell], evals: Sequence[Cell]) -> dict:
    """The test of each match and its coefficient in log odds. cells: (T,), evals: (C,).

    {"task_match", "domain_match": {"logit", "logit_low", "logit_high", "logit_without_product", "p",
     "permutations", "smallest_p", "exact", "scope"}, "task_minus_domain": without those of the test,
     "scope", "test"}
    """
    k, n = counts.pairs(len(evals))
    design = MatchDesign(n > 0, cells, evals)
    em, scored = k[design.at], n[design.at]
    rates = design.square(em / scored)
    fit, plain = (fit_log_odds(design, em, scored, product=product) for product in (True, False))
    value, before = with_difference(fit.coefficients), with_difference(plain.coefficients)
    gradients = with_difference(fit.gradients)
    result = {
        "scope": "runs like these" if counts.runs_vary else "these runs",
        "test": "tasks, or domains, of the eval prompts under all other names, jointly; two-sided",
    }
    for name in (*MATCHES, "task_minus_domain"):
        values = dict.fromkeys(("logit", "logit_low", "logit_high", "logit_without_product"))
        if name in value:
            half = counts.half_width(design.square(gradients[name]), rates)
            values = {"logit": round(value[name], 4)} | _bounds("logit_low", "logit_high", value[name], half)
            values["logit_without_product"] = round(before[name], 4)
        if name in design.known:
            others = tuple(match for match in MATCHES if match != name)
            values |= design.renamed(name, fit_log_odds(design, em, scored, others).left)
        result[name] = values | {"scope": result["scope"]}
    return result


# -- pooled rates --------------------------------------------------------------------------------------


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
    result = {"by_match": {kind: panel.rate(mask) for kind, mask in masks.items()}}
    for kind in ("same_task", "same_domain"):
        difference = panel.difference(masks[kind], masks["neither"])
        if difference is not None:
            result[f"{kind}_minus_neither"] = difference
    return result
