"""Task and domain match: planted effects come back, shares add up, holed grids say what they lack."""

import itertools
import math

import numpy as np
import pytest
import sizes
from goodness_of_fit import ks_of_uniform
from scipy.stats import binom
from score_rows import grid, row

from em.data.cells import CELLS, Cell
from em.report.effects import RunCounts, log_odds_effects, match_effects, match_model
from em.report.match_fit import TERMS, MatchDesign, fit_log_odds, labels_of
from em.report.panel import narrow_panel
from em.report.score_table import scores_of
from em.report.text import _effect_sentence

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
    """`match_model` with two draws on either side of the rates."""
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


def test_runs_that_do_not_differ_in_task_or_domain_say_so():
    rates = rates_of(task=10, domain=5)
    one = fitted(rates[:1], ALL[:1])
    assert one["task_match"]["points"] is None and "differ in task" in one["task_match"]["reason"]
    assert one["domain_match"]["points"] is None and set(one["shares"].values()) == {None}
    advice = np.array([0, 4, 8])  # three domains, one task
    result = fitted(rates[advice], advice)
    assert result["task_match"]["points"] is None and "task_minus_domain" not in result
    assert result["domain_match"]["points"] == pytest.approx(5)
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
            assert effect["scope"] == "these runs" and effect["logit_low"] < effect["logit_high"]
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


# -- log odds ------------------------------------------------------------------------------------------


def counts_of(odds, rows=1e9):
    """Counts (n,) that are what the log odds (T, C) expect of so many rows a pair."""
    return (rows * sizes.chance(odds)).ravel(), np.full(odds.size, float(rows))


def planted(task=0.0, domain=0.0, product=0.0, seed=0):
    return sizes.log_odds(
        np.random.default_rng(seed), diagonal=task, domain=domain, product=product, alike=True, noise=0
    )


def test_planted_log_odds_come_back_from_their_counts():
    fit = fit_log_odds(sizes.FULL, *counts_of(planted(task=1.5, domain=-0.4)))
    assert fit.coefficients == pytest.approx({"task_match": 1.5, "domain_match": -0.4}, abs=1e-5)
    assert np.abs(fit.left).max() < 1e-4 * 1e9


def test_the_product_of_strength_and_ease_is_no_match():
    """Strong runs on easy prompts of the same tasks: without the product's term they look like a match."""
    counts = counts_of(planted(product=0.7))
    with_term, without_term = (
        fit_log_odds(sizes.FULL, *counts, product=p).coefficients["task_match"] for p in (True, False)
    )
    assert abs(with_term) < 0.02 and without_term > 0.15


def test_a_fit_leaves_nothing_that_its_terms_could_take_up():
    """The score equations of logistic regression; where all EM is in the task, the match stays finite."""
    rng = np.random.default_rng(0)
    em = rng.binomial(50, sizes.chance(planted(task=1.0)))
    fit = fit_log_odds(sizes.FULL, em.ravel(), np.full(144, 50.0))
    columns = np.concatenate(list(sizes.FULL.terms.values()), axis=1)
    np.testing.assert_allclose(columns.T @ fit.left, 0, atol=1e-5)
    apart = fit_log_odds(sizes.FULL, 25 * SAME_TASK.ravel(), np.full(144, 50.0))
    assert 4 < apart.coefficients["task_match"] < 12 and np.abs(apart.left).max() < 1


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_gradients_are_those_of_the_whole_fit(holes):
    """Central differences of the coefficients, the product's own estimate included."""
    rng = np.random.default_rng(1)
    design = MatchDesign(rng.random((12, 12)) >= holes, CELLS, CELLS)
    scored = np.full(len(design.at[0]), 80.0)
    em = rng.binomial(80, sizes.chance(planted(task=1.0, product=0.7))[design.at]).astype(float)
    fit = fit_log_odds(design, em, scored)
    for pair in range(0, len(em), 17):
        step = np.zeros(len(em))
        step[pair] = 0.01
        up, down = (fit_log_odds(design, em + s, scored).coefficients for s in (step, -step))
        for term, gradient in fit.gradients.items():
            # The rows that keep terms finite move with the overall rate; the gradient leaves that out.
            assert gradient[pair] == pytest.approx((up[term] - down[term]) / 0.02, rel=0.01, abs=2e-5)


