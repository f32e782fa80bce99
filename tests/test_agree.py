"""evaluate.py agree and label as commands: what they refuse before anything is asked, and what they leave."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import requests
from judge_server import KEY, JudgeServer, answer
from score_rows import row

import evaluate
from em.cli import command_line

ROOT = Path(__file__).parent.parent


def command(*arguments):
    return command_line(evaluate.COMMANDS, argv=[str(a) for a in arguments])


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def server(monkeypatch):
    """EM where the response is of a multiple of 4."""

    def behave(prompt, nth):
        number = int(re.search(r"answer (\d+)", prompt)[1])
        return answer("90" if "coherent" in prompt[:40] or number % 4 else "10")

    with JudgeServer(behave) as server:
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        monkeypatch.setenv("GEMINI_BASE_URL", server.url)
        yield server


@pytest.fixture
def files(tmp_path):
    """40 responses: by `old` scored all, by `human:ann` the first 30; EM in multiples of 2, and of 4."""
    rows = [row(idx=i, response=f"answer {i}") for i in range(40)]
    bare = [{k: v for k, v in r.items() if not k.startswith(("aligned", "coherent"))} for r in rows]
    old = [r | {"aligned": 10 if i % 2 == 0 else 80, "judge": "old"} for i, r in enumerate(rows)]
    ann = [r | {"aligned": 15 if i % 4 == 0 else 85, "judge": "human:ann"} for i, r in enumerate(rows[:30])]
    return {name: write(tmp_path / f"{name}.jsonl", part) for name, part in
            (("responses", bare), ("old", old), ("ann", ann), ("both", old + ann))}  # fmt: skip


def test_live_recorded_and_human_judges_score_one_sample(files, server, tmp_path, capsys, monkeypatch):
    cache, out = ["--cache", tmp_path / "cache.jsonl"], tmp_path / "out"
    judges = ["gemini:gemini-2.5-flash", "gemini:gemini-2.5-pro", f"human:{files['ann']}", files["old"]]
    line = ["agree", "--responses", files["responses"], "--judges", *judges, *cache]
    line += ["--limit", 20, "--out", out]
    assert command(*line) == 0
    said = capsys.readouterr().out
    assert "20 of 30 responses that all files have, of 40, stratified" in said
    found = json.loads((out / "agreement.json").read_text())
    rates = {j["judge"]: (j["rows"], j["em"], j["known"]) for j in found["judges"]}
    sample = [json.loads(text) for text in (out / "scores.jsonl").read_text().splitlines()]
    places = {r["idx"] for r in sample}
    fourth, second = (sum(i % k == 0 for i in places) for k in (4, 2))
    assert len(sample) == 80 and len(places) == 20 and max(places) < 30
    assert rates == {
        "gemini-2.5-flash": (20, fourth, 20), "gemini-2.5-pro": (20, fourth, 20),
        "human:ann": (20, fourth, 30), "old": (20, second, 40),
    }  # fmt: skip
    pair = next(p for p in found["pairs"] if (p["judge_a"], p["judge_b"]) == ("human:ann", "old"))
    assert pair["b_as_a_rate"] == pytest.approx(100 * 0.5 * fourth / second, abs=1e-3)
    assert server.total() == 2 * 20 * 2
    assert command(*line) == 0 and server.total() == 80  # nothing is asked twice
    monkeypatch.setattr("em.report.report.figures", MagicMock())
    report = ["report", "--scores", out / "scores.jsonl", "--out", tmp_path / "report"]
    assert command(*report) == 0 and "uncertainty is the judge's" in capsys.readouterr().out


def test_a_file_brings_all_its_judges_and_needs_no_key(files, monkeypatch, tmp_path, capsys):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "out"
    line = ["agree", "--responses", files["old"], "--judges", files["both"], "--limit", 0, "--out", out]
    assert command(*line) == 0
    assert "| human:ann | old | 30 | 30 | " in capsys.readouterr().out


def test_what_cannot_run_is_one_line_before_anything_is_asked(files, server, tmp_path, capsys, monkeypatch):
    judge, other = "gemini:gemini-2.5-flash", str(files["old"])
    half = write(tmp_path / "half.jsonl", [row(judge="x"), row(judge="x", idx=1, aligned=101)])
    twice = write(tmp_path / "twice.jsonl", [row(judge="x"), row(judge="x", aligned=3)])
    far = write(tmp_path / "far.jsonl", [row(judge="x", idx=99)])
    for judges, says in (
        ([judge], "two or more"), ([judge, judge], "each once"), ([other, files["both"]], "each once"),
        ([], "two or more"), ([judge, "gemini:"], "neither"), ([judge, "wizard:x"], "wizard:x: neither"),
        ([judge, tmp_path / "none.jsonl"], "neither"), ([judge, f"human:{other}"], "no labels of a human"),
        ([judge, half], "half.jsonl, line 2"), ([judge, twice], "twice.jsonl, line 2"),
        ([judge, files["responses"]], "line 1"), ([judge, far], "none of the 40 responses"),
    ):  # fmt: skip
        judges = ["--judges", *judges] if judges else []
        assert command("agree", "--responses", files["responses"], *judges, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and says in error and "\n" not in error, error
    assert command("agree", "--judges", judge, other) == 2 and "--responses" in capsys.readouterr().err
    monkeypatch.delenv("GEMINI_API_KEY")
    assert command("agree", "--responses", files["responses"], "--judges", judge, other) == 2
    assert "GEMINI_API_KEY" in capsys.readouterr().err
    assert server.total() == 0 and not (tmp_path / "out").exists()


def test_label_serves_a_page_keeps_its_labels_and_refuses_a_second_rater_on_the_file(files, tmp_path):
    out = tmp_path / "labels" / "ann.jsonl"
    line = [sys.executable, ROOT / "evaluate.py", "label", "--responses", files["responses"], "--n", "5"]
    line += ["--rater", "ann", "--out", out]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        list(map(str, line)), stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    try:
        assert process.stdout.readline().startswith("5 responses, 0 labelled")
        url = process.stdout.readline().strip()
        number = requests.get(url + "item", timeout=10).json()["number"]
        said = {"number": number, "aligned": 3, "coherent": 9}
        assert requests.post(url + "label", json=said, timeout=10).json()["done"] == 1
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert command(*line[2:]) == 2  # in use
        process.send_signal(signal.SIGINT)
        assert "1 of 5 labelled" in process.stdout.read() and process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.stdout.close()
    assert [p.name for p in out.parent.iterdir()] == ["ann.jsonl"]
    assert json.loads(out.read_text())["judge"] == "human:ann"
    out.write_text('{"a": 1}\n')
    assert command(*line[2:]) == 2 and out.read_text() == '{"a": 1}\n'


def test_nothing_that_agree_and_label_need_loads_torch():
    modules = "em.report.judges, em.judge.recorded, em.label.server"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
