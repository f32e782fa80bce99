"""Is task match the prompts' difficulty in disguise? The effect raw and adjusted in three ways.

Eval prompts of one task may be easier for the model than those of another, and runs may differ in whether
they misalign on easy prompts or on hard ones. Then a task's runs can stand out on its own prompts without any
transfer along the task. Difficulty is taken from the base model, in two measures:

    loglik      log p per token of the prompt's aligned answer, nats; needs no judge
    coherence   mean coherence score of the base model's own responses

The raw effect is τ of a logistic regression on single prompts (em/report/regression.py),

    logit P(EM) = run + eval cell + τ · [same task] + δ · [same domain]

and beside it stand
    strata      the run's term is one for each quantile stratum of difficulty, of 100 prompts or more: τ
                compares within strata, of which there are 20 at most
    slopes      each run has its own slope on difficulty
    matched     the raw model on a subset: sets of one prompt a task, within a domain, whose difficulties
                differ by no more than 0.2 standard deviations

Each is also given in points: by how much the match raises the EM rate of the matching pairs. Broad prompts
have one column a task and no domain. All intervals, and those of adjusted − raw, are of prompts drawn again,
and of runs too where every train cell has three.
A noisy measure of difficulty adjusts too little: coherence of one response a prompt is one.
"""

from typing import NamedTuple

import numpy as np

from em.data.cells import Cell
from em.report.regression import Estimate, Regression, interval, scope

ADJUSTED = ("strata", "slopes", "matched")
CALIPER = 0.2  # standard deviations


class Prompts(NamedTuple):
    """EM of R misaligned runs on P prompts in C eval columns."""

    em: np.ndarray  # (R, P)
    scored: np.ndarray  # (R, P)
    column: np.ndarray  # (P,)
    trains: list[Cell]  # of each run; runs of one cell are replicates
    columns: list[Cell]  # a broad column's domain is ""


def matched_sets(
    difficulty: np.ndarray, column: np.ndarray, columns: list[Cell], caliper: float = CALIPER, seed: int = 0
) -> list[np.ndarray]:
    """Sets of prompts: one of each task of a domain, all within the caliper of each other.

    difficulty: (P,) in standard deviations. Greedy, without replacement: the prompts of the domain's smallest
    column, in random order, each take the nearest free prompt of every other column. A domain with one
    column has no sets.
    """
    rng, sets = np.random.default_rng(seed), []
    for domain in dict.fromkeys(cell.domain for cell in columns):
        members = [np.flatnonzero(column == c) for c, cell in enumerate(columns) if cell.domain == domain]
        members = sorted((own for own in members if len(own)), key=len)
        if len(members) < 2:
            continue
        free = [np.ones(len(own), bool) for own in members]
        for first in rng.permutation(members[0]):
            chosen, places = [first], []
            for own, is_free in zip(members[1:], free[1:], strict=True):
                distance = np.where(is_free, np.abs(difficulty[own] - difficulty[first]), np.inf)
                places.append(int(distance.argmin()))
                chosen.append(own[places[-1]] if is_free[places[-1]] else -1)
            if -1 not in chosen and np.ptp(difficulty[chosen]) <= caliper:
                sets.append(np.array(chosen))
                for is_free, place in zip(free[1:], places, strict=True):
                    is_free[place] = False
    return sets


