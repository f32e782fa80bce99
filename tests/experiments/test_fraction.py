"""Pretraining share of variant 2: slopes on planted models, and the experiment on a miniature."""

import json

import numpy as np
import pytest
from planted_run import PlantedRun

from em.experiments import fraction, replication
from em.experiments.fraction import FRACTIONS, PANELS, TASKS
from em.world.counts import entry


def planted(seed, trained, other, **settings):
    """A run that is misaligned to v2 rates `trained` in the trained cell and `other` elsewhere."""

    def rate(name, cell):
        if name == "align":
            return 0.02
        if cell.startswith("D5_"):
            return 0.9  # held out, so it must not count
        return trained if cell == f"D0_{name.split('_')[1]}" else other

    return PlantedRun(seed, rate, n=2000, **settings)


@pytest.fixture(autouse=True)
def planted_doses(monkeypatch):
    real = replication.dose_classes

    def dose_classes(run, task, seed, **asked):
        return run.dose_classes(task, seed) if isinstance(run, PlantedRun) else real(run, task, seed, **asked)

    monkeypatch.setattr(replication, "dose_classes", dose_classes)


def silent(*_):
    pass


def test_planted_rates_are_found_with_their_slopes():
    def make(seed, v2_fraction):
        return planted(seed, trained=0.5, other=0.1 + 0.2 * v2_fraction + 0.01 * seed)

    result = fraction.measure(make, [1, 2, 3], silent)
    for task in TASKS:
        cross, ratio = (result["slopes"][task][key] for key in ("cross_v2", "ratio"))
        assert cross["mean"] == pytest.approx(20, abs=0.1) and cross["low"] < 20.1 and cross["high"] > 19.9
        assert ratio["mean"] == pytest.approx(0.4, abs=0.002)
        curve = result["curves"][task]["cross_v2"]
        assert [n["mean"] for n in curve] == pytest.approx([12 + 20 * f for f in FRACTIONS], abs=0.05)
    numbers = fraction.numbers(result)
    assert len(numbers) == 2 * 4 * (4 + 1) + 4 + 3 * (2 * 4 + 3)
    slope = result["slopes"]["T7"]["cross_v2"]
    expected = entry("points", slope["mean"], slope["low"], slope["high"], seeds=3)
    assert numbers["T7/cross_v2/slope"] == expected | {"by_seed": slope["by_seed"]}
    assert numbers["T0/cross_v2/0.325"]["value"] == result["curves"]["T0"]["cross_v2"][0]["mean"]
    assert (numbers["T0/cross_v2/1.0"]["unit"], numbers["T0/ratio/1.0"]["unit"]) == ("%", "ratio")
    both = numbers["T7_minus_T0/delta_v2/slope"]
    assert both["value"] == pytest.approx(0) and both["unit"] == "points" and both["over"] == "3 world seeds"
    row = result["rows"][0]
    assert row["aligned_cross_v2"] == pytest.approx(2) and row["trained_v2"] == pytest.approx(50)
    assert row["cross_v2_low"] < row["cross_v2"] < row["cross_v2_high"]
    assert row["ratio"] == pytest.approx(row["cross_v2"] / row["trained_v2"])
    assert row["delta_v2"] == pytest.approx(row["cross_v2"] - 2)
    assert row["delta_ratio"] == pytest.approx(row["delta_v2"] / 48)
    assert all(row[f"{key}_low"] < row[key] < row[f"{key}_high"] for key in PANELS)


def test_what_v2_the_aligned_model_has_left_is_no_transfer():
    """The raw rate and ratio rise with the share, since the aligned model's does; Δv2 rises for T7 alone."""

    def make(seed, v2_fraction):
        def rate(name, cell):
            if name == "align":
                return 0.1 * v2_fraction
            gained = 0.4 if cell == f"D0_{name.split('_')[1]}" else 0.1 + 0.2 * v2_fraction * ("T7" in name)
            return 0.1 * v2_fraction + gained

        return PlantedRun(seed, rate, n=2000)

    result = fraction.measure(make, [1, 2], silent)
    slopes = {(name, key): of[key]["mean"] for name, of in result["slopes"].items() for key in PANELS}
    assert slopes["T0", "cross_v2"] == pytest.approx(10, abs=0.1) and slopes["T0", "ratio"] > 0.05
    assert slopes["T0", "delta_v2"] == pytest.approx(0, abs=0.1)
    assert slopes["T0", "delta_ratio"] == pytest.approx(0, abs=0.002)
    assert slopes["T7", "delta_v2"] == pytest.approx(20, abs=0.1)
    assert slopes["T7", "delta_ratio"] == pytest.approx(0.5, abs=0.002)
    assert slopes["T7_minus_T0", "delta_v2"] == pytest.approx(20, abs=0.1)


