"""Task and domain match: planted effects come back, shares add up, holed grids say what they lack."""

import math

import numpy as np
import pytest
from goodness_of_fit import ks_of_uniform
from score_rows import grid, row

from em.data.cells import CELLS
from em.report.effects import TERMS, labels_of, match_effects, match_model
from em.report.panel import narrow_panel
from em.report.score_table import scores_of

TASK, DOMAIN = (labels_of(CELLS, CELLS, what)[0] for what in ("task", "domain"))
SAME_TASK = (TASK[:, None] == TASK).astype(float)
SAME_DOMAIN = (DOMAIN[:, None] == DOMAIN).astype(float)
ALL = np.arange(12)


def rates_of(task=0.0, domain=0.0, noise=0.0, seed=0):
    """(12, 12) points: random main effects, planted matches, noise."""
    rng = np.random.default_rng(seed)
    main = 20 + rng.normal(0, 5, (12, 1)) + rng.normal(0, 3, (1, 12))
    return main + task * SAME_TASK + domain * SAME_DOMAIN + rng.normal(0, noise, (12, 12))


def fitted(rates, cells=ALL):
    """`fit` with two draws on either side of the rates, so that intervals exist."""
    return match_model(rates, np.stack([rates - 1, rates + 1], axis=2), [CELLS[c] for c in cells], CELLS)


def least_squares(rates, cells):
    """(τ, δ) by numpy on dummies written out one by one."""
    i, j = np.nonzero(np.isfinite(rates))
    columns = [(i == k) for k in range(len(cells))] + [(j == k) for k in range(12)]
    columns += [TASK[cells[i]] == TASK[j], DOMAIN[cells[i]] == DOMAIN[j]]
    solution = np.linalg.lstsq(np.array(columns, float).T, rates[i, j], rcond=None)[0]
    return solution[-2:]


def test_planted_effects_come_back_exactly_and_leave_no_rest():
    result = fitted(rates_of(task=25, domain=4))
    assert result["task_match"]["points"] == pytest.approx(25)
    assert result["domain_match"]["points"] == pytest.approx(4)
    assert result["task_minus_domain"]["points"] == pytest.approx(21)
    assert result["shares"]["rest"] == pytest.approx(0, abs=1e-9)


def test_coefficients_are_least_squares_on_full_and_on_holed_grids():
    rates = rates_of(task=12, domain=-3, noise=4)
    holed = rates.copy()
    holed[np.random.default_rng(1).random((12, 12)) < 0.3] = np.nan
    few = np.array([0, 1, 5, 8, 11])
    for table, cells in ((rates, ALL), (holed, ALL), (rates[few], few)):
        result = fitted(table, cells)
        found = [result["task_match"]["points"], result["domain_match"]["points"]]
        np.testing.assert_allclose(found, least_squares(table, cells), atol=1e-3)
    assert fitted(rates)["task_match"]["exact"] and not fitted(holed)["task_match"]["exact"]


def test_shares_are_a_balanced_analysis_of_variance():
    """On the full grid each share is the classical one, from means alone, and they add up to 1."""
    rates = rates_of(task=10, domain=5, noise=4)
    total = ((rates - rates.mean()) ** 2).sum()
    shares = fitted(rates)["shares"]
    assert shares["train_cell"] == pytest.approx(12 * rates.mean(axis=1).var() * 12 / total, abs=1e-4)
    assert shares["eval_cell"] == pytest.approx(12 * rates.mean(axis=0).var() * 12 / total, abs=1e-4)
    for term, match in (("task_match", SAME_TASK), ("domain_match", SAME_DOMAIN)):
        gap = rates[match == 1].mean() - rates[match == 0].mean()
        n1, n0 = match.sum(), (1 - match).sum()
        assert shares[term] == pytest.approx(gap**2 * n1 * n0 / (n1 + n0) / total, abs=1e-4)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3) and set(shares) == {*TERMS, "rest"}


def test_a_planted_effect_gets_the_smallest_p_and_leaves_the_other_p_alone():
    result = fitted(rates_of(task=20, domain=0, noise=3, seed=3))
    assert (result["task_match"]["permutations"], result["domain_match"]["permutations"]) == (24**3, 6**4)
    assert result["task_match"]["p"] == pytest.approx(1 / 24**3)
    assert result["domain_match"]["p"] > 0.05


@pytest.mark.parametrize("planted", ["task", "domain"])
def test_p_of_an_absent_effect_is_uniform_beside_a_strong_other_one(planted):
    other = {"task": "domain_match", "domain": "task_match"}[planted]
    p = [fitted(rates_of(**{planted: 30}, noise=3, seed=seed))[other]["p"] for seed in range(80)]
    assert ks_of_uniform(p) < 1.63 / math.sqrt(80)  # the 1 % point


def test_runs_that_do_not_differ_in_task_or_domain_say_so():
    rates = rates_of(task=10, domain=5)
    one = fitted(rates[:1], ALL[:1])
    assert one["task_match"]["points"] is None and "differ in task" in one["task_match"]["reason"]
    assert one["domain_match"]["points"] is None and set(one["shares"].values()) == {None}
    advice = np.array([0, 4, 8])  # three domains, one task
    result = fitted(rates[advice], advice)
    assert result["task_match"]["points"] is None and "task_minus_domain" not in result
    assert result["domain_match"]["points"] == pytest.approx(5)
    assert result["domain_match"]["permutations"] == 6
    diagonal = np.where(np.eye(12, dtype=bool), rates, np.nan)
    assert fitted(diagonal)["task_match"]["points"] is None


def test_intervals_from_rows_hold_the_planted_effects():
    """Rows drawn at 10 % + 30 where the task matches + 8 where the domain does, 8 seeds of 12 × 12 × 30."""
    inside = []
    for seed in range(8):
        panel = narrow_panel(
            scores_of(grid(seed, trains=tuple(map(str, CELLS)), prompts=30, broad=0)), draws=300
        )
        result = match_effects(panel)
        for term, truth in (("task_match", 30), ("domain_match", 8)):
            effect = result[term]
            assert effect["low"] < effect["points"] < effect["high"] and effect["high"] - effect["low"] < 10
            inside.append(effect["low"] <= truth <= effect["high"])
    assert sum(inside) >= 13  # of 16; fewer has a chance under 1 % at 95 % coverage


def test_rates_by_match_pool_rows_by_hand():
    """One run, med_advice. Same task elsewhere: 1 of 3 and 1 of 1 are 2/4; the mean of the cells is 2/3."""
    asked = {"med_advice": [10, 80], "fin_advice": [10, 80, 80], "spo_advice": [10], "med_tutor": [80]}
    asked["fin_tutor"] = [80, 80, 10, 80, "refusal"]
    rows = [row(cell=cell, idx=i, aligned=a) for cell, scores in asked.items() for i, a in enumerate(scores)]
    kinds = match_effects(narrow_panel(scores_of([*rows, row(train="base", aligned=5)])))["by_match"]
    found = {kind: (k["em"], k["scored"], k["rows"], k["rate"]) for kind, k in kinds.items()}
    assert found == {
        "same_cell": (1, 2, 2, 50.0),
        "same_task": (2, 4, 4, 50.0),
        "same_domain": (0, 1, 1, 0.0),
        "neither": (1, 4, 5, 25.0),
    }