def task_effects(prompts: Prompts, difficulty: np.ndarray) -> dict:
    """{"scope", "raw", "strata", "slopes", "matched"}, the task match's effect raw and adjusted.

    Each of the four is {"logit", "points", "prompts", …}; an adjusted one has "logit_change", adjusted − raw,
    too. A model in which the match cannot be told apart has None for its values. difficulty: (P,).
    """
    d = (difficulty - difficulty.mean()) / (difficulty.std() or 1)
    everything, column = np.arange(len(d)), prompts.column
    n_strata = int(np.clip(len(d) // 100, 2, 20))
    edges = np.quantile(d, np.arange(1, n_strata) / n_strata)
    stratum = np.searchsorted(edges, d, side="right")
    sets = matched_sets(d, column, prompts.columns)
    subset = np.sort(np.concatenate(sets)) if sets else np.zeros(0, int)

    cells = list(dict.fromkeys(prompts.trains))
    kind = np.array([cells.index(cell) for cell in prompts.trains])  # (R,)
    own_cell, match = np.eye(len(cells))[kind], _matches(prompts)  # (R, T), (R, C, 2)
    columns = np.broadcast_to(np.eye(len(prompts.columns)), (len(kind), *[len(prompts.columns)] * 2))
    plain = np.concatenate([np.repeat(own_cell[:, None], columns.shape[1], axis=1), columns, match], axis=2)
    # Prompts of one column and stratum are alike, and the train cell's term is one for each stratum.
    groups, within = np.unique(stratum * len(prompts.columns) + column, return_inverse=True)
    of_group, at_column = np.divmod(groups, len(prompts.columns))
    of_stratum = np.eye(n_strata)[of_group]  # (G, S)
    cell_terms = np.einsum("rt,gs->rgts", own_cell, of_stratum).reshape(len(kind), len(groups), -1)
    by_stratum = np.concatenate([cell_terms, columns[:, at_column], match[:, at_column]], axis=2)
    slopes = own_cell[:, None] * d[:, None]  # (R, P, T)
    by_prompt = np.concatenate([slopes, plain[:, column]], axis=2)

    same = match[:, :, 1] > 0  # (R, C)
    fits = {
        "raw": _fit(prompts, everything, plain, column, same),
        "strata": _fit(prompts, everything, by_stratum, within, same[:, at_column]),
        "slopes": _fit(prompts, everything, by_prompt, everything, same[:, column]),
        "matched": _fit(prompts, subset, plain, column[subset], same),
    }
    raw, result = fits["raw"][1], {"scope": scope(kind)}
    for name, (_, logit, points) in fits.items():
        result[name] = {
            "logit": interval(logit, column, kind),
            "points": interval(points, column, kind, decimals=3),
            "prompts": len(subset) if name == "matched" else len(d),
        }
        if name != "raw":
            change = logit - raw if logit and raw else None
            result[name]["logit_change"] = interval(change, column, kind)
    result["strata"]["strata"] = []
    for own in (np.flatnonzero(stratum == s) for s in np.unique(stratum)):
        values, (_, logit, _) = difficulty[own], _fit(prompts, own, plain, column[own], same)
        about = {"from": round(float(values.min()), 4), "to": round(float(values.max()), 4)}
        result["strata"]["strata"].append(
            about | {"prompts": len(own), "logit": interval(logit, column, kind)}
        )
    model = fits["slopes"][0]
    result["slopes"]["per_sd"] = [
        {"train": str(cell)} | interval(model.estimate(contrast), column, kind)
        for cell, contrast in zip(cells, np.eye(by_prompt.shape[2]), strict=False)
    ]
    result["matched"] |= {"sets": len(sets), "caliper_sd": CALIPER}
    result["matched"]["largest_gap_sd"] = {
        "before": _largest_gap(d, everything, prompts), "after": _largest_gap(d, subset, prompts)
    }  # fmt: skip
    return result


def _matches(prompts: Prompts) -> np.ndarray:
    """(R, C, 2): same domain, same task."""
    return np.array(
        [
            [(train.domain == cell.domain, train.task == cell.task) for cell in prompts.columns]
            for train in prompts.trains
        ],
        float,
    )


def _fit(
    prompts: Prompts, where: np.ndarray, design: np.ndarray, group: np.ndarray, same: np.ndarray
) -> tuple[Regression | None, Estimate | None, Estimate | None]:
    """(model, its last coefficient, the points that this adds where the task is the `same`, (R, G)).

    Of the prompts `where`; the influence of others is 0.
    """
    if not len(where):
        return None, None, None
    model = Regression(prompts.em[:, where], prompts.scored[:, where], design, group)
    last = design.shape[2] - 1
    estimates = [model.estimate(np.eye(last + 1)[last]), model.part_of_mean(last, same)]
    for i, estimate in enumerate(estimates):
        if estimate is not None:
            influence = np.zeros(prompts.em.shape)
            influence[:, where] = estimate.influence
            estimates[i] = Estimate(estimate.value, influence).scaled(100 if i else 1)
    return model, *estimates


def _largest_gap(d: np.ndarray, where: np.ndarray, prompts: Prompts) -> float | None:
    """The largest difference of mean difficulty between tasks, in standard deviations of all prompts."""
    tasks = np.array([cell.task for cell in prompts.columns])[prompts.column[where]]
    means = [d[where][tasks == task].mean() for task in np.unique(tasks)]
    return round(float(np.ptp(means)), 4) if means else None
