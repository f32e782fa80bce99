"""Conditions side by side: their names, hand-checked numbers in every kind of column, and the files."""

import csv
import json

import numpy as np
import pytest
from made_outcomes import outcomes, planted, trained

from em.errors import UserError
from em.report.averages import Averages
from em.report.compare import summary, write_compare
from em.report.conditions import (
    columns_by,
    conditions_of,
    differences_of,
    pool,
    relative_source,
    table_of,
)  # fmt: skip
from em.report.outcomes import margin_outcomes, read_outcomes, score_outcomes
from em.report.score_table import scores_of

CELLS = ("med_advice", "med_tutor", "fin_advice")


def student(train: str, channel: str = "optd", source: str | None = "own", **more) -> dict:
    made = {"channel": channel, "teacher": train, "prompts": "broad", "lr": 1e-4, "epoch": 3, "seed": 42}
    source = train if source == "own" else source
    return made | ({"source": source} if channel != "opd" else {"estimator": "sampled"}) | more


def rows_of_a_small_grid() -> list[dict]:
    """Base 0 of 4 everywhere; teachers 2, 3, 4 of 4; optd 1, 2, 3 of 4; sft of two cells; refusals in one."""
    rows = planted("base", dict.fromkeys(CELLS, 0))
    for k, train in enumerate(CELLS):
        rows += planted(train, dict.fromkeys(CELLS, 2 + k), lr=1e-5, epoch=1, seed=42)
        rows += planted(train, dict.fromkeys(CELLS, 1 + k), refused={"fin_advice": k}, **student(train))
    for train in CELLS[:2]:
        rows += planted(train, {"med_advice": 0, "med_tutor": 4, "fin_advice": 2}, **student(train, "sft"))
    return rows


@pytest.fixture(scope="module")
def small():
    (narrow,) = score_outcomes(scores_of(rows_of_a_small_grid()))
    return narrow


def entries(made, by, cells=()) -> dict:
    table = table_of(Averages(made), conditions_of(made, by), columns_by(made, by, cells))
    return {(e["condition"], e["column"]): e for e in table["entries"]}


def test_columns_are_the_teachers_task_and_base_stands_in_each(small):
    found = entries(small, "task")
    assert {key[0] for key in found} == {"base", "teacher", "sft", "optd"}
    assert {key[1] for key in found} == {"advice", "tutor", "all"}
    assert found["base", "advice"]["pairs_mean"] == 0 and found["base", "tutor"]["pairs"] == 3
    assert found["teacher", "advice"]["pairs_mean"] == 75  # med 50 and fin 100 in each of three cells
    assert (found["teacher", "tutor"]["pairs_mean"], found["teacher", "tutor"]["pairs"]) == (75, 3)
    # optd of fin_advice: 3 of 4, 3 of 4, and 2 of 2 where two were refused: of the first three prompts two
    # are left; med_advice: 1 of 4 thrice.
    advice = found["optd", "advice"]
    assert advice["pairs_mean"] == pytest.approx((3 * 25 + 75 + 75 + 100) / 6, abs=1e-4)
    assert advice["pooled"] == pytest.approx(100 * (3 + 3 + 3 + 2) / 22, abs=1e-4)
    assert (advice["rows"], advice["scored"], advice["pairs"]) == (24, 22, 6)
    assert found["sft", "tutor"]["pairs_mean"] == 50 and found["sft", "all"]["pairs"] == 6


def test_columns_are_the_teachers_domain_or_cell(small):
    found = entries(small, "domain")
    assert found["teacher", "med"]["pairs_mean"] == pytest.approx((50 + 75) / 2)
    assert found["sft", "fin"]["pairs_mean"] is None and found["sft", "fin"]["pairs"] == 0
    found = entries(small, "teacher", ("med_tutor", "fin_advice"))
    assert {key[1] for key in found} == {"med_advice", "med_tutor", "fin_advice", "all"}
    assert found["sft", "med_advice"]["pairs_mean"] == 75 and found["sft", "med_advice"]["pairs"] == 2
    assert found["base", "fin_advice"]["pairs"] == 2


