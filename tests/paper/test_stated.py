"""What the paper states: every figure and table once."""

from em.experiments.claims import CLAIMS
from em.paper.measures import MEASURES
from em.paper.ours import ON_TABLES
from em.paper.stated import read_items

IDS = [f"figure{n}" for n in range(1, 27)] + [f"table{n}" for n in range(1, 21)]


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
