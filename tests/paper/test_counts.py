"""Pools of counts: rates by hand, and intervals that hold however alike a prompt's answers are."""

import json

import numpy as np
import pytest
from compared import FIELDS

from em.data.cells import parse_cell
from em.errors import UserError
from em.paper.counts import Counts, read_counts
from em.paper.measures import measure
from em.stats import wilson


def counts_file(path, rows):
    path.write_text(json.dumps({"source": "planted", "fields": FIELDS, "rows": rows}))
    return path


def two_by_two(em, scored=((10, 10), (10, 10)), samples=1):
    """Counts of med_advice and med_tutor, narrow."""
    cells = [parse_cell("med_advice"), parse_cell("med_tutor")]
    sums = np.zeros((2, 2, 6), int)
    sums[:, :, 0], sums[:, :, 1], sums[:, :, 2] = 10, scored, em
    return Counts(cells, cells, samples, sums)


def everywhere(counts):
    return np.ones(counts.em.shape, bool)


def test_a_pool_has_the_rate_of_its_rows_and_the_mean_of_its_pairs():
    counts = two_by_two(em=[[8, 1], [2, 5]], scored=[[10, 10], [4, 10]])
    entry = counts.rate(everywhere(counts))
    assert (entry["em"], entry["scored"], entry["rows"], entry["pairs"]) == (16, 34, 40, 4)
    assert entry["rate"] == pytest.approx(100 * 16 / 34, abs=1e-4)
    assert entry["pairs_mean"] == pytest.approx(100 * (0.8 + 0.1 + 0.5 + 0.5) / 4)
    assert entry["prompts"] == 20  # ten a column, whoever answers


def test_a_narrow_pair_has_wilsons_interval_and_no_design_effect():
    counts = two_by_two(em=[[8, 1], [2, 5]])
    entry = counts.rate(np.array([[True, False], [False, False]]))
    expected = [100 * bound for bound in wilson(8, 10)]
    assert [entry["low"], entry["high"]] == pytest.approx(expected, abs=1e-4)
    assert [entry["rows_low"], entry["rows_high"]] == pytest.approx(expected, abs=1e-4)
    assert entry["design_effect"] == 1 and entry["interval"] == "wilson"


def test_four_samples_a_prompt_can_have_a_design_effect_of_four():
    """80 rows of 20 prompts: the widest interval is that of 20 rows, the narrowest that of 80."""
    sums = np.array([[[80, 80, 20, 0, 0, 0]]])
    entry = Counts([parse_cell("med_advice")], [("advice", "high")], 4, sums).rate(np.ones((1, 1), bool))
    assert [entry["low"], entry["high"]] == pytest.approx([100 * b for b in wilson(5, 20)], abs=1e-3)
    assert [entry["rows_low"], entry["rows_high"]] == pytest.approx(
        [100 * b for b in wilson(20, 80)], abs=1e-3
    )
    assert entry["design_effect"] == 4 and entry["prompts"] == 20


@pytest.mark.parametrize("alike", [True, False])
def test_the_interval_holds_the_true_rate_however_alike_the_runs_are(alike):
    """Six runs of known rates on the same 60 prompts: one hardness a prompt, or one a response."""
    rng, rates, hits = np.random.default_rng(0), np.array([0.02, 0.1, 0.3, 0.3, 0.6, 0.9]), []
    trains = [parse_cell(f"med_{name}") for name in "abcdef"]
    narrower = 0
    for _ in range(600):
        hardness = rng.random((1, 60) if alike else (6, 60))
        em = (hardness < rates[:, None]).sum(axis=1)
        sums = np.array([[[60, 60, k, 0, 0, 0]] for k in em])
        entry = Counts(trains, [parse_cell("med_a")], 1, sums).rate(np.ones((6, 1), bool))
        hits.append(entry["low"] <= 100 * rates.mean() <= entry["high"])
        narrower += entry["rows_low"] <= 100 * rates.mean() <= entry["rows_high"]
    assert np.mean(hits) >= 0.93
    assert (narrower / 600 < 0.85) == alike  # counting rows is wrong where answers are alike