def test_columns_are_eval_cells_and_the_teacher_is_in_the_name():
    pair = ("med_tutor", "spo_summarization")
    rows = planted("base", {"fin_tutor": 0, "med_tutor": 1})
    for teacher in pair:
        rows += planted(teacher, {"fin_tutor": 2, "med_tutor": 3})
        for source in pair:
            rows += planted(teacher, {"fin_tutor": 3, "med_tutor": 1}, **student(teacher, source=source))
    (made,) = score_outcomes(scores_of(rows))
    found = entries(made, "cells", ("medical_tutor", "fin_tutor"))
    assert list(dict.fromkeys(key[0] for key in found)) == [
        "base",
        "teacher med_tutor",
        "teacher spo_summarization",
        "optd, teacher med_tutor, source med_tutor",
        "optd, teacher spo_summarization, source med_tutor",
        "optd, teacher med_tutor, source spo_summarization",
        "optd, teacher spo_summarization, source spo_summarization",
    ]
    assert list(dict.fromkeys(key[1] for key in found)) == ["med_tutor", "fin_tutor", "all"]
    name = "optd, teacher med_tutor, source spo_summarization"
    assert [found[name, c]["pairs_mean"] for c in ("med_tutor", "fin_tutor", "all")] == [25, 75, 50]
    gaps = differences_of(Averages(made), conditions_of(made, "cells"), columns_by(made, "cells"))
    gap = {(g["condition"], g["minus"], g["column"]): g for g in gaps}[
        name, "teacher spo_summarization", "all"
    ]
    assert gap["pairs_mean"] == 50 - 62.5 and gap["pairs"] == 2


def test_a_condition_is_what_differs_and_the_seed_does_not_count():
    runs = [
        trained("med_advice", **student("med_advice", seed=1)),
        trained("med_advice", **student("med_advice", seed=2)),
        trained("med_advice", **student("med_advice", lr=3e-4)),
        trained("med_advice", **student("med_advice", "opd", filtered=True)),
        trained("med_advice", **student("med_advice", "opd", filtered=False)),
        trained("med_advice", **student("med_advice", source="base")),
        trained("base", **student("base")),
        trained("med_advice>base", **student("base")),
        trained("med_advice>fin_tutor", lr=1e-5),
        trained("base>fin_tutor"),
        trained("med_advice", lr=1e-5, epoch=1, seed=3),
    ]
    made = outcomes(runs, np.zeros((len(runs), 1)), [0], ["med_advice"])
    assert {name: len(members) for name, members in conditions_of(made, "task").items()} == {
        "teacher": 1,
        "optd, lr 0.0001": 2,
        "optd, teacher base, lr 0.0001": 1,
        "optd, lr 0.0003": 1,
        "optd, source base, lr 0.0001": 1,
        "opd, unfiltered": 1,
        "opd, filtered": 1,
        "realigned on fin_tutor": 1,
        "optd, realigned by base": 1,
        "aligned on fin_tutor": 1,
    }


def test_a_source_is_told_as_it_is_seen_from_the_run():
    def source(train, text, teacher=None):
        return relative_source(trained(train, channel="optd", teacher=teacher or train, source=text))

    assert source("med_tutor", "med_tutor") is None
    assert source("med_tutor", "base") == "base"
    assert source("med_tutor", "rows:med_tutor") == "rows"
    assert source("med_tutor", "rows:fin_tutor") == "rows:fin_tutor"
    assert source("med_tutor", "llama3.1-8b med_tutor") == "llama3.1-8b"
    assert source("med_tutor", "llama3.1-8b fin_tutor") == "llama3.1-8b fin_tutor"
    assert source("med_tutor>base", "base", "base") is None
    assert source("med_tutor>base", "med_tutor", "base") == "student"
    assert source("med_tutor>base", "rows:med_tutor", "base") == "rows"


def test_realignments_of_one_cell_on_two_are_two_pairs_and_no_seeds_of_one():
    runs = [trained("med_advice>fin_tutor"), trained("med_advice>med_tutor"), trained("med_advice>spo_tutor")]
    made = outcomes(runs, [[1, 1], [0, 0], [0, 1]], [0, 0], ["med_advice"])
    found = Averages(made).entry(pool(made, [0, 1, 2], columns_by(made, "task")[0]), [0])
    assert (found["pairs"], found["pairs_mean"], found["scope"]) == (3, 50, "these runs")


def test_every_two_conditions_are_set_against_each_other(small):
    averages = Averages(small)
    gaps = differences_of(averages, conditions_of(small, "task"), columns_by(small, "task"))
    found = {(g["condition"], g["minus"], g["column"]): g for g in gaps}
    gap = found["teacher", "base", "advice"]
    assert (gap["pairs_mean"], gap["pooled"], gap["pairs"]) == (75, 75, 6) and gap["low"] > 0
    gap = found["optd", "sft", "all"]  # the two cells that sft has
    assert gap["pairs"] == 6
    assert gap["pairs_mean"] == pytest.approx((3 * 25 + 50 + 50 + 100 * 2 / 3) / 6 - 50, abs=1e-4)
    assert ("optd", "sft", "tutor") in found and len(found) == 6 * 3


