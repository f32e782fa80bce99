"""Both averages by hand, and intervals: what they are made of, where they end, how often they cover."""

import math

import numpy as np
import pytest
from made_outcomes import outcomes, trained

from em.report.averages import Averages, Pool
from em.report.outcomes import NATS
from em.stats import mean_interval, rate_interval, wilson

ONE = Pool.of({"med_advice": [0]})


def entry(made, cells: dict, columns=(0, 1)) -> dict:
    return Averages(made).entry(Pool.of(cells), list(columns))


def test_refusals_set_pooled_rows_and_the_mean_of_pairs_apart():
    """1 of 2 in one cell, 4 of 4 in the other: 5 of 6 rows, but (50 + 100) / 2 of pairs."""
    made = outcomes(
        [trained()], [[1, 0, 0, 0, 1, 1, 1, 1]], [0] * 4 + [1] * 4, scored=[[1, 1, 0, 0, 1, 1, 1, 1]]
    )
    found = entry(made, {"med_advice": [0]})
    assert found["pooled"] == pytest.approx(100 * 5 / 6, abs=1e-4) and found["pairs_mean"] == 75
    assert (found["rows"], found["scored"], found["pairs"], found["prompts"], found["runs"]) == (
        8,
        6,
        2,
        8,
        1,
    )
    assert found["low"] < 75 < found["high"] and found["pooled_low"] < found["pooled"] < found["pooled_high"]


def test_a_pair_without_a_scored_row_is_no_pair():
    made = outcomes([trained()], [[1, 0, 0, 0]], [0, 0, 1, 1], scored=[[1, 1, 0, 0]])
    found = entry(made, {"med_advice": [0]})
    assert (found["pairs_mean"], found["pairs"], found["rows"]) == (50, 1, 4)
    empty = entry(made, {"med_advice": [0]}, (1,))
    assert (empty["pairs_mean"], empty["pooled"], empty["low"], empty["pairs"]) == (None, None, None, 0)
    assert entry(made, {})["rows"] == 0


def test_seeds_are_replicates_of_one_pair():
    """Cell A has seeds at 0 and 100 %, cell B one run at 100 %: pairs (50 + 100) / 2, rows 4 of 6."""
    made = outcomes(
        [trained(seed=1), trained(seed=2), trained("fin_tutor")], [[0, 0], [1, 1], [1, 1]], [0, 0]
    )
    found = Averages(made).entry(Pool.of({"med_advice": [0, 1], "fin_tutor": [2]}), [0])
    assert found["pairs_mean"] == 75 and found["pairs"] == 2 and found["runs"] == 3
    assert found["pooled"] == pytest.approx(100 * 4 / 6, abs=1e-4)


def test_one_cells_interval_is_that_of_as_many_independent_rows():
    made = outcomes([trained()], [[1] * 6 + [0] * 14], [0] * 20)
    found = entry(made, {"med_advice": [0]}, (0,))
    assert (found["low"], found["high"]) == pytest.approx([100 * b for b in rate_interval(0.3, 20)], abs=1e-4)


def test_at_zero_and_a_hundred_it_is_wilsons_of_the_prompts_whatever_the_runs():
    made = outcomes([trained(), trained("fin_tutor")], np.zeros((2, 30)), [0] * 30)
    found = Averages(made).entry(Pool.of({"med_advice": [0], "fin_tutor": [1]}), [0])
    assert (found["low"], found["high"]) == pytest.approx([100 * b for b in wilson(0, 30)], abs=1e-4)
    full = entry(outcomes([trained()], np.ones((1, 30)), [0] * 30), {"med_advice": [0]}, (0,))
    assert full["high"] == 100 and full["low"] == pytest.approx(100 * wilson(30, 30)[0], abs=1e-4)


