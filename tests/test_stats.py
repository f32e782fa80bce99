import math

import numpy as np
import pytest
from scipy.stats import binom, chi2

from em.stats import (
    Z95,
    at_flip,
    difference_interval,
    newcombe,
    rate_interval,
    sd_interval,
    share_interval,
    t_quantile,
    wilson,
)


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


@pytest.mark.parametrize(
    "a, b", [((30, 24, 37), (10, 5, 16)), ((12, 3, 22), (15, 11, 18)), ((9, 4, 15), (0, -2, 3))]
)
def test_a_share_ends_where_the_two_weighted_parts_no_longer_differ(a, b):
    share, low, high = share_interval(a, b)
    assert share == a[0] / (a[0] + b[0]) and low < share < high
    for p, end in ((low, 0), (high, 1)):
        if 0 <= p <= 1:  # a weight below 0 would swap the ends
            parts = ([(1 - p) * v for v in a], [p * v for v in b])
            assert difference_interval(*parts)[end] == pytest.approx(0, abs=1e-9)
    falls = [tuple(-v for v in (value, high, low)) for value, low, high in (a, b)]
    assert share_interval(*falls) == pytest.approx((share, low, high))


def test_a_share_of_what_may_be_nothing_is_none():
    assert share_interval((3, -1, 7), (2, -1, 5)) == (None, None, None)  # 5 ± 5.0
    assert share_interval((3, -1, 7), (2.1, -0.8, 5))[0] == pytest.approx(3 / 5.1)  # 5.1 − 4.94


@pytest.mark.parametrize("means", [(8.0, 2.0), (3.0, 7.0), (10.0, 0.0)])
def test_share_intervals_hold_the_share_19_times_in_20(means):
    rng, held, draws = np.random.default_rng(0), 0, 4000
    for a, b in rng.normal(means, (1.0, 1.5), (draws, 2)):
        _, low, high = share_interval((a, a - Z95, a + Z95), (b, b - 1.5 * Z95, b + 1.5 * Z95))
        held += low <= means[0] / sum(means) <= high
    assert held / draws == pytest.approx(0.95, abs=0.012)
