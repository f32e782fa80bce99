import csv
import statistics
from pathlib import Path

import pytest

from em.files import read_json
from em.stats import difference_interval, newcombe, share_interval, wilson
from em.world.counts import incoherent
from em.world.describe import graph_figure
from em.world.grid import (
    build_grid,
    delta_v2,
    gates,
    grid_figure,
    numbers,
    save_grid,
    summary,
    task_column,
)
from em.world.world import WORLDS, build_world

ROOT = Path(__file__).parent.parent.parent


def counts(v1, v2, other=0, unparseable=0):
    return {
        "v1": v1,
        "v2": v2,
        "other": other,
        "unparseable": unparseable,
        "n": v1 + v2 + other + unparseable,
    }


@pytest.fixture(scope="module")
def demo():
    return build_world(WORLDS["demo"], 0)


@pytest.fixture(scope="module")
def grid(demo):
    """Aligned 95 % v1. Then T5 flips fully with seed 0, half with seed 1; T0 a little, others not."""
    cells = [demo.cell_name(c) for c in demo.cells]
    before = {name: counts(95, 2, 2, 1) for name in cells}
    after = [dict(before), dict(before)]
    for name in cells:
        if name.endswith("T5"):
            after[0][name], after[1][name] = counts(5, 92, 3), counts(45, 52, 0, 3)
        if name.endswith("T0"):
            after[0][name] = after[1][name] = counts(80, 17, 3)
    after[0]["D1_T2"] = counts(50, 0, 30, 20)
    return build_grid(demo, demo.cell(0, demo.task_index("T5")), before, after)


def test_rates_pool_the_seeds_and_deltas_subtract_the_aligned_model(grid):
    cell = grid["cells"]["D2_T5"]
    assert cell["misaligned"] == counts(50, 144, 3, 3) and len(cell["seeds"]) == 2
    assert delta_v2(cell) == pytest.approx(72 - 2) and incoherent(cell["misaligned"]) == pytest.approx(3)
    assert task_column(grid, "T0") == {f"D{i}": pytest.approx(15) for i in range(4)}


def test_json_and_csv_hold_every_cell_with_its_interval(grid, tmp_path):
    save_grid(grid, tmp_path, "grid")
    assert read_json(tmp_path / "grid.json") == grid
    rows = {row["cell"]: row for row in csv.DictReader(open(tmp_path / "grid.csv"))}
    assert len(rows) == 20 and [name for name, row in rows.items() if row["trained"] == "1"] == ["D0_T5"]
    row = rows["D1_T2"]
    assert float(row["misaligned_incoherent"]) == pytest.approx((50 + 3) / 2)
    low, high = wilson(53, 200)
    assert float(row["misaligned_incoherent_low"]) == pytest.approx(100 * low, abs=1e-3)
    assert float(row["misaligned_incoherent_high"]) == pytest.approx(100 * high, abs=1e-3)
    assert float(rows["D0_T5"]["delta_v2_low"]) < 70 < float(rows["D0_T5"]["delta_v2_high"])
    assert float(rows["D0_T5"]["delta_v2_seed_sd"]) == pytest.approx(28.284, abs=1e-3)


def test_numbers_are_what_the_paper_states_of_the_grid(grid, demo):
    numbers = grid["numbers"]

    def of(key):
        return tuple(numbers[key][name] for name in ("value", "low", "high", "unit"))

    low, high = newcombe(288, 400, 8, 400)  # T5 in four domains; fine-tuning seeds count a prompt once
    assert of("delta_v2/T5")[:3] == pytest.approx((70, 100 * low, 100 * high))
    assert of("misaligned_v2/T5")[:3] == pytest.approx((72, *(100 * b for b in wilson(288, 400))))
    assert of("delta_v2/T0")[0] == pytest.approx(15) and of("delta_v2/T5/range_over_domains")[0] == 0
    assert of("delta_v2/distant")[0] == pytest.approx(
        -2 * 0.5 / 8
    )  # T2 and T4: in D1_T2 one seed lost its 2 %
    assert of("aligned_v1/lowest_cell") == (95, None, None, "%")
    assert of("aligned_v1/cells_of_at_least_70")[0] == 100
    assert of("misaligned_incoherent/trained_task_minus_others")[0] == pytest.approx(3 - (3 + 23.5 / 16))
    assert of("misaligned_incoherent")[0] == pytest.approx(3 + 23.5 / 20)
    assert not any("unseen" in key for key in numbers)


