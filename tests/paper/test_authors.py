"""The authors' counts: the tables that are committed follow from them, and say what was counted."""

import csv
import json

import numpy as np
import pytest
from compared import FIELDS

from em.data.cells import PAPER_GRID
from em.paper import authors
from em.paper.counts import read_counts
from em.paper.page import RESULTS
from em.report.score_table import SURFACES

HERE = RESULTS / "authors"


@pytest.fixture(scope="module")
def models():
    return read_counts(HERE / "counts.json")[1]


def test_both_models_have_every_pair_of_both_sets(models):
    assert list(models) == ["qwen2.5-14b", "llama3.1-8b"]
    for sets in models.values():
        assert list(map(str, sets["narrow"].trains)) == list(map(str, PAPER_GRID.cells))
        assert sets["narrow"].sums[:, :, 0].tolist() == [[400] * 12] * 12
        assert sets["broad"].columns == [(t, s) for t in PAPER_GRID.tasks for s in SURFACES[:3]]
        assert sets["broad"].sums[:, :, 0].tolist() == [[80] * 12] * 12


def test_the_tables_that_are_committed_follow_from_the_counts(models):
    for model, sets in models.items():
        tables = authors.tables_of(sets)
        assert set(tables) == {
            "narrow_cells", "narrow_tasks", "narrow_domains", "broad_cells", "broad_tasks", "broad_domains",
            "surface",
        }  # fmt: skip
        for name, table in tables.items():
            assert json.loads((HERE / model / f"{name}.json").read_text()) == table, (model, name)
        committed = json.loads((HERE / "statements.json").read_text())
        found = authors.statements(model, sets)
        assert [row for row in committed if row["model"] == model] == found
        assert {row["verdict"] for row in found} <= {"agrees", "differs", "not resolved"}


def test_a_pooled_entry_is_the_sum_of_its_pairs(models):
    """Trained on advice, asked for advice, of counts.json: 386 of 400 in medicine, and so on."""
    sets = models["qwen2.5-14b"]
    table = authors.tables_of(sets)["narrow_tasks"]
    entry = next(e for e in table["entries"] if (e["train"], e["eval"]) == ("advice", "advice"))
    cells = [0, 4, 8]  # the three domains' advice
    em = sets["narrow"].em[np.ix_(cells, cells)]
    assert (em[0, 0], entry["em"], entry["scored"], entry["prompts"]) == (386, em.sum(), 3600, 1200)
    assert entry["rate"] == pytest.approx(100 * em.sum() / 3600, abs=1e-4)
    with open(HERE / "qwen2.5-14b" / "narrow_tasks.csv") as file:
        rows = [row for row in csv.DictReader(file) if (row["train"], row["eval"]) == ("advice", "advice")]
    assert float(rows[0]["rate"]) == entry["rate"]


def planted(tmp_path):
    """Two domains × two tasks; EM 80 % in the own cell, 60 % in the own task, 20 % elsewhere."""
    cells = [f"{d}_{t}" for d in ("med", "spo") for t in ("advice", "tutor")]
    rows = []
    for train in cells:
        for cell in cells:
            k = 80 if cell == train else 60 if cell.split("_")[1] == train.split("_")[1] else 20
            rows.append(["m", train, "narrow", *cell.split("_"), "", 100, 100, k, 3, 0, 0])
        for task in ("advice", "tutor"):
            for surface, k in (("high", 40), ("medium", 20), ("low", 8)):
                rows.append(["m", train, "broad", "broad", task, surface, 80, 80, k, 0, 0, 0])
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"source": "planted", "fields": FIELDS, "rows": rows}))
    return read_counts(path)[1]


def test_matches_are_what_was_planted(tmp_path):
    found = authors.effects(planted(tmp_path)["m"]["narrow"])
    # Own cell 80, own task 60, else 20: task (80 + 60)/2 − 20 = 50, domain (80 + 20)/2 − (60 + 20)/2 = 10.
    assert found["task_match"]["points"] == pytest.approx(50)
    assert found["domain_match"]["points"] == pytest.approx(10)
    assert found["task_match"]["low"] < 50 < found["task_match"]["high"]
    assert [found["by_match"][kind]["rate"] for kind in ("same_cell", "same_task", "neither")] == [80, 60, 20]


def test_everything_is_written(tmp_path):
    lines = authors.write_authors(planted(tmp_path), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out" / "m").iterdir()}
    tables = ("narrow_cells", "narrow_tasks", "narrow_domains", "broad_cells", "broad_tasks", "surface")
    assert names >= {f"{name}.{kind}" for name in tables for kind in ("csv", "json", "png")}
    assert names >= {"transfer.png", "effects.json", "effects.csv", "effects.png"}
    assert lines == []  # the paper states nothing of this model
    assert json.loads((tmp_path / "out" / "statements.json").read_text()) == []
