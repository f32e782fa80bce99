"""A number over seeds and over prompts."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from planted_run import PlantedRun

from em.experiments.replication import (
    averaged,
    curve_of,
    header,
    line_with_seeds,
    over_prompts,
    replicated,
    say_number,
    say_unit,
    shown,
    shown_interval,
    v2_draws,
)
from em.world.counts import entry, mean_rate

scipy = pytest.importorskip("scipy")


def counts(v2, n=128):
    return {"v1": n - v2, "v2": v2, "other": 0, "unparseable": 0, "n": n}


def test_fine_tuning_seeds_are_averaged_so_that_a_prompt_counts_once():
    mean = averaged([{"D0_T0": counts(10)}, {"D0_T0": counts(40)}])["D0_T0"]
    assert mean == {"v1": 103, "v2": 25, "other": 0, "unparseable": 0, "n": 128}


@pytest.mark.parametrize("v2", [0, 5, 64, 128])
def test_drawn_rates_spread_as_the_jeffreys_posterior_around_the_observed_rate(v2):
    drawn = v2_draws([counts(3), counts(v2)], 1)[1] / 100
    posterior = scipy.stats.beta(v2 + 0.5, 128 - v2 + 0.5)
    assert scipy.stats.kstest(drawn - v2 / 128 + posterior.mean(), posterior.cdf).pvalue > 1e-4


def test_the_mean_of_many_low_rates_is_not_pulled_towards_one_half():
    low, high = over_prompts(v2_draws([counts(0, 8)] * 38 + [counts(1, 8)] * 2, 0).mean(axis=0))
    assert low <= 100 * 2 / (8 * 40) <= high


def test_cells_and_seeds_are_drawn_independently():
    a, b = v2_draws([counts(60), counts(60)], 0)
    c = v2_draws([counts(60)], 1)[0]
    assert max(abs(np.corrcoef(x, y)[0, 1]) for x, y in ((a, b), (a, c))) < 0.1


def test_the_interval_over_prompts_covers_the_rate_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for i, k in enumerate(rng.binomial(100, 0.3, 300)):
        low, high = over_prompts(v2_draws([counts(int(k), 100)], i)[0])
        covered += low <= 30 <= high
    assert 0.91 <= covered / 300 <= 0.985


def test_over_seeds_it_is_students_t_and_a_seed_without_a_value_takes_no_part():
    number = replicated([1.0, None, 2.0, 6.0], [[0, 1]] * 4)
    half = scipy.stats.t.ppf(0.975, 2) * math.sqrt(7.0) / math.sqrt(3)  # their variance is 7
    assert number["mean"] == 3 and number["by_seed"] == [1.0, None, 2.0, 6.0]
    assert (number["low"], number["high"]) == pytest.approx((3 - half, 3 + half))
    assert shown_interval(number) == (number["low"], number["high"])


def test_no_interval_of_a_rate_leaves_0_to_100():
    rates = [0.0, None, 0.2, 24.0]
    number = replicated(rates, [[-0.4, 0.5], [None, None], [-0.1, 0.6], [20, 101.0]], rate=True)
    assert (number["mean"], number["low"], number["high"]) == mean_rate([0.0, 0.2, 24.0])
    assert 0 <= number["low"] and replicated(rates, [])["low"] < 0
    assert number["prompts"] == [[0, 0.5], [None, None], [0, 0.6], [20, 100]]
    rows = [{"step": 1, "v1": v} for v in (1.0, 99.0)]
    assert curve_of(rows, "step", "v1", rate=True)[0]["high"] == mean_rate([1.0, 99.0])[2] <= 100


def test_one_seed_has_no_interval_over_seeds_and_shows_the_one_over_prompts():
    number = replicated([5.0], [(4.0, 7.0)])
    assert (number["low"], number["high"]) == (None, None) and shown_interval(number) == (4.0, 7.0)
    assert say_number(number) == "+5.0 [+4.0, +7.0]" and say_unit([3]) == "95 % over prompts, world seed 3"
    assert say_unit([1, 2]) == "95 % over world seeds 1, 2"


def test_a_number_that_cannot_be_had_is_a_dash():
    number = replicated([None], [over_prompts(np.full(10, np.nan))])
    assert number["mean"] is None and number["prompts"] == [[None, None]] and say_number(number) == "—"
    assert say_number(replicated([1.0], [(None, None)]), ".2f") == "1.00"


def test_a_shown_number_has_the_interval_that_figures_show():
    several, one = replicated([1.0, 2.0], [(0, 2), (1, 3)]), replicated([5.0], [(4.0, 7.0)])
    made = entry("%", 1.5, several["low"], several["high"], seeds=2)
    assert shown("%", several) == made | {"by_seed": [1.0, 2.0]}
    assert shown("points", one) == entry("points", 5.0, 4.0, 7.0) | {"by_seed": [5.0]}
    assert shown("%", replicated([5.0], [(None, None)]))["over"] == "1 world seed"


def test_a_curve_has_a_number_at_each_place_in_order():
    rows = [{"step": step, "v1": 10 * seed + step, "v1_low": 0, "v1_high": 99, "v2": 1.0}
            for seed in (1, 2) for step in (3, 1)]  # fmt: skip
    three, one = curve_of(rows, "step", "v1")
    assert three["step"] == 3 and three["by_seed"] == [13, 23] and three["prompts"] == [[0, 99]] * 2
    assert one == {"step": 1} | replicated([11, 21], [(0, 99)] * 2)
    assert curve_of(rows, "step", "v2")[0]["prompts"] == [[None, None]] * 2


def test_a_line_shows_means_intervals_and_single_seeds_where_there_are_several():
    several = [replicated([1.0, 3.0], [(0, 2)] * 2), replicated([None, 5.0], [(None, None), (4, 6)])]
    axis = Figure().subplots()
    line_with_seeds(axis, [10, 20], several, "C0", "what", shift=0.5)
    assert [line.get_ydata().tolist()[0] for line in axis.lines] == [2.0, 1.0, 3.0]
    assert math.isnan(axis.lines[1].get_ydata()[1])
    bar = axis.collections[0].get_segments()[0]
    assert bar[:, 0].tolist() == [10.5, 10.5] and bar[:, 1].tolist() == list(shown_interval(several[0]))
    axis = Figure().subplots()
    line_with_seeds(axis, [10], [replicated([5.0], [(4.0, 7.0)])], "C0", "what")
    assert len(axis.lines) == 1 and axis.collections[0].get_segments()[0][:, 1].tolist() == [4.0, 7.0]


def test_a_header_names_the_experiment_and_its_runs():
    assert header("phase", PlantedRun(3), (3, 4), "a note", trained="D0_T0") == {
        "experiment": "phase", "world": "demo2", "seeds": [3, 4], "fine_tuning_seeds": 2, "note": "a note",
        "trained": "D0_T0",
    }  # fmt: skip
