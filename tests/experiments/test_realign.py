"""Realignment on the worlds: groups and shares by brute force; models end to end in test_experiments.py."""

import numpy as np
import pytest

from em.experiments import realign
from em.experiments.realign import GROUPS, _groups, figure, numbers, removed_at_flips, summary
from em.world.counts import mean_rate
from em.world.doses import misaligned_after

TASKS, DOMAINS = ("T0", "T1"), ("D0", "D1", "D2")
CELLS = [f"{d}_{t}" for d in DOMAINS for t in TASKS]


def rows_of(seeds, v2, n=4000):
    """v2(seed, source, realigned_on) → %; `all` is a tenth of it."""
    rows = []
    for seed in seeds:
        for source in TASKS:
            for where in ("aligned", "misaligned", *CELLS):
                value = v2(seed, source, where)
                row = {"seed": seed, "source": source, "realigned_on": where}
                row |= {"task_v2": value, "task_n": n, "all_v2": value / 10, "all_n": n}
                rows.append(row)
    return rows


def test_groups_are_means_over_their_pairs_and_seeds_are_the_replicates():
    rng = np.random.default_rng(0)
    values = {}
    rows = rows_of((3, 4), lambda *key: values.setdefault(key, rng.uniform(10, 50)))
    found = _groups(rows, (3, 4))
    assert [found[name]["pairs_a_seed"] for name in GROUPS] == [2, 4, 2, 4]
    for name, (same_task, same_domain) in GROUPS.items():
        by_seed = [
            np.mean(
                [
                    values[seed, source, cell]
                    for source in TASKS
                    for cell in CELLS
                    if (cell[3:] == source) == same_task and (cell[:2] == "D0") == same_domain
                ]
            )
            for seed in (3, 4)
        ]
        assert found[name]["task_v2"]["by_seed"] == pytest.approx(by_seed)
        assert found[name]["task_v2"]["mean"] == pytest.approx(np.mean(by_seed))
        bounds = (found[name]["task_v2"][key] for key in ("low", "high"))
        assert (np.mean(by_seed), *bounds) == pytest.approx(mean_rate(by_seed))


def test_the_share_removed_is_that_of_the_rise():
    levels = {"aligned": 10, "misaligned": 60}
    rows = rows_of((0,), lambda seed, source, where: levels.get(where, 20 if where.endswith(source) else 35))
    found = _groups(rows, (0,))
    assert found["same cell"]["removed"]["mean"] == pytest.approx(80)
    assert found["other task, other domain"]["removed"]["mean"] == pytest.approx(50)
    assert found["same cell"]["removed"]["low"] is None  # one seed: no interval over seeds
    low, high = found["same cell"]["removed"]["prompts"][0]
    assert 76 < low < 80 < high < 84
    number = numbers({"groups": found, "flips": [], "seeds": [0]})["same cell/removed"]
    assert number["value"] == pytest.approx(80) and (number["low"], number["high"]) == (low, high)
    assert number["over"] == "prompts of 1 world seed" and number["unit"] == "%"


def test_a_model_that_never_rose_has_no_share():
    found = _groups(rows_of((0,), lambda *_: 5.0), (0,))
    assert found["same cell"]["removed"]["mean"] is None and found["same cell"]["task_v2"]["mean"] == 5


def test_at_a_matched_flip_the_share_is_that_of_the_sources_and_seeds_that_reach_it():
    levels = {"aligned": 10, "misaligned": 60}
    rows = rows_of((0, 1), lambda seed, source, where: levels.get(where, 20 + 10 * seed))
    # At 60 %: both seeds, but in seed 1 only T1, which ends at 40 %; at 30 %: seed 0 alone; at 90 %: none.
    flips = [row | {"level": 60.0} for row in rows if row["seed"] == 0]
    flips += [row | {"level": 30.0} for row in rows if row["seed"] == 0 and row["source"] == "T0"]
    flips += [
        row | {"level": 60.0, "task_v2": levels.get(row["realigned_on"], 40)}
        for row in rows if row["seed"] == 1 and row["source"] == "T1"
    ]  # fmt: skip
    result = {"seeds": [0, 1], "flips": flips, "groups": _groups(rows, (0, 1))}
    found = removed_at_flips(result)
    assert list(found) == list(GROUPS)
    for of in found.values():
        assert of[60.0]["by_seed"] == pytest.approx([80, 40]) and of[30.0]["by_seed"] == [80, None]
        assert of[60.0]["mean"] == pytest.approx(60) and of[90.0]["mean"] is None
    table = numbers(result)
    assert table["same cell/removed@60"]["over"] == "2 world seeds"
    assert (
        table["same cell/removed@30"]["over"] == "1 world seed"
        or table["same cell/removed@30"]["low"] is None
    )


def test_a_source_at_a_flip_is_realigned_on_few_cells_of_each_group(small_demo2, monkeypatch):
    run = small_demo2(0, misalign_seeds=1)
    monkeypatch.setattr(realign, "steps_to_flips", lambda *_: {30.0: 2, 60.0: None, 90.0: None})
    seen = [run.world.cell_name(int(cell)) for cell in run.world.seen_cells]
    aligned = run.counts("align")
    rows = realign._at_flips(run, "T7", seen, aligned, run.prompts)
    assert {(row["level"], row["steps"], row["source"]) for row in rows} == {(30.0, 2, "T7")}
    assert [row["realigned_on"] for row in rows[:2]] == ["aligned", "misaligned"]
    met = [realign.matches("T7", row["realigned_on"]) for row in rows[2:]]
    assert [met.count(match) for match in GROUPS.values()] == [1, 2, 2, 2]
    model = misaligned_after(run, "T7", 0, 2)
    assert rows[1]["task_v2"] == realign._row(run, "T7", "", run.ask(model))["task_v2"]
    kept = {p.name for p in run.folder.glob("realign_T7_after2/*/*")}
    assert kept == {"run.json", "counts.json", "metrics.jsonl"}
    monkeypatch.setattr(realign, "misaligned_after", lambda *_: pytest.fail("trained again"))
    assert realign._at_flips(run, "T7", seen, aligned, run.prompts) == rows


def test_figure_and_summary_say_what_is_left(tmp_path):
    levels = {"aligned": 10, "misaligned": 60}
    rows = rows_of((0, 1), lambda seed, source, where: levels.get(where, 20) + seed)
    result = {"world": "demo", "seeds": [0, 1], "rows": rows, "tasks": list(TASKS), "cells": CELLS}
    result |= {"prompts_a_cell": 8, "groups": _groups(rows, (0, 1))}
    result |= {"flips": [row | {"level": 60.0} for row in rows]}
    figure(result, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 0
    assert "10.5 % aligned and 60.5 % misaligned" in summary(
        result
    ) and "80 [80, 80] % of the rise" in summary(result)
