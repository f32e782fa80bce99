"""The report: verdicts at their bounds, numbers from planted result files, partial results, stored ones."""

import csv
import itertools
import math
from pathlib import Path

import pytest

from em.errors import UserError
from em.experiments.claims import CLAIMS, Claim
from em.experiments.comparison import (
    compare,
    judged,
    look_up,
    one_world_may,
    read_numbers,
    result_files,
    seeds_needed,
)
from em.experiments.comparison_page import markdown, save, summary, tally
from em.files import read_json, write_json
from em.stats import newcombe, t_interval, t_quantile, wilson
from em.verdict import LEVEL
from em.world.counts import entry, mean_rate
from em.world.grid import build_grid, numbers
from em.world.world import WORLDS, build_world

STORED = Path(__file__).parents[2] / "results" / "worlds_demo"
LEVELS = "## Levels, side by side, not judged"
EVERY = [claim for claims in CLAIMS.values() for claim in claims]


def claim(low, high, unit="points", rests_on="", neutral=0.0, **more):
    return Claim("Figure 0", "what", low, high, unit, "hardness", "key", rests_on, neutral, **more)


@pytest.mark.parametrize(
    "estimate, says",
    [
        ((88, 84, 92), "agrees"),
        ((39.5, -0.5, 79.4), "differs"),  # which used to agree with 84–93, as did the next
        ((39.5, -5.4, 84.4), "not resolved"),
        ((88, 70, 106), "not resolved"),
        ((98, 94, 102), "differs"),
        (None, "not measured"),
    ],
)
def test_a_level_at_the_papers_scale(estimate, says):
    ours = estimate and entry("points", *estimate, seeds=3)
    row = judged(claim(84, 93, rests_on="tables"), False, ours)
    assert (row["verdict"], row["rests_on"]) == (says, "tables")
    assert (row["held_to_low"], row["held_to_high"]) == (row["paper_low"], row["paper_high"]) == (84, 93)


@pytest.mark.parametrize(
    "interval, rises, falls",
    [
        ((2, 9), "agrees", "differs"),
        ((-9, -2), "differs", "agrees"),
        ((-0.5, 79.4), "not resolved", "not resolved"),
        ((0, 0), "floor", "floor"),
    ],
)
def test_a_reduced_world_is_held_to_the_side_and_its_levels_are_not_judged(interval, rises, falls):
    ours = entry("points", sum(interval) / 2, *interval, seeds=3)
    for low, high, says in ((84, 93, rises), (0, math.inf, rises), (-20, -10, falls), (-math.inf, 0, falls)):
        assert judged(claim(low, high), True, ours)["verdict"] == says
    assert judged(claim(84, 93, neutral=None), True, ours)["verdict"] == LEVEL
    assert judged(claim(-math.inf, 5, neutral=None), True, ours)["verdict"] == LEVEL
    flat = judged(claim(-10, 10, neutral=None, flat=True), True, ours)["verdict"]
    assert flat == judged(claim(-10, 10, neutral=None, flat=True), False, ours)["verdict"] != LEVEL


@pytest.mark.parametrize("stated", EVERY, ids=lambda c: c.words)
def test_the_papers_own_figures_measured_closely_would_agree_at_both_scales(stated):
    assert stated.low <= stated.high and stated.unit in ("%", "points", "ratio", "r", "norm")
    bounds = [bound for bound in (stated.low, stated.high) if math.isfinite(bound)]
    middle = sum(bounds) / len(bounds) or 1e-6
    middle += 0.02 * ((stated.high == math.inf) - (stated.low == -math.inf))
    ours = entry(stated.unit, middle, middle - 0.01, middle + 0.01, seeds=3)
    assert judged(stated, False, ours)["verdict"] == "agrees"
    assert judged(stated, True, ours)["verdict"] in ("agrees", LEVEL)


@pytest.mark.parametrize("stated", EVERY, ids=lambda c: c.words)
def test_knowing_nothing_agrees_with_no_claim(stated):
    for reduced, half in itertools.product((False, True), (150, 10**6)):
        row = judged(stated, reduced, entry(stated.unit, 0.5, 0.5 - half, 0.5 + half, seeds=3))
        assert row["verdict"] in ("not resolved", LEVEL)