def test_a_margins_interval_is_students_t():
    values = [0.1, 0.5, -0.2, 0.9, 0.3, 0.4]
    found = entry(outcomes([trained()], [values], [0] * 6, unit=NATS), {"med_advice": [0]}, (0,))
    expected = mean_interval(values)
    assert [found[k] for k in ("pairs_mean", "low", "high")] == pytest.approx(
        [expected[k] for k in ("mean", "low", "high")], abs=1e-4
    )


def drawn(rng, rate: float, runs: int, prompts: int, spread: float = 1.5):
    """(runs, prompts) of EM that prompts share an inclination to; the mean rate is about `rate`."""
    mean = math.log(rate / (1 - rate)) * math.sqrt(1 + 0.346 * spread**2)
    chance = 1 / (1 + np.exp(-mean - spread * rng.normal(size=prompts)))
    return rng.random((runs, prompts)) < chance


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_intervals_of_several_runs_on_common_prompts_cover(rate):
    """Rows are not independent: treated as if they were, three runs would cover about 85 %."""
    rng = np.random.default_rng(1)
    truth = 100 * np.mean([drawn(rng, rate, 1, 20_000).mean() for _ in range(10)])
    runs = [trained(c) for c in ("med_advice", "fin_tutor", "spo_critique")]
    pool, covers = Pool.of({str(run.train): [r] for r, run in enumerate(runs)}), 0
    for _ in range(200):
        averages = Averages(outcomes(runs, drawn(rng, rate, 3, 100), np.arange(100) % 2))
        found = averages.entry(pool, [0, 1])
        assert 0 <= found["low"] < found["high"] <= 100
        covers += found["low"] <= truth <= found["high"]
    assert covers / 200 >= 0.91


def test_differences_are_paired_by_prompt_and_cover_nothing_where_there_is_nothing():
    rng, narrow, wide, covers = np.random.default_rng(2), [], [], 0
    pools = Pool.of({"med_advice": [0]}), Pool.of({"med_advice": [1]})
    for _ in range(200):
        em = drawn(rng, 0.3, 2, 100, spread=3)
        found = Averages(outcomes([trained(lr=1.0), trained(lr=2.0)], em, [0] * 100)).difference(*pools, [0])
        narrow.append(found["high"] - found["low"])
        covers += found["low"] <= 0 <= found["high"]
        em = np.concatenate([np.c_[em[:1], np.zeros((1, 100))], np.c_[np.zeros((1, 100)), em[1:]]])
        apart = np.repeat([[1, 0], [0, 1]], 100, axis=1)  # the second run on other prompts
        made = outcomes([trained(lr=1.0), trained(lr=2.0)], em, [0] * 200, scored=apart)
        found = Averages(made).difference(*pools, [0])
        wide.append(found["high"] - found["low"])
    assert np.mean(narrow) < 0.85 * np.mean(wide) and covers / 200 >= 0.91


def test_a_difference_is_over_the_pairs_that_both_have():
    """B was never trained on fin_tutor: A's 100 % there does not count. Base is set against each of A's."""
    runs = [trained(lr=1.0), trained("fin_tutor", lr=1.0), trained(lr=2.0), trained("base")]
    made = outcomes(runs, [[1, 0], [1, 1], [0, 0], [0, 0]], [0, 0])
    a, averages = Pool.of({"med_advice": [0], "fin_tutor": [1]}), Averages(made)
    found = averages.difference(a, Pool.of({"med_advice": [2]}), [0])
    assert (found["pairs_mean"], found["pairs"]) == (50, 1)
    found = averages.difference(a, Pool.of({None: [3]}), [0])
    assert (found["pairs_mean"], found["pairs"]) == (75, 2)
    assert averages.difference(Pool.of({"med_advice": [0]}), Pool.of({"fin_tutor": [1]}), [0]) is None
    made = outcomes(runs[:2], [[1, 0, 1, 1], [0, 0, 0, 0]], [0, 0, 1, 1], scored=[[1] * 4, [1, 1, 0, 0]])
    found = Averages(made).difference(Pool.of({None: [0]}), Pool.of({None: [1]}), [0, 1])
    assert (found["pairs_mean"], found["pooled"], found["pairs"]) == (50, 50, 1)  # B was asked one cell alone


