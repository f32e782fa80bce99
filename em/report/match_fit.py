"""Task match and domain match over the pairs of any grid: in points, in log odds, and by renaming tasks.

`MatchDesign` has the terms of both fits: least squares of the rates, and logistic regression of the counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from em.data.cells import Cell
from em.stats import permutation_test

TERMS = ("train_cell", "eval_cell", "task_match", "domain_match")
MATCHES = ("task_match", "domain_match")


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


class MatchDesign:
    """The terms of the n observed (train cell, eval cell) pairs.

    at: their places (i, j); terms: {name of TERMS: (n, k)}; known: the matches that these pairs can tell
    apart from the other terms.
    """

    def __init__(self, observed: np.ndarray, cells: Sequence[Cell], evals: Sequence[Cell]):
        """observed: (T, C) bool."""
        self.observed, self.at = observed, np.nonzero(observed)
        i, j = self.at
        self.labels = {f"{what}_match": labels_of(cells, evals, what) for what in ("task", "domain")}
        self.terms = {"train_cell": np.eye(len(cells))[i], "eval_cell": np.eye(len(evals))[j]}
        for term, (train, asked) in self.labels.items():
            self.terms[term] = (train[i] == asked[j])[:, None].astype(float)
        self.known = [term for term in MATCHES if self.alone(term) @ self.alone(term) > 1e-9]

    def alone(self, term: str, *more: np.ndarray) -> np.ndarray:
        """(n,) a match without what all other terms, and the columns `more`, say of it."""
        others = [columns for other, columns in self.terms.items() if other != term]
        return without(self.terms[term][:, 0], *others, *more)

    def weights(self, term: str) -> np.ndarray:
        """(n,): the least-squares coefficient is weights · values."""
        z = self.alone(term)
        return z / (z @ z)

    def square(self, values: np.ndarray) -> np.ndarray:
        """(n,) → (T, C), 0 where not observed."""
        square = np.zeros(self.observed.shape)
        square[self.at] = values
        return square

    def renamed(self, term: str, left: np.ndarray) -> dict:
        """p of the test that gives the eval prompts' tasks, or domains, other names; how fine it can be.

        left: (n,) what the other terms leave in each pair.
        """
        train, asked = self.labels[term]
        some = self.observed.any(axis=0)
        names = np.unique(asked[some])
        has_own = np.isin(train, names)  # other train cells match nothing under the true names
        row, column = np.searchsorted(names, train), np.searchsorted(names, asked)
        i, j = (side[has_own[self.at[0]]] for side in self.at)
        scores = np.zeros((len(names), len(names)))
        np.add.at(scores, (row[i], column[j]), left[has_own[self.at[0]]])
        trained = len(np.unique(train[has_own]))
        ways = math.factorial(len(names)) // math.factorial(len(names) - trained)
        p, tried = permutation_test(scores, np.arange(len(names)), np.zeros(len(names), int))
        tasks, domains = (labels[1][some] for labels in self.labels.values())
        full = len(np.unique(tasks)) * len(np.unique(domains)) == some.sum()
        return {
            "p": p if ways > 1 else None,
            "permutations": ways,
            "smallest_p": 1.0 if ways < 3 else 1 / min(ways, tried),  # of two ways both are as far from 0
            "exact": bool(full and tried >= ways and (self.observed == some).all()),
        }


# -- log odds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogOddsFit:
    """coefficients and gradients: by match; a gradient (n,) is the change for one EM more in each pair.

    left: (n,) EM in each pair beyond what the fit expects.
    """

    coefficients: dict[str, float]
    gradients: dict[str, np.ndarray]
    left: np.ndarray


def fit_log_odds(
    design: MatchDesign, em: np.ndarray, scored: np.ndarray, matches=MATCHES, product=True
) -> LogOddsFit:
    """Logistic regression of the pairs' counts (n,) on the cells' terms and `matches`.

    product: and on train cell × eval cell, whose terms come from a first fit without (Tukey 1949); from three
    train and three eval cells on. Every pair gets a few rows at the overall rate, as many in all as there are
    parameters (Clogg and others 1991), so that no term runs away where a run, or a cell, has no EM.
    """
    n_train, n_eval = design.observed.shape
    terms = [design.terms[term] for term in ("train_cell", "eval_cell", *matches)]
    first = np.concatenate(terms, axis=1)
    overall, few = (em.sum() + 0.5) / (scored.sum() + 1), first.shape[1] / len(em)
    k, n = em + few * overall, scored + few
    odds, inverse, weight = _logistic(first, k, n, np.full(len(em), math.log(overall / (1 - overall))))
    columns, moved = first, inverse @ first.T  # moved: (k, n) coefficients with the counts
    if product and min(n_train, n_eval) > 2:
        i, j = design.at
        to_terms = np.linalg.pinv(first)
        centre = [np.eye(size) - 1 / size for size in (n_train, n_eval)]
        strength, ease = np.split((to_terms @ odds)[: n_train + n_eval], [n_train])
        strength, ease = centre[0] @ strength, centre[1] @ ease
        columns = np.concatenate([first, (strength[i] * ease[j])[:, None]], axis=1)
        by_term = np.zeros_like(first)  # how the product moves with the first fit's terms
        by_term[:, :n_train] = ease[j][:, None] * centre[0][i]
        by_term[:, n_train : n_train + n_eval] = strength[i][:, None] * centre[1][j]
        product_moved = by_term @ to_terms @ first @ moved  # (n, n)
        odds, inverse, weight = _logistic(columns, k, n, odds)
        gamma = (np.linalg.pinv(columns) @ odds)[-1]
        scores = columns.T - gamma * (columns.T * weight) @ product_moved
        scores[-1] += (k - n / (1 + np.exp(-odds))) @ product_moved
        moved = inverse @ scores
    to_terms = np.linalg.pinv(columns)
    values, gradients = to_terms @ odds, to_terms @ columns @ moved
    more = (columns[:, first.shape[1] :],)
    told = [term for term in matches if design.alone(term, *more) @ design.alone(term, *more) > 1e-9]
    place = {term: n_train + n_eval + matches.index(term) for term in told}
    return LogOddsFit(
        {term: float(values[p]) for term, p in place.items()},
        {term: gradients[p] for term, p in place.items()},
        k - n / (1 + np.exp(-odds)),
    )


def _logistic(columns: np.ndarray, k: np.ndarray, n: np.ndarray, odds: np.ndarray):
    """Maximum likelihood by Newton's steps from `odds`: (log odds (n,), inverse information, weights)."""
    for _ in range(100):
        rate = 1 / (1 + np.exp(-odds))
        weight = n * rate * (1 - rate)
        inverse = np.linalg.pinv(columns.T @ (weight[:, None] * columns), rcond=1e-10, hermitian=True)
        step = columns @ (inverse @ (columns.T @ (k - n * rate)))
        far = np.abs(step).max()
        if far < 1e-8:
            break
        odds = odds + step * min(1, 3 / far)
    return odds, inverse, weight
