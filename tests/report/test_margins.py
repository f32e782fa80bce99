"""The margin matrix: rows in, mean changes with intervals out."""

import csv

import pytest

from em.errors import UserError
from em.files import read_json
from em.report.margins import margin_report, read_margins


def row(train: str, cell: str, idx: int, before: float, after: float, model: str = "a/Tiny") -> dict:
    domain, task = cell.split("_")
    return {
        "model": model, "train": train, "domain": domain, "task": task, "idx": idx, "before": before,
        "after": after,
    }  # fmt: skip


def test_two_rows_have_the_interval_of_student_t_not_of_a_normal(tmp_path):
    """The two rows of results/sample_grid on med_advice, 0.916 ± 0.1125, for which 1.96 gave [0.70, 1.14]."""
    changes = (0.9160 - 0.1125, 0.9160 + 0.1125)
    rows = [row("med_advice", "med_advice", i, -0.5, -0.5 + change) for i, change in enumerate(changes)]
    rows += [row("med_advice", "fin_tutor", 0, 0.1, 0.4)]
    text = margin_report(rows, tmp_path)
    assert "+0.916 in the trained cell and +0.300 elsewhere" in text
    written = read_json(tmp_path / "tiny" / "margin_matrix.json")
    own, other = written["entries"]
    assert (written["model"], own["train"], own["eval"], own["n"]) == (
        "a/Tiny",
        "med_advice",
        "med_advice",
        2,
    )
    assert (own["mean"], own["low"], own["high"]) == pytest.approx((0.916, -0.513, 2.345), abs=1e-3)
    assert (other["eval"], other["low"], other["high"], other["n"]) == ("fin_tutor", None, None, 1)
    with open(tmp_path / "tiny" / "margin_matrix.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["mean"]) for line in lines] == pytest.approx([0.916, 0.3])
    assert lines[1]["low"] == "" and (tmp_path / "tiny" / "margin_matrix.png").exists()


def test_trains_come_in_the_grids_order_and_each_model_has_a_folder(tmp_path):
    rows = [row(train, "spo_tutor", 0, 0, 1) for train in ("base", "fin_tutor", "med_advice")]
    margin_report(rows + [row("med_advice", "med_advice", 0, 0, 1, model="other")], tmp_path)
    entries = read_json(tmp_path / "tiny" / "margin_matrix.json")["entries"]
    assert [entry["train"] for entry in entries] == ["med_advice", "fin_tutor", "base"]
    assert [e["eval"] for e in read_json(tmp_path / "other" / "margin_matrix.json")["entries"]] == [
        "med_advice"
    ]


def test_a_malformed_margin_row_is_named_with_its_line(tmp_path):
    path = tmp_path / "margins.jsonl"
    path.write_text('{"model": "a"}\n')
    with pytest.raises(UserError, match="line 1: no field .train.; there should be model, train, domain"):
        read_margins([path])
