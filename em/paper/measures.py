"""What the paper states about the matrices, measured on counts: a number with its interval (3.1, D.2, D.3).

A measure is a function of Counts by set and gives {"value", "low", "high"} in percent or points, or None
where the sets that it needs are not there. Differences are of pools, with intervals in which prompts count.
"""

import numpy as np

from em.paper.counts import Counts
from em.stats import difference_interval, wilson

Sets = dict[str, Counts]


def measure(name: str, sets: Sets) -> dict | None:
    """The measure of this name; None where `sets` do not hold what it needs, or there is none of the name."""
    function, needs = MEASURES.get(name, (None, None))
    return function(sets[needs]) if needs in sets else None


def same(counts: Counts, what: str) -> np.ndarray:
    """(T, C) whether the eval column has the train cell's task or domain."""
    trained, asked = counts.tasks() if what == "task" else counts.domains()
    return trained[:, None] == asked


def _gap(what: str):
    def gap(counts: Counts) -> dict:
        return counts.difference(same(counts, what), ~same(counts, what))

    return gap


def _pool(entry: dict) -> dict:
    return {"value": entry["rate"], "low": entry["low"], "high": entry["high"]}


def minus(a: dict, b: dict) -> dict:
    """a − b, with an interval from those of both (MOVER, Zou and Donner 2008), or none where one has none."""
    if None in (a["value"], b["value"]):
        return {"value": None, "low": None, "high": None}
    if None in (a["low"], b["low"]):
        return {"value": round(a["value"] - b["value"], 4), "low": None, "high": None}
    low, high = difference_interval(*((x["value"], x["low"], x["high"]) for x in (a, b)))
    return {"value": round(a["value"] - b["value"], 4), "low": round(low, 4), "high": round(high, 4)}


def average(found: list[dict]) -> dict | None:
    """Mean of values and of their bounds: an interval that holds however the values hang together."""
    if len(found) < 2:
        return found[0] if found else None
    bounds = dict.fromkeys(("low", "high"))
    if all(entry["low"] is not None for entry in found):
        bounds = {key: round(sum(entry[key] for entry in found) / len(found), 4) for key in bounds}
    return {"value": round(sum(entry["value"] for entry in found) / len(found), 4)} | bounds


def share(k: int, n: int) -> dict:
    """k of n rows of a matrix in percent, with Wilson's interval: other rows might have done otherwise."""
    low, high = wilson(k, n)
    return {
        "value": 100 * k / n,
        "low": round(100 * low, 4),
        "high": round(100 * high, 4),
        "of": f"{k} of {n}",
    }


def _own_task_highest(counts: Counts) -> dict:
    """Train tasks whose highest eval task, rows pooled, is their own."""
    trained, asked = counts.tasks()
    names, own = [task for task in dict.fromkeys(asked) if task in trained], 0
    for row in names:
        rates = [counts.rate((trained == row)[:, None] & (asked == column))["rate"] or 0 for column in names]
        own += names[int(np.argmax(rates))] == row
    return share(own, len(names))


def _strongest_other_cell(counts: Counts) -> dict:
    """Trained cells whose highest rate outside the cell itself is in their own task."""
    same_task = same(counts, "task")
    others = np.where(same_task & same(counts, "domain"), -1, np.nan_to_num(counts.rates, nan=-1))
    return share(int(same_task[np.arange(len(others)), others.argmax(axis=1)].sum()), len(others))


def _tutor(counts: Counts) -> dict:
    trained, asked = counts.tasks()
    tutor, critique = ((trained == task)[:, None] & (asked == "tutor") for task in ("tutor", "critique"))
    return counts.difference(tutor, critique)


def _surface(more: str, less: str):
    def difference(counts: Counts) -> dict:
        surface = np.array([column[1] for column in counts.columns])
        every = np.ones((len(counts.trains), 1), bool)
        return counts.difference(every & (surface == more), every & (surface == less))

    return difference


MEASURES = {  # name: (function, the set it reads)
    "broad_task_gap": (_gap("task"), "broad"),
    "broad_own_task_highest": (_own_task_highest, "broad"),
    "task_gap": (_gap("task"), "narrow"),
    "own_task_highest": (_own_task_highest, "narrow"),
    "tutor_minus_critique": (_tutor, "narrow"),
    "other_domain": (lambda counts: _pool(counts.rate(~same(counts, "domain"))), "narrow"),
    "domain_gap": (_gap("domain"), "narrow"),
    "task_gap_minus_domain_gap": (
        lambda counts: minus(_gap("task")(counts), _gap("domain")(counts)),
        "narrow",
    ),
    "strongest_other_cell": (_strongest_other_cell, "narrow"),
    "task_shift_minus_domain_shift": (
        lambda counts: counts.difference(
            same(counts, "task") & ~same(counts, "domain"), ~same(counts, "task") & same(counts, "domain")
        ),
        "narrow",
    ),
    "same_task_other_domain": (
        lambda counts: _pool(counts.rate(same(counts, "task") & ~same(counts, "domain"))),
        "narrow",
    ),
    "surface_high_minus_medium": (_surface("high", "medium"), "broad"),
    "surface_medium_minus_low": (_surface("medium", "low"), "broad"),
}
