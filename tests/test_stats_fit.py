"""Student's t, straight lines and correlations against printed tables, numpy and simulation."""

import math

import numpy as np
import pytest
import sizes
from scipy.stats import binom, t

from em.stats import (
    grouped_pearson,
    linear_fit,
    mean_interval,
    mean_rate_interval,
    pearson,
    t_interval,
    t_quantile,
)

# t(0.975; df), from the printed tables (Abramowitz and Stegun 26.10, NIST) and closed forms for 1 and 2.
TABLE = {3: 3.182446, 4: 2.776445, 5: 2.570582, 10: 2.228139, 29: 2.045230, 30: 2.042272, 120: 1.979930}


@pytest.mark.parametrize("df, value", TABLE.items())
def test_t_quantiles_are_those_of_the_tables(df, value):
    assert t_quantile(df) == pytest.approx(value, abs=1e-6)


def test_t_quantiles_have_their_closed_forms_at_one_and_two_and_the_normal_limit():
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)
    z = 1.959963984540054
    assert t_quantile(10_000) == pytest.approx(z + (z**3 + z) / 4e4, abs=1e-7)  # Cornish and Fisher


def test_t_quantiles_are_scipys():
    for df in (6, 33, 99, 100, 101, 102, 250, 5000):
        assert t_quantile(df) == pytest.approx(t.ppf(0.975, df), abs=1e-9)


def test_t_interval_by_hand():
    """1, 2, 3: mean 2, sd 1, t(2) = 4.302653."""
    mean, low, high = t_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    assert t_interval([4.0]) == (4.0, None, None)


@pytest.mark.parametrize("n", [2, 4])  # 1.96 standard errors would cover 70 of 100 at n = 2, 85 at n = 4
def test_t_interval_covers_the_mean_in_95_of_100_samples(n):
    rng = np.random.default_rng(0)
    bounds = [t_interval(sample.tolist())[1:] for sample in rng.normal(3, 2, (4000, n))]
    covered = np.mean([low <= 3 <= high for low, high in bounds])
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_mean_interval_names_the_bounds_and_counts_the_values():
    """1, 2, 3, 4: mean 2.5, variance 5/3, t(3) = 3.182446; a single value has no interval."""
    half = 3.182446 * math.sqrt(5 / 3) / 2
    expected = {"mean": 2.5, "low": 2.5 - half, "high": 2.5 + half, "n": 4}
    assert mean_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx(expected, abs=1e-6)
    assert mean_interval([1.0]) == {"mean": 1.0, "low": None, "high": None, "n": 1}


def points(n=12, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.uniform(80, 100, n)
    return x, 3 * x - 200 + rng.normal(0, 5, n)


def test_a_line_is_that_of_numpy_with_its_covariance():
    x, y = points()
    fit = linear_fit(x, y)
    (slope, intercept), covariance = np.polyfit(x, y, 1, cov=True)
    assert (fit.slope, fit.intercept) == pytest.approx((slope, intercept))
    for interval, centre, variance in (
        (fit.slope_interval, slope, covariance[0, 0]),
        (fit.intercept_interval, intercept, covariance[1, 1]),
    ):
        half = 2.228139 * math.sqrt(variance)  # t with 10 degrees of freedom
        assert interval == pytest.approx((centre - half, centre + half), rel=1e-6)
    at = np.array([80.0, 90.0, 105.0])
    design = np.stack([at, np.ones(3)], axis=1)
    half = 2.228139 * np.sqrt(np.einsum("ij,jk,ik->i", design, covariance, design))
    low, high = fit.band(at)
    np.testing.assert_allclose(low, design @ (slope, intercept) - half, rtol=1e-5)
    np.testing.assert_allclose(high, design @ (slope, intercept) + half, rtol=1e-5)


def test_the_band_is_narrowest_at_the_mean_and_closed_on_an_exact_line():
    x, y = points()
    fit = linear_fit(x, y)
    low, high = fit.band(np.linspace(70, 110, 401))
    assert abs(np.linspace(70, 110, 401)[np.argmin(high - low)] - x.mean()) < 0.1
    exact = linear_fit([1, 2, 4], [5, 7, 11])
    assert (exact.slope, exact.intercept, exact.residual_sd) == pytest.approx((2, 3, 0), abs=1e-12)
    assert exact.band([3])[0] == pytest.approx([9])


def test_no_line_through_two_points_or_one_place():
    assert linear_fit([1, 2], [3, 4]) is None and linear_fit([2, 2, 2], [1, 2, 3]) is None


def test_pearson_is_that_of_numpy_with_fishers_interval():
    x, y = points(19)
    r, low, high = pearson(x, y)
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1])
    # In z the interval is symmetric, 1.96 standard errors of 1/√16 to each side.
    assert math.atanh(r) - math.atanh(low) == pytest.approx(1.959964 / 4, rel=1e-6)
    assert math.atanh(high) - math.atanh(r) == pytest.approx(1.959964 / 4, rel=1e-6)
    assert pearson(x, -y) == pytest.approx((-r, -high, -low))


