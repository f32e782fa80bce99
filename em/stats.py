"""Intervals for counts, means, lines and correlations, all two-sided 95 %; rates are fractions in [0, 1].

Of rows that are no independent trials, since they share prompts: em/clusters.py.
"""

import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z90, Z95 = 1.6448536269514722, 1.959963984540054


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson score interval of k successes in n trials; (0, 1) where n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n the bound is the rate itself, which rounding would miss.
    return 0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half


def rate_interval(rate: float, n: float, df: int | None = None) -> tuple[float, float]:
    """Wilson's interval of a rate of `n` rows, which need be no whole number, for the few events too.

    df: degrees of freedom by which n was estimated; Student's t then stands for the normal quantile. Wilson's
    low bound is too high where there are few events (Brown, Cai and DasGupta 2001, section 4.1.1), so it is
    no higher than the one-sided 95 % bound, here by Wilson and Hilferty; likewise the high bound.
    """
    wider = 1.0 if df is None else t_quantile(df) / Z95

    def low(p: float) -> float:
        k, z = p * n, Z95 * wider
        if k <= 0:
            return 0.0
        score = (p + z * z / (2 * n) - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
        root = 1 - 1 / (9 * k) - Z90 * wider * math.sqrt(1 - p) / (3 * math.sqrt(k))
        return min(score, p * max(root, 0.0) ** 3)

    return low(rate), 1 - low(1 - rate)


def newcombe(k1: int, n1: int, k0: int, n0: int) -> tuple[float, float]:
    """Newcombe's interval (1998, method 10) of k1/n1 − k0/n0, from the two Wilson intervals."""
    if n1 == 0 or n0 == 0:
        return -1.0, 1.0
    return difference_interval((k1 / n1, *wilson(k1, n1)), (k0 / n0, *wilson(k0, n0)))


def difference_interval(
    a: tuple[float, float, float], b: tuple[float, float, float], correlation: float = 0.0
) -> tuple[float, float]:
    """(low, high) of a − b, each (value, low, high), by their correlation (Zou and Donner 2008)."""

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x + y * y - 2 * correlation * x * y, 0.0))

    (value_a, low_a, high_a), (value_b, low_b, high_b) = a, b
    gap = value_a - value_b
    return (
        gap - reach(value_a - low_a, high_b - value_b),
        gap + reach(high_a - value_a, value_b - low_b),
    )


def share_interval(
    a: tuple[float, float, float], b: tuple[float, float, float]
) -> tuple[float | None, float | None, float | None]:
    """(share, low, high) of a in a + b, each an independent (value, low, high), by Fieller's theorem.

    The share p is where (1 − p) a − p b = 0; its interval is where that of the left side, from the distances
    of a's and b's bounds, holds 0. All None where the interval of a + b does.
    """
    total, bounds = a[0] + b[0], []
    if total < 0:
        return share_interval(*((-value, -high, -low) for value, low, high in (a, b)))
    for side, (down, up) in zip(
        (-1, 1), ((a[0] - a[1], b[2] - b[0]), (a[2] - a[0], b[0] - b[1])), strict=True
    ):
        square = total**2 - down**2 - up**2  # > 0: the sum is resolved, and the roots are real
        if square <= 0:
            return None, None, None
        root = math.sqrt((down * b[0]) ** 2 + (up * a[0]) ** 2 - (down * up) ** 2)
        bounds.append((a[0] * total - down**2 + side * root) / square)
    return a[0] / total, *bounds


