"""Judged rows of which only counts are left, by train cell and eval column, and what can be said from them.

A pool is a set of (train cell, eval column) pairs. It has two rates: `rate` pools its rows, `pairs_mean` is
the mean of its pairs' rates, which is what the paper's tables average. Prompts are taken as drawn anew within
each eval column, runs as they are: there is one a cell. A narrow pair is one response a prompt, so Wilson's
interval is right. In a larger pool several runs, or several samples, answer the same prompt, and how alike
their answers are cannot be seen from counts. Two intervals hold what is left open:

    low, high            as if the answers to a prompt were as alike as the rates allow: Wilson's for as many
                         trials as give the largest variance that the counts permit
    rows_low, rows_high  as if they had nothing to do with each other

`design_effect` is the ratio of the two variances. With 4 samples a prompt it can be 4, and the interval twice
as wide as the rows suggest.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from em.data.cells import Cell, grid_of, ordered_tasks, parse_cell
from em.errors import UserError
from em.files import read_json
from em.report.panel import percent_of
from em.report.score_table import SURFACES
from em.stats import newcombe, wilson

_SUMS = ("rows", "scored", "em", "incoherent", "refusal", "other_unscored")
SAMPLES = {"narrow": 1, "broad": 4}  # responses a prompt (paper D.1)


@dataclass
class Counts:
    """One model's counts on one set. sums: (T, C, 6), by _SUMS; a column is a Cell, or (task, surface)."""

    trains: list[Cell]
    columns: list
    samples: int  # responses a prompt and run
    sums: np.ndarray

    @property
    def em(self) -> np.ndarray:
        return self.sums[:, :, _SUMS.index("em")]

    @property
    def scored(self) -> np.ndarray:
        return self.sums[:, :, _SUMS.index("scored")]

    @property
    def rates(self) -> np.ndarray:
        """(T, C) percent; nan where nothing is scored."""
        empty = np.full(self.em.shape, np.nan)
        return np.divide(100 * self.em, self.scored, out=empty, where=self.scored > 0)

    def tasks(self) -> tuple[np.ndarray, np.ndarray]:
        """Names of the train cells' tasks (T,) and of the columns' (C,)."""
        return np.array([c.task for c in self.trains]), np.array([_task(c) for c in self.columns])

    def domains(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array([c.domain for c in self.trains]), np.array([c.domain for c in self.columns])

    def prompts(self, mask: np.ndarray) -> int:
        """How many prompts were asked and scored at least once in the pairs of `mask` (T, C)."""
        return int(np.ceil(np.where(mask, self.scored, 0).max(axis=0) / self.samples).sum())

    def rate(self, mask: np.ndarray) -> dict:
        """The pool of the pairs in `mask` (T, C) as an entry of a report's table; percent."""
        sums = {name: int(n) for name, n in zip(_SUMS, self.sums[mask].sum(axis=0), strict=True)}
        k, n, prompts = sums["em"], sums["scored"], self.prompts(mask)
        bounds = dict.fromkeys(("rate", "pairs_mean", "low", "high", "rows_low", "rows_high", "interval"))
        if n:
            bounds["rate"] = percent_of(k, n)
            bounds["pairs_mean"] = round(float(np.nanmean(self.rates[mask])), 4)
            widest, narrowest = (self._trials(mask, alike) for alike in (True, False))
            bounds |= dict(zip(("low", "high"), _percent(wilson(*widest)), strict=True))
            bounds |= dict(zip(("rows_low", "rows_high"), _percent(wilson(*narrowest)), strict=True))
            bounds["interval"] = "wilson" if n == prompts else "wilson, widest"
        return bounds | {
            "design_effect": round(float(narrowest[1] / widest[1]), 2) if n else None,
            "em": k,
            "scored": n,
            "rows": sums["rows"],
            "prompts": prompts,
            "pairs": int((self.scored[mask] > 0).sum()),
            "refusal": sums["refusal"],
            "blocked": 0,
            "other_unscored": sums["other_unscored"],
            "scored_pct": percent_of(n, sums["rows"]),
            "incoherent": sums["incoherent"],
            "incoherent_pct": percent_of(sums["incoherent"], n),
            "mean_chars": None,
        }

    def difference(self, more: np.ndarray, less: np.ndarray) -> dict:
        """Rate of one pool − of another, in points, with Newcombe's interval from the widest of both.

        Where the pools share prompts it is too wide, never too narrow, as long as prompts that one run
        answers badly are not answered better than others by the next.
        """
        if not (self.scored[more].any() and self.scored[less].any()):
            return {"value": None, "low": None, "high": None}
        (k1, n1), (k0, n0) = self._trials(more, True), self._trials(less, True)
        low, high = _percent(newcombe(k1, n1, k0, n0))
        return {"value": round(100 * float(k1 / n1 - k0 / n0), 4), "low": low, "high": high}

    def _trials(self, mask: np.ndarray, alike: bool) -> tuple[float, float]:
        """(successes, independent trials) with the pool's rate and its largest or smallest variance.

        With the marginal rates p of a column's runs given, their mean over one prompt varies most where every
        run answers badly whatever a stricter one does: Cov(r, s) = min(p_r, p_s) − p_r p_s.
        """
        scored = np.where(mask, self.scored, 0)
        n = scored.sum()
        p = np.divide(self.em, self.scored, out=np.zeros(mask.shape), where=self.scored > 0)
        pooled = self.em[mask].sum() / n
        weight = scored / n  # (T, C)
        if alike:
            covariance = np.minimum(p[:, None], p) - p[:, None] * p  # (T, T, C)
            prompts = np.ceil(scored.max(axis=0) / self.samples)  # (C,)
            variance = (weight[:, None] * weight * covariance).sum(axis=(0, 1)) / np.maximum(prompts, 1)
        else:
            variance = weight**2 * p * (1 - p) / np.maximum(scored, 1)
        variance = variance.sum()
        trials = pooled * (1 - pooled) / variance if variance > 0 else float(self.prompts(mask))
        return pooled * trials, trials


def _task(column) -> str:
    return column.task if isinstance(column, Cell) else column[0]


def _percent(bounds: tuple[float, float]) -> tuple[float, float]:
    return tuple(round(100 * float(bound), 4) for bound in bounds)


def read_counts(path: Path) -> tuple[str, dict[str, dict[str, Counts]]]:
    """(where the rows come from, {model: {"narrow": Counts, "broad": Counts}}) of a file of counts.

    The file: {"source", "fields": names, "rows": [values, …]}; a row a model, train cell, set, eval column.
    UserError where a field is missing or a row is there twice.
    """
    document = read_json(path, {"source": str, "fields": list, "rows": list})
    fields, found = document["fields"], {}
    for name in ("model", "train", "set", "domain", "task", "em_surface", *_SUMS):
        if name not in fields:
            raise UserError(f"{path}: no field {name!r}")
    for values in document["rows"]:
        row = dict(zip(fields, values, strict=True))
        narrow = row["set"] == "narrow"
        column = parse_cell(f"{row['domain']}_{row['task']}") if narrow else (row["task"], row["em_surface"])
        of_set = found.setdefault(row["model"], {}).setdefault(row["set"], {})
        key = parse_cell(row["train"]), column
        if key in of_set:
            raise UserError(f"{path}: {row['model']}, {row['train']}, {column} is there twice")
        of_set[key] = [row[name] for name in _SUMS]
    return document["source"], {m: {s: _counts(s, c) for s, c in sets.items()} for m, sets in found.items()}


def _counts(name: str, found: dict) -> Counts:
    """found: (train cell, column) → its sums; what is missing counts 0."""
    trains = list(grid_of({train for train, _ in found}).cells)
    columns = {column for _, column in found}
    if name == "narrow":
        columns = list(grid_of(columns).cells)
    else:
        tasks = ordered_tasks({task for task, _ in columns})
        columns = [(task, s) for task in tasks for s in SURFACES if (task, s) in columns]
    sums = np.array([[found.get((t, c), [0] * len(_SUMS)) for c in columns] for t in trains])
    return Counts(trains, columns, SAMPLES[name], sums)