def test_pearson_says_nothing_it_cannot_know():
    assert pearson([1, 2, 3], [1, 2, 4])[1:] == (None, None)
    assert pearson([1, 2, 3, 4], [2, 4, 6, 8]) == (1, 1, 1)
    assert pearson([1, 2, 3, 4], [5, 5, 5, 5]) == (None, None, None)
    assert pearson(np.array([]), np.array([])) == (None, None, None)


# -- points that come in groups ------------------------------------------------------------------------


def test_grouped_correlations_are_of_the_means_and_of_the_deviations():
    """Groups of unlike size; a shift of a whole group leaves `within` alone, one of its points `between`."""
    rng = np.random.default_rng(0)
    tasks = ["a"] * 3 + ["b"] * 5 + ["c"] * 2 + ["d"] * 4 + ["e"]
    x, y = rng.normal(size=(2, len(tasks)))
    found = grouped_pearson(x, y, tasks)
    mean = {v: [np.mean([z for z, g in zip(v, tasks, strict=True) if g == task]) for task in "abcde"]
            for v in map(tuple, (x, y))}  # fmt: skip
    assert (found["groups"], found["points"]) == (5, 15)
    between = [found[f"between{end}"] for end in ("", "_low", "_high")]
    assert between == pytest.approx(pearson(*mean.values()))
    away = [np.array(v) - [mean[tuple(v)]["abcde".index(g)] for g in tasks] for v in (x, y)]
    r = np.corrcoef(*away)[0, 1]
    half = 1.959964 / math.sqrt(15 - 4 - 3)
    assert found["within"] == pytest.approx(r)
    assert (found["within_low"], found["within_high"]) == pytest.approx(
        (math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)), abs=1e-6
    )
    shifted = grouped_pearson(x + 5 * (np.array(tasks) == "b"), y, tasks)
    assert shifted["within"] == pytest.approx(r) and shifted["between"] != pytest.approx(found["between"])


def test_grouped_correlations_say_nothing_they_cannot_know():
    x, y = [1, 2, 3, 4, 5], [2, 1, 4, 3, 6]
    one = grouped_pearson(x, y, ["a"] * 5)
    assert one["between"] is None and one["within"] == pytest.approx(pearson(x, y)[0])
    lone = grouped_pearson([0.1, 0.2, 0.7, 0.4], [2, 1, 4, 3], list("abcd"))
    assert lone["within"] is None and lone["between_low"] is not None
    flat = grouped_pearson([0.1] * 3 + [0.7] * 3, [1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1])
    assert flat["within"] is None and flat["between_low"] is None


def test_few_tasks_are_not_many_points():
    """x and y independent, half of each the task's: the pooled interval leaves out 0 one time in four."""
    found = sizes.correlation_sizes(5, 10, 600)
    assert found["pooled"] > 0.2
    for name in ("between", "within"):
        assert 600 * found[name] <= binom.ppf(0.999, 600, 0.06)


@pytest.mark.parametrize("rates", [[0.0, 0.0, 0.01], [1.0, 0.99, 1.0], [0.0, 1.0], [0.2, 0.4, 0.3, 0.25]])
def test_the_mean_of_rates_has_an_interval_inside_the_unit_one_that_turns_over_with_them(rates):
    mean, low, high = mean_rate_interval(rates)
    assert mean == pytest.approx(np.mean(rates)) and 0 <= low < mean < high <= 1
    over = mean_rate_interval([1 - rate for rate in rates])
    assert over == pytest.approx((1 - mean, 1 - high, 1 - low))


def test_equal_rates_have_no_width_and_one_has_no_interval():
    assert mean_rate_interval([0.0] * 12) == (0, 0, 0)
    assert mean_rate_interval([0.25] * 3) == (0.25, 0.25, 0.25)
    assert mean_rate_interval([0.1]) == (0.1, None, None)


def test_in_the_middle_the_interval_of_rates_is_nearly_students_t():
    rates = [0.5 + 0.01 * i for i in (-3, -2, -1, 0, 1, 2, 3)]
    assert mean_rate_interval(rates) == pytest.approx(t_interval(rates), abs=1e-3)


@pytest.mark.parametrize("mean, cv", [(0.003, 0.5), (0.003, 1), (0.02, 0.5), (0.02, 1)])
def test_the_interval_of_a_mean_of_rare_rates_misses_it_on_both_sides(mean, cv):
    """Twelve worlds whose rates are Beta. Student's t lies below the mean 9 times in 100, above it never."""
    rng, n = np.random.default_rng(0), 3840
    size = (1 - mean) / (mean * cv**2) - 1
    rates = rng.binomial(n, rng.beta(mean * size, (1 - mean) * size, (1000, 12))) / n
    _, low, high = np.array([mean_rate_interval(row.tolist()) for row in rates]).T
    assert np.mean((low <= mean) & (mean <= high)) > 0.915
    assert np.mean(high < mean) < 0.06 and np.mean(low > mean) < 0.04