@functools.cache
def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t with `df` ≥ 1 degrees of freedom."""
    if df > 100:  # to 1e-10 by Abramowitz and Stegun 26.7.5
        z = Z95
        terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96)
        terms += ((3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,)
        terms += ((79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,)
        return sum(term / df**power for power, term in enumerate(terms))

    def between(t: float) -> float:
        """P(|T| < t), exact for whole df (Abramowitz and Stegun 26.7.3, 26.7.4)."""
        angle = math.atan(t / math.sqrt(df))
        sine, cosine = math.sin(angle), math.cos(angle)
        term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
        for k in range(1 + df % 2, df, 2):
            total += term
            term *= k / (k + 1) * cosine * cosine
        return 2 / math.pi * (angle + sine * total) if df % 2 else sine * total

    low, high = 1.9, 12.8  # the quantile falls from 12.706 at df = 1 to 1.960
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if between(middle) < 0.95 else (low, middle)
    return high


def sd_interval(sd: float, df: int) -> tuple[float, float]:
    """(low, high) of a normal standard deviation, estimated as `sd` with `df` ≥ 1 degrees of freedom."""

    def below(x: float) -> float:
        """P(χ² < x), exact for whole df (Abramowitz and Stegun 26.4.4, 26.4.5)."""
        term = math.exp(-x / 2) * (math.sqrt(2 * x / math.pi) if df % 2 else 1.0)
        rest = math.erfc(math.sqrt(x / 2)) if df % 2 else 0.0
        for k in range(2 + df % 2, df + 2, 2):
            rest += term
            term *= x / k
        return 1 - rest

    def quantile(p: float) -> float:
        low, high = 0.0, df + 10 * math.sqrt(2 * df) + 10
        while high - low > 1e-12 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if below(middle) < p else (low, middle)
        return high

    return sd * math.sqrt(df / quantile(0.975)), sd * math.sqrt(df / quantile(0.025))


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of the mean over independent replicates; no bounds when fewer than two."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def mean_rate_interval(rates: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of the mean over independent replicates, each of which is a rate; like `t_interval`.

    `rate_interval` of as many rows as would leave the rates' own variance, so that no bound leaves [0, 1] and
    the longer side is the one away from the edge: Student's t misses rates near 0 on one side only. Rates
    that are all the same, such as a floor of zeros, have no width.
    """
    mean = statistics.fmean(rates)
    if len(rates) < 2:
        return mean, None, None
    variance = statistics.variance(rates) / len(rates)
    if variance == 0:
        return mean, mean, mean
    return mean, *rate_interval(mean, mean * (1 - mean) / variance, len(rates) - 1)


def mean_interval(values: Sequence[float]) -> dict:
    """`t_interval` by name, with the number of replicates: {"mean", "low", "high", "n"}."""
    return dict(zip(("mean", "low", "high"), t_interval(values), strict=True)) | {"n": len(values)}


@dataclass(frozen=True)
class LinearFit:
    """Least squares y = intercept + slope·x over n points; intervals by Student's t on n − 2."""

    slope: float
    slope_interval: tuple[float, float]
    intercept: float
    intercept_interval: tuple[float, float]
    residual_sd: float
    n: int
    x_mean: float
    x_squares: float  # Σ (x − x_mean)²

    def line(self, x: np.ndarray) -> np.ndarray:
        return self.intercept + self.slope * np.asarray(x, float)

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Low and high of the line (the mean of y, not a new y) at each x, 95 % pointwise."""
        away = (np.asarray(x, float) - self.x_mean) ** 2 / self.x_squares
        half = t_quantile(self.n - 2) * self.residual_sd * np.sqrt(1 / self.n + away)
        return self.line(x) - half, self.line(x) + half


def linear_fit(x: Sequence[float], y: Sequence[float]) -> LinearFit | None:
    """None where a line and its error cannot be had: fewer than three points, or all x the same."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or np.ptp(x) == 0:
        return None
    n, x_mean = len(x), x.mean()
    squares = float(((x - x_mean) ** 2).sum())
    slope = float(((x - x_mean) * (y - y.mean())).sum() / squares)
    intercept = float(y.mean() - slope * x_mean)
    residual_sd = math.sqrt(float(((y - intercept - slope * x) ** 2).sum()) / (n - 2))
    half = t_quantile(n - 2) * residual_sd / math.sqrt(squares)
    half0 = t_quantile(n - 2) * residual_sd * math.sqrt(1 / n + x_mean**2 / squares)
    return LinearFit(
        slope=slope,
        slope_interval=(slope - half, slope + half),
        intercept=intercept,
        intercept_interval=(intercept - half0, intercept + half0),
        residual_sd=residual_sd,
        n=n,
        x_mean=float(x_mean),
        x_squares=squares,
    )


