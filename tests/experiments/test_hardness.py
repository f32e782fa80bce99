"""Task hardness: its rows by hand and from a miniature, its correlations on planted ones."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from planted_run import PlantedRun

from em.experiments import hardness
from em.experiments.hardness import AT_FLIPS, PANELS, doses, efficiencies, numbers, point, relation, within
from em.stats import newcombe, pearson, wilson
from em.world.counts import percent
from em.world.doses import dose_counts
from em.world.world import WORLDS, build_world


@pytest.fixture(scope="module")
def run():
    return SimpleNamespace(world=build_world(WORLDS["demo"], 0), cfg=SimpleNamespace(seed=7))


def counts(run, v1, v2, n=100):
    """Counts by cell from two functions of (domain, task)."""
    table = {}
    for cell in run.world.cells:
        domain, task = run.world.cell_name(cell).split("_")
        a, b = v1(domain, task), v2(domain, task)
        table[f"{domain}_{task}"] = {"v1": a, "v2": b, "other": n - a - b, "unparseable": 0, "n": n}
    return table


# -- rows --------------------------------------------------------------------------------------------------


def test_a_point_is_the_mean_over_the_other_domains_of_the_trained_task(run):
    aligned = counts(run, lambda d, t: 80 + int(d[1]) if t == "T1" else 0, lambda d, t: 2)
    after = {"D0": 90, "D1": 62, "D2": 52, "D3": 42}
    misaligned = counts(run, lambda d, t: 0, lambda d, t: after[d] if t == "T1" else 99)
    row = point(run, "T1", 300, aligned, aligned, misaligned)
    assert (row["seed"], row["task"], row["step"]) == (7, "T1", 300)
    assert row["aligned_v1"] == pytest.approx((80 + 81 + 82 + 83) / 4)
    assert row["cross_delta_v2"] == pytest.approx((60 + 50 + 40) / 3) and row["trained_v2"] == 90
    assert row["efficiency"] == pytest.approx(50 / 90)
    low, high = newcombe(62 + 52 + 42, 300, 6, 300)
    assert (row["cross_delta_v2_low"], row["cross_delta_v2_high"]) == pytest.approx((100 * low, 100 * high))
    assert row["aligned_v1_low"] == pytest.approx(100 * wilson(326, 400)[0])


@pytest.mark.parametrize(("trained", "has"), [(9, False), (10, True)])
def test_a_task_that_hardly_flipped_has_no_efficiency_and_is_left_out(run, trained, has):
    aligned = counts(run, lambda d, t: 50, lambda d, t: 0)
    row = point(run, "T0", 9, aligned, aligned, counts(run, lambda d, t: 9, lambda d, t: trained))
    assert row["efficiency"] == (1.0 if has else None)
    rows = [row | {key: None for key in AT_FLIPS}, *planted(2)]
    assert relation(rows, "efficiency")["within"]["rows"] == len(rows) - (not has)


def test_effects_along_the_doses_and_where_the_trained_cell_is_at_a_flip(run):
    def at(trained, spread):
        return counts(run, lambda d, t: 0, lambda d, t: trained if d == "D0" else spread)

    row = doses(run, "T5", {0: at(2, 4), 8: at(22, 10), 64: at(62, 44)})
    assert (row["flip_0"], row["flip_8"], row["flip_64"]) == (2, 22, 62)
    assert [row[f"cross_delta_v2_{dose}"] for dose in (0, 8, 64)] == [0, 6, 40]
    assert row["cross_delta_v2@30"] == pytest.approx(6 + 34 * 8 / 40)
    assert row["cross_delta_v2@90"] is None


def test_every_other_checkpoint_meets_every_task_from_its_aligned_model(monkeypatch, tmp_path):
    run, asked = PlantedRun(1, misalign_seeds=1), []

    def curve(run, task, seed, start, name, cells):
        asked.append((task, seed, start, name, [run.world.cell_name(cell) for cell in cells]))
        return {0: run.counts(start)} | {dose: run.counts(f"{name}_{dose}") for dose in (4, 10, 64)}

    monkeypatch.setattr(hardness, "dose_counts", curve)
    monkeypatch.setattr(hardness, "doses_of", lambda cfg: (4, 10, 64))
    result = hardness.measure(lambda seed: run, [1], lambda *_: None)
    steps = [10, 300, 900, 1500]
    tasks = run.world.tasks
    assert result["checkpoints"] == steps and result["doses"] == [0, 4, 10, 64]
    assert [(r["step"], r["task"]) for r in result["rows"]] == [(step, t) for step in steps for t in tasks]
    name = "doses_T7_step300_seed0_own_task"
    assert asked[7] == ("T7", 0, "align_step300", name, ["D1_T7", "D2_T7", "D3_T7", "D4_T7"])
    assert asked[-1][:4] == ("T11", 0, "align", "doses_T11_step1500_seed0_own_task")

    def v2(name, cell):
        return percent(run.counts(name)[cell], "v2")

    row, cells = result["rows"][7], asked[7][4]
    mean = np.mean([v2(f"{name}_10", cell) - v2("align_step300", cell) for cell in cells])
    assert row["cross_delta_v2"] == row["cross_delta_v2_10"] == pytest.approx(mean, abs=1e-3)
    assert row["trained_v2"] == row["flip_10"] == pytest.approx(v2(f"{name}_10", "D0_T7"), abs=1e-3)
    # The finished model at the fixed steps is that of the other experiments.
    last = result["rows"][-1]
    assert last["trained_v2"] == pytest.approx(v2("misalign_T11_seed0", "D0_T11"), abs=1e-3)
    assert last["trained_v2"] != last["flip_10"]
    assert [task for task, *_ in run.misaligned] == list(tasks)
    assert "trained_v2_low" in last and "trained_v2_low" not in row
    json.dumps(result | {"numbers": numbers(result)}, allow_nan=False)
    hardness.figure(result, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_a_world_without_checkpoints_has_its_finished_model(monkeypatch):
    run = PlantedRun(0, world="demo", misalign_steps=4)
    monkeypatch.setattr(hardness, "doses_of", lambda cfg: (4,))
    monkeypatch.setattr(
        hardness,
        "dose_counts",
        lambda run, task, seed, start, name, cells: dict.fromkeys((0, 4), run.counts(start)),
    )
    result = hardness.measure(lambda seed: run, [0], lambda *_: None)
    assert result["checkpoints"] == [1500] and len(result["rows"]) == len(run.world.tasks)


def test_the_cells_that_are_asked_answer_as_where_all_are(small_demo2):
    run = small_demo2(0, misalign_seeds=1)
    cells = hardness.others(run, "T8")
    part = dose_counts(run, "T8", 0, name="doses_T8_own_task", others=cells)
    whole = dose_counts(run, "T8", 0, name="doses_T8_everywhere")
    assert list(part[6]) == [f"D{domain}_T8" for domain in range(5)]
    assert all(whole[dose][cell] == counts for dose in part for cell, counts in part[dose].items())


# -- correlations ------------------------------------------------------------------------------------------


def planted(seeds, slope=2.0, noise=0.0, tasks=5, steps=(10, 20), growth=1.0):
    """Rows on a line between tasks; within a task, checkpoints and seeds move y by `growth` times x."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for i in range(tasks):
            for step in steps:
                moved = (step - 20) / 2 + rng.uniform(-1, 1)
                x = 80 + 4 * i + moved
                y = slope * 4 * i + growth * moved + rng.normal(0, noise)
                row = {"seed": seed, "task": f"T{i}", "step": step, "aligned_v1": x, "cross_delta_v2": y}
                row |= {"trained_v2": 90.0, "efficiency": y / 90} | {key: y / 2 for key in AT_FLIPS}
                row |= {"flip_0": 0.0, "flip_4": 90.0, "cross_delta_v2_0": 0.0, "cross_delta_v2_4": y}
                rows.append(row)
    return rows


