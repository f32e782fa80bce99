import math

import pytest

from em.stats import Z95, newcombe, wilson


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
