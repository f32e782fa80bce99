"""Regression on runs by prompts: against a plain optimiser, refits without a prompt, and Student's t."""

import numpy as np
import pytest
from scipy.optimize import minimize

from em.report.regression import Estimate, Regression, interval, scope
from em.stats import t_quantile


def panel(seed=0, R=3, P=40, G=4, logits=-1.0, effect=0.0):
    """(values, counts, design, group) of R runs on P prompts with responses missing here and there.

    effect: of the design's last column, logits.
    """
    rng = np.random.default_rng(seed)
    group = np.sort(rng.integers(0, G, P))
    counts = rng.integers(0, 3, (R, P)).astype(float)
    design = np.zeros((R, G, R + G + 1))
    design[np.arange(R), :, np.arange(R)] = 1
    design[:, np.arange(G), R + np.arange(G)] = 1
    design[:, :, -1] = rng.normal(size=(R, G))
    linear = logits + rng.normal(0, 0.7, P) + effect * design[:, group, -1]
    values = rng.binomial(counts.astype(int), 1 / (1 + np.exp(-linear))).astype(float)
    return values, counts, design, group


def test_the_logistic_fit_maximises_the_likelihood_times_jeffreys_prior():
    values, counts, design, group = panel()
    X, y, n = (a.reshape(-1, *a.shape[2:]) for a in (design[:, group], values, counts))
    X = X[:, 1:]  # a basis: the first run is the others' reference

    def objective(b):
        p = 1 / (1 + np.exp(-X @ b))
        information = X.T @ ((n * p * (1 - p))[:, None] * X)
        return -(y @ np.log(p) + (n - y) @ np.log(1 - p) + 0.5 * np.linalg.slogdet(information)[1])

    expected = minimize(objective, np.zeros(X.shape[1]), tol=1e-12).x
    model = Regression(values, counts, design, group)
    assert model.estimate(np.eye(8)[-1]).value == pytest.approx(expected[-1], abs=1e-5)
    assert model.estimate(np.eye(8)[1] - np.eye(8)[2]).value == pytest.approx(
        expected[0] - expected[1], abs=1e-5
    )


def test_least_squares_is_least_squares_on_the_single_observations():
    values, counts, design, group = panel(1)
    rows = np.repeat(design[:, group].reshape(-1, 8), counts.ravel().astype(int), axis=0)
    # Every response of an observation gets the observation's mean: the coefficients are the same.
    means = np.divide(values, counts, out=np.zeros_like(values), where=counts > 0)
    expected = np.linalg.lstsq(rows, np.repeat(means.ravel(), counts.ravel().astype(int)), rcond=None)[0]
    model = Regression(values, counts, design, group, logit=False)
    assert model.estimate(np.eye(8)[-1]).value == pytest.approx(expected[-1])


def test_a_run_without_any_em_leaves_every_coefficient_finite():
    values, counts, design, group = panel(2)
    values[0] = 0
    model = Regression(values, counts, design, group)
    assert np.abs(model.coefficients).max() < 10 and model.estimate(np.eye(8)[-1]).value < 5


def test_what_the_observations_cannot_tell_is_none():
    values, counts, design, group = panel()
    model = Regression(values, counts, design, group)
    assert model.estimate(np.eye(8)[0]) is None  # a run's own level, beside the groups' levels
    design[:, :, -1] = design[:, :, 0]
    assert Regression(values, counts, design, group).estimate(np.eye(8)[-1]) is None
    assert interval(None, group) == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize("logit", [True, False])
@pytest.mark.parametrize("what", ["coefficient", "part of the mean"])
def test_the_standard_error_is_that_of_leaving_out_a_prompt_at_a_time(logit, what):
    values, counts, design, group = panel(3, P=240, effect=1.0)  # which adds more in some groups
    where = np.ones(design.shape[:2], bool)

    def estimate(keep):
        model = Regression(values[:, keep], counts[:, keep], design, group[keep], logit)
        return model.estimate(np.eye(8)[-1]) if what == "coefficient" else model.part_of_mean(7, where)

    found = interval(estimate(np.arange(240)), np.zeros(240))
    without = np.array([estimate(np.delete(np.arange(240), p)).value for p in range(240)])
    jackknife = np.sqrt(239 / 240 * ((without - without.mean()) ** 2).sum())
    assert (found["high"] - found["low"]) / 2 / 1.96 == pytest.approx(jackknife, rel=0.06)


def test_the_part_of_the_mean_is_what_taking_the_term_away_takes_from_it():
    values, counts, design, group = panel(4)
    model, where = Regression(values, counts, design, group), design[:, :, -1] > 0
    without = design.copy()
    without[:, :, -1] = 0
    less = 1 / (1 + np.exp(-without @ model.coefficients))
    weight = counts * where[:, group]
    expected = (weight * (model.fitted - less)[:, group]).sum() / weight.sum()
    assert model.part_of_mean(7, where).value == pytest.approx(expected)


def test_a_difference_is_paired_and_strata_of_one_prompt_say_nothing():
    values, counts, design, group = panel(5)
    one = Regression(values, counts, design, group).estimate(np.eye(8)[-1])
    assert interval(one - one, group) == {"value": 0, "low": 0, "high": 0}
    alone = Estimate(1.0, np.ones((3, 1)))
    assert interval(alone, np.zeros(1)) == {"value": 1.0, "low": None, "high": None}


def test_replicates_have_students_t_where_only_runs_differ():
    """Two kinds of three runs, whose prompts all say the same: the difference of two means of three."""
    level = np.array([0.2, 0.3, 0.5, 0.1, 0.1, 0.4])
    values, kind = np.repeat(level[:, None], 20, axis=1), np.repeat([0, 1], 3)
    design = np.eye(2)[kind][:, None, :]
    model = Regression(values, np.ones((6, 20)), design, np.zeros(20, int), logit=False)
    estimate = model.estimate(np.array([1.0, -1.0]))
    half = t_quantile(4) * sum(level[kind == k].var(ddof=1) / 3 for k in (0, 1)) ** 0.5
    found = interval(estimate, np.zeros(20), kind)
    gap = level[:3].mean() - level[3:].mean()
    assert (found["low"], found["high"]) == pytest.approx((gap - half, gap + half), abs=1e-4)
    assert scope(kind) == "runs like these" and scope(np.array([0, 0, 0, 1, 1])) == "these runs"
    few = interval(estimate, np.zeros(20), np.arange(6))
    assert few["high"] - few["low"] < 1e-6  # the prompts do not differ, and runs do not count


def test_noise_of_single_responses_is_counted_once_where_prompts_and_runs_are_both_drawn():
    """Responses independent of run and prompt: their variance enters once, not for each way of drawing."""
    kind, widths = np.repeat([0, 1], 4), []
    design = np.eye(2)[kind][:, None, :]
    for seed in range(30):
        values = (np.random.default_rng(seed).random((8, 60)) < 0.5).astype(float)
        model = Regression(values, np.ones((8, 60)), design, np.zeros(60, int), logit=False)
        influence = model.estimate(np.array([1.0, -1.0])).influence
        found = interval(Estimate(0.0, influence), np.zeros(60), kind, decimals=9)
        widths.append(found["high"] / (1.96 * (2 * 0.25 / 240) ** 0.5))
    assert 1 <= np.mean(widths) < 1.45  # twice the variance, with Student's t of six degrees, would be 1.7