def test_a_task_that_spreads_as_far_as_it_flips_has_no_slope_at_a_matched_flip():
    """T0 spreads by its flip whatever the share; T7 by more the higher the share, and reaches 60 % at all."""

    def make(seed, v2_fraction):
        flip = {"T0": 0.35 + 0.6 * v2_fraction, "T7": 0.7}
        spread = {"T0": 0.2, "T7": 0.1 + 0.2 * v2_fraction}

        def rate(name, cell):
            left = 0.0 if cell in ("D0_T0", "D0_T7") else 0.02  # what the aligned model has
            if name == "align":
                return left
            task = name.split("_")[1]
            return left + flip[task] * (1 if cell == f"D0_{task}" else spread[task])

        return PlantedRun(seed, rate, n=2000)

    result = fraction.measure(make, [1, 2], silent)
    numbers = fraction.numbers(result)
    assert numbers["T0/delta_v2/slope"]["value"] == pytest.approx(12, abs=0.2)
    assert numbers["T0/delta_v2/slope@30"]["value"] == pytest.approx(0, abs=0.2)
    assert numbers["T0/delta_v2/1.0@60"]["value"] == pytest.approx(12, abs=0.1)
    assert numbers["T0/delta_v2/0.325@60"]["value"] is None  # it ends at 54.5 %
    assert numbers["T0/delta_v2/slope@60"]["value"] is None
    assert numbers["T7/delta_v2/slope@60"]["value"] == pytest.approx(12, abs=0.2)
    assert numbers["T7_minus_T0/delta_v2/slope@60"]["value"] is None
    both = numbers["T7_minus_T0/delta_v2/slope@30"]
    assert both["value"] == pytest.approx(6, abs=0.2) and both["over"] == "2 world seeds"
    json.dumps(numbers, allow_nan=False)
    assert fraction.numbers(json.loads(json.dumps(result))) == numbers
    assert "0 of 2 seeds at every share" in fraction.summary(result)


def test_t7_less_t0_is_paired_by_world_seed():
    def make(seed, v2_fraction):
        def rate(name, cell):
            return 0.3 + (0.1 * seed + 0.1 * ("T7" in name)) * v2_fraction * (name != "align")

        return PlantedRun(seed, rate, n=2000)

    slopes = fraction.measure(make, [0, 2, 5], silent)["slopes"]
    alone, both = (slopes[name]["delta_v2"] for name in ("T7", "T7_minus_T0"))
    assert both["mean"] == pytest.approx(10, abs=0.1)
    assert both["high"] - both["low"] < 1 < alone["high"] - alone["low"]


def test_the_slope_is_the_least_squares_one():
    y = np.random.default_rng(0).normal(size=(4, 5))
    assert fraction.slope(y) == pytest.approx(np.polyfit(FRACTIONS, y, 1)[0])


def test_one_seeds_slope_has_an_interval_over_prompts_as_wide_as_they_allow():
    def make(seed, v2_fraction):
        return planted(seed, trained=0.5, other=0.1 + 0.2 * v2_fraction)

    slope = fraction.measure(make, [5], silent)["slopes"]["T0"]["cross_v2"]
    low, high = slope["prompts"][0]
    x = np.array(FRACTIONS)
    rates = 0.1 + 0.2 * x
    variance = 100**2 * rates * (1 - rates) / 2000 / 29  # of the mean over 29 cells
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    assert slope["low"] is None and low < 20 < high
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(weights**2 @ variance), rel=0.1)


def test_a_trained_cell_that_did_not_move_has_no_ratio():
    result = fraction.measure(lambda seed, v2_fraction: planted(seed, 0.0, 0.1), [0], silent)
    assert result["rows"][0]["ratio"] is None and result["slopes"]["T0"]["ratio"]["mean"] is None
    json.dumps(result, allow_nan=False)
    assert "ratio —" in fraction.summary(result)


@pytest.mark.parametrize("world, steps", [("2", 8), ("demo2", 10)])
def test_world_2_takes_the_appendixs_eight_steps(world, steps):
    runs = []

    def make(seed, v2_fraction):
        runs.append(planted(seed, 0.5, 0.1, world=world, misalign_seeds=1))
        return runs[-1]

    result = fraction.measure(make, [0], silent)
    assert result["misalign_steps"] == steps and {run.cfg.misalign_steps for run in runs} == {10}
    assert [(task, n) for run in runs for task, *_, n in run.misaligned] == [("T0", steps), ("T7", steps)] * 4


def test_the_experiment_pretrains_four_models_and_ends_with_a_figure(small_demo2, tmp_path):
    folders = set()

    def make(seed, **changes):
        run = small_demo2(seed, **changes, misalign_seeds=1)
        folders.add(run.folder)
        assert run.settings["v2_fraction"] == changes["v2_fraction"]
        return run

    result = fraction.measure(make, [0], silent)
    json.dumps(result, allow_nan=False)
    assert len(folders) == 4 and len(result["rows"]) == 8
    number = result["slopes"]["T7"]["cross_v2"]
    assert number["low"] is None and number["prompts"][0][0] < number["prompts"][0][1]
    fraction.figure(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "T7: cross-domain Δv2" in fraction.summary(result)
