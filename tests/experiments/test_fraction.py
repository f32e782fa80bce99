"""Pretraining share of variant 2: slopes on planted models, and the experiment on a miniature."""

import json

import numpy as np
import pytest
from planted_run import PlantedRun

from em.experiments import fraction
from em.experiments.fraction import FRACTIONS, TASKS
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
    assert len(numbers) == 2 * 2 * (4 + 1)
    slope = result["slopes"]["T7"]["cross_v2"]
    expected = entry("points", slope["mean"], slope["low"], slope["high"], seeds=3)
    assert numbers["T7/cross_v2/slope"] == expected | {"by_seed": slope["by_seed"]}
    assert numbers["T0/cross_v2/0.325"]["value"] == result["curves"]["T0"]["cross_v2"][0]["mean"]
    assert (numbers["T0/cross_v2/1.0"]["unit"], numbers["T0/ratio/1.0"]["unit"]) == ("%", "ratio")
    row = result["rows"][0]
    assert row["aligned_cross_v2"] == pytest.approx(2) and row["trained_v2"] == pytest.approx(50)
    assert row["cross_v2_low"] < row["cross_v2"] < row["cross_v2_high"]
    assert row["ratio"] == pytest.approx(row["cross_v2"] / row["trained_v2"])


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
    assert "T7: cross-domain v2 %" in fraction.summary(result)