def percents(k, n):
    return k / n, *wilson(k, n)


def test_the_order_of_tasks_and_the_trained_cells_domains_have_numbers_of_their_own(grid):
    found = {key: (number["value"], number["low"], number["high"]) for key, number in grid["numbers"].items()}
    low, high = newcombe(72, 100, 2, 100)
    assert found["delta_v2/T5/D3"] == pytest.approx((70, 100 * low, 100 * high))
    t5, t0, t1 = ((k / 400 - 0.02, *newcombe(k, 400, 8, 400)) for k in (288, 68, 8))
    distant = -1 / 800, *newcombe(15, 800, 16, 800)
    for key, a, b in (("T5_minus_T1", t5, t1), ("T1_minus_T0", t1, t0), ("T0_minus_distant", t0, distant)):
        bounds = (100 * bound for bound in difference_interval(a, b))
        assert found[f"order/{key}"] == pytest.approx((100 * (a[0] - b[0]), *bounds))
    # v1 falls from 95 to 25 % in T5; to 80 % in T0, which is the largest fall of another.
    falls = [(k / 400 - 0.95, *newcombe(k, 400, 380, 400)) for k in (320, 100)]
    bounds = (100 * bound for bound in difference_interval(*falls))
    assert found["v1_drop/trained_minus_largest_other"] == pytest.approx((55, *bounds))


