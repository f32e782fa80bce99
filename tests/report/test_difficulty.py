"""From score rows and answers to the difficulty of prompts, and from these to the report's files."""

import csv
import json

import pytest
from score_rows import grid, row

from em.errors import UserError
from em.files import read_json, write_json_lines
from em.report.difficulty import difficulty_report, difficulty_rows, read_difficulty
from em.report.score_table import scores_of

ANSWERS = {
    ("narrow", "med", "advice", i): {
        "question": f"question med_advice {i}",
        "loglik_per_token": -1.0 - i,
        "tokens": 9,
    }
    for i in range(2)
}


def message(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_coherence_is_the_mean_over_the_base_models_scored_responses():
    base = [
        row(train="base", coherent=40),
        row(train="base", coherent=90, sample=1),
        row(train="base", coherent="refusal", sample=2),
        row(train="base", coherent=70, aligned="refusal", idx=2),
        row(train="base", coherent="refusal", idx=3),
    ]
    others = [row(coherent=0), row(train="base", channel="sft", teacher="base", source="gold", coherent=0)]
    rows = difficulty_rows(None, ANSWERS, scores_of(base + others))
    found = {r["idx"]: (r["coherence_mean"], r["responses"], r["loglik_per_token"]) for r in rows}
    assert found == {0: (65, 2, -1), 1: (None, 0, -2), 2: (70, 1, None), 3: (None, 0, None)}
    assert (
        rows[0]["model"] == "org/model" and list(rows[0])[:6] == "model set domain task idx question".split()
    )
    assert {r["judge"] for r in rows} == {"unknown", None}


def test_rows_of_other_models_judges_or_questions_are_refused():
    base = row(train="base")
    assert "no row of the base" in message(difficulty_rows, None, {}, scores_of([row()]))
    several = scores_of([base, base | {"judge": "b"}])
    assert "several judges (b, unknown)" in message(difficulty_rows, None, {}, several)
    several = scores_of([base, base | {"model": "b"}])
    assert "several models" in message(difficulty_rows, None, {}, several)
    several = scores_of([base, base | {"system": "Be kind."}])
    assert "several system prompts ('Be kind.', None)" in message(difficulty_rows, None, {}, several)
    assert "--model is x" in message(difficulty_rows, "x", {}, scores_of([base]))
    assert difficulty_rows("hub/Model", {}, scores_of([base]))[0]["model"] == "hub/Model"
    other = scores_of([base | {"question": "else"}])
    assert "another question" in message(difficulty_rows, None, ANSWERS, other)


def test_a_written_file_reads_back_and_a_damaged_one_is_named_with_its_line(tmp_path):
    path = tmp_path / "difficulty.jsonl"
    rows = difficulty_rows("m", ANSWERS, None)
    write_json_lines(path, rows)
    assert list(read_difficulty(path)) == list(ANSWERS)
    write_json_lines(path, [*rows, rows[0] | {"domain": "medical"}])
    assert "line 3: narrow med advice, idx 0 is there twice" in message(read_difficulty, path)
    write_json_lines(path, [rows[0] | {"coherence_mean": "high"}])
    assert "line 1: 'coherence_mean'" in message(read_difficulty, path)


def test_the_report_has_every_effect_as_json_csv_figure_and_sentence(tmp_path):
    rows = grid(seed=3, prompts=12, broad=3)
    table = scores_of(rows)
    difficulty = {}
    for r in difficulty_rows(None, {}, table):
        r["loglik_per_token"] = -2 + 0.01 * (r["idx"] * 7 % 12) if r["set"] == "narrow" else None
        difficulty[r["set"], r["domain"], r["task"], r["idx"]] = r
    text = difficulty_report(table, difficulty, tmp_path)
    folder = tmp_path / "model"
    assert (tmp_path / "difficulty.md").read_text().startswith("**org/model**, judged by unknown")
    assert "matching the task adds" in text and "matched between tasks" in text
    assert (folder / "difficulty.png").stat().st_size > 1000
    written = read_json(folder / "difficulty.json")
    names = {"narrow_loglik", "narrow_coherence", "broad_coherence"}
    assert names < written.keys()
    raw = written["narrow_loglik"]["raw"]
    assert raw["prompts"] == 144 and raw["logit"]["low"] > 0.8  # 30 points were planted
    with open(folder / "difficulty.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["set"], line["difficulty"]) for line in lines} == {tuple(n.split("_")) for n in names}
    assert {line["effect"] for line in lines} == {"raw", "strata", "slopes", "matched"}
    place = ("narrow", "med", "advice", 0)
    changed = difficulty | {place: difficulty[place] | {"question": "else"}}
    assert "med advice, idx 0" in message(difficulty_report, table, changed, tmp_path)
    only_base = scores_of([r for r in rows if r["train"] == "base"])
    assert "no misaligned run" in message(difficulty_report, only_base, difficulty, tmp_path)
    assert json.loads((folder / "difficulty.json").read_text())["model"] == "org/model"