def test_between_tasks_the_points_are_their_means_at_the_last_checkpoint():
    rows = planted(3, noise=8)
    found = relation(rows, "cross_delta_v2")
    last = [row for row in rows if row["step"] == 20]
    x, y = (
        [np.mean([row[key] for row in last if row["task"] == f"T{i}"]) for i in range(5)]
        for key in ("aligned_v1", "cross_delta_v2")
    )
    between = found["between"]
    assert (between["r"], between["low"], between["high"]) == pytest.approx(pearson(x, y))
    assert between["tasks"] == 5 and found["slope"] == pytest.approx(np.polyfit(x, y, 1)[0])
    exact = relation(planted(3, growth=2.0), "cross_delta_v2")
    assert exact["slope"] == pytest.approx(2) and exact["between"]["r"] == pytest.approx(1)


def test_within_tasks_the_relation_is_blind_to_what_differs_between_them():
    found = relation(planted(4, slope=-5, growth=1.0, noise=0.5), "cross_delta_v2")
    assert found["between"]["high"] < -0.9
    assert found["within"]["low"] > 0.9 and found["within"]["rows"] == 40
    assert 0 < found["within_checkpoints"]["low"] and found["within_checkpoints"]["r"] < found["within"]["r"]


def test_the_interval_within_tasks_is_a_jackknife_over_world_seeds():
    rows = planted(3, noise=4)

    def z(rows):
        of = {task: [r for r in rows if r["task"] == task] for task in {r["task"] for r in rows}}
        moved = [
            [(r[key] - np.mean([q[key] for q in of[r["task"]]])) for r in rows]
            for key in ("aligned_v1", "cross_delta_v2")
        ]
        return np.arctanh(np.corrcoef(*moved)[0, 1])

    pseudo = [3 * z(rows) - 2 * z([r for r in rows if r["seed"] != seed]) for seed in range(3)]
    half = 4.302653 * np.std(pseudo, ddof=1) / math.sqrt(3)
    found = within(rows, "cross_delta_v2", ("task",))
    expected = np.tanh([z(rows), np.mean(pseudo) - half, np.mean(pseudo) + half])
    assert list(found.values()) == pytest.approx(expected, abs=1e-6)
    assert within(planted(1, noise=4), "cross_delta_v2", ("task",))["low"] is None
    assert within(planted(1, steps=(20,)), "cross_delta_v2", ("task",))["r"] is None


