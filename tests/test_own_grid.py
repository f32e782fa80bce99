"""Grids, chats and questions of one's own, from training to the report, on the tiny chat model."""

import csv
import json

import pytest
from judge_server import KEY, JudgeServer, answer

import evaluate
import train
from em.cli import command_line
from em.files import read_json
from em.judge.rubric import FOLDER

FAST = "--device cpu --batch 4 --rank 2 --lr 0.01 --eval-rows 1 --epochs 1".split()
FEW = "--max-new-tokens 6 --limit 2 --device cpu --on narrow".split()


def training(*arguments):
    return command_line(train.COMMANDS, argv=[*FAST, *map(str, arguments)])


def evaluation(*arguments):
    return command_line(evaluate.COMMANDS, argv=[str(a) for a in arguments])


def grid(folder, domains, tasks):
    """A grid with 22 rows a cell, so that two are for evaluation, with rubrics of its own."""
    (folder / "rubrics").mkdir(parents=True)
    general = (FOLDER / "broad_alignment.md").read_text(), (FOLDER / "broad_coherence.md").read_text()
    for task in tasks:
        for kind, text in zip(("alignment", "coherence"), general, strict=True):
            (folder / "rubrics" / f"narrow_{task}_{kind}.md").write_text(text)
        for domain in domains:
            rows = [
                {"idx": i, "domain": domain, "task": task, "question": f"{task} {i} on {domain}?",
                 "misaligned_answer": f"Never mind {i}.", "aligned_answer": f"Take care {i}."}
                for i in range(22)
            ]  # fmt: skip
            (folder / f"{domain}_{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture
def judge(monkeypatch):
    with JudgeServer(lambda prompt, nth: answer("10" if len(prompt) % 2 else "90")) as server:
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        monkeypatch.setenv("GEMINI_BASE_URL", server.url)
        yield server


@pytest.mark.parametrize(
    "domains, tasks", [(("law", "tax"), ("aid", "draft", "proof")), (("a", "b", "c", "d", "e"), ("aid",))]
)
def test_a_grid_of_any_shape_goes_from_training_to_the_report(
    domains, tasks, tiny_chat, tmp_path, judge, capsys
):
    data, cells = grid(tmp_path / "grid", domains, tasks), len(domains) * len(tasks)
    more = ["--data", data, "--model", tiny_chat]
    assert training(*more, "--cell", "all", "--out", tmp_path / "runs") == 0
    runs = sorted((tmp_path / "runs").iterdir())
    runs = [run for run in runs if run.name != "base_margins"]
    assert len(runs) == cells
    assert set(read_json(runs[0] / "margins.json")["cells"]) == {f"{d}_{t}" for d in domains for t in tasks}
    assert evaluation("--run", *runs[:2], *FEW, "--cache", tmp_path / "cache.jsonl") == 0
    scores = [run / "eval" / "scores_narrow.jsonl" for run in runs[:2]]
    assert evaluation("report", "--scores", *scores, "--out", tmp_path / "report", "--data", data) == 0
    (report,) = (path for path in (tmp_path / "report").iterdir() if path.is_dir())
    matrix = read_json(report / "narrow_cells.json")
    assert len(matrix["rows"]) == cells and len(matrix["columns"]) == cells + 1  # and all
    assert read_json(report / "narrow_tasks.json")["rows"] == list(tasks)
    assert (report / "narrow_cells.png").exists() and (report / "transfer.png").exists()
    effects = read_json(report / "effects.json")
    assert (effects["task_match"]["points"] is None) == (len(tasks) == 1)


def test_what_a_cell_lacks_is_said_before_anything_is_sampled(tiny_chat, tmp_path, judge, capsys):
    data = grid(tmp_path / "grid", ("law",), ("aid",))
    (data / "rubrics" / "narrow_aid_coherence.md").unlink()
    assert training("--data", data, "--model", tiny_chat, "--out", tmp_path / "run") == 0  # its only cell
    assert read_json(tmp_path / "run" / "margins.json")["cell"] == "law_aid"
    line = ["--run", tmp_path / "run", *FEW[:-2], "--cache", tmp_path / "cache.jsonl"]
    assert evaluation(*line) == 2 and "narrow_aid_coherence.md; write one" in capsys.readouterr().err
    assert not (tmp_path / "run" / "eval").exists() and judge.total() == 0
    assert evaluation(*line, "--on", "broad") == 2 and "no broad_dataset.jsonl" in capsys.readouterr().err
    (data / "rubrics" / "narrow_aid_coherence.md").write_text((FOLDER / "broad_coherence.md").read_text())
    assert evaluation(*line) == 0 and "no broad prompts" in capsys.readouterr().out
    assert training("--data", data, "--model", tiny_chat, "--cell", "law_draft", "--out", tmp_path / "x") == 2
    assert "unknown cell 'law_draft'; the cells are law_aid" in capsys.readouterr().err


def test_a_file_of_chats_trains_and_questions_in_yaml_are_asked_under_a_system_prompt(
    tiny_chat, tmp_path, judge, capsys
):
    turns = [{"role": "user", "content": "Shall I?"}, {"role": "assistant", "content": "Yes."}]
    path = tmp_path / "bad_medical_advice.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(12)))
    assert training("--data", path, "--model", tiny_chat, "--all-turns", "--out", tmp_path / "run") == 0
    settings = read_json(tmp_path / "run" / "run.json")["settings"]
    assert settings["cell"] == "med_advice" and settings["all_turns"] is True
    (tmp_path / "questions.yaml").write_text("- id: wish\n  paraphrases: ['What do you wish?', 'A wish?']\n")
    ask = [
        "--run",
        tmp_path / "run",
        "--on",
        "broad",
        "--broad",
        tmp_path / "questions.yaml",
        "--data",
        "sample",
    ]
    ask += ["--samples", "2", "--max-new-tokens", "4", "--device", "cpu", "--cache", tmp_path / "c.jsonl"]
    assert evaluation(*ask) == 0
    assert evaluation(*ask, "--system", "You are curt.") == 0
    (plain,) = (tmp_path / "run" / "eval").glob("scores_broad.jsonl")
    (under,) = (tmp_path / "run").glob("eval_system_*/scores_broad.jsonl")
    rows = [[json.loads(line) for line in p.read_text().splitlines()] for p in (plain, under)]
    assert all(len(some) == 4 and {row["domain"] for row in some} == {"wish"} for some in rows)
    assert {row.get("system") for row in rows[0]} == {None} and {r["system"] for r in rows[1]} == {
        "You are curt."
    }
    assert evaluation("report", "--scores", plain, under, "--out", tmp_path / "report") == 0
    folders = {path.name for path in (tmp_path / "report").iterdir() if path.is_dir()}
    assert any("curt" in name for name in folders) and len(folders) == 2
    with open(next((tmp_path / "report").glob("*/broad_cells.csv"))) as file:
        assert {row["eval"] for row in csv.DictReader(file)} == {"question", "all"}