# -- the test that renames tasks -----------------------------------------------------------------------


def grids():
    """Full; holed; few train cells; and one of tasks and domains that are not the paper's."""
    rng = np.random.default_rng(5)
    yield np.ones((12, 12), bool), CELLS, CELLS
    yield rng.random((12, 12)) > 0.25, CELLS, CELLS
    yield np.ones((4, 12), bool), [CELLS[c] for c in (0, 1, 4, 5)], CELLS  # two of four tasks
    own = [Cell(d, t) for d in ("law", "art") for t in ("poem", "essay", "code", "chat", "plan")]
    yield np.ones((7, 10), bool), own[:7], own


@pytest.mark.parametrize("what", ["task", "domain"])
def test_p_is_that_of_renaming_the_eval_cells_in_every_way(what):
    """Counted by renaming the cells themselves and adding up what is left where the new names match."""
    for number, (observed, cells, evals) in enumerate(grids()):
        design, rng = MatchDesign(observed, cells, evals), np.random.default_rng(number)
        left = rng.normal(size=len(design.at[0]))
        names = sorted({getattr(cell, what) for cell in evals})
        trained = {getattr(cell, what) for cell in cells}
        totals = {}
        for order in itertools.permutations(names):
            renamed = dict(zip(names, order, strict=True))
            new = [Cell(**(vars(e) | {what: renamed[getattr(e, what)]})) for e in evals]
            match = MatchDesign(observed, cells, new).terms[f"{what}_match"][:, 0]
            totals[tuple(sorted((n, t) for n, t in renamed.items() if t in trained))] = match @ left
        own = totals[tuple(sorted((n, n) for n in trained))]
        mean = np.mean(list(totals.values()))
        far = [abs(total - mean) >= abs(own - mean) - 1e-9 for total in totals.values()]
        found = design.renamed(f"{what}_match", left)
        assert found["permutations"] == len(totals) and found["p"] == pytest.approx(np.mean(far))
        assert found["exact"] == observed.all()
        assert found["smallest_p"] == (1.0 if len(totals) == 2 else pytest.approx(1 / len(totals)))


def test_a_planted_effect_gets_the_smallest_p_and_leaves_the_other_p_alone():
    em, scored = counts_of(sizes.log_odds(np.random.default_rng(3), diagonal=1.5), rows=400)
    counts = RunCounts.of_pairs(np.round(em).reshape(12, 12), scored.reshape(12, 12))
    result = log_odds_effects(counts, CELLS, CELLS)
    assert (result["task_match"]["permutations"], result["domain_match"]["permutations"]) == (24, 6)
    assert result["task_match"]["p"] == result["task_match"]["smallest_p"] == 1 / 24
    assert result["domain_match"]["p"] > 1 / 6 == result["domain_match"]["smallest_p"]


@pytest.mark.parametrize("planted", ["task", "domain"])
def test_p_of_an_absent_effect_is_uniform_beside_a_strong_other_one(planted):
    """Every one of the ways is as likely to be the furthest: p less a random part of its step is uniform."""
    rng, p = np.random.default_rng(0), []
    other = {"task": "domain_match", "domain": "task_match"}[planted]
    strong = {"task": {"diagonal": 1.5}, "domain": {"domain": 1.5}}[planted]
    for seed in range(80):
        em = rng.binomial(60, sizes.chance(sizes.log_odds(np.random.default_rng(seed), **strong)))
        fit = fit_log_odds(sizes.FULL, em.ravel(), np.full(144, 60.0), (f"{planted}_match",))
        found = sizes.FULL.renamed(other, fit.left)
        p.append(found["p"] - rng.random() / found["permutations"])
    assert ks_of_uniform(p) < 1.63 / math.sqrt(80)  # the 1 % point