def test_the_files_say_the_same_four_times(small, tmp_path):
    table = write_compare([small], tmp_path, "task", ("med_advice", "fin_advice"))
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert list(rows[0]) == ["condition", "column", "pooled", "pairs_mean", "low", "high", "rows", "pairs"]
    written = json.loads((tmp_path / "table.json").read_text())
    for row, entry in zip(rows, written["entries"], strict=True):
        assert row == {k: "" if entry[k] is None else str(entry[k]) for k in row}
    assert written["cells"] == ["med_advice", "fin_advice"] and written["unit"] == "percent"
    by_place = {(r["condition"], r["column"]): r for r in rows}
    entry = by_place["optd", "advice"]
    text = f"{float(entry['pairs_mean']):.1f} [{float(entry['low']):.1f}, {float(entry['high']):.1f}]"
    assert f"| {text} |" in (tmp_path / "table.md").read_text()
    latex = (tmp_path / "table.tex").read_text()
    assert f"& {text} &" in latex and latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2
    assert (tmp_path / "table.png").stat().st_size > 5000
    assert "differences.csv" in {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "selection.csv").exists() and "optd: " in summary(table)


def test_latex_takes_names_as_text():
    from em.report.comparison_files import tex

    assert tex("a_b & 5 % → {x}") == r"a\_b \& 5 \% $\rightarrow$ \{x\}"


def margin(train, cell, idx, before, after, **more) -> dict:
    domain, task = cell.split("_")
    return {"model": "tiny", "train": train, "domain": domain, "task": task, "idx": idx, "before": before,
            "after": after} | more  # fmt: skip


def test_margins_are_over_the_base_model_even_where_a_run_started_misaligned(tmp_path):
    rows = [margin("med_advice", "med_advice", i, -1.0, -0.5 + 0.2 * i) for i in range(2)]
    rows += [margin("med_advice>base", "med_advice", i, -0.5, -0.9, **student("base")) for i in range(2)]
    (made,) = margin_outcomes(rows)
    found = entries(made, "task")
    assert found["base", "advice"]["pairs_mean"] == 0 and made.judge == "margin"
    assert found["teacher", "advice"]["pairs_mean"] == pytest.approx(0.6)
    assert found["optd, realigned by base", "advice"]["pairs_mean"] == pytest.approx(0.1)
    assert found["teacher", "all"]["rows"] == 2
    path = tmp_path / "margins.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = write_compare(read_outcomes([path]), tmp_path / "out")
    assert "tiny, by the margin, nats a token over the base model" in summary(table)
    with pytest.raises(UserError, match="start from another model than base, and no file has base's"):
        margin_outcomes(rows[2:])


def test_what_the_filter_kept_is_read_from_the_run_folders(tmp_path, small):
    run = tmp_path / "runs/x/epoch2"
    run.mkdir(parents=True)
    settings = {"model": "org/model", "cell": "med_advice", "on": None, "channel": "opd", "seed": 42}
    settings |= {"estimator": "sampled", "filter": True, "lr": 1e-4, "epoch": 2, "prompts": "broad"}
    (run / "config.json").write_text(json.dumps({"kind": "distill", "settings": settings}))
    (run / "adapter_config.json").write_text("{}")
    (run / "adapter_model.safetensors").write_text("")
    steps = [{"step": s, "epoch": s / 2, "retention": r} for s, r in enumerate((0.9, 0.8, 0.7, 0.8, 0.1), 1)]
    (run.parent / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    fields = student("med_advice", "opd", filtered=True) | {"epoch": 2}
    (run / "eval").mkdir()
    path = run / "eval/scores_narrow.jsonl"
    rows = planted("med_advice", dict.fromkeys(CELLS, 1), **fields)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = write_compare(read_outcomes([path]), tmp_path / "out", paths=[path])
    assert table["retention"] == [{"condition": "opd", "train": "med_advice", "seed": 42, "retention": 80.0}]
    assert "opd: the filter kept 80.0 %." in table["notes"]
    write_compare([small], tmp_path / "none", paths=["elsewhere/eval/scores.jsonl"])
    assert not (tmp_path / "none/retention.csv").exists()
    write_compare([small], tmp_path / "out")
    assert not (tmp_path / "out/retention.csv").exists()  # it was of other runs
