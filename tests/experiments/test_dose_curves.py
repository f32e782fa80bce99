"""Transfer against local flip: planted curves over seeds."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from em.experiments.dose_curves import GRID, at_flips, effect_at, flip_entries, transfer_curve


def line(slope, flips=(0.0, 20.0, 50.0, 96.0)):
    return [(flip, slope * flip) for flip in flips]


def test_numbers_at_a_flip_are_over_the_seeds_that_reach_it():
    numbers = at_flips([line(0.5), line(0.7), line(9.0, (0.0, 45.0))])
    assert numbers[30.0]["by_seed"] == pytest.approx([15, 21, 270])
    assert numbers[60.0]["by_seed"][2] is None and numbers[60.0]["mean"] == pytest.approx(36)
    half = 12.706205 * np.std([45, 63], ddof=1) / 2**0.5
    assert numbers[90.0]["low"] == pytest.approx(54 - half, rel=1e-6)
    entries = flip_entries("T0/x", "points", numbers)
    assert list(entries) == ["T0/x@30", "T0/x@60", "T0/x@90"]
    assert [e["over"] for e in entries.values()] == ["3 world seeds", "2 world seeds", "2 world seeds"]


def test_a_flip_that_no_seed_reaches_has_no_number():
    of = flip_entries("a", "r", at_flips([line(1.0, (0.0, 10.0))]))["a@60"]
    assert (of["value"], of["low"], of["high"]) == (None, None, None)
    assert effect_at([(0.0, None), (50.0, 3.0)], 30.0) is None  # no effect at one end of the line between
    assert effect_at([(0.0, None), (20.0, 1.0), (50.0, 4.0)], 30.0) == pytest.approx(2.0)


def test_a_drawn_line_is_the_mean_at_each_flip_and_stops_where_most_seeds_do():
    axis = Figure().subplots()
    short = (0.0, 20.0, 41.0)
    transfer_curve(axis, {"a": [line(0.5), line(1.0, short), line(1.5, short)], "b": []}, place=1)
    drawn = next(of for of in axis.lines if of.get_label() == "a")
    x, y = drawn.get_data()
    assert x[-1] == 40 and y == pytest.approx(x)  # beyond 41 % one seed of three is left
    assert x[0] == GRID[1]  # at dose 0 the flip was there before any training
    marked = next(of for of in axis.lines if of.get_marker() == "o")
    assert np.ravel(marked.get_data()) == pytest.approx([20, 20])