def pearson(
    x: Sequence[float], y: Sequence[float], used: int = 0
) -> tuple[float | None, float | None, float | None]:
    """(r, low, high): correlation with Fisher's z interval, of independent points (else: `grouped_pearson`).

    used: degrees of freedom that were taken out of x and y before, beyond their means. No bounds below four
    points beyond these, and no r where x or y does not vary.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None, None, None
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if len(x) - used < 4:
        return r, None, None
    if abs(r) == 1:  # z is infinite
        return r, r, r
    z, half = math.atanh(r), Z95 / math.sqrt(len(x) - used - 3)
    return r, math.tanh(z - half), math.tanh(z + half)


def grouped_pearson(x: Sequence[float], y: Sequence[float], groups: Sequence) -> dict:
    """Correlation of points that come in groups, such as a point a task and seed: over groups, and within.

    {"between", "between_low", "between_high": `pearson` of the groups' means, the group being the unit,
     "within", "within_low", "within_high": of what is left of x and y when each group's mean is taken out,
     by Fisher's z with a degree of freedom less for every group, "groups", "points"}

    Points of one group share what the group does to both, so `pearson` over all of them takes few groups for
    many points, and finds a correlation where there is none one time in four and more. Within, points are
    taken as independent but for their group; where they share something across groups too, such as a world
    seed, resample that (`within` of em/experiments/hardness.py). None where it cannot be had: Fisher's z
    needs four groups, and within them three points more than groups.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    code = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    size = np.bincount(code)
    means = [np.bincount(code, v) / size for v in (x, y)]
    dx, dy = (v - mean[code] for v, mean in zip((x, y), means, strict=True))
    dx[abs(dx) < 1e-12 * abs(x).max()] = dy[abs(dy) < 1e-12 * abs(y).max()] = 0  # rounding is no variation
    result = dict(zip(("between", "between_low", "between_high"), pearson(*means), strict=True))
    within = pearson(dx, dy, used=len(size) - 1)
    result |= dict(zip(("within", "within_low", "within_high"), within, strict=True))
    return result | {"groups": len(size), "points": len(x)}


FLIPS = (30.0, 60.0, 90.0)  # local flips, in %, at which effects are compared


def at_flip(flips: Sequence[float], effects: Sequence, level: float):
    """The effect where the local flip first reaches `level`, by linear interpolation between doses (ours).

    flips, effects: by dose, rising from dose 0; an effect may be an array of several. NaN where the flip is
    never reached, or was there before any training.
    """
    for i, flip in enumerate(flips):
        if flip >= level:
            if i == 0:
                return math.nan
            share = (level - flips[i - 1]) / (flip - flips[i - 1])
            return effects[i - 1] + share * (effects[i] - effects[i - 1])
    return math.nan


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


SAMPLED, MOST = 20_000, 400_000  # permutations: drawn where there are more than so many


def permutation_test(scores: np.ndarray, labels: np.ndarray, blocks: np.ndarray) -> tuple[float, int]:
    """(two-sided p, number of permutations) of the statistic Σᵢ scores[i, labels[i]].

    scores: (n, n_labels); labels and blocks: (n,) integers. Labels are permuted within each block, in every
    possible way, so p is exact and at least 1 / number. Distance is from the mean over all permutations.
    Where there are more than MOST ways, SAMPLED random ones stand for them, beside the labels as they are.
    """
    members = [np.flatnonzero(blocks == block) for block in np.unique(blocks)]
    observed = scores[np.arange(len(labels)), labels].sum()
    totals = np.zeros(1)
    if math.prod(math.factorial(len(m)) for m in members) > MOST:
        rng, totals = np.random.default_rng(0), np.zeros(SAMPLED + 1)
        for m in members:
            orders = rng.permuted(np.tile(labels[m], (SAMPLED, 1)), axis=1)
            totals[1:] += scores[m, orders].sum(axis=1)
        totals[0] = observed
    else:
        for m in members:
            orders = np.array(list(itertools.permutations(labels[m])))  # (m!, m)
            totals = (totals[:, None] + scores[m, orders].sum(axis=1)).ravel()  # blocks are independent
    mean = sum(scores[np.ix_(m, labels[m])].sum() / len(m) for m in members)
    distance = np.abs(totals - mean)
    rounding = 1e-9 * max(1.0, distance.max())
    return float(np.mean(distance >= abs(observed - mean) - rounding)), len(totals)
