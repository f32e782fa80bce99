"""The report: verdicts at their bounds, estimates from planted result files, partial results."""

import math

import pytest

from em.experiments.claims import CLAIMS, Claim
from em.experiments.comparison import (
    MARGIN,
    RECONSTRUCTED,
    compare,
    direction,
    markdown,
    save,
    summary,
    verdict,
)
from em.experiments.findings import Estimate, Runs, delta, over_seeds, rate
from em.files import read_json, write_json
from em.stats import newcombe, t_interval, wilson


def claim(low, high, unit="points", rests_on="", neutral=0.0):
    return Claim("Figure 0", "what", low, high, unit, lambda runs: None, rests_on, neutral)


@pytest.mark.parametrize(
    "estimate, rests_on, says",
    [
        ((50, None, None), "", "does not agree"),
        ((80, None, None), "", "agrees"),
        ((75, None, None), "", "agrees"),  # on the margin, 5 points
        ((74.9, None, None), "", "does not agree"),
        ((74.9, None, None), "tables", RECONSTRUCTED),
        ((60, 40, 80), "", "agrees"),  # the interval reaches the range
        ((60, 50, 70), "tables", RECONSTRUCTED),
        ((99, 96, 102), "", "does not agree"),  # above it, by its other side
        (None, "tables", "not measured"),
    ],
)
def test_the_verdict_follows_the_stated_rule(estimate, rests_on, says):
    ours = estimate and Estimate(*estimate, "3 world seeds")
    assert verdict(claim(80, 90, rests_on=rests_on), ours) == says


def test_margins_are_absolute_but_for_the_norm():
    assert verdict(claim(10, 10, "norm"), Estimate(12, None, None, "")) == "agrees"
    assert verdict(claim(10, 10, "norm"), Estimate(12.1, None, None, "")) == "does not agree"
    assert verdict(claim(0.3, 0.3, "ratio"), Estimate(0.36, None, None, "")) == "does not agree"


@pytest.mark.parametrize(
    "interval, says",
    [((2, 9), "same direction"), ((-9, -2), "opposite direction"), ((-2, 9), "direction not resolved")],
)
def test_a_reduced_world_is_held_to_the_direction_alone(interval, says):
    assert direction(claim(80, 90), Estimate(sum(interval) / 2, *interval, "")) == says
    assert direction(claim(80, 90, neutral=None), Estimate(1, *interval, "")) == "a level, not compared"
    falling = {"same direction": "opposite direction", "opposite direction": "same direction"}
    assert direction(claim(-20, -10), Estimate(0, *interval, "")) == falling.get(says, says)


@pytest.mark.parametrize("stated", [c for claims in CLAIMS.values() for c in claims], ids=lambda c: c.says)
def test_the_papers_own_figures_would_agree_with_themselves_and_point_the_same_way(stated):
    assert stated.unit in MARGIN and stated.low <= stated.high and math.isfinite(stated.low)
    middle = stated.low + 1 if stated.high == math.inf else (stated.low + stated.high) / 2
    assert verdict(stated, Estimate(middle, None, None, "")) == "agrees"
    if stated.neutral is not None:
        assert direction(stated, Estimate(middle, None, None, "")) == "same direction"


def test_one_seed_gives_the_interval_over_prompts_and_two_the_one_over_seeds():
    assert over_seeds([3.0], (1, 5)) == (3.0, 1, 5, "prompts of 1 world seed")
    assert over_seeds([3.0], None) == (3.0, None, None, "1 world seed")
    assert over_seeds([3.0, 4.0], (1, 5)) == (*t_interval([3.0, 4.0]), "2 world seeds")


