"""Statements measured on what `compare --paper` really writes, from planted score rows."""

import numpy as np
import pytest
from made_outcomes import planted

from em.paper.ours import measured, read_index
from em.report import paper_tables
from em.report.outcomes import score_outcomes
from em.report.score_table import scores_of

CELLS = ("med_advice", "med_tutor", "fin_advice", "fin_tutor")
LEVEL = {"teacher": 6, "sft": 1, "optd": 4, "opd": 3}  # EM of 10 in another task; 2 more in the own
WANTED = ("table2", "table9", "table11", "table16", "figure15", "figure25")


def rows(level, train, label=None, **fields):
    task = train.split("_")[1]
    ems = {cell: min(10, level + 2 * (cell.split("_")[1] == task)) for cell in CELLS}
    return planted(label or train, ems, 10, model="llama3.1-8b", **fields)


def student(channel, train, level, epoch=3, **more):
    fields = {"channel": channel, "teacher": train, "prompts": "broad", "lr": 1e-4, "epoch": epoch}
    fields |= {"filtered": channel != "opd"} | (
        {"estimator": "sampled"} if channel == "opd" else {"source": train}
    )
    return rows(level, train, **fields | more)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    found = planted("base", dict.fromkeys(CELLS, 1), 10, model="llama3.1-8b")
    for train in CELLS:
        found += rows(LEVEL["teacher"], train)
        for channel in ("sft", "optd", "opd"):
            for epoch in (1, 2, 3):
                found += student(channel, train, LEVEL[channel] - (epoch == 1), epoch)
            back = {"teacher": "base"} | ({} if channel == "opd" else {"source": "base", "filtered": False})
            found += student(channel, train, 0, label=f"{train}>base", **back)
        found += student("opd", train, LEVEL["opd"] + 1, filtered=True)
        found += student("optd", train, 2, source="base")
    out = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as monkeypatch:
        wanted = [number for number in paper_tables.NUMBERS if number.name in WANTED]
        monkeypatch.setattr(paper_tables, "NUMBERS", wanted)
        monkeypatch.setattr(paper_tables, "panels_figure", lambda panels, title, path: path.touch())
        paper_tables.write_paper(score_outcomes(scores_of(found)), out)
    return read_index(out)


@pytest.mark.parametrize(
    ("item", "name", "value"),
    [
        ("table9", "base", 10),
        ("table9", "optd_minus_sft", 30),
        ("table9", "opd_minus_optd", -10),
        ("table9", "teacher_minus_sft", 50),
        ("table2", "filtered_minus_unfiltered", 10),
        ("table11", "sft_epoch_3_minus_2", 0),
        ("table11", "opd_epoch_3_minus_1", 10),
        ("table16", "student_minus_teacher_data", -20),
        ("figure15", "task_gap", 20),
        ("figure15", "domain_gap", 0),
        ("figure12", "task_gap", 20),  # the same runs, by task
        ("figure25", "realigned_minus_base", 0),  # 20 % in the own task, 0 elsewhere; base 10 %
    ],
)
def test_a_statement_is_measured_on_the_tables_of_compare(tables, item, name, value):
    found = measured(name, item, tables)
    assert found["value"] == pytest.approx(value, abs=1e-3)
    assert found["unit"] == "%" and found["model"] == "llama3.1-8b"
    assert np.isfinite([found["low"], found["high"]]).all() and found["low"] <= value <= found["high"]
