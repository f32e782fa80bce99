import math

import numpy as np
import pytest
from scipy.stats import binom, chi2

from em.stats import Z95, at_flip, newcombe, rate_interval, sd_interval, t_quantile, wilson


@pytest.mark.parametrize("k, n", [(0, 10), (3, 10), (10, 10), (84, 128), (1, 384)])
def test_wilson_bounds_solve_the_score_equation(k, n):
    """A bound p satisfies |k/n − p| = z √(p(1−p)/n), the equation the interval inverts."""
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            assert abs(k / n - p) == pytest.approx(Z95 * math.sqrt(p * (1 - p) / n))


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_newcombe_gives_the_published_example():
    """Newcombe (1998), Table II, example (a), method 10: 56/70 − 48/80."""
    low, high = newcombe(56, 70, 48, 80)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def test_newcombe_is_antisymmetric_and_contains_the_difference():
    low, high = newcombe(30, 128, 5, 128)
    assert newcombe(5, 128, 30, 128) == pytest.approx((-high, -low))
    assert low < 25 / 128 < high


def coverage(interval, n, rates):
    """Of n independent rows, by enumeration: (rates,)."""
    bounds = np.array([interval(k, n) for k in range(n + 1)])
    inside = (bounds[:, :1] <= rates) & (rates <= bounds[:, 1:])
    return (binom.pmf(np.arange(n + 1)[:, None], n, rates) * inside).sum(axis=0)


@pytest.mark.parametrize("n", [20, 45, 100, 333, 400])
def test_rate_intervals_hold_rates_from_0_3_to_90_percent(n):
    """Wilson's does not: 0.84 at 0.4 % of 45 rows, where one event moves its low bound too far."""
    rates = np.geomspace(0.003, 0.9, 600)
    found = coverage(lambda k, n: rate_interval(k / n, n), n, rates)
    assert found.min() > 0.92 and (found < 0.93).mean() < 0.02 and found.mean() > 0.95
    if n == 45:
        assert coverage(wilson, n, rates).min() < 0.85


def test_rate_intervals_are_wilsons_where_events_are_many_and_wider_by_t():
    assert rate_interval(0.3, 400) == pytest.approx(wilson(120, 400))
    assert rate_interval(0, 50) == pytest.approx(wilson(0, 50))
    assert rate_interval(1, 50) == pytest.approx(wilson(50, 50))
    low, high = rate_interval(0.5, 1000, df=4)
    assert high - low == pytest.approx(2 * t_quantile(4) * math.sqrt(0.25 / 1000), rel=0.01)
    assert rate_interval(0.1, 30.5)[0] == pytest.approx(1 - rate_interval(0.9, 30.5)[1])


def test_the_effect_at_a_flip_lies_on_the_line_between_two_doses():
    flips, effects = [2.0, 22.0, 62.0, 58.0, 95.0], [0.0, 5.0, 25.0, 30.0, 40.0]
    assert at_flip(flips, effects, 32.0) == pytest.approx(10.0)  # a quarter of the way from 22 to 62
    assert at_flip(flips, effects, 60.0) == pytest.approx(24.0)  # the first time, not the second
    assert at_flip(flips, effects, 62.0) == 25.0
    assert math.isnan(at_flip(flips, effects, 96.0))  # never reached
    assert math.isnan(at_flip(flips, effects, 1.0))  # there before any training


@pytest.mark.parametrize("df", [1, 2, 3, 11, 12, 40, 301])
def test_the_interval_of_an_sd_is_by_chi_squared(df):
    expected = [2.0 * math.sqrt(df / chi2.ppf(p, df)) for p in (0.975, 0.025)]
    assert sd_interval(2.0, df) == pytest.approx(expected, rel=1e-8)