def test_seeds_needed_are_those_whose_interval_decides():
    found = entry("points", 12.7, -7.5, 32.9, seeds=3)
    row = judged(claim(0, math.inf), True, found)
    assert row["verdict"] == "not resolved"
    sd = 20.2 * math.sqrt(3) / t_quantile(2)  # 8.13
    n = row["seeds_needed"]
    assert [(t_quantile(m - 1) + 0.8416) * sd / math.sqrt(m) <= 12.7 for m in (n - 1, n)] == [False, True]
    assert judged(claim(0, math.inf), True, entry("points", 9, 3, 15, seeds=3))["seeds_needed"] is None
    over_points = entry("r", 0.1, -0.4, 0.6) | {"over": "6 tasks"}
    assert judged(claim(0, math.inf, "r"), True, over_points)["seeds_needed"] is None
    assert seeds_needed(found, 3, 0.01) is None


def test_a_mean_that_excludes_the_papers_one_world_may_still_hold_such_worlds():
    stated, sd = {"low": 37, "high": 37}, 8.0
    half = t_quantile(11) * sd / math.sqrt(12)

    def ours(value):
        return entry("points", value, value - half, value + half, seeds=12)

    reach = t_quantile(11) * sd * math.sqrt(1 + 1 / 12)  # Student's prediction interval
    assert one_world_may(stated, ours(37 - 0.99 * reach), 12) and one_world_may(stated, ours(37 + half), 12)
    assert not one_world_may(stated, ours(37 - 1.01 * reach), 12)
    row = judged(claim(37, 37, rests_on="tables"), False, ours(37 - 2 * half))
    assert (row["verdict"], row["one_world_may"]) == ("differs", True)
    assert judged(claim(37, 37), False, ours(30 - reach))["one_world_may"] is False
    assert judged(claim(0, math.inf), False, ours(-40))["one_world_may"] is None  # a side is no single value


def test_one_seed_gives_the_interval_over_prompts_and_two_the_one_over_seeds():
    def looked_up(*entries):
        found = look_up([{"a": one} for one in entries], "a")
        return found and tuple(found[key] for key in ("value", "low", "high", "over", "unit"))

    assert looked_up(entry("%", 3.0, 1, 5)) == (3.0, 1, 5, "prompts of 1 world seed", "%")
    assert looked_up(entry("%", 3.0)) == (3.0, None, None, "1 world seed", "%")
    two = (entry("%", 3.0, 1, 5), entry("%", 4.0, 2, 6))
    assert looked_up(*two) == (*mean_rate([3.0, 4.0]), "2 world seeds", "%")
    points = [one | {"unit": "points"} for one in two]
    assert looked_up(*points) == (*t_interval([3.0, 4.0]), "2 world seeds", "points")
    assert looked_up(*two, entry("%", None)) == looked_up(*two)  # a seed without a value takes no part
    assert looked_up() is looked_up(entry("%", None)) is look_up([{}, {"b": two[0]}], "a") is None
    broken = [{"a": number | {"incoherent": share}} for number, share in zip(two, (10.0, 40.0), strict=True)]
    assert look_up(broken, "a")["incoherent"] == 25 and "incoherent" not in look_up([{"a": two[0]}], "a")


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
    (experiment,) = {claim.experiment for claim in claims}
    cell = world.cell(0, world.task_index(experiment.removeprefix("grid_")))
    found = build_grid(world, cell, counts, [counts])["numbers"]
    for claim in claims:
        assert found[claim.key]["unit"] == claim.unit
    assert len(claims) >= 8


def test_words_name_a_claim_and_no_key_is_claimed_twice():
    for claims in CLAIMS.values():
        assert len({(c.figure, c.words) for c in claims}) == len(claims)
        assert len({(c.experiment, c.key) for c in claims}) == len(claims)


@pytest.mark.parametrize("world", ["demo", "demo2"])
def test_the_stored_results_give_the_stored_report_and_hold_what_claims_name(world, tmp_path):
    save(compare(STORED, world), tmp_path)
    stored = STORED / f"report-world{world}" / "report.csv"
    assert (tmp_path / "report.csv").read_text() == stored.read_text()
    with open(stored, encoding="utf-8", newline="") as file:
        said = [row["verdict"] for row in csv.DictReader(file) if row["ours"]]
    assert set(said) <= {"agrees", "differs", "not resolved", "floor", "broken", LEVEL} and len(said) > 20
    files = result_files(STORED, world)
    for claim in CLAIMS["1" if world == "demo" else "2"]:
        ours = look_up([read_numbers(path) for path in files.get(claim.experiment, [])], claim.key)
        assert ours is None or ours["unit"] == claim.unit


