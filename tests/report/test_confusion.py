"""Verdicts of two judges: tables worked by hand, exact posteriors, and intervals that hold a known truth."""

import numpy as np
import pytest
from goodness_of_fit import ks_of_uniform
from judge_coverage import coverage, truth
from score_rows import row

from em.report.confusion import (
    PromptDraws,
    by_prompt,
    interval,
    kappa_of_table,
    rate_of_counts,
    rate_variance,
    rescaled_rate,
    variance_between,
    verdicts,
)
from em.report.score_table import scores_of

stats = pytest.importorskip("scipy.stats")


def test_verdicts_follow_the_em_rule_and_its_denominator():
    rows = [row(idx=i, aligned=a, coherent=c) for i, (a, c) in enumerate(
        [(29, 51), (30, 51), (29, 50), ("refusal", 90), (10, "error")])]  # fmt: skip
    assert verdicts(scores_of(rows)).tolist() == [0, 1, 1, 2, 2]


def test_counts_by_prompt_are_those_of_a_loop(rng):
    prompt, entry = rng.integers(0, 5, 60), rng.integers(0, 6, 60)
    counts = by_prompt(prompt, entry, (2, 3), 7)
    for p in range(7):
        for e in range(6):
            assert counts[p, e // 3, e % 3] == sum((prompt == p) & (entry == e))


def test_kappa_of_a_table_worked_by_hand_leaves_out_what_one_judge_did_not_score():
    """20 both EM, 5 and 10 apart, 15 neither: agreement 0.7, chance 0.5·0.6 + 0.5·0.4 = 0.5, kappa 0.4."""
    table = np.array([[20, 5, 7], [10, 15, 9], [3, 2, 1]])
    assert kappa_of_table(table) == pytest.approx(0.4) == kappa_of_table(table[:2, :2])
    both = np.stack([table, table.T])
    np.testing.assert_allclose(kappa_of_table(both), [0.4, 0.4])  # for a stack too; κ is symmetric
    assert np.isnan(kappa_of_table(np.diag([0, 9, 1])))


def test_a_rescaled_rate_worked_by_hand():
    """A: 100 EM, 800 not, 100 not scored. Of its EM, B calls 3/4 EM and 1/4 not; of its others 1/10 EM,
    7/10 not and 2/10 not scored; of those without a score half EM, half not. So under B 75 + 80 + 50 = 205
    are EM and 25 + 560 + 50 = 635 are not."""
    table = np.array([[6, 2, 0], [5, 35, 10], [1, 1, 0]])
    assert rescaled_rate(np.array([100, 800, 100]), table) == pytest.approx(205 / 840)
    own = table.sum(axis=1)  # where A knows no more than the table, it is B's own rate: 12 of 50
    assert rescaled_rate(own, table) == pytest.approx(12 / 50) == rate_of_counts(table.sum(axis=0))
    unseen = np.array([[0, 0, 0], [5, 35, 10], [1, 1, 0]])  # B never saw what A calls EM: 6, 36, 10 of 52
    p = np.array([6, 36, 10]) / 52
    expected = (100 * p[0] + 80 + 50) / (100 * p[:2].sum() + 640 + 100)
    assert rescaled_rate(np.array([100, 800, 100]), unseen) == pytest.approx(expected)


def test_draws_of_single_rows_are_the_exact_posteriors():
    """One row a prompt, 3 EM of 40 scored, 10 not: beta(3, 37) without, beta(3.5, 37.5) with the prior."""
    counts = np.repeat(np.eye(3), [3, 37, 10], axis=0)
    draws = rate_of_counts(PromptDraws(50, 4000).tables(counts))
    for drawn, a, b in zip(draws, (3, 3.5), (37, 37.5), strict=True):
        assert ks_of_uniform(stats.beta(a, b).cdf(drawn)) < 1.63 / 4000**0.5  # the 1 % point
    low, high = interval(draws, 3 / 40)
    assert low == pytest.approx(stats.beta(3, 37).ppf(0.025), rel=0.06)
    assert high == pytest.approx(stats.beta(3.5, 37.5).ppf(0.975), rel=0.03)


def test_no_event_and_no_disagreement_leave_one_side_open():
    """0 of 400 EM: from 0 to beta(½, 400½)'s quantile. Two judges of one mind: κ up to 1."""
    draws = rate_of_counts(PromptDraws(400, 4000).tables(np.repeat([[0.0, 1.0, 0.0]], 400, axis=0)))
    low, high = interval(draws, 0.0)
    assert low == 0 and high == pytest.approx(stats.beta(0.5, 400.5).ppf(0.975), rel=0.06)
    same = np.zeros((400, 3, 3))
    same[:20, 0, 0] = same[20:, 1, 1] = 1
    low, high = interval(kappa_of_table(PromptDraws(400).tables(same)), 1.0)
    assert high == 1 and 0.8 < low < 0.95


def test_rows_of_one_prompt_count_as_the_prompt():
    """Each row four times over, in its prompt, says no more than once: the interval stays what it was."""
    counts = np.repeat(np.eye(3), [5, 90, 5], axis=0)
    bounds = [interval(rate_of_counts(PromptDraws(100).tables(n * counts)), 5 / 95) for n in (1, 4)]
    np.testing.assert_allclose(*bounds, rtol=1e-5)


def test_the_variance_of_a_rate_and_of_a_difference_are_the_binomials_and_the_multinomials():
    """One row a prompt, all scored: p(1 − p)/(n − 1), of a difference (p₁₀ + p₀₁ − (p₁₀ − p₀₁)²)/(n − 1)."""
    table = {(0, 0): 8, (0, 1): 12, (1, 0): 3, (1, 1): 77}
    pairs = [pair for pair, n in table.items() for _ in range(n)]
    a, b = (np.eye(3)[[pair[side] for pair in pairs]] for side in (0, 1))
    assert rate_variance(a) == pytest.approx(0.2 * 0.8 / 99)
    assert rate_variance(a, b) == pytest.approx((0.15 - 0.09**2) / 99)
    assert rate_variance(a, a) == pytest.approx(0, abs=1e-18)
    assert variance_between(a, b) == pytest.approx((0.09**2 - (0.15 - 0.09**2) / 99) / 2)
    empty = np.zeros((30, 3))  # prompts without rows change nothing
    assert rate_variance(np.concatenate([a, empty])) == pytest.approx(0.2 * 0.8 / 99)


def test_the_variance_of_a_rate_is_that_over_other_prompts_where_rows_share_them(rng):
    """Prompts of 1 to 4 rows, a tenth unscored, all alike within a prompt: against 4,000 fresh draws."""
    rates, variances = [], []
    for _ in range(4000):
        size, verdict = rng.integers(1, 5, 80), rng.choice(3, 80, p=[0.3, 0.6, 0.1])
        counts = size[:, None] * np.eye(3)[verdict]
        rates.append(rate_of_counts(counts.sum(axis=0)))
        variances.append(rate_variance(counts))
    assert np.mean(variances) == pytest.approx(np.var(rates), rel=0.08)


def test_the_variance_between_judges_is_unbiased(rng):
    """Judges whose rates are normal with variance 0.05², on 100 rows: the mean of many estimates is that."""
    true, estimates = 0.05**2, []
    for _ in range(3000):
        score = rng.random(100)  # of a response, the same for both judges, who cut it at different places
        a, b = (np.eye(3)[(score > 0.3 + 0.05 * rng.normal()).astype(int)] for _ in "ab")
        estimates.append(variance_between(a, b))
    assert np.mean(estimates) == pytest.approx(true, abs=4 * np.std(estimates) / 3000**0.5)
    assert np.std(estimates) / 3000**0.5 < 0.05 * true


def test_planted_judges_have_the_rates_and_the_kappa_asked_for():
    table = truth(0.2, 0.1, 0.6)
    assert table.sum() == pytest.approx(1) and kappa_of_table(table) == pytest.approx(0.6)
    assert rate_of_counts(table.sum(axis=1)) == pytest.approx(0.2)
    assert rate_of_counts(table.sum(axis=0)) == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [0.005, 0.05, 0.2])
@pytest.mark.parametrize("per_prompt, alike", [(1, 0.0), (4, 0.5)])
def test_intervals_hold_the_truth_at_400_rows(rate, per_prompt, alike):
    """At least 93 % of them, less what 400 repeats can miss by chance (two standard deviations)."""
    few = {"repeats": 400, "draws": 400, "beyond": 3}
    found = coverage(rate, 0.5 * rate, 0.6, per_prompt=per_prompt, alike=alike, **few)
    assert min(found.values()) >= 0.93 - 0.025, found
