"""Intervals for counts. All rates are fractions in [0, 1]; intervals are two-sided 95 %."""

import itertools
import math

import numpy as np

Z95 = 1.959963984540054


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson score interval of k successes in n trials; (0, 1) where n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n the bound is the rate itself, which rounding would miss.
    return 0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half


def newcombe(k1: int, n1: int, k0: int, n0: int) -> tuple[float, float]:
    """Newcombe's interval (1998, method 10) of k1/n1 − k0/n0, from the two Wilson intervals."""
    if n1 == 0 or n0 == 0:
        return -1.0, 1.0
    p1, p0 = k1 / n1, k0 / n0
    (low1, high1), (low0, high0) = wilson(k1, n1), wilson(k0, n0)
    low = p1 - p0 - math.hypot(p1 - low1, high0 - p0)
    high = p1 - p0 + math.hypot(high1 - p1, p0 - low0)
    return low, high


def resample_clusters(strata: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn in each bootstrap draw, (draws, P) float32.

    strata: (P,) the stratum of each cluster, such as the eval cell of a prompt. Clusters are drawn with
    replacement within their stratum, so that every draw keeps the design.
    """
    rng = np.random.default_rng(seed)
    weights = np.empty((draws, len(strata)), np.float32)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        n = len(members)
        drawn = rng.integers(0, n, (draws, n)) + n * np.arange(draws)[:, None]  # one row of bins a draw
        weights[:, members] = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)
    return weights


def percentile_interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the finite ones of bootstrap draws (B,); (nan, nan) where none is."""
    finite = draws[np.isfinite(draws)]
    if len(finite) == 0:
        return math.nan, math.nan
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def permutation_test(scores: np.ndarray, labels: np.ndarray, blocks: np.ndarray) -> tuple[float, int]:
    """(two-sided p, number of permutations) of the statistic Σᵢ scores[i, labels[i]].

    scores: (n, n_labels); labels and blocks: (n,) integers. Labels are permuted within each block, in every
    possible way, so p is exact and at least 1 / number. Distance is from the mean over all permutations.
    """
    totals, observed = np.zeros(1), scores[np.arange(len(labels)), labels].sum()
    for block in np.unique(blocks):
        members = np.flatnonzero(blocks == block)
        orders = np.array(list(itertools.permutations(labels[members])))  # (m!, m)
        sums = scores[members, orders].sum(axis=1)
        totals = (totals[:, None] + sums).ravel()  # blocks permute independently
    distance = np.abs(totals - totals.mean())
    rounding = 1e-9 * max(1.0, distance.max())
    return float(np.mean(distance >= abs(observed - totals.mean()) - rounding)), len(totals)