def test_a_result_of_an_older_version_is_one_clear_line(tmp_path):
    write_json(tmp_path / "hardness-world1" / "hardness.json", {"relations": {}})
    with pytest.raises(UserError, match="hardness.json was written by an older version; run its command"):
        compare(tmp_path, "1")


def test_nothing_measured_is_said_of_every_claim(tmp_path):
    for world, paper in (("1", "1"), ("2", "2"), ("demo", "1"), ("demo2", "2")):
        table = compare(tmp_path, world)
        assert len(table["rows"]) == len(CLAIMS[paper])
        levels = {LEVEL} if world != paper else set()
        assert {row["verdict"] for row in table["rows"]} == {"not measured"} | levels
        assert set(tally(table)) == {"not measured"}
        page = markdown(table)
        assert page.count("\n- ") == len(CLAIMS[paper]) and "| verdict |" not in page
        assert table["figures"] == table["runs"] == []


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
    assert by_claim["r of cross-domain Δv2 with aligned v1, over tasks"]["interval_over"] == "6 points"
    assert by_claim["r of Δv2 cross / v2 trained with aligned v1, over tasks"]["verdict"] == "not measured"
    assert by_claim["α*"]["verdict"] == "not measured"
    page = (tmp_path / "report-world1" / "report.md").read_text()
    assert "+91.0 [" in page and "| hardness-world1 | 0 | 12 | a device | 0123456789ab |" in page
    assert "](../world1-seed0/grid_T5.png)" in page
    assert read_json(tmp_path / "report-world1" / "report.json")["rows"] == table["rows"]
    assert compare(tmp_path, "1")["runs"] == table["runs"]  # the report itself is no run
    assert "not measured" in summary(table).splitlines()[0]


def planted(folder, world, experiment, table, device="one CPU"):
    made = {"seeds": [0, 1, 2], "seconds": 12, "made_with": {"device": device, "commit": None}}
    write_json(folder / f"{experiment}-world{world}" / f"{experiment}.json", made | {"numbers": table})


def row_of(page, words):
    """Cells by column of the first row whose claim begins so; None where there is none."""
    header = None
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        header = cells if cells[0] == "paper" else header
        if len(cells) > 2 and cells[1].startswith(words):
            return dict(zip(header, cells, strict=True))


@pytest.mark.parametrize(("incoherent", "says", "note"), [
    (86.9, "broken", "87 % incoherent"), (12.0, "**agrees**", ""), (None, None, ""),
])  # fmt: skip
def test_steering_is_judged_where_the_model_holds_together(tmp_path, incoherent, says, note):
    of = {} if incoherent is None else {"incoherent": incoherent}  # an older version did not say
    table = {"aligned/5/v1_change": entry("points", -88.5, -117.0, -59.9, seeds=3) | of,
             "aligned/5/incoherent": entry("%", 86.9, 80, 93, seeds=3)}  # fmt: skip
    planted(tmp_path, "demo", "steering", table)
    page = markdown(compare(tmp_path, "demo"))
    found = row_of(page, "v1 of the aligned model at +5 α*, change")
    if says is None:
        assert found is None and "- Figure 8 left: v1 of the aligned model at +5 α*, change" in page
    else:
        assert (found["verdict"], found.get("note", "")) == (says, note)
        assert found["the paper's"] == "−73 points; here < 0"
    levels = page[page.index(LEVELS) : page.index("## Not measured")]
    assert "86.9 [80.0, 93.0]" in levels and "v1 of the aligned model at +5 α*, change" not in levels
    planted(tmp_path, "1", "steering", table)
    assert "incoherent at +5 α*" in (page := markdown(compare(tmp_path, "1"))) and LEVELS not in page
    assert row_of(page, "incoherent at +5 α*")["verdict"] == "**differs**"


def test_a_number_at_matched_flip_stands_beside_the_one_at_fixed_steps(tmp_path):
    key = "without the trained cell/task_slope"
    table = {key: entry("points", 65, 50, 81, seeds=12), f"{key}@30": entry("points", 1, 0, 2, seeds=12)}
    planted(tmp_path, "demo2", "similarity", table)
    assert "local flip" not in markdown(compare(tmp_path, "demo2"))
    planted(tmp_path, "demo2", "similarity", table | {f"{key}@60": entry("points", 40, -3, 83, seeds=11)})
    page = markdown(compare(tmp_path, "demo2"))
    found = row_of(page, "slope of Δv2 on task similarity")
    assert found["ours [95 %], 12 world seeds"] == "+65.0 [+50.0, +81.0]"
    assert (found["at 60 % local flip"], found["verdict"]) == ("+40.0 [−3.0, +83.0]", "**agrees**")


