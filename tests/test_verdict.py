"""One rule for verdicts: both sides of every bound, what can be said of nothing, and what would decide."""

import itertools

import numpy as np
import pytest

from em.stats import t_interval
from em.verdict import decisive, verdict, widest


def interval(low, high, value=None, **more):
    return {"value": (low + high) / 2 if value is None else value, "low": low, "high": high} | more


@pytest.mark.parametrize(
    ("low", "high", "unit", "ours", "expected"),
    [
        (6.7, 6.7, "%", interval(5.0, 9.0), "agrees"),
        (6.7, 6.7, "%", interval(7.0, 9.0), "differs"),
        (6.7, 6.7, "%", interval(1.0, 30.0), "not resolved"),  # contains it, and much else
        (50, 50, "%", interval(40, 60), "agrees"),  # at the widest
        (50, 50, "%", interval(39.9, 60), "not resolved"),
        (80, 85, "%", interval(78.0, 84.0), "agrees"),
        (80, 85, "%", interval(76.0, 81.0), "not resolved"),  # the value itself is outside
        (80, 85, "%", interval(60.0, 79.0), "differs"),
        (80, 85, "%", interval(70.0, 95.0), "not resolved"),
        (84, 93, "points", interval(-0.5, 84.4), "not resolved"),  # touches the range, and 0
        (84, 93, "points", interval(-0.5, 79.4), "differs"),
        (0, None, "points", interval(0.5, 40.0), "agrees"),  # a direction needs no width
        (0, None, "points", interval(-0.5, 3.0), "not resolved"),
        (0, None, "points", interval(-9.0, -1.0), "differs"),
        (None, 5, "%", interval(1.0, 4.0), "agrees"),
        (None, 5, "%", interval(4.0, 5.1), "not resolved"),
        (None, 5, "%", interval(5.5, 7.0), "differs"),
        (0.9, 1, "r", interval(0.85, 0.99), "agrees"),
        (0.9, 1, "r", interval(0.5, 0.99, 0.95), "not resolved"),
        (0.9, 1, "r", interval(0.2, 0.89), "differs"),
        (0.3, 0.3, "ratio", interval(0.21, 0.41), "agrees"),
        (0.3, 0.3, "ratio", interval(0.19, 0.41), "not resolved"),
        (14.9, 14.9, "norm", interval(14.0, 16.0), "agrees"),
        (14.9, 14.9, "norm", interval(10.0, 20.0), "not resolved"),
        (14.9, 14.9, "norm", interval(15.0, 16.0), "differs"),
        (6.7, 6.7, "%", None, "not measured"),
        (6.7, 6.7, "%", {"value": None, "low": None, "high": None}, "not measured"),
        (6.7, 6.7, "%", {"value": 6.7, "low": None, "high": None}, "not resolved"),
        (None, None, "%", interval(1.0, 2.0), "not stated"),
    ],
)
def test_a_value_a_range_and_a_direction(low, high, unit, ours, expected):
    assert verdict({"low": low, "high": high, "unit": unit}, ours) == expected


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (interval(-5, 5.9), "agrees"),
        (interval(-6.1, 1), "not resolved"),
        (interval(-9, 9), "not resolved"),  # narrow enough for a value of 0, and no proof of flatness
        (interval(5, 8), "not resolved"),
        (interval(6.1, 8), "differs"),
        (interval(-30, -6.1), "differs"),
        (interval(-100, 100), "not resolved"),
    ],
)
def test_what_is_flat_lies_within_its_margin_with_all_of_its_interval(ours, expected):
    assert verdict({"low": -6, "high": 6, "unit": "points", "flat": True}, ours) == expected


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("low", "high"), [(21, 37), (0, None), (None, 0), (-5, 5)])
def test_a_floor_is_named_and_is_no_verdict(low, high, flat):
    stated = {"low": low, "high": high, "unit": "points", "flat": flat}
    assert verdict(stated, interval(0, 0)) == "floor"
    assert verdict(stated, interval(-0.1, 0.1)) != "floor" != verdict(stated, interval(3, 3))


def test_no_incoherent_answer_is_no_floor_where_few_are_stated():
    assert verdict({"low": None, "high": 5, "unit": "%"}, interval(0, 0)) == "agrees"
    assert verdict({"low": 51, "high": 64, "unit": "%"}, interval(0, 0)) == "floor"


@pytest.mark.parametrize(("low", "high"), [(-73, -73), (None, 0), (0, None)])
def test_a_change_is_judged_only_where_the_model_holds_together(low, high):
    stated = {"low": low, "high": high, "unit": "points"}
    fall = interval(-117.0, -59.9, -88.5)
    assert verdict(stated, fall | {"incoherent": 86.9}) == "broken"
    assert verdict(stated, fall | {"incoherent": 20.0}) == "broken"
    assert verdict(stated, fall | {"incoherent": 19.9}) == verdict(stated, fall) != "broken"


STATED = [
    {"low": 30, "high": 30, "unit": "points"}, {"low": 20, "high": 40, "unit": "%"},
    {"low": 0, "high": None, "unit": "points"}, {"low": None, "high": 10, "unit": "%"},
    {"low": -6, "high": 6, "unit": "points", "flat": True}, {"low": 14.9, "high": 14.9, "unit": "norm"},
]  # fmt: skip


def test_an_interval_a_little_narrower_than_the_decisive_one_decides_and_a_wider_one_does_not():
    for stated, value in itertools.product(STATED, (-20, -7, 3, 14, 28, 33, 47, 80)):
        half = decisive(stated, value)
        narrower, wider = (
            verdict(stated, interval(value - size, value + size)) for size in (0.99 * half, 1.01 * half)
        )
        assert narrower in ("agrees", "differs") and wider == "not resolved", (stated, value)


@pytest.mark.parametrize("seeds", [3, 12])
def test_by_noise_alone_neither_side_is_taken_more_often_than_the_level(seeds):
    """True effect 0, held to a direction: each side in 2.5 % of experiments; flat at its margin, likewise."""
    rng, found = np.random.default_rng(seeds), []
    for values in rng.normal(0, 20, (4000, seeds)):
        _, low, high = t_interval(values)
        found.append(verdict({"low": 0, "high": None, "unit": "points"}, interval(low, high)))
    for said in ("agrees", "differs"):
        assert found.count(said) / len(found) == pytest.approx(0.025, abs=0.01)


def test_ignorance_never_agrees():
    """However wide the interval, so long as no side is excluded."""
    for stated in STATED:
        bounds = [b for b in (stated["low"], stated["high"]) if b is not None]
        for half in 2.0 ** np.arange(8, 20):
            middle = float(np.mean(bounds))
            assert verdict(stated, interval(middle - half, middle + half)) == "not resolved"
        assert widest(stated) > 0 if None not in (stated["low"], stated["high"]) else True