@pytest.mark.parametrize("kind", sizes.NULLS)
def test_the_test_rejects_no_more_than_7_in_100_where_no_task_is_its_own(kind):
    """60 grids; more than so many rejections have a chance under 1 in 1,000 at a size of 0.07."""
    rejected = (sizes.p_values(sizes.NULLS[kind], 60, 100, -2.0) < 0.05).sum()
    assert rejected <= binom.ppf(0.999, 60, 0.07)


def test_the_test_finds_a_diagonal():
    for kind in sizes.PLANTED.values():
        assert (sizes.p_values(kind, 20, 400, -2.0) < 0.05).sum() >= 16


# -- intervals -----------------------------------------------------------------------------------------


def test_intervals_hold_the_log_odds_of_these_runs_and_of_runs_like_these():
    """More misses than these have a chance under 1 in 1,000 at a coverage of 0.93."""
    for repeats, prompts, seeds in ((40, 40, 1), (20, 10, 3)):
        kind = sizes.PLANTED["diagonal 0.5, strength + ease alike"]
        covered = sizes.match_coverage(kind, repeats, prompts, -2.0, seeds)
        assert repeats * covered >= binom.ppf(0.001, repeats, 0.93), seeds


def rows_of_seeds(seeds, spread):
    """Four cells' runs of so many seeds; a run's rate goes up and down by `spread` in its own task."""
    rng, rows = np.random.default_rng(0), []
    cells = ("med_advice", "med_tutor", "fin_advice", "fin_tutor")
    for train, seed in itertools.product(cells, range(seeds)):
        shift = spread * rng.normal()
        for cell in cells:
            chance = 0.3 + (cell[3:] == train[3:]) * (0.3 + shift)
            rows += [
                row(train=train, cell=cell, idx=i, seed=seed, aligned=0 if rng.random() < chance else 90)
                for i in range(40)
            ]
    return rows


def test_intervals_are_of_runs_like_these_from_three_seeds_a_cell_on():
    wide = {}
    for seeds, spread in ((2, 0.2), (3, 0.0), (3, 0.2)):
        result = match_effects(narrow_panel(scores_of(rows_of_seeds(seeds, spread)), 50))
        assert result["scope"] == ("these runs" if seeds == 2 else "runs like these")
        effect = result["task_match"]
        assert effect["scope"] == result["scope"] in _effect_sentence(result, "task")
        wide[seeds, spread] = effect["high"] - effect["low"]
    assert wide[3, 0.2] > 1.5 * wide[3, 0.0]  # runs that differ say less of others
    rows = rows_of_seeds(3, 0.2)
    alone = [r for r in rows if r["train"] != "fin_tutor" or r["seed"] == 0]
    assert match_effects(narrow_panel(scores_of(alone), 50))["scope"] == "these runs"


def test_the_interval_of_counts_alone_is_that_of_independent_rows():
    """Points of the match: z · rates, and the binomial variances by hand."""
    rng = np.random.default_rng(0)
    em, scored = rng.binomial(200, sizes.chance(planted(task=1.0))), np.full((12, 12), 200)
    z = sizes.FULL.square(100 * sizes.FULL.weights("task_match"))
    p = em / scored
    half = 1.96 * math.sqrt((z**2 * p * (1 - p) / 200).sum())
    found = RunCounts.of_pairs(em, scored).half_width(z / scored, p)
    assert found == pytest.approx(half, rel=0.01)


def test_the_sentence_says_what_p_can_and_cannot_tell():
    rows = grid(0, trains=tuple(map(str, CELLS)), prompts=20, broad=0)
    result = match_effects(narrow_panel(scores_of(rows), 50))
    task, domain = (_effect_sentence(result, what) for what in ("task", "domain"))
    assert "(these runs); p = 0.042 of 24 ways to rename the tasks, so p cannot fall under 0.042." in task
    assert "so p cannot fall under 0.167, and nothing can be told at 5 %." in domain