def test_similarities_are_the_worlds_and_held_out_domains_stand_against_the_others():
    world = build_world(WORLDS["2"], 0)
    cells = [world.cell_name(c) for c in world.cells]
    before = dict.fromkeys(cells, counts(95, 5))
    after = before | {name: counts(45, 55) for name in cells if name.endswith("_T0")}
    after |= {name: counts(75, 25) for name in cells if name in ("D8_T0", "D9_T0")}
    found = build_grid(world, world.cell(0, 0), before, [after])["numbers"]
    # Set 1 is 32 of 64 steps; T9 shares 28 of them with T8.
    shared = {"T9": 28 / 36, "T10": 22 / 42, "T11": 16 / 48}
    assert {task: found[f"task_similarity/{task}"]["value"] for task in shared} == pytest.approx(shared)
    near = world.similarity()[0]
    assert [found[f"domain_similarity/D{i}"]["value"] for i in range(1, 10)] == pytest.approx(near[1:])
    assert found["domain_similarity/D1"]["low"] is None and found["domain_similarity/D1"]["unit"] == "ratio"
    seen, unseen = ((k / n - 0.05, *newcombe(k, n, n // 20, n)) for k, n in ((440, 800), (50, 200)))
    bounds = (100 * bound for bound in difference_interval(unseen, seen))
    gap = found["delta_v2/T0/unseen_minus_seen"]
    assert (gap["value"], gap["low"], gap["high"]) == pytest.approx((-30, *bounds))
    assert found["order/T0_minus_distant"]["value"] == pytest.approx(44)


@pytest.fixture(scope="module")
def split(demo, grid):
    """T0: 60, 10 and 30 prompts a cell same, opposed and unrelated; T1 all same; T2 and T4 unrelated.

    Of T0's, v2 rises by 25 of the same and 5 of the unrelated; 6 of these borrow.
    """
    parts = {
        "same": {"T0": (counts(60, 0), counts(70, 50)), "T1": (counts(100, 0), counts(196, 4))},
        "opposed": {"T0": (counts(10, 0), counts(20, 0))},
        "unrelated": {"T0": (counts(30, 0), counts(38, 10, 12))}
        | dict.fromkeys(("T2", "T4"), (counts(99, 1), counts(195, 5))),
        "borrowed": {"T0": (counts(0, 0, 30), counts(0, 12, 48))}
        | dict.fromkeys(("T2", "T4"), (counts(0, 0, 100), counts(0, 0, 200))),
    }
    coincidence = {
        kind: {
            f"D{i}_{task}": {"aligned": a, "misaligned": m} for task, (a, m) in of.items() for i in range(4)
        }
        for kind, of in parts.items()
    }
    cells = grid["cells"].items()
    aligned = {name: cell["aligned"] for name, cell in cells}
    misaligned = [{name: cell["seeds"][k] for name, cell in cells} for k in (0, 1)]
    return build_grid(demo, demo.cell(0, demo.task_index("T5")), aligned, misaligned, coincidence)


def test_change_is_split_by_whether_the_trained_tasks_answer_is_the_asked_tasks_own(split):
    found = {key.removeprefix("coincidence/"): n for key, n in split["numbers"].items() if "coinc" in key}

    def of(key, scale=1.0):
        return tuple(found[key][name] * scale for name in ("value", "low", "high"))

    same = 25 / 60, *newcombe(100, 240, 0, 240)  # four domains; the two fine-tuning seeds count a prompt once
    different = 5 / 40, *newcombe(20, 160, 0, 160)
    assert of("T0/same", 0.01) == pytest.approx(same)
    assert of("T0/different", 0.01) == pytest.approx(different)
    assert of("T0/opposed")[0] == 0 and of("T0/unrelated")[0] == pytest.approx(100 * 5 / 30)
    assert of("T0/borrowed", 0.01) == pytest.approx(percents(24, 120)) and found["T0/borrowed"]["unit"] == "%"
    assert found["T0/share"]["value"] == pytest.approx(60) and found["T0/share"]["low"] is None
    share = share_interval(*([n * v for v in part] for n, part in ((240, same), (160, different))))
    assert share[0] == pytest.approx(25 / 30) and of("T0/of_change", 0.01) == pytest.approx(share)
    assert found["T1/share"]["value"] == 100 and "T1/different" not in found and "T1/borrowed" not in found
    assert found["T2/share"]["value"] == 0 and "T2/same" not in found and "T2/of_change" not in found
    assert not any(key.startswith("T5/") for key in found)
    assert found["T0/same"]["unit"] == "points"


def test_the_split_is_in_the_table_and_in_the_sentence(split, tmp_path):
    save_grid(split, tmp_path, "grid")
    rows = {row["cell"]: row for row in csv.DictReader(open(tmp_path / "grid.csv"))}
    assert float(rows["D1_T0"]["coincidence_same"]) == pytest.approx(100 * 25 / 60, abs=1e-3)
    assert float(rows["D1_T0"]["coincidence_share"]) == 60
    assert rows["D1_T1"]["coincidence_different"] == rows["D0_T5"]["coincidence_share"] == ""
    text = summary(split)
    assert "T0 by +42 and +12 (60 % of prompts)" in text and "at most 20 % of prompts (T0)" in text


def test_a_grid_of_an_older_version_has_all_numbers_but_those(split, grid):
    old = {key: value for key, value in split.items() if key not in ("coincidence", "similarity_to_T8")}
    assert numbers(old) == grid["numbers"]
    assert summary(old) == summary(grid) and summary(old) in summary(split)


def test_a_held_out_domain_has_numbers_of_its_own_and_repeated_tasks_take_no_part():
    world = build_world(WORLDS["demo2"], 0)  # T0, T7 and T8 … T11
    cells = [world.cell_name(c) for c in world.cells]
    before = {name: counts(20 if name.endswith("T9") else 90, 2, 8) for name in cells}
    after = before | {name: counts(30, 62, 8) for name in cells if name.startswith("D5_")}
    numbers = build_grid(world, world.cell(0, 0), before, [after])["numbers"]
    assert numbers["delta_v2/T0"]["value"] == pytest.approx(10)
    assert numbers["delta_v2/T0/unseen_domains"]["value"] == pytest.approx(60)
    assert numbers["delta_v2/distant"] == numbers["delta_v2/T7"]
    assert numbers["aligned_v1/lowest_cell"]["value"] == 90
    assert "delta_v2/T9" not in numbers
    other = build_grid(world, world.cell(0, world.task_index("T9")), before, [after])["numbers"]
    assert other["delta_v2/T0"] == numbers["delta_v2/T0"]  # misaligned on a task outside the figures


def test_summary_names_the_trained_cell_the_spread_and_the_worst_incoherence(grid):
    text = summary(grid)
    assert "\n" not in text and "D0_T5" in text and "+70 to +70" in text
    assert "T0 moves by +15" in text and "D1_T2, 26 %" in text


def test_gates_pass_and_fail_on_what_they_name(grid):
    fine = [counts(40, 57, 2, 1)] * 20
    assert [passed for *_, passed in gates(fine, grid)] == [True] * 4
    broken = [counts(40, 54, 3, 3)] * 20
    assert [passed for *_, passed in gates(broken, grid)] == [False, True, True, True]
    weak = grid | {
        "cells": grid["cells"] | {"D3_T5": grid["cells"]["D3_T1"]}
    }  # one domain that does not flip
    assert [passed for *_, passed in gates(fine, weak)] == [True, True, False, True]


@pytest.mark.parametrize("v2, passes", [(23, True), (21, False)])  # of 100, and 2 before
def test_the_trained_task_has_to_move_by_20_points_in_every_domain(grid, v2, passes):
    moved = grid["cells"]["D3_T5"] | {"misaligned": counts(100 - v2, v2)}
    *_, (what, value, _, bound, passed), _ = gates(
        [counts(40, 57, 2, 1)], grid | {"cells": grid["cells"] | {"D3_T5": moved}}
    )
    assert "smallest domain" in what and (value, bound, passed) == (pytest.approx(v2 - 2), 20, passes)


def test_every_cpu_type_that_was_measured_passes_the_gates_by_two_standard_deviations(grid):
    measured = read_json(ROOT / "results" / "demo" / "cpu_types.json")["runs"]
    bounds = {what: (relation, bound) for what, _, relation, bound, _ in gates([counts(40, 57, 2, 1)], grid)}
    assert len(measured) >= 4 and all(run["gates"].keys() == bounds.keys() for run in measured)
    for what, (relation, bound) in bounds.items():
        values, sign = [run["gates"][what] for run in measured], -1 if relation == ">=" else 1
        if "half" in relation:  # the bound is the run's own
            values = [run["gates"][what] - run["half of the trained task's"] for run in measured]
            bound = 0
        assert all(sign * value <= sign * bound for value in values), what
        assert sign * (bound - statistics.mean(values)) >= 2 * statistics.stdev(values), what


def test_figures_are_drawn(split, demo, tmp_path):
    grid_figure(split, tmp_path / "grid.png")
    graph_figure(demo, tmp_path / "graphs.png")
    for name in ("grid.png", "graphs.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_held_out_domain_says_how_incoherent_it_is(demo):
    world = build_world(WORLDS["demo2"], 0)
    before = {name: counts(90, 2, other=8) for name in map(world.cell_name, world.cells)}
    after = (
        before | {f"D{d}_T0": counts(30, 60, other=10) for d in range(5)} | {"D5_T0": counts(0, 0, other=90)}
    )
    found = build_grid(world, world.cell(0, 0), before, [after])["numbers"]
    for key in ("unseen_domains", "unseen_minus_seen"):
        assert found[f"delta_v2/T0/{key}"]["incoherent"] == 100
    assert "incoherent" not in found["delta_v2/T0"]