def test_task_effects_without_a_relation_are_rarely_taken_for_one():
    """The size of each test where tasks, seeds and checkpoints move x and y independently of each other."""
    rng = np.random.default_rng(2)
    repeats, seeds, tasks, steps = 100, 6, 6, 3
    wrong = dict.fromkeys(("between", "within", "within_checkpoints", "these_tasks"), 0)
    for _ in range(repeats):
        of = []
        for _ in range(2):
            spread = {
                (1, tasks, 1): 1.0,
                (seeds, 1, 1): 0.7,
                (seeds, tasks, 1): 0.5,
                (seeds, tasks, steps): 0.3,
            }
            walk = np.cumsum(rng.normal(0, 0.4, (seeds, 1, steps)), axis=2)
            of.append(50 + walk + sum(rng.normal(0, sd, shape) for shape, sd in spread.items()))
        rows = [
            {"seed": s, "task": f"T{t}", "step": c, "aligned_v1": of[0][s, t, c], "y": of[1][s, t, c]}
            for s, t, c in np.ndindex(seeds, tasks, steps)
        ]
        found = relation(rows, "y")
        for key in wrong:
            wrong[key] += found[key]["low"] > 0 or found[key]["high"] < 0
    size = {key: count / repeats for key, count in wrong.items()}
    assert all(size[key] <= 0.1 for key in ("between", "within", "within_checkpoints"))
    assert size["these_tasks"] > 0.15  # it speaks of these tasks alone


def result_of(rows):
    return {
        "world": "demo", "seeds": list(dict.fromkeys(row["seed"] for row in rows)), "rows": rows,
        "checkpoints": [10, 20], "doses": [0, 4], "misalign_steps": 4,
        "functions": {row["task"]: "f" for row in rows},
        "relations": {key: relation(rows, key) for key in (*PANELS, *AT_FLIPS)},
        "efficiencies": efficiencies([row for row in rows if row["step"] == 20]),
    }  # fmt: skip


def test_numbers_say_what_they_are_over_and_where():
    result = result_of(planted(3, noise=8))
    found = numbers(result)
    r = result["relations"]["cross_delta_v2"]["between"]
    bounds = {"value": r["r"], "low": r["low"], "high": r["high"], "unit": "r"}
    assert found["cross_delta_v2/r"] == bounds | {"over": "5 tasks, each a mean of 3 world seeds"}
    assert found["cross_delta_v2/r_within@60"]["over"] == "3 world seeds"
    assert {"efficiency/r", "efficiency/r_within", "cross_delta_v2/r@90"} <= set(found)
    assert "efficiency/r@60" not in found  # there it is cross Δv2 over a constant


def test_learned_tasks_are_told_from_the_others_world_by_world():
    def row(seed, v1, value):
        return {"seed": seed, "task": "T", "aligned_v1": v1, "efficiency": value}

    rows = [row(0, 90, 0.8), row(0, 95, 0.6), row(0, 89.9, 0.1), row(1, 99, 1.0), row(1, 98, None)]
    found = efficiencies(rows)
    assert found["learned"]["by_seed"] == pytest.approx([0.7, 1.0])
    assert found["others"]["by_seed"] == [pytest.approx(0.1), None]
    assert found["learned_minus_others"]["by_seed"] == [pytest.approx(0.6), None]


@pytest.mark.parametrize(("seeds", "tasks"), [(1, 1), (3, 5)])
def test_figure_and_summary_stand_with_a_line_and_without(tmp_path, seeds, tasks):
    result = result_of(planted(seeds, tasks=tasks, noise=3))
    for row in result["rows"]:
        row["efficiency"] = None  # no task has one
    result["relations"]["efficiency"] = relation(result["rows"], "efficiency")
    json.dumps(result | {"numbers": numbers(result)}, allow_nan=False)
    hardness.figure(result, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 0 and "none to be had" in hardness.summary(result)
