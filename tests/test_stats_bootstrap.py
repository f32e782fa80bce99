"""Cluster resampling, percentile intervals and the exact permutation test, against closed forms."""

import itertools
import math

import numpy as np
import pytest
from goodness_of_fit import ks_of_uniform

from em.stats import percentile_interval, permutation_test, resample_clusters


def test_every_draw_keeps_the_number_of_clusters_of_each_stratum():
    strata = np.array([0, 1, 0, 2, 1, 0, 1, 1])
    weights = resample_clusters(strata, 500, seed=0)
    for stratum in range(3):
        assert (weights[:, strata == stratum].sum(axis=1) == (strata == stratum).sum()).all()
    assert (weights[:, strata == 2] == 1).all()  # one cluster is always itself
    np.testing.assert_array_equal(weights, resample_clusters(strata, 500, seed=0))
    assert (weights != resample_clusters(strata, 500, seed=1)).any()


def test_weights_have_the_multinomial_mean_variance_and_covariance():
    """n balls into n bins: mean 1, variance 1 − 1/n, covariance −1/n; none between strata."""
    n, strata = 5, np.repeat([0, 1], 5)
    weights = resample_clusters(strata, 40_000, seed=0)
    expected = np.kron(np.eye(2), np.eye(n) - 1 / n)
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.03)
    np.testing.assert_allclose(np.cov(weights.T), expected, atol=0.03)


def test_percentiles_leave_out_what_is_not_finite():
    draws = np.concatenate([np.arange(1001.0), [np.nan, np.inf]])
    assert percentile_interval(draws) == (25, 975)
    assert all(math.isnan(bound) for bound in percentile_interval(np.array([np.nan])))


def test_permutation_p_counts_every_permutation_within_blocks():
    """Against a plain loop over all permutations that keep the blocks, and its count."""
    rng = np.random.default_rng(0)
    scores, labels, blocks = (
        rng.normal(size=(7, 4)),
        np.array([0, 2, 3, 1, 0, 3, 2]),
        np.array([0, 0, 0, 1, 1, 1, 2]),
    )
    totals = []
    for order in itertools.permutations(range(7)):
        if (blocks[list(order)] == blocks).all():
            totals.append(scores[np.arange(7), labels[list(order)]].sum())
    distance = np.abs(np.array(totals) - np.mean(totals))
    observed = abs(scores[np.arange(7), labels].sum() - np.mean(totals))
    expected = np.mean(distance >= observed - 1e-12)
    p, n = permutation_test(scores, labels, blocks)
    assert n == len(totals) == math.factorial(3) ** 2
    assert p == pytest.approx(expected) and 1 / n <= p < 1


def test_permutation_p_is_fishers_exact_test_for_two_labels_and_two_values():
    """Five of nine are 1, four of them among the four labelled 1: hypergeometric chances by math.comb."""
    x, labels = np.array([1, 0, 0, 0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    chance = [math.comb(5, k) * math.comb(4, 4 - k) / math.comb(9, 4) for k in range(5)]
    mean = 4 * 5 / 9
    expected = sum(c for k, c in enumerate(chance) if abs(k - mean) >= abs(4 - mean) - 1e-12)
    scores = np.stack([np.zeros(9), x], axis=1)  # the sum of x over label 1
    p, n = permutation_test(scores, labels, np.zeros(9, int))
    assert n == math.factorial(9) and p == pytest.approx(expected)


def test_permutation_p_is_uniform_where_there_is_nothing_to_find():
    """KS distance from uniform over 300 noise grids of 12 rows; fails if the test is not exact."""
    rng = np.random.default_rng(0)
    labels, blocks = np.tile(np.arange(4), 3), np.repeat(np.arange(3), 4)
    p = [permutation_test(rng.normal(size=(12, 4)), labels, blocks)[0] for _ in range(300)]
    assert ks_of_uniform(p) < 1.63 / math.sqrt(300)  # the 1 % point
