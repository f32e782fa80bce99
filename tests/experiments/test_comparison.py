"""The report: verdicts at their bounds, numbers from planted result files, partial results, stored ones."""

import csv
import math
from pathlib import Path

import pytest

from em.errors import UserError
from em.experiments.claims import CLAIMS, Claim
from em.experiments.comparison import (
    MARGIN,
    RECONSTRUCTED,
    compare,
    direction,
    look_up,
    markdown,
    read_numbers,
    result_files,
    save,
    summary,
    verdict,
)
from em.files import read_json, write_json
from em.stats import newcombe, t_interval, wilson
from em.world.counts import entry
from em.world.grid import build_grid, numbers
from em.world.world import WORLDS, build_world

STORED = Path(__file__).parents[2] / "results" / "worlds_demo"


def claim(low, high, unit="points", rests_on="", neutral=0.0):
    return Claim("Figure 0", "what", low, high, unit, "hardness", "key", rests_on, neutral)


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
    ours = estimate and entry("points", *estimate, seeds=3)
    assert verdict(claim(80, 90, rests_on=rests_on), ours) == says


def test_margins_are_absolute_but_for_the_norm():
    assert verdict(claim(10, 10, "norm"), entry("norm", 12)) == "agrees"
    assert verdict(claim(10, 10, "norm"), entry("norm", 12.1)) == "does not agree"
    assert verdict(claim(0.3, 0.3, "ratio"), entry("ratio", 0.36)) == "does not agree"


@pytest.mark.parametrize(
    "interval, says",
    [((2, 9), "same direction"), ((-9, -2), "opposite direction"), ((-2, 9), "direction not resolved")],
)
def test_a_reduced_world_is_held_to_the_direction_alone(interval, says):
    ours = entry("points", sum(interval) / 2, *interval)
    assert direction(claim(80, 90), ours) == says
    assert direction(claim(80, 90, neutral=None), ours) == "a level, not compared"
    falling = {"same direction": "opposite direction", "opposite direction": "same direction"}
    assert direction(claim(-20, -10), ours) == falling.get(says, says)


@pytest.mark.parametrize("stated", [c for claims in CLAIMS.values() for c in claims], ids=lambda c: c.words)
def test_the_papers_own_figures_would_agree_with_themselves_and_point_the_same_way(stated):
    assert stated.unit in MARGIN and stated.low <= stated.high and math.isfinite(stated.low)
    middle = stated.low + 1 if stated.high == math.inf else (stated.low + stated.high) / 2
    assert verdict(stated, entry(stated.unit, middle)) == "agrees"
    if stated.neutral is not None:
        assert direction(stated, entry(stated.unit, middle)) == "same direction"


def test_one_seed_gives_the_interval_over_prompts_and_two_the_one_over_seeds():
    def looked_up(*entries):
        found = look_up([{"a": one} for one in entries], "a")
        return found and tuple(found[key] for key in ("value", "low", "high", "over", "unit"))

    assert looked_up(entry("%", 3.0, 1, 5)) == (3.0, 1, 5, "prompts of 1 world seed", "%")
    assert looked_up(entry("%", 3.0)) == (3.0, None, None, "1 world seed", "%")
    two = (entry("%", 3.0, 1, 5), entry("%", 4.0, 2, 6))
    assert looked_up(*two) == (*t_interval([3.0, 4.0]), "2 world seeds", "%")
    assert looked_up(*two, entry("%", None)) == looked_up(*two)  # a seed without a value takes no part
    assert looked_up() is looked_up(entry("%", None)) is look_up([{}, {"b": two[0]}], "a") is None