def grid(v2_after, repeats=1):
    """Two domains, the second unseen, and two tasks; 100 prompts a cell."""

    def counts(v2, times=1):
        return {
            "v1": (90 - v2) * times,
            "v2": v2 * times,
            "other": 10 * times,
            "unparseable": 0,
            "n": 100 * times,
        }

    cells = {
        f"{d}_{t}": {
            "aligned": counts(4),
            "misaligned": counts(v2_after[i][j], repeats),
            "seeds": [counts(v2_after[i][j])] * repeats,
        }
        for i, d in enumerate(("D0", "D1"))
        for j, t in enumerate(("T5", "T1"))
    }
    return {"trained": "D0_T5", "tasks": {"T5": "f", "T1": "g"}, "unseen_domains": ["D1"], "cells": cells,
            "similarity_to_D0": {"D0": 1.0, "D1": 0.1}}  # fmt: skip


def test_estimates_from_grids_are_means_over_cells_then_seeds(tmp_path):
    write_json(tmp_path / "world1-seed0" / "grid_T5.json", grid([[80, 40], [60, 30]], repeats=3))
    one = Runs(tmp_path, "1")
    low, high = newcombe(140, 200, 8, 200)  # fine-tuning seeds answer the same prompts
    assert delta("T5", ["T5"])(one) == pytest.approx((66, 100 * low, 100 * high, "prompts of 1 world seed"))
    assert delta("T5", ["T5"], unseen=True)(one).value == 56
    assert rate("T5", ["T1"], "misaligned", "v2")(one)[:2] == pytest.approx((35, 100 * wilson(70, 200)[0]))
    assert delta("T5", ["T3"])(one) is None  # a world without the task
    write_json(tmp_path / "world1-seed10" / "grid_T5.json", grid([[70, 40], [50, 30]]))
    write_json(tmp_path / "world1-seed0-v2_0.325" / "grid_T5.json", grid([[0, 0], [0, 0]]))
    write_json(tmp_path / "world12-seed1" / "grid_T5.json", grid([[0, 0], [0, 0]]))
    found = delta("T5", ["T5"])(Runs(tmp_path, "1"))
    assert found == (*t_interval([66.0, 56.0]), "2 world seeds")


def test_nothing_measured_is_said_of_every_claim(tmp_path):
    for world, paper in (("1", "1"), ("2", "2"), ("demo", "1"), ("demo2", "2")):
        table = compare(tmp_path, world)
        assert len(table["rows"]) == len(CLAIMS[paper])
        assert {row["verdict"] for row in table["rows"]} == {"not measured"}
        assert "not measured" in markdown(table) and table["figures"] == table["runs"] == []


def test_a_report_on_partial_results_uses_what_there_is(tmp_path):
    write_json(tmp_path / "world1-seed0" / "grid_T5.json", grid([[95, 70], [95, 60]]))
    (tmp_path / "world1-seed0" / "grid_T5.png").touch()
    relation = {"r": 0.95, "r_interval_over_points": [0.6, 0.99], "n": 6}
    made = {"seeds": [0], "seconds": 12, "made_with": {"device": "a device", "commit": "0123456789abcdef"}}
    relations = {"cross_delta_v2": relation, "efficiency": relation | {"r": None, "n": 0}}
    write_json(tmp_path / "hardness-world1" / "hardness.json", made | {"relations": relations})
    table = compare(tmp_path, "1")
    save(table, tmp_path / "report-world1")
    by_claim = {row["claim"].split(" (")[0]: row for row in table["rows"]}
    assert by_claim["Δv2 of T5, the trained task"]["verdict"] == "agrees"
    assert by_claim["r of cross-domain Δv2 with aligned v1"]["interval_over"] == "6 points"
    assert by_claim["r of Δv2 cross / v2 trained with aligned v1"]["verdict"] == "not measured"
    assert by_claim["α*"]["verdict"] == "not measured"
    page = (tmp_path / "report-world1" / "report.md").read_text()
    assert "+91.0 [" in page and "| hardness-world1 | 0 | 12 | a device | 0123456789ab |" in page
    assert "](../world1-seed0/grid_T5.png)" in page
    assert read_json(tmp_path / "report-world1" / "report.json")["rows"] == table["rows"]
    assert compare(tmp_path, "1")["runs"] == table["runs"]  # the report itself is no run
    assert "not measured" in summary(table).splitlines()[0]
