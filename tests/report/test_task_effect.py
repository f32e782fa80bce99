"""Difficulty that passes for task match: planted, it biases the raw effect and no adjusted one."""

import numpy as np
import pytest
from referee import WAYS, held, planted_difficulty

from em.data.cells import Cell
from em.report.task_effect import Prompts, matched_sets, task_effects

SETS = 16


@pytest.fixture(scope="module", params=[0.0, 0.8])
def planted(request):
    """(true effect, the effects of so many data sets with that effect and with confounding)."""
    truth = request.param
    return truth, [task_effects(*planted_difficulty(seed, truth, n=50)) for seed in range(SETS)]


def test_confounded_by_difficulty_the_raw_effect_is_biased_and_the_adjusted_are_not(planted):
    truth, results = planted
    found = {way: held([r[way]["logit"] for r in results], truth) for way in WAYS}
    assert found["raw"][0] > 0.25 and found["raw"][1] < 0.2
    for way in WAYS[1:]:
        assert abs(found[way][0]) < 0.09, way  # over so many sets its error is about 0.02
    # Of 48 intervals that hold the truth 93 times in 100, 40 or more hold it in 98 of 100 cases.
    assert sum(found[way][1] for way in WAYS[1:]) * SETS >= 40
    changes = [r["slopes"]["logit_change"] for r in results]
    assert np.mean([change["high"] < 0 for change in changes]) > 0.9  # adjusted is less, and that is certain


def test_matched_prompts_are_alike_in_difficulty_across_tasks(planted):
    for result in planted[1]:
        gaps, found = result["matched"]["largest_gap_sd"], result["matched"]
        assert gaps["before"] > 0.8 and gaps["after"] < 0.08
        assert found["prompts"] == 4 * found["sets"] > 100


def test_points_are_what_the_match_adds_to_the_rates_of_matching_pairs():
    prompts, d = planted_difficulty(0, 0.8, confounding=0, n=200)
    found = task_effects(prompts, d)
    same = np.array([[t.task == prompts.columns[c].task for c in prompts.column] for t in prompts.trains])
    rate = prompts.em[same].mean()
    without = 1 / (1 + np.exp(-(np.log(rate / (1 - rate)) - 0.8)))
    assert found["raw"]["points"]["value"] == pytest.approx(100 * (rate - without), abs=2.5)
    per_sd = [entry["value"] for entry in found["slopes"]["per_sd"]]
    assert np.ptp(per_sd) < 1.2 and np.mean(per_sd) == pytest.approx(0, abs=1.5)


def test_a_set_has_one_prompt_of_each_task_of_a_domain_within_the_caliper_and_no_prompt_twice():
    rng = np.random.default_rng(0)
    columns = [Cell("law", "advice"), Cell("law", "essay"), Cell("law", "quiz"), Cell("art", "essay")]
    column = rng.choice(4, 300, p=[0.2, 0.3, 0.3, 0.2])
    d = rng.normal(size=300) + 0.5 * column
    sets = matched_sets(d, column, columns, 0.2)
    assert len(sets) > 20
    for chosen in sets:
        assert sorted(column[chosen]) == [0, 1, 2] and np.ptp(d[chosen]) <= 0.2  # art has one task
    every = np.concatenate(sets)
    assert len(set(every.tolist())) == len(every)


def test_any_grid_will_do_and_one_that_cannot_tell_says_none():
    rng = np.random.default_rng(1)
    columns = [Cell("law", "advice"), Cell("law", "essay"), Cell("art", "essay"), Cell("art", "quiz")]
    column, d = np.repeat(np.arange(4), 50), rng.normal(size=200)
    trains = [Cell("law", "advice"), Cell("law", "essay"), Cell("art", "quiz")]
    em = (rng.random((3, 200)) < 0.3).astype(float)
    found = task_effects(Prompts(em, np.ones_like(em), column, trains, columns), d)
    assert all(found[way]["logit"]["value"] is not None for way in WAYS)
    alone = task_effects(Prompts(em[:1], np.ones((1, 200)), column, trains[:1], columns), d)
    assert all(alone[way]["logit"]["value"] is None and alone[way]["points"]["low"] is None for way in WAYS)
    flat = task_effects(Prompts(em, np.ones_like(em), column, trains, columns), np.zeros(200))
    assert flat["slopes"]["logit"]["value"] == pytest.approx(flat["raw"]["logit"]["value"], abs=1e-3)


def test_three_seeds_of_every_cell_speak_of_runs_like_these_and_show_in_the_interval():
    """Runs of one cell that differ a lot in what they do to their own task."""
    rng = np.random.default_rng(0)
    columns = [Cell(d, t) for d in ("law", "art") for t in ("advice", "essay")]
    column, trains = np.repeat(np.arange(4), 100), [cell for cell in columns for _ in range(3)]
    own = np.array([[train.task == columns[c].task for c in column] for train in trains])
    em = rng.random(own.shape) < 1 / (1 + np.exp(1 - own * rng.normal(1, 1, (12, 1))))
    prompts = Prompts(em.astype(float), np.ones(em.shape), column, trains, columns)
    seeds = task_effects(prompts, rng.normal(size=400))
    once = task_effects(prompts._replace(em=prompts.em[::3], scored=prompts.scored[::3], trains=columns),
                        rng.normal(size=400))  # fmt: skip
    assert (seeds["scope"], once["scope"]) == ("runs like these", "these runs")
    for way in WAYS:
        wide, narrow = (r[way]["logit"]["high"] - r[way]["logit"]["low"] for r in (seeds, once))
        assert wide > 1.5 * narrow
    assert len(seeds["slopes"]["per_sd"]) == 4
