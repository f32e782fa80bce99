"""Regression on runs by prompts: logistic for EM, least squares for margins; intervals by prompt and by run.

An observation is one run on one prompt: how many of its scored responses are EM, of how many, or a sum of
margins. Logistic fits take Firth's penalty (Biometrika 1993), which removes the first-order bias of maximum
likelihood and leaves every coefficient finite, also that of a run without any EM.

An estimate carries its influence function: what each run and prompt adds to its error, to first order. The
interval follows from it as if prompts were drawn again within their eval column, the same for all runs (the
infinitesimal jackknife, that is a sandwich with prompts as clusters). So it says what other prompts would
have given from *these runs*. Where every kind of run has replicates, `interval` draws runs again as well
(Cameron, Gelbach and Miller 2011), and speaks of *runs like these*. Estimates of the same runs and prompts
can be subtracted: the difference is paired.
"""

import math
from typing import NamedTuple

import numpy as np

from em.clusters import LEAST_SEEDS, cluster_variance, merged
from em.stats import t_quantile


class Estimate(NamedTuple):
    value: float
    influence: np.ndarray  # (R, P); sums to about 0

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.influence - other.influence)

    def scaled(self, factor: float) -> "Estimate":
        return Estimate(factor * self.value, factor * self.influence)


class Regression:
    """E[outcome] = design · coefficients, or its logit. Columns may depend on each other.

    values, counts: (R, P) sum of outcomes and their number for each run and prompt; where the number is 0
    nothing was observed. design: (R, G, K) for G groups of prompts with the same regressors. group: (P,).
    """

    def __init__(
        self,
        values: np.ndarray,
        counts: np.ndarray,
        design: np.ndarray,
        group: np.ndarray,
        logit: bool = True,
    ):
        n_groups = design.shape[1]
        y, n = (
            np.stack([np.bincount(group, row, n_groups) for row in each]).ravel() for each in (values, counts)
        )  # (R·G,)
        X = design.reshape(len(y), -1)
        X, y, n = X[n > 0], y[n > 0], n[n > 0]
        self.coefficients = _firth(X, y, n) if logit else _pseudo_inverse(X.T @ (n[:, None] * X)) @ (X.T @ y)
        self.design, self.group, self.counts, self.logit = design, group, counts, logit
        self.fitted = self._mean(design @ self.coefficients)  # (R, G)
        weight = _mean_and_weight(X @ self.coefficients, n)[1] if logit else n
        self._information = X.T @ (weight[:, None] * X)
        self._inverse = _pseudo_inverse(self._information)
        self.residual = values - counts * self.fitted[:, group]  # (R, P)

    def _mean(self, linear: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-linear)) if self.logit else linear

    def estimate(self, contrast: np.ndarray) -> Estimate | None:
        """contrast · coefficients, (K,); None where the observations cannot tell it."""
        if not self._can_tell(contrast):
            return None
        return Estimate(float(contrast @ self.coefficients), self._influence(contrast))

    def _can_tell(self, contrast: np.ndarray) -> bool:
        rest = contrast - self._information @ (self._inverse @ contrast)
        return bool(np.abs(rest).max() < 1e-6 * np.abs(contrast).max())

    def _influence(self, gradient: np.ndarray) -> np.ndarray:
        return self.residual * (self.design @ (self._inverse @ gradient))[:, self.group]

    def part_of_mean(self, term: int, where: np.ndarray) -> Estimate | None:
        """By how much coefficient `term` raises the mean outcome of the observations `where`, (R, G) bool."""
        if not self._can_tell(np.eye(len(self.coefficients))[term]):
            return None
        counts = self.counts * where[:, self.group]  # (R, P)
        without = self.design * (np.arange(len(self.coefficients)) != term)
        less = self._mean(without @ self.coefficients)
        added, total = self.fitted - less, counts.sum()
        value = float((counts * added[:, self.group]).sum() / total)
        slopes = (self.fitted * (1 - self.fitted), less * (1 - less)) if self.logit else (1, 1)
        change = slopes[0] * np.moveaxis(self.design, 2, 0) - slopes[1] * np.moveaxis(without, 2, 0)
        by_group = np.stack([np.bincount(self.group, row, added.shape[1]) for row in counts])
        gradient = (by_group * change).sum(axis=(1, 2)) / total  # (K,)
        own = counts * (added[:, self.group] - value) / total  # other prompts would have another mean
        return Estimate(value, self._influence(gradient) + own)


def _mean_and_weight(linear: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = 1 / (1 + np.exp(-linear))
    return p, n * p * (1 - p)


def _firth(X: np.ndarray, y: np.ndarray, n: np.ndarray, steps: int = 100) -> np.ndarray:
    """(K,) penalised by Jeffreys' prior: as if h/2 EM were among h more responses, h being the leverage."""
    coefficients = np.zeros(X.shape[1])
    for _ in range(steps):
        p, weight = _mean_and_weight(X @ coefficients, n)
        inverse = _pseudo_inverse(X.T @ (weight[:, None] * X))
        leverage = weight * ((X @ inverse) * X).sum(axis=1)
        step = inverse @ (X.T @ (y - n * p + leverage * (0.5 - p)))
        largest = np.abs(step).max(initial=0.0)
        coefficients += step * min(1.0, 2 / max(largest, 1e-300))  # far from the optimum a step can overshoot
        if largest < 1e-7:
            break
    return coefficients


def _pseudo_inverse(information: np.ndarray) -> np.ndarray:
    """A generalised inverse (K, K) of a singular information: enough for what can be told from the data."""
    scale = np.sqrt(np.maximum(information.diagonal(), 0))
    scale[scale == 0] = 1
    values, vectors = np.linalg.eigh(information / np.outer(scale, scale))
    kept = values > 1e-10 * max(values.max(initial=0.0), 1e-300)
    vectors = vectors[:, kept] / scale[:, None]
    return (vectors / values[kept]) @ vectors.T


def interval(
    estimate: Estimate | None, strata: np.ndarray, kind: np.ndarray | None = None, decimals: int = 4
) -> dict:
    """{"value", "low", "high"}, 95 %; all None where there is no estimate, no bounds for a single prompt.

    strata: (P,) the eval column of each prompt. kind: (R,) which runs are replicates of each other; they
    count as such where `replicated(kind)`.
    """
    if estimate is None:
        return dict.fromkeys(("value", "low", "high"))
    influence, strata = estimate.influence, merged(strata)
    of_prompt, freedom = influence.sum(axis=0), len(strata) - len(np.unique(strata))
    variance = cluster_variance(of_prompt, strata)
    if kind is not None and replicated(kind):
        of_run = cluster_variance(influence.sum(axis=1), kind)
        variance = max(variance, of_run, variance + of_run - float((influence**2).sum()))
        freedom = len(kind) - len(np.unique(kind))
    low = high = None
    if freedom > 0:
        half = t_quantile(min(freedom, 1000)) * math.sqrt(
            max(variance, 0.0)
        )  # rounding can leave less than 0
        low, high = round(estimate.value - half, decimals), round(estimate.value + half, decimals)
    return {"value": round(estimate.value, decimals), "low": low, "high": high}


def replicated(kind: np.ndarray) -> bool:
    """Whether every kind of run is there often enough to say how such runs vary."""
    return bool((np.unique(kind, return_counts=True)[1] >= LEAST_SEEDS).all())


def scope(kind: np.ndarray) -> str:
    """What the intervals of these runs are about."""
    return "runs like these" if replicated(kind) else "these runs"
