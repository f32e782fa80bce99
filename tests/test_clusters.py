"""Rates of clustered rows against closed forms: variances, design effects, differences."""

import math

import numpy as np
import pytest

from em.clusters import cluster_variance, clustered_rate, rate_difference
from em.report.panel import pooled_rate
from em.stats import rate_interval, resample_clusters


def test_the_variance_is_that_of_drawing_clusters_anew_within_strata():
    """n s² by hand in each stratum, which is n / (n − 1) times what the bootstrap's draws show."""
    errors, strata = np.array([1.0, 2.0, 6.0, 10.0, 30.0, 7.0]), np.array([0, 0, 0, 1, 1, 2])
    by_hand = 3 * np.var([1, 2, 6], ddof=1) + 2 * np.var([10, 30], ddof=1)
    assert cluster_variance(errors, strata) == pytest.approx(by_hand)
    draws = resample_clusters(strata, 40_000, 0) @ errors
    expected = 3 * np.var([1, 2, 6]) + 2 * np.var([10, 30])
    assert draws.var() == pytest.approx(expected, rel=0.03)
    other = np.array([3.0, 1.0, 2.0, -1.0, 5.0, 4.0])
    together = cluster_variance(errors + other, strata)
    apart = cluster_variance(errors, strata) + cluster_variance(other, strata)
    assert cluster_variance(errors, strata, other) == pytest.approx((together - apart) / 2)


def test_rows_that_agree_are_worth_their_clusters_and_those_that_do_not_all_of_them():
    rng, one = np.random.default_rng(0), np.zeros(400, int)
    em, scored = (rng.random(400) < 0.3).astype(float), np.ones(400)
    single = pooled_rate(em, scored, one)
    fivefold = pooled_rate(5 * em, 5 * scored, one)
    assert (fivefold.low, fivefold.high) == pytest.approx((single.low, single.high), rel=1e-9)
    loose = rng.binomial(5, 0.3, 400)
    found = pooled_rate(loose, 5 * scored, one)
    low, high = rate_interval(found.rate, 2000)
    assert found.high - found.low == pytest.approx(high - low, rel=0.1)


def test_few_clusters_with_an_event_say_little_of_how_alike_rows_are():
    """One event in 50 × 4 rows: a design effect of 1 by its errors, 4 if rows agree; (1 + 4/2) / 1.5."""
    em = np.zeros(50)
    em[0] = 1
    found = pooled_rate(em, np.full(50, 4.0), np.zeros(50, int))
    assert (found.low, found.high) == pytest.approx(rate_interval(1 / 200, 200 / 2, 49), rel=0.02)
    none = pooled_rate(0 * em, np.full(50, 4.0), np.zeros(50, int))
    assert (none.low, none.high) == rate_interval(0, 50)


def test_a_difference_of_other_clusters_joins_the_two_intervals():
    """Clusters without rows of one rate have no part in its error: then r = 0, Newcombe's own formula."""
    strata = np.repeat([0, 1], 30)
    errors = np.random.default_rng(0).normal(size=60) * 0.01
    a = clustered_rate(0.3, errors * (strata == 0), 60.0, 10, strata)
    b = clustered_rate(0.1, errors * (strata == 1), 60.0, 10, strata)
    gap, low, high = rate_difference(a, b)
    assert gap == pytest.approx(0.2)
    assert low == pytest.approx(gap - math.hypot(a.rate - a.low, b.high - b.rate))
    assert high == pytest.approx(gap + math.hypot(a.high - a.rate, b.rate - b.low))