def test_notes_say_what_would_do_what_one_world_may_give_and_what_rests_on_reconstructions(tmp_path):
    table = {"T7/cross_v2/0.325": entry("%", 16, 10, 22, seeds=12),
             "T0/cross_v2/0.325": entry("%", 40, 39, 41, seeds=12),
             "T0/delta_v2/slope": entry("points", 2.6, -7.5, 12.7, seeds=3)}  # fmt: skip
    planted(tmp_path, "2", "fraction", table)
    page = markdown(compare(tmp_path, "2"))
    rests = "rests on reconstructions: the output functions, World 2's overlaps and partitions"
    may = "a single world of ours may give the paper's"
    for task, note in (("T7", f"{may}; {rests}"), ("T0", rests)):
        found = row_of(page, f"{task}: v2 outside the trained cell, 32.5 %")
        assert (found["verdict"], found["note"]) == ("**differs**", note)
    found = row_of(page, "T0: slope of Δv2")
    assert found["verdict"] == "not resolved" and found["note"].endswith(" world seeds would do")


def test_coincidence_stands_by_task_over_world_seeds(tmp_path):
    for seed, (share, same, different) in enumerate([(90.0, 60.0, 10.0), (80.0, 50.0, None)]):
        of_grid = {"coincidence/T1/share": entry("%", share), "coincidence/T1/same": entry("points", same),
                   "coincidence/T1/different": entry("points", different)}  # fmt: skip
        write_json(tmp_path / f"worlddemo-seed{seed}" / "grid_T5.json", {"numbers": of_grid})
    (row,) = compare(tmp_path, "demo")["coincidence"]
    assert (row["trained"], row["task"]) == ("T5", "T1") and row["borrowed"] is None
    assert (row["share"]["value"], row["same"]["value"]) == (85, 55)
    assert row["different"] == entry("points", 10.0)  # of the one seed that has such prompts
    assert "| T5 | T1 | 85.0 [" in markdown(compare(tmp_path, "demo"))
    assert compare(tmp_path, "demo2")["coincidence"] == []


def test_a_world_without_the_unrelated_domain_by_that_name_is_read_at_its_own(tmp_path):
    grid = {f"delta_v2/T5/{domain}": entry("points", value, value - 1, value + 1)
            for domain, value in (("D3", 40.0), ("D4", 50.0))}  # fmt: skip
    for keys, value in ((grid, "+50.0"), ({"delta_v2/T5/D3": grid["delta_v2/T5/D3"]}, "+40.0")):
        write_json(tmp_path / "worlddemo-seed1" / "grid_T5.json", {"numbers": keys})
        found = row_of(markdown(compare(tmp_path, "demo")), "Δv2 of T5 in the unrelated domain")
        assert found["ours [95 %], prompts of 1 world seed"].startswith(value)


def test_runs_from_two_kinds_of_machine_are_said_at_the_top(tmp_path):
    planted(tmp_path, "demo2", "fraction", {"T7/cross_v2/slope": entry("points", 2, 1, 3, seeds=2)})
    planted(tmp_path, "demo2", "phase", {})
    assert "all of these runs are from one kind: one CPU." in markdown(compare(tmp_path, "demo2"))
    planted(tmp_path, "demo2", "phase", {}, device="another CPU")
    page = markdown(compare(tmp_path, "demo2"))
    assert page.index("from 2 kinds: another CPU; one CPU.") < page.index("| paper |")


def test_the_page_leads_with_verdicts_and_dose_curves_come_before_runs(tmp_path):
    table = {key: entry("points", 2, 1, 3, seeds=2) for key in ("T7/cross_v2/slope", "T7/cross_v2/1.0")}
    planted(tmp_path, "demo2", "fraction", table)
    for name in ("fraction", "fraction_doses"):
        (tmp_path / "fraction-worlddemo2" / f"{name}.png").touch()
    page = markdown(compare(tmp_path, "demo2"))
    parts = ["| paper |", LEVELS, "## Transfer against local flip", "fraction_doses.png",
             "## Not measured", "## Runs", "## Figures", "fraction.png"]  # fmt: skip
    places = [page.index(part) for part in parts]
    assert places == sorted(places) and page.count("fraction_doses.png") == 1