def grid(v2_after, repeats=1):
    """Two domains, the second unseen, and two tasks; 100 prompts a cell."""

    def counts(v2, times=1):
        return {
            "v1": (95 - v2) * times,
            "v2": v2 * times,
            "other": 5 * times,
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
    found = {"trained": "D0_T5", "tasks": {"T5": "f", "T1": "g"}, "unseen_domains": ["D1"], "cells": cells,
             "similarity_to_D0": {"D0": 1.0, "D1": 0.1}}  # fmt: skip
    return found | {"numbers": numbers(found)}


def test_numbers_from_grids_are_means_over_cells_then_seeds(tmp_path):
    def of_grids(key):
        found = look_up([read_numbers(path) for path in result_files(tmp_path, "1")["grid_T5"]], key)
        return found and tuple(found[key] for key in ("value", "low", "high", "over"))

    write_json(tmp_path / "world1-seed0" / "grid_T5.json", grid([[80, 40], [60, 30]], repeats=3))
    low, high = newcombe(140, 200, 8, 200)  # fine-tuning seeds answer the same prompts
    assert of_grids("delta_v2/T5") == pytest.approx((66, 100 * low, 100 * high, "prompts of 1 world seed"))
    assert of_grids("delta_v2/T5/unseen_domains")[0] == 56
    assert of_grids("misaligned_v2/T1")[:2] == pytest.approx((35, 100 * wilson(70, 200)[0]))
    assert of_grids("delta_v2/T3") is None  # a world without the task
    write_json(tmp_path / "world1-seed10" / "grid_T5.json", grid([[70, 40], [50, 30]]))
    write_json(tmp_path / "world1-seed0-v2_0.325" / "grid_T5.json", grid([[0, 0], [0, 0]]))
    write_json(tmp_path / "world12-seed1" / "grid_T5.json", grid([[0, 0], [0, 0]]))
    assert of_grids("delta_v2/T5") == (*t_interval([66.0, 56.0]), "2 world seeds")


@pytest.mark.parametrize("paper", ["1", "2"])
def test_every_claim_on_the_grid_names_a_number_of_its_worlds_grid_in_its_unit(paper):
    world = build_world(WORLDS[paper], 0)
    counts = {name: {"v1": 90, "v2": 4, "other": 6, "unparseable": 0, "n": 100}
              for name in map(world.cell_name, world.cells)}  # fmt: skip
    claims = [claim for claim in CLAIMS[paper] if claim.experiment.startswith("grid_")]
    for claim in claims:
        task = claim.experiment.removeprefix("grid_")
        found = build_grid(world, world.cell(0, world.task_index(task)), counts, [counts])["numbers"]
        assert found[claim.key]["unit"] == claim.unit
    assert len(claims) >= 8


@pytest.mark.parametrize("world", ["demo", "demo2"])
def test_the_stored_results_give_the_stored_report_and_hold_what_claims_name(world, tmp_path):
    save(compare(STORED, world), tmp_path)
    stored = STORED / f"report-world{world}" / "report.csv"
    assert (tmp_path / "report.csv").read_text() == stored.read_text()
    with open(stored, encoding="utf-8", newline="") as file:
        assert sum(row["verdict"] == "not measured" for row in csv.DictReader(file)) <= 2  # tasks it lacks
    files = result_files(STORED, world)
    for claim in CLAIMS["1" if world == "demo" else "2"]:
        ours = look_up([read_numbers(path) for path in files[claim.experiment]], claim.key)
        assert ours is None or ours["unit"] == claim.unit


def test_a_result_of_an_older_version_is_one_clear_line(tmp_path):
    write_json(tmp_path / "hardness-world1" / "hardness.json", {"relations": {}})
    with pytest.raises(UserError, match="hardness.json was written by an older version; run its command"):
        compare(tmp_path, "1")


def test_nothing_measured_is_said_of_every_claim(tmp_path):
    for world, paper in (("1", "1"), ("2", "2"), ("demo", "1"), ("demo2", "2")):
        table = compare(tmp_path, world)
        assert len(table["rows"]) == len(CLAIMS[paper])
        assert {row["verdict"] for row in table["rows"]} == {"not measured"}
        assert "not measured" in markdown(table) and table["figures"] == table["runs"] == []


def test_a_report_on_partial_results_uses_what_there_is(tmp_path):
    write_json(tmp_path / "world1-seed0" / "grid_T5.json", grid([[95, 70], [95, 60]]))
    (tmp_path / "world1-seed0" / "grid_T5.png").touch()
    known = entry("r", 0.95, 0.6, 0.99) | {"over": "6 points"}
    made = {"seeds": [0], "seconds": 12, "made_with": {"device": "a device", "commit": "0123456789abcdef"}}
    made["numbers"] = {"cross_delta_v2/r": known, "efficiency/r": known | {"value": None}}
    write_json(tmp_path / "hardness-world1" / "hardness.json", made)
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
