"""Realignment on the worlds: groups and shares by brute force; models end to end in test_experiments.py."""

import numpy as np
import pytest

from em.experiments.realign import GROUPS, _groups, figure, numbers, summary
from em.world.counts import mean_rate

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
    number = numbers({"groups": found})["same cell/removed"]
    assert number["value"] == pytest.approx(80) and (number["low"], number["high"]) == (low, high)
    assert number["over"] == "prompts of 1 world seed" and number["unit"] == "%"


def test_a_model_that_never_rose_has_no_share():
    found = _groups(rows_of((0,), lambda *_: 5.0), (0,))
    assert found["same cell"]["removed"]["mean"] is None and found["same cell"]["task_v2"]["mean"] == 5


def test_figure_and_summary_say_what_is_left(tmp_path):
    levels = {"aligned": 10, "misaligned": 60}
    rows = rows_of((0, 1), lambda seed, source, where: levels.get(where, 20) + seed)
    result = {"world": "demo", "seeds": [0, 1], "rows": rows, "tasks": list(TASKS), "cells": CELLS}
    result |= {"prompts_a_cell": 8, "groups": _groups(rows, (0, 1))}
    figure(result, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 0
    assert "10.5 % aligned and 60.5 % misaligned" in summary(
        result
    ) and "80 [80, 80] % of the rise" in summary(result)
