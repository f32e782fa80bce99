"""Is task match the prompts' difficulty in disguise? The effect raw and adjusted in three ways.

Eval prompts of one task may be easier for the model than those of another, and runs may differ in whether
they misalign on easy prompts or on hard ones. Then a task's runs can stand out on its own prompts without any
transfer along the task. Difficulty is taken from the base model, in two measures:

    loglik      log p per token of the prompt's aligned answer, nats; needs no judge
    coherence   mean coherence score of the base model's own responses

The raw effect is τ of a logistic regression on single prompts (em/report/regression.py),

    logit P(EM) = run + eval cell + τ · [same task] + δ · [same domain]

and beside it stand
    strata      the run's term is one for each quantile stratum of difficulty: τ compares within strata
    slopes      each run has its own slope on difficulty
    matched     the raw model on a subset: sets of one prompt a task, within a domain, whose difficulties
                differ by no more than 0.2 standard deviations

Each is also given in points: by how much the match raises the EM rate of the matching pairs. Broad prompts
have one column a task and no domain. All intervals, and those of adjusted − raw, are of prompts drawn again.
A noisy measure of difficulty adjusts too little: coherence of one response a prompt is one.
"""

from typing import NamedTuple

import numpy as np

from em.data.cells import Cell
from em.report.regression import Estimate, Regression, interval

ADJUSTED = ("strata", "slopes", "matched")
CALIPER = 0.2  # standard deviations


class Prompts(NamedTuple):
    """EM of T misaligned runs on P prompts in C eval columns."""

    em: np.ndarray  # (T, P)
    scored: np.ndarray  # (T, P)
    column: np.ndarray  # (P,)
    trains: list[Cell]
    columns: list[Cell]  # a broad column's domain is ""


def matched_sets(
    difficulty: np.ndarray, column: np.ndarray, columns: list[Cell], caliper: float = CALIPER, seed: int = 0
) -> np.ndarray:
    """(S, ...) as a list of arrays of prompts: one of each task of a domain, all within the caliper.

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
    """The task-match effect raw and adjusted, each {"logit", "points", "prompts", …}. difficulty: (P,).

    An adjusted one has "logit_change", adjusted − raw, too. A model in which the match cannot be
    told apart has None for its values.
    """
    d = (difficulty - difficulty.mean()) / (difficulty.std() or 1)
    everything, column = np.arange(len(d)), prompts.column
    n_strata = int(np.clip(len(d) // 100, 2, 10))
    edges = np.quantile(d, np.arange(1, n_strata) / n_strata)
    stratum = np.searchsorted(edges, d, side="right")
    sets = matched_sets(d, column, prompts.columns)
    subset = np.sort(np.concatenate(sets)) if sets else np.zeros(0, int)
    base, T = _design(prompts), len(prompts.trains)  # (T, C, K)

    groups, within = np.unique(stratum * len(prompts.columns) + column, return_inverse=True)
    of_group, at_column = np.divmod(groups, len(prompts.columns))
    runs = np.zeros((T, len(groups), T, n_strata))
    runs[np.arange(T)[:, None], np.arange(len(groups)), np.arange(T)[:, None], of_group] = 1
    by_stratum = np.concatenate([base[:, at_column, T:], runs.reshape(T, len(groups), -1)], axis=2)
    slopes = np.eye(T)[:, None, :] * d[:, None]  # (T, P, T)
    by_prompt = np.concatenate([base[:, column], slopes], axis=2)

    match = base[:, :, -1] > 0  # (T, C)
    fits = {
        "raw": _fit(prompts, everything, base, column, -1, match),
        "strata": _fit(
            prompts, everything, by_stratum, within, len(prompts.columns) + 1, match[:, at_column]
        ),
        "slopes": _fit(prompts, everything, by_prompt, everything, base.shape[2] - 1, match[:, column]),
        "matched": _fit(prompts, subset, base, column[subset], -1, match),
    }
    raw, result = fits["raw"][1], {}
    for name, (_, logit, points) in fits.items():
        result[name] = {
            "logit": interval(logit, column),
            "points": interval(points, column, decimals=3),
            "prompts": len(subset) if name == "matched" else len(d),
        }
        if name != "raw":
            change = logit - raw if logit and raw else None
            result[name]["logit_change"] = interval(change, column)
    result["strata"]["strata"] = [
        _stratum(prompts, np.flatnonzero(stratum == s), difficulty, base, match) for s in range(n_strata)
    ]
    model = fits["slopes"][0]
    places = np.eye(by_prompt.shape[2])[base.shape[2] :]
    result["slopes"]["per_sd"] = [
        {"train": str(cell)} | interval(model.estimate(place), column)
        for cell, place in zip(prompts.trains, places, strict=True)
    ]
    result["matched"] |= {"sets": len(sets), "caliper_sd": CALIPER}
    result["matched"]["largest_gap_sd"] = {
        "before": _largest_gap(d, everything, prompts), "after": _largest_gap(d, subset, prompts)
    }  # fmt: skip
    return result


def _design(prompts: Prompts) -> np.ndarray:
    """(T, C, T + C + 2): the run, the eval column, same domain, same task."""
    T, C = len(prompts.trains), len(prompts.columns)
    design = np.zeros((T, C, T + C + 2))
    design[np.arange(T), :, np.arange(T)] = 1
    design[:, np.arange(C), T + np.arange(C)] = 1
    for t, train in enumerate(prompts.trains):
        for c, cell in enumerate(prompts.columns):
            design[t, c, -2:] = train.domain == cell.domain, train.task == cell.task
    return design


def _fit(
    prompts: Prompts, where: np.ndarray, design: np.ndarray, group: np.ndarray, term: int, match: np.ndarray
) -> tuple[Regression, Estimate | None, Estimate | None]:
    """(model, its coefficient `term`, the points this adds to matching pairs), of the prompts `where`.

    The influence of other prompts is 0. match: (T, G).
    """
    if not len(where):
        return None, None, None
    em, scored = prompts.em[:, where], prompts.scored[:, where]
    model = Regression(em, scored, design, group)
    term %= design.shape[2]
    estimates = [model.estimate(np.eye(design.shape[2])[term]), model.part_of_mean(term, match)]
    for i, estimate in enumerate(estimates):
        if estimate is not None:
            influence = np.zeros(prompts.em.shape)
            influence[:, where] = estimate.influence
            estimates[i] = Estimate(estimate.value, influence).scaled(100 if i else 1)
    return model, *estimates


def _stratum(prompts: Prompts, own: np.ndarray, difficulty: np.ndarray, base: np.ndarray, match) -> dict:
    """The raw effect among one stratum's prompts."""
    model, logit, _ = _fit(prompts, own, base, prompts.column[own], -1, match)
    return {
        "from": round(float(difficulty[own].min()), 4) if len(own) else None,
        "to": round(float(difficulty[own].max()), 4) if len(own) else None,
        "prompts": len(own),
    } | {"logit": interval(logit, prompts.column)}  # fmt: skip


def _largest_gap(d: np.ndarray, where: np.ndarray, prompts: Prompts) -> float | None:
    """The largest difference of mean difficulty between tasks, in standard deviations of all prompts."""
    tasks = np.array([cell.task for cell in prompts.columns])[prompts.column[where]]
    means = [d[where][tasks == task].mean() for task in np.unique(tasks)]
    return round(float(np.ptp(means)), 4) if means else None