def test_three_seeds_of_every_cell_make_an_interval_of_runs_like_these():
    """Seeds at 10, 50 and 90 % on 400 prompts: prompts alone would say ± 3, seeds say ± 30 and more."""
    em = np.stack([np.arange(400) % 10 < k for k in (1, 5, 9)])
    made = outcomes([trained(seed=s) for s in range(3)], em, [0] * 400)
    averages = Averages(made)
    three = averages.entry(Pool.of({"med_advice": [0, 1, 2]}), [0])
    two = averages.entry(Pool.of({"med_advice": [0, 1]}), [0])
    assert three["scope"] == "runs like these" and three["high"] - three["low"] > 60
    assert two["scope"] == "these runs" and two["high"] - two["low"] < 8
    runs = [trained(seed=s, lr=lr) for lr in (1.0, 2.0) for s in range(3)]
    pools = [Pool.of({"med_advice": list(range(i, i + 3))}) for i in (0, 3)]
    gap = Averages(outcomes(runs, np.concatenate([em, em]), [0] * 400)).difference(*pools, [0])
    assert gap["scope"] == "runs like these" and gap["low"] < -40 and gap["high"] > 40


def test_variance_over_prompts_and_over_seeds_add_up_less_what_both_count():
    """By the three sums of Cameron, Gelbach and Miller on 3 seeds × 4 prompts, with t on 2 seeds' freedom."""
    em = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]], float)
    found = Averages(outcomes([trained(seed=s) for s in range(3)], em, [0] * 4)).entry(
        Pool.of({"med_advice": [0, 1, 2]}), [0]
    )
    rates, p = em.mean(axis=1), em.mean()
    away = (em - rates[:, None]) / 12
    by_prompt = 4 / 3 * (away.sum(axis=0) ** 2).sum()
    by_seed = ((rates - p) ** 2).sum() / 2 / 3
    total = by_prompt + by_seed - (away**2).sum()
    assert total > max(by_prompt, by_seed)
    bounds = [100 * b for b in rate_interval(p, p * (1 - p) / total, 2)]
    assert (found["low"], found["high"]) == pytest.approx(bounds, abs=1e-4)


def test_runs_that_differ_by_seed_cover_the_mean_of_all_seeds():
    """A run's own level varies by 0.5 on the logit scale; the interval of these runs covers too seldom."""
    rng, covers, of_runs = np.random.default_rng(3), {3: 0, 1: 0}, 6
    cells = ("med_advice", "fin_tutor")
    truth = 100 * np.mean(1 / (1 + np.exp(1 - math.sqrt(1.25) * rng.normal(size=400_000))))
    runs = [trained(cell, seed=s) for cell in cells for s in range(3)]
    for _ in range(200):
        level = -1 + rng.normal(size=100) + 0.5 * rng.normal(size=(of_runs, 1))
        made = outcomes(runs, rng.random(level.shape) < 1 / (1 + np.exp(-level)), [0] * 100)
        for seeds in covers:
            pool = Pool.of({cell: [3 * i + s for s in range(seeds)] for i, cell in enumerate(cells)})
            found = Averages(made).entry(pool, [0])
            covers[seeds] += found["low"] <= truth <= found["high"]
    assert covers[3] / 200 >= 0.93 and covers[1] / 200 < 0.85


def test_a_mean_over_columns_of_one_prompt_has_no_interval_and_of_two_has_one():
    """One margin in each of two cells: nothing says how prompts vary, so no interval of no width."""
    for asked, known in (([0, 1], False), ([0, 0, 1, 1], True)):
        made = outcomes([trained()], [[0.1, 0.4, 0.2, 0.7][: len(asked)]], asked, unit=NATS)
        found = entry(made, {"med_advice": [0]})
        assert found["pairs_mean"] is not None
        assert (found["low"] is not None) == (found["high"] is not None) == known
        assert not known or found["low"] < found["pairs_mean"] < found["high"]
