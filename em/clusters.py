"""Rates of rows that share prompts: the prompt is a cluster, and its rows are no independent trials.

`clustered_rate` gives a rate its interval, `rate_difference` compares two over the same clusters. They stay
within what a rate can be, and hold the truth from 20 clusters on at rates from 0.3 to 90 %, where a bootstrap
that finds few events to draw does not (`tests/sizes.py`). All intervals are 95 %.
"""

import math
from dataclasses import dataclass

import numpy as np

from em.stats import difference_interval, rate_interval

FEW = 5  # clusters of a stratum, under which too little variation is seen in it alone
LEAST_SEEDS = 3  # of every cell, from which on the runs too are seen as drawn: "runs like these"


@dataclass(frozen=True)
class ClusteredRate:
    """A rate over clusters, and what each of them adds to its error, (P,), by which two can be compared."""

    rate: float
    low: float
    high: float
    errors: np.ndarray
    strata: np.ndarray


def clustered_rate(rate: float, errors: np.ndarray, rows: float, few: int, strata) -> ClusteredRate:
    """`rate` with an interval for whoever draws other clusters from the same strata.

    errors: (P,) each cluster's part of rate − truth to first order, such as (its events − rate · its rows) /
    rows. rows: of all clusters. few: clusters with an event, or those with none where these are fewer.
    strata: (P,) integers.

    The rows are worth as many independent ones as have the errors' variance. What `few` clusters say about
    it is little, so half a cluster more says that all rows of a cluster agree; where few is 0, only that.
    """
    clusters, within = len(errors), len(errors) - len(np.unique(strata))
    alike = rows / clusters  # the design effect where all rows of a cluster agree
    if few == 0 or within < 1:
        low, high = rate_interval(rate, clusters)
    else:
        seen = cluster_variance(errors, strata) / (rate * (1 - rate) / rows)
        design_effect = (few * seen + 0.5 * alike) / (few + 0.5)
        low, high = rate_interval(rate, rows / design_effect, within)
    return ClusteredRate(rate, low, high, errors, strata)


def merged(strata: np.ndarray) -> np.ndarray:
    """(P,) integers, equal where the strata are; those of fewer than FEW clusters are one."""
    _, code, size = np.unique(strata, return_inverse=True, return_counts=True)
    return np.where(size[code] < FEW, -1, code)


def cluster_variance(errors: np.ndarray, strata: np.ndarray, other: np.ndarray | None = None) -> float:
    """Variance of Σ errors over clusters drawn anew within their strata; or covariance with Σ other.

    errors, other: (P,); strata: (P,). A stratum of a single cluster adds nothing.
    """
    other = errors if other is None else other
    code = np.unique(strata, return_inverse=True)[1]
    n = np.bincount(code)
    products = np.bincount(code, errors * other)
    products -= np.bincount(code, errors) * np.bincount(code, other) / n
    return float((products * n / np.maximum(n - 1, 1)).sum())


def rate_difference(a: ClusteredRate, b: ClusteredRate) -> tuple[float, float, float]:
    """(a − b, low, high) of two rates over the same clusters, which may be the same ones' other rows.

    The two intervals are joined as Newcombe (1998, method 10) joins Wilson's, by the correlation that the
    errors show (Zou and Donner 2008). a and b need the same strata and clusters in the same order.
    """
    variances = [cluster_variance(r.errors, a.strata) for r in (a, b)]
    scale = math.sqrt(variances[0] * variances[1])
    r = float(np.clip(cluster_variance(a.errors, a.strata, b.errors) / scale, -1, 1)) if scale > 0 else 0.0
    bounds = difference_interval((a.rate, a.low, a.high), (b.rate, b.low, b.high), r)
    return a.rate - b.rate, *bounds
