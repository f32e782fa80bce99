"""The dose curve of a fine-tuning, from planted margins, and what a run keeps of its way."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from em.data.cells import parse_cell
from em.errors import UserError
from em.files import read_json
from em.run import Run
from em.stats import at_flip, mean_interval
from em.training import doses
from em.training.doses import DoseMargins, check_doses, dose_curve, dose_figure, groups_of
from em.training.margin import AnswerPair

MED, TASK, DOMAIN, NEITHER, FAR = map(
    parse_cell, ("med_advice", "fin_advice", "med_tutor", "fin_tutor", "spo_critique")
)


def entry(result: dict, at: str, cells: str) -> dict:
    (found,) = (e for e in result["entries"] if (e["at"], e["cells"]) == (at, cells))
    return found


@pytest.fixture
def planted():
    """Ten rows of the trained cell, of which 0, 2, 8 and 10 flip; the others move by dose."""
    rng, margins = np.random.default_rng(0), {}
    for dose, flipped in {0: 0, 1: 2, 4: 8, 16: 10}.items():
        own = [0.5 if i < flipped else -0.5 for i in range(10)]
        margins[dose] = {MED: own} | {
            cell: list(-1 + slope * dose + rng.normal(0, 0.1, n))
            for cell, slope, n in ((TASK, 0.3, 6), (DOMAIN, 0.2, 6), (NEITHER, 0.0, 6), (FAR, 0.1, 7))
        }
    return margins


def test_other_cells_are_grouped_by_what_they_share_with_the_trained_one():
    found = groups_of(MED, [DOMAIN, MED, NEITHER, TASK, FAR])
    others = [DOMAIN, NEITHER, TASK, FAR]
    assert found == {
        "same task": [TASK], "same domain": [DOMAIN], "neither": [NEITHER, FAR], "all others": others
    }  # fmt: skip
    assert groups_of(MED, [MED]) == {} and list(groups_of(MED, [MED, FAR])) == ["neither", "all others"]


def test_at_a_dose_are_the_means_of_rows_and_of_cells_with_students_t(planted):
    result = dose_curve(MED, planted, "misaligned")
    own = entry(result, "step 4", "med_advice")
    assert (own["dose"], own["local_flip"], own["flip"], own["n"]) == (4, 80, 80, 10)
    change = np.subtract(planted[4][TASK], planted[0][TASK])
    of_task = entry(result, "step 4", "same task")
    for measure, values in {"margin": planted[4][TASK], "change": change}.items():
        expected = mean_interval(list(values))
        names = (measure, f"{measure}_low", f"{measure}_high")
        assert [of_task[name] for name in names] == pytest.approx(
            [expected[k] for k in ("mean", "low", "high")]
        )
    a, b = planted[16][NEITHER], planted[16][FAR]  # a mean of two cells, whose errors are independent
    both, t11 = entry(result, "step 16", "neither"), 2.2009851600829
    half = t11 * math.sqrt(np.var(a, ddof=1) / 6 + np.var(b, ddof=1) / 7) / 2
    middle = (np.mean(a) + np.mean(b)) / 2
    bounds = both["margin"], both["margin_low"], both["margin_high"], both["n"]
    assert bounds == pytest.approx((middle, middle - half, middle + half, 13))
    assert 0 < own["flip_low"] < 80 < own["flip_high"] < 100


def test_effects_at_a_flip_lie_between_the_doses_around_it(planted):
    result = dose_curve(MED, planted, "misaligned")
    at = entry(result, "flip 60", "same task")  # two thirds of the way from 20 % at step 1 to 80 % at step 4
    early, late = (entry(result, f"step {dose}", "same task") for dose in (1, 4))
    assert at["dose"] == pytest.approx(3) and at["local_flip"] == 60
    assert at["dose_low"] < 3 < at["dose_high"] and at["flip_low"] < at["flip"] < at["flip_high"]
    for measure in ("margin", "change", "flip"):
        assert at[measure] == pytest.approx(early[measure] / 3 + 2 * late[measure] / 3)
    assert at["change_low"] < at["change"] < at["change_high"]


def test_what_a_realignment_flips_is_below_zero_and_four_rows_have_no_interval_at_a_flip():
    margins = {
        0: {MED: [1.0] * 4, FAR: [1.0] * 6},
        2: {MED: [-1.0] * 4, FAR: [-1.0] * 3 + [0.5] * 3},
    }
    result = dose_curve(MED, margins, "aligned")
    assert [entry(result, f"step {d}", "med_advice")["flip"] for d in (0, 2)] == [0, 100]
    assert entry(result, "step 2", "all others")["flip"] == 50
    at = entry(result, "flip 60", "all others")
    assert at["change"] == pytest.approx(-1.25 * 0.6) and at["change_low"] is None


def test_what_is_not_reached_or_rests_on_one_row_is_null_and_is_drawn(tmp_path):
    margins = {0: {MED: [-1.0] * 6, FAR: [-1.0]}, 1: {MED: [1.0] * 3 + [-1.0] * 3, FAR: [0.5]}}
    result = dose_curve(MED, margins, "misaligned")
    json.dumps(result, allow_nan=False)
    lost, reached = (entry(result, f"flip {level}", "neither") for level in (60, 30))
    assert {lost[k] for k in ("dose", "margin", "change", "change_low", "change_high", "flip")} == {None}
    assert reached["change"] == pytest.approx(0.9) and reached["change_low"] is None
    single = entry(result, "step 1", "neither")
    assert (single["change"], single["change_low"]) == (1.5, None)
    dose_figure(result, tmp_path / "doses.png")
    assert "30 % of the rows of med_advice flipped at step 0.6" in doses.summary(result)
    alone = dose_curve(MED, {dose: {MED: of[MED]} for dose, of in margins.items()}, "misaligned")
    dose_figure(alone, tmp_path / "alone.png")
    assert "no other cells" in doses.summary(alone)


def test_an_interval_at_a_flip_holds_the_truth_where_the_trained_cells_rows_are_the_noise(monkeypatch):
    """Few rows say when the trained cell is half flipped; what moves by dose is uncertain with that."""
    monkeypatch.setattr(doses, "DRAWS", 100)
    monkeypatch.setattr(doses, "FLIPS", (60.0,))
    steps = np.array([0, 1, 2, 4, 8, 16])
    shift = np.log2(1 + steps)[:, None]

    def rows(rng, n: int) -> np.ndarray:
        return rng.normal(-2, 1, n) + shift  # (D, n)

    def others(rng, n: int) -> np.ndarray:
        return -1 + shift * rng.normal(1, 0.1, n)

    rng, held, sure = np.random.default_rng(1), 0, 0
    large, far = rows(rng, 200_000), others(rng, 200_000)
    truth = at_flip(list(100 * (large > 0).mean(axis=1)), list((far - far[0]).mean(axis=1)), 60.0)
    for _ in range(80):
        own, far = rows(rng, 24), others(rng, 24)
        margins = {d: {MED: list(own[i]), FAR: list(far[i])} for i, d in enumerate(steps.tolist())}
        at = entry(dose_curve(MED, margins, "misaligned"), "flip 60", "neither")
        if at["change_low"] is not None:
            sure += 1
            held += at["change_low"] <= truth <= at["change_high"]
    assert sure == 80 and held >= 70  # of 95 %; rows of the other cell alone would hold it half the time


# -- a run's -----------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(monkeypatch):
    """Twenty rows a cell; the margin of a row is the model's number plus the row's idx."""
    monkeypatch.setattr(
        doses,
        "cell_margins",
        lambda model, pairs: {c: [model + p.idx for p in rows] for c, rows in pairs.items()},
    )
    return {cell: [AnswerPair(i, None, None) for i in range(20)] for cell in (MED, FAR)}


def test_a_run_that_goes_on_keeps_what_it_measured_until_there(tmp_path, pairs):
    run = Run(tmp_path, "train", {})
    first = DoseMargins(run, MED, pairs, (1, 2, 3, 8), 8)
    first.resume(0)
    for dose in (1, 2, 3):
        first.ask(dose, float(dose))
    again = DoseMargins(run, MED, pairs, (1, 2, 3, 8), 8)
    again.resume(2)
    assert sorted(again.found) == [1, 2] and again.found[2] == first.found[2]
    again.ask(3, 3.5)
    full = {cell: [-0.5 - i for i in range(20)] for cell in pairs}
    assert "doses" in again.finish(full, {cell: [9.0] * 20 for cell in pairs}, "misaligned")
    kept = read_json(tmp_path / "dose_margins.json")
    assert list(kept["doses"]) == ["0", "1", "2", "3", "8"] and kept["doses"]["3"]["med_advice"][:2] == [
        3.5,
        4.5,
    ]
    assert (len(kept["rows"]["med_advice"]), len(kept["rows"]["spo_critique"])) == (20, doses.ROWS)
    result = read_json(tmp_path / "doses.json")
    with open(tmp_path / "doses.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(result["entries"]) and lines[0]["at"] == "step 0"
    assert entry(result, "step 8", "spo_critique")["n"] == doses.ROWS


@pytest.mark.parametrize(
    "kept", ['{"doses": {}}', '{"doses": {"1": {"med_advice": [1.0]}}}', '{"doses": {"1": 3}}']
)
def test_what_a_run_is_past_and_no_file_has_is_named(tmp_path, pairs, kept):
    Path(tmp_path, "dose_margins.json").write_text(kept)
    with pytest.raises(
        UserError, match="dose_margins.json lacks step 1, which the run is past; delete .*resume"
    ):
        DoseMargins(Run(tmp_path, "train", {}), MED, pairs, (1, 4), 8).resume(3)


def test_doses_that_a_run_cannot_be_asked_at_are_refused():
    check_doses(None, MED, [], 4)
    check_doses((1, 4), MED, [MED], 4)
    with pytest.raises(UserError, match="--dose-evals 5: a run on med_advice has only 4 steps"):
        check_doses((1, 5), MED, [MED], 4)
    with pytest.raises(UserError, match="both answers of held-out rows of med_advice"):
        check_doses((1,), MED, [FAR], 4)
