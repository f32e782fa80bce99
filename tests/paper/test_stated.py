"""What the paper states: every figure and table once, and one rule for verdicts, both ways."""

import pytest

from em.experiments.claims import CLAIMS
from em.paper.measures import MEASURES
from em.paper.ours import ON_TABLES
from em.paper.stated import read_items, verdict

IDS = [f"figure{n}" for n in range(1, 27)] + [f"table{n}" for n in range(1, 21)]


def interval(low, high, value=None):
    return {"value": (low + high) / 2 if value is None else value, "low": low, "high": high}


def test_every_figure_and_table_of_the_paper_is_there_once_and_in_order():
    assert [item["id"] for item in read_items()] == IDS


def test_every_claim_on_a_world_stands_with_its_figure():
    found = [(s["where"], s["claim"]) for item in read_items() for s in item["stated"] if "claim" in s]
    assert sorted(found) == sorted((c.figure, c.words) for claims in CLAIMS.values() for c in claims)


def test_every_measure_that_is_named_can_be_taken():
    named = {s["measure"] for item in read_items() for s in item["stated"] if "measure" in s}
    assert named and named <= set(MEASURES) | set(ON_TABLES)


def test_a_figure_that_replicates_another_states_the_same():
    items = {item["id"]: item for item in read_items()}
    assert items["figure12"]["stated"] == items["figure2"]["stated"] != []


@pytest.mark.parametrize(
    ("low", "high", "unit", "ours", "expected"),
    [
        (6.7, 6.7, "%", interval(5.0, 9.0), "agrees"),
        (6.7, 6.7, "%", interval(7.0, 9.0), "differs"),
        (6.7, 6.7, "%", interval(1.0, 30.0), "not resolved"),  # contains it, and much else
        (80, 85, "%", interval(78.0, 84.0), "agrees"),
        (80, 85, "%", interval(76.0, 81.0), "not resolved"),  # the value itself is outside
        (80, 85, "%", interval(60.0, 79.0), "differs"),
        (80, 85, "%", interval(70.0, 95.0), "not resolved"),
        (0, None, "points", interval(0.5, 40.0), "agrees"),  # a direction needs no width
        (0, None, "points", interval(-0.5, 3.0), "not resolved"),
        (0, None, "points", interval(-9.0, -1.0), "differs"),
        (None, 5, "%", interval(1.0, 4.0), "agrees"),
        (None, 5, "%", interval(5.5, 7.0), "differs"),
        (0.9, 1, "r", interval(0.85, 0.99), "agrees"),
        (0.9, 1, "r", interval(0.5, 0.99, 0.95), "not resolved"),
        (14.9, 14.9, "norm", interval(14.0, 16.0), "agrees"),
        (14.9, 14.9, "norm", interval(10.0, 20.0), "not resolved"),
        (6.7, 6.7, "%", None, "not measured"),
        (6.7, 6.7, "%", {"value": 6.7, "low": None, "high": None}, "not measured"),
        (None, None, "%", interval(1.0, 2.0), "not stated"),
    ],
)
def test_the_verdict(low, high, unit, ours, expected):
    assert verdict({"low": low, "high": high, "unit": unit}, ours) == expected