def test_a_difference_of_pools_is_of_their_rates_with_an_interval_around_it():
    counts = two_by_two(em=[[8, 1], [2, 5]])
    found = measure("task_gap", {"narrow": counts})
    assert found["value"] == pytest.approx(100 * (13 - 3) / 20)
    assert found["low"] < found["value"] < found["high"]
    assert measure("surface_high_minus_medium", {"narrow": counts}) is None
    assert measure("no such measure", {"narrow": counts}) is None


def test_shares_of_a_matrix_are_counted_by_hand():
    cells = [parse_cell(f"{d}_{t}") for d in ("med", "spo") for t in ("advice", "tutor")]
    sums = np.full((4, 4, 6), 10)
    # med_advice: strongest other cell spo_advice (own task); med_tutor: spo_advice (not); spo_advice:
    # med_tutor (not); spo_tutor: med_tutor (own task). The diagonal is left out.
    sums[:, :, 2] = [[9, 1, 8, 2], [1, 9, 8, 2], [1, 7, 9, 2], [1, 6, 2, 9]]
    narrow = {"narrow": Counts(cells, cells, 1, sums)}
    assert measure("strongest_other_cell", narrow)["of"] == "2 of 4"
    # advice-trained: advice 9+8+1+9 over tutor 1+2+7+2; tutor-trained: tutor 9+2+6+9 over advice 1+8+1+2.
    assert measure("own_task_highest", narrow)["of"] == "2 of 2"
    sums[[0, 0, 2, 2], [1, 3, 1, 3], 2] = 10  # now trained on advice, asked to tutor: all
    assert measure("own_task_highest", narrow)["of"] == "1 of 2"


def test_surface_differences_pool_tasks_and_runs():
    columns = [(task, s) for task in ("advice", "tutor") for s in ("high", "medium", "low")]
    sums = np.zeros((1, 6, 6), int)
    sums[:, :, :2], sums[0, :, 2] = 80, [40, 20, 8, 20, 4, 8]
    broad = {"broad": Counts([parse_cell("med_advice")], columns, 4, sums)}
    assert measure("surface_high_minus_medium", broad)["value"] == pytest.approx(100 * (60 - 24) / 160)
    assert measure("surface_medium_minus_low", broad)["value"] == pytest.approx(100 * (24 - 16) / 160)


def test_a_file_of_counts_is_read_into_the_grids_order(tmp_path):
    rows = [
        ["m", "fin_tutor", "narrow", "med", "advice", "", 10, 9, 3, 1, 1, 0],
        ["m", "med_advice", "narrow", "fin", "tutor", "", 10, 10, 4, 0, 0, 0],
        ["m", "med_advice", "broad", "broad", "tutor", "low", 8, 8, 1, 0, 0, 0],
        ["m", "med_advice", "broad", "broad", "tutor", "high", 8, 8, 2, 0, 0, 0],
    ]
    source, models = read_counts(counts_file(tmp_path / "counts.json", rows))
    narrow, broad = models["m"]["narrow"], models["m"]["broad"]
    assert source == "planted"
    assert list(map(str, narrow.trains)) == ["med_advice", "fin_tutor"]
    assert list(map(str, narrow.columns)) == ["med_advice", "fin_tutor"]
    assert narrow.em.tolist() == [[0, 4], [3, 0]] and narrow.scored.tolist() == [[0, 10], [9, 0]]
    assert broad.columns == [("tutor", "high"), ("tutor", "low")] and broad.em.tolist() == [[2, 1]]
    assert narrow.rate(np.zeros((2, 2), bool))["rate"] is None


def test_a_pair_that_is_there_twice_is_refused(tmp_path):
    row = ["m", "med_advice", "narrow", "med", "advice", "", 10, 9, 3, 1, 1, 0]
    with pytest.raises(UserError, match="twice"):
        read_counts(counts_file(tmp_path / "counts.json", [row, row]))
