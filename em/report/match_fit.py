"""Task and domain match by least squares over the pairs of any grid, and the test that renames tasks."""

import math
from collections.abc import Sequence

import numpy as np

from em.data.cells import Cell
from em.stats import permutation_test

TERMS = ("train_cell", "eval_cell", "task_match", "domain_match")
MATCHES = ("task_match", "domain_match")


class MatchFit:
    """Least squares of one value a (train cell, eval cell) pair, (T, C), nan where not observed.

    weights: {"task_match", "domain_match", "task_minus_domain": (T, C)}, of what the grid can tell apart; a
    coefficient is Σ weights · values. left: {term: (n,)} the values without every term but this one.
    """

    def __init__(self, values: np.ndarray, cells: Sequence[Cell], evals: Sequence[Cell], product=False):
        self.observed = np.isfinite(values)
        self.at = i, j = np.nonzero(self.observed)
        self.y = y = values[i, j]  # (n,)
        self.labels = {what: labels_of(cells, evals, what) for what in ("task", "domain")}
        self.design = {"train_cell": np.eye(len(cells))[i], "eval_cell": np.eye(len(evals))[j]}
        for what, (train, asked) in self.labels.items():
            self.design[f"{what}_match"] = (train[i] == asked[j])[:, None].astype(float)
        if product and min(len(cells), len(evals)) > 2:
            terms = np.linalg.lstsq(np.concatenate(list(self.design.values()), axis=1), y, rcond=None)[0]
            strength, ease = terms[: len(cells)], terms[len(cells) : len(cells) + len(evals)]
            self.design["product"] = (strength[i] * ease[j])[:, None]
        self.weights, self.left = {}, {}
        for term in MATCHES:
            others = [columns for other, columns in self.design.items() if other != term]
            z, self.left[term] = without(self.design[term][:, 0], *others), without(y, *others)
            if z @ z > 1e-9:
                self.weights[term] = self._square(z / (z @ z))
        if len(self.weights) == 2:
            self.weights["task_minus_domain"] = self.weights["task_match"] - self.weights["domain_match"]

    def _square(self, values: np.ndarray) -> np.ndarray:
        """(n,) → (T, C), 0 where not observed."""
        square = np.zeros(self.observed.shape)
        square[self.at] = values
        return square

    def coefficient(self, name: str) -> float:
        return float(self.weights[name][self.at] @ self.y)

    def renamed(self, term: str) -> dict:
        """p of the test that gives the eval prompts' tasks, or domains, other names; how fine it can be."""
        train, asked = self.labels[term.removesuffix("_match")]
        names, named = np.unique(asked[self.observed.any(axis=0)], return_inverse=True)
        column = np.zeros(len(asked), int)
        column[self.observed.any(axis=0)] = named
        row = np.searchsorted(names, train)
        has_own = np.isin(train, names)  # other train cells match nothing under the true names
        left = self._square(self.left[term])
        scores = np.zeros((len(names), len(names)))
        for t in np.flatnonzero(has_own):
            np.add.at(scores[row[t]], column, left[t])
        trained = len(np.unique(train[has_own]))
        ways = math.factorial(len(names)) // math.factorial(len(names) - trained)
        p, tried = permutation_test(scores, np.arange(len(names)), np.zeros(len(names), int))
        grid = {(t, d) for t, d in zip(*(self.labels[what][1] for what in self.labels), strict=True)}
        full = len(grid) == math.prod(len(set(labels)) for labels in zip(*grid, strict=True))
        return {
            "p": p if ways > 1 else None,
            "permutations": ways,
            "smallest_p": 1.0 if ways < 3 else 1 / min(ways, tried),  # of two ways both are as far from 0
            "exact": bool(full and tried >= ways and (self.observed == self.observed[:1]).all()),
        }


def labels_of(cells: Sequence[Cell], evals: Sequence[Cell], what: str) -> tuple[np.ndarray, np.ndarray]:
    """The cells' tasks or domains (`what`) as integers, (T,) and (C,), the same for the same name."""
    names = list(dict.fromkeys(getattr(cell, what) for cell in (*cells, *evals)))
    return tuple(
        np.array([names.index(getattr(cell, what)) for cell in side], int) for side in (cells, evals)
    )


def without(y: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """What is left of y (n,) after its projection on all the columns (n, k), which may be dependent."""
    design = np.concatenate(columns, axis=1)
    return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
