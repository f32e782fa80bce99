"""evaluate.py compare as a command: what it leaves, and what it refuses in one line."""

import csv
import json

import pytest
from made_outcomes import planted

import evaluate
from em.cli import command_line

CELLS = ("med_advice", "fin_tutor")


def compare(*arguments) -> int:
    return command_line(evaluate.COMMANDS, argv=["compare", *map(str, arguments)])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def scores(tmp_path):
    rows = planted("base", dict.fromkeys(CELLS, 0))
    for train in CELLS:
        rows += planted(train, dict.fromkeys(CELLS, 3))
    return write(tmp_path / "scores.jsonl", rows)


def test_two_files_give_one_table(scores, tmp_path, capsys):
    made = {"channel": "sft", "teacher": "med_advice", "source": "med_advice"}
    more = write(tmp_path / "more.jsonl", planted("med_advice", {"med_advice": 1, "fin_tutor": 2}, **made))
    out = tmp_path / "out"
    assert compare("--scores", scores, more, "--out", out, "--columns", "cells", "--cells", *CELLS) == 0
    rows = {(r["condition"], r["column"]): r for r in csv.DictReader((out / "table.csv").open())}
    assert (
        rows["sft", "fin_tutor"]["pairs_mean"] == "50.0" and rows["teacher fin_tutor", "all"]["pairs"] == "2"
    )
    assert "sft: 37.50" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--scores needs at least one file"),
        (["--scores", "{scores}", "--columns", "rows"], "invalid choice: 'rows'"),
        (
            ["--scores", "{scores}", "--cells", "spo_tutor"],
            "no row asks that cell; asked are med_advice, fin_tutor",
        ),
        (["--scores", "{scores}", "--cells", "nonsense"], "unknown cell 'nonsense'"),
        (["--scores", "{scores}", "--paper", "--cells", "med_advice"], "--paper has the paper's own columns"),
        (
            ["--scores", "{scores}", "--model", "other"],
            "--model other: the files have none; they have org/model",
        ),
        (["--scores", "{scores}", "{model}"], "several models; name one: --model else/two or org/model"),
        (["--scores", "{scores}", "{judge}"], "several judges; name one: --judge gpt or unknown"),
        (["--scores", "{scores}", "{judge}", "--paper"], "several judges; name one: --judge gpt or unknown"),
        (["--scores", "{broad}"], "no narrow rows"),
        (["--scores", "{scores}", "--out", "{scores}"], "is a file; choose another --out"),
        (["--scores", "{folder}/none.jsonl"], "none.jsonl does not exist"),
    ],
)
def test_what_cannot_be_compared_ends_in_one_line(arguments, message, scores, tmp_path, capsys):
    rows = planted("base", {"med_advice": 0})
    names = {"scores": scores, "folder": tmp_path}
    for name, more in (
        ("model", {"model": "else/two"}),
        ("judge", {"judge": "gpt"}),
        ("broad", {"set": "broad"}),
    ):
        names[name] = write(tmp_path / f"{name}.jsonl", [row | more for row in rows])
    out = [] if "--out" in arguments else ["--out", tmp_path / "out"]
    assert compare(*[a.format(**names) for a in arguments], *out) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_choice_of_judge_makes_two_comparable(scores, tmp_path):
    judged = write(tmp_path / "gpt.jsonl", [r | {"judge": "gpt"} for r in planted("base", {"med_advice": 2})])
    assert compare("--scores", scores, judged, "--judge", "gpt", "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out/table.json").read_text())
    assert found["judge"] == "gpt" and found["conditions"] == ["base"]
