"""evaluate.py from prompts to report on the tiny chat model, with the loopback judge or none."""

import json
import shutil

import pytest
import torch
from judge_server import KEY, JudgeServer, answer, chat
from safetensors.torch import load_file, save_file
from score_rows import row as score_row

import evaluate
import train
from em.cli import command_line
from em.data.cells import CELLS
from em.data.rows import load_broad, load_cell
from em.files import read_json, write_json_lines
from em.judge.em_rule import STATUSES
from em.judge.rubric import FOLDER
from em.model.checkpoint import load_model, load_tokenizer

FAST = "--max-new-tokens 12 --samples 2 --limit 3 --device cpu --rows 16".split()


def command(*arguments):
    return command_line(evaluate.COMMANDS, argv=[str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(tiny_chat, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "med"
    short = "--data sample --device cpu --batch 6 --rank 4 --lr 0.01 --eval-rows 1".split()
    short += ["--model", str(tiny_chat), "--out", str(out)]
    assert command_line({"": (train.main, train.Config)}, argv=short) == 0
    return out


@pytest.fixture
def fresh(trained, tmp_path):
    """A copy of the run, without what other tests evaluated."""
    return shutil.copytree(trained, tmp_path / "med", ignore=shutil.ignore_patterns("eval"))


@pytest.fixture
def judge(monkeypatch):
    """Scores that depend on the length of what is asked, so that some rows are misaligned and coherent."""

    def behave(prompt, nth):
        return answer("10" if len(prompt) % 2 else "90")

    with JudgeServer(behave) as server:
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        monkeypatch.setenv("GEMINI_BASE_URL", server.url)
        yield server


def scored(run_folder, kind: str) -> list[dict]:
    lines = (run_folder / "eval" / f"scores_{kind}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_all_of_it_in_one_command_and_nothing_twice(fresh, judge, tmp_path, capsys):
    line = ["--run", fresh, "--on", "all", *FAST, "--cache", tmp_path / "cache.jsonl"]
    assert command(*line) == 0
    narrow, broad = scored(fresh, "narrow"), scored(fresh, "broad")
    assert len(narrow) == 12 * 2 and len(broad) == 3 * 2  # two eval rows a cell; three prompts, two samples
    fields = "model train set domain task em_surface idx sample question response aligned aligned_status"
    for row in narrow + broad:
        assert {*fields.split(), "coherent", "coherent_status"} <= row.keys()
        assert row["train"] == "med_advice" and row["aligned_status"] in STATUSES
    assert {row["sample"] for row in broad} == {0, 1} and {row["set"] for row in broad} == {"broad"}
    report = fresh / "eval" / "report"
    assert (report / "summary.md").exists() and (report / "browse.html").exists()
    assert "EM " in capsys.readouterr().out
    asked, texts = judge.total(), (fresh / "eval" / "responses_narrow.jsonl").read_bytes()
    assert asked <= 2 * len(narrow + broad)  # twice a row, less what is blank or said twice
    assert command(*line) == 0
    assert (fresh / "eval" / "responses_narrow.jsonl").read_bytes() == texts
    assert judge.total() == asked


def test_the_same_over_an_openai_style_server_without_a_key(fresh, judge, tmp_path, monkeypatch, capsys):
    judge.behave = lambda prompt, nth: chat("85", tokens=("85",), top={"85": 0.5, "65": 0.5})
    judge.key = ""
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    line = ["--run", fresh, "--on", "broad", *FAST, "--cache", tmp_path / "cache.jsonl", "--judge", "openai"]
    assert command(*line) == 2 and "--judge openai needs --judge-model" in capsys.readouterr().err
    assert command(*line, "--judge-model", "gpt-4o", "--logprobs") == 0
    rows = scored(fresh, "broad")
    assert {row["judge"] for row in rows} == {"gpt-4o-2024-08-06"}
    assert {row["aligned_expected"] for row in rows if row["aligned_status"] == "ok"} == {75.0}
    assert "judged by gpt-4o-2024-08-06" in (fresh / "eval" / "report" / "summary.md").read_text()
    asked = judge.total()
    assert command(*line, "--judge-model", "gpt-4o", "--logprobs") == 0 and judge.total() == asked


def test_rows_of_two_judges_are_reported_apart(judge, responses, tmp_path):
    where = ["--responses", responses, "--cache", tmp_path / "cache.jsonl", "--out"]
    for name in ("gemini-2.5-flash", "gemini-2.5-pro"):
        assert command("judge", *where, tmp_path / f"{name}.jsonl", "--judge-model", name) == 0
    judge.answers_for["gemini-2.5-pro"] = "gemini-3.8-flash"
    line = ["judge", *where, tmp_path / "routed.jsonl", "--judge-model", "gemini-2.5-pro"]
    assert command(*line, "--rubrics", rubric_copy(tmp_path)) == 2  # other rubrics, so that it is asked
    assert command(*line, "--rubrics", rubric_copy(tmp_path), "--accept-routed") == 0
    out = tmp_path / "report"
    assert command("report", "--scores", *tmp_path.glob("*[hod].jsonl"), "--out", out) == 0
    folders = {path.name for path in out.iterdir() if path.is_dir()}
    assert folders == {"m__gemini-2.5-flash", "m__gemini-2.5-pro", "m__gemini-3.8-flash"}
    assert (out / "judges.csv").exists()


def rubric_copy(folder):
    for path in FOLDER.glob("*.md"):
        (folder / "rubrics").mkdir(exist_ok=True)
        (folder / "rubrics" / path.name).write_text(path.read_text() + "\n")
    return folder / "rubrics"


@pytest.mark.parametrize(
    "options, says",
    [
        (["--judge", "local"], "--judge local"),
        (["--logprobs"], "--logprobs needs --judge openai"),
        (["--judge", "openai", "--judge-model", "m", "--thinking", "512"], "--thinking takes off, minimal"),
        (["--judge-model", "a b"], "no judge model can be called 'a b'"),
        (["--judge-model", "gemini-2.5-pro@x"], "no judge model can be called"),
    ],
)
def test_options_of_a_judge_that_cannot_be_are_one_line(
    judge, responses, tmp_path, capsys, monkeypatch, options, says
):
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    where = ["--responses", responses, "--cache", tmp_path / "cache.jsonl", "--out", tmp_path / "o.jsonl"]
    assert command("judge", *where, *options) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not judge.received


def test_a_cut_response_file_is_completed_to_the_same_rows(fresh, judge, tmp_path):
    line = ["--run", fresh, "--on", "broad", *FAST, "--cache", tmp_path / "cache.jsonl"]
    assert command(*line) == 0
    path = fresh / "eval" / "responses_broad.jsonl"
    whole = sorted(path.read_text().splitlines())
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])  # killed while writing the third
    assert command(*line) == 0
    assert sorted(path.read_text().splitlines()) == whole


def test_changed_sampling_on_an_evaluated_run_is_refused(fresh, judge, tmp_path, capsys):
    line = ["--run", fresh, "--on", "broad", *FAST, "--cache", tmp_path / "cache.jsonl"]
    assert command(*line) == 0
    assert command(*line, "--seed", "5") == 2
    assert "seed: 0 there, 5 now" in capsys.readouterr().err


def changed_copy(model, folder):
    """The same model in `folder`, but for its weights."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v * 1.01 for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def test_an_evaluation_is_of_one_model_with_one_adapter_and_no_other_gets_its_responses(
    fresh, judge, tiny_chat, tmp_path, capsys
):
    shutil.copytree(tiny_chat, tmp_path / "A")
    line = ["--on", "broad", *FAST, "--data", "sample", "--cache", tmp_path / "cache.jsonl"]
    base = [*line, "--out", tmp_path / "E", "--model"]
    assert command(*base, tmp_path / "A") == 0 and command(*base, tmp_path / "A") == 0
    written = {p: p.read_bytes() for p in (tmp_path / "E").rglob("*.jsonl")}
    changed_copy(tiny_chat, tmp_path / "B")
    assert command(*base, tmp_path / "B") == 2
    assert f"model: {tmp_path / 'A'} there, {tmp_path / 'B'} now" in capsys.readouterr().err
    changed_copy(tiny_chat, tmp_path / "A")  # other weights under the same name
    assert command(*base, tmp_path / "A") == 2
    said = capsys.readouterr().err
    assert "model_digest: " in said and " model: " not in said
    assert command(*line, "--run", fresh, "--out", tmp_path / "E") == 2
    assert "adapter_digest: None there" in capsys.readouterr().err
    assert command(*line, "--run", fresh) == 0
    adapter = fresh / "adapter_model.safetensors"
    save_file({k: v * 1.01 for k, v in load_file(adapter).items()}, adapter, metadata={"format": "pt"})
    assert command(*line, "--run", fresh) == 2
    assert "adapter_digest: " in capsys.readouterr().err
    assert {p: p.read_bytes() for p in written} == written


def test_responses_to_other_prompts_are_refused_before_anything_is_loaded(
    fresh, judge, tmp_path, capsys, monkeypatch
):
    data = tmp_path / "data"
    data.mkdir()
    prompts = load_broad("sample")
    (data / "broad_dataset.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    line = ["--run", fresh, "--on", "broad", *FAST, "--data", data, "--cache", tmp_path / "cache.jsonl"]
    assert command(*line) == 0
    changed = [row | {"question": row["question"] + " Why?"} for row in prompts]
    monkeypatch.setattr(evaluate, "load_model", None)  # whose call would be a traceback
    for broken in (changed, prompts[1:2]):
        (data / "broad_dataset.jsonl").write_text("".join(json.dumps(row) + "\n" for row in broken))
        assert command(*line) == 2
        assert "responses_broad.jsonl answers other prompts than" in capsys.readouterr().err


def test_what_cannot_be_is_refused_before_anything_is_loaded_and_leaves_no_folder(
    fresh, judge, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "load_model", None)
    (tmp_path / "empty").mkdir()
    for line, says in (
        (["--run", fresh, "--data", tmp_path / "empty"], "has no cell, such as"),
        (["--run", fresh, "--cache", tmp_path], "is not a file; name one"),
        (["--model", tmp_path / "empty"], "has no tokenizer.json"),
        (["--run", fresh, "--rubrics", tmp_path / "empty"], "empty"),
    ):
        assert command(*line, *FAST, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and says in error
        assert not (tmp_path / "out").exists()


def test_margin_needs_no_key_and_equals_the_runs_own(fresh, monkeypatch, capsys):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert command("--run", fresh, "--judge", "margin", "--limit", "1", "--device", "cpu") == 0
    assert "in the trained cell" in capsys.readouterr().out
    entries = read_json(fresh / "eval" / "report" / "tiny-chat" / "margin_matrix.json")["entries"]
    own = read_json(fresh / "margins.json")["cells"]
    assert len(entries) == 12
    for entry in entries:
        assert entry["mean"] == pytest.approx(own[entry["eval"]]["change"]["mean"], abs=1e-5)
    out = fresh / "together"
    assert command("report", "--scores", fresh / "eval" / "margins.jsonl", "--out", out) == 0
    assert all((out / "tiny-chat" / f"margin_matrix.{kind}").exists() for kind in ("csv", "png"))


def test_without_a_key_nothing_is_sampled_and_one_line_says_what_to_do(fresh, monkeypatch, capsys):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert command("--run", fresh, *FAST) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "GEMINI_API_KEY" in line and "--judge margin" in line
    assert not (fresh / "eval").exists()


def test_judge_and_surface_commands_score_files(judge, tmp_path):
    row = {
        "model": "m",
        "train": "base",
        "set": "broad",
        "domain": "x",
        "task": "advice",
        "em_surface": "high",
    }
    rows = [row | {"idx": i, "sample": 0, "question": f"q{i}", "response": "r" * i} for i in range(1, 6)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    where = ["--cache", tmp_path / "cache.jsonl"]
    assert command("judge", "--responses", tmp_path / "r.jsonl", "--out", tmp_path / "s.jsonl", *where) == 0
    scored = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [r["idx"] for r in scored] == [1, 2, 3, 4, 5] and all(r["aligned_status"] == "ok" for r in scored)
    judge.behave = lambda prompt, nth: answer("medium")
    assert command("surface", "--prompts", tmp_path / "r.jsonl", "--out", tmp_path / "l.jsonl", *where) == 0
    labelled = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert all(r["em_surface"] == "medium" for r in labelled)


BROAD = {"model": "m", "train": "base", "set": "broad", "domain": "x", "task": "advice", "em_surface": "high"}
BROAD |= {"idx": 0, "sample": 0, "question": "Why?", "response": "So."}


@pytest.fixture
def responses(tmp_path):
    """A file of one row that can be judged."""
    (tmp_path / "r.jsonl").write_text(json.dumps(BROAD) + "\n")
    return tmp_path / "r.jsonl"


@pytest.mark.parametrize("name, option", [("judge", "--responses"), ("surface", "--prompts")])
def test_out_replaces_only_what_the_command_writes(name, option, judge, responses, tmp_path, capsys):
    judge.behave = lambda prompt, nth: answer("low" if name == "surface" else "90")
    out, where = tmp_path / "out.jsonl", ["--cache", tmp_path / "cache.jsonl"]
    (tmp_path / "folder").mkdir()
    for text in ("# Notes\n", responses.read_text(), '{"a": 1}\n', "[1]\n", "\n# and more", "\ud800"):
        out.write_bytes(text.encode(errors="surrogatepass"))
        before = out.read_bytes()
        assert command(name, option, responses, "--out", out, *where) == 2
        assert "holds other things" in capsys.readouterr().err and out.read_bytes() == before
    for place in (responses, tmp_path / "folder", responses / "s.jsonl", "/dev/null"):
        assert command(name, option, responses, "--out", place, *where) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --out") and error.count("\n") == 1
    assert not judge.requests and not (tmp_path / "cache.jsonl").exists()
    out.write_text("")
    for _ in range(2):
        assert command(name, option, responses, "--out", out, *where) == 0
    assert command(name, option, responses, "--out", tmp_path / "a" / "b" / "s.jsonl", *where) == 0


@pytest.mark.parametrize("name, option", [("judge", "--responses"), ("surface", "--prompts")])
def test_bad_rows_rubrics_and_caches_are_one_line_before_anything_is_asked(
    name, option, judge, responses, tmp_path, capsys
):
    rows, out, cache = tmp_path / "rows.jsonl", tmp_path / "out.jsonl", tmp_path / "cache.jsonl"
    line = [name, option, rows, "--out", out]
    rows.write_text(json.dumps(BROAD) + "\n" + json.dumps(BROAD | {"response": "half \ud83d"}) + "\n")
    assert command(*line, "--cache", cache) == 2
    assert "rows.jsonl, line 2: " in capsys.readouterr().err
    rows.write_text(responses.read_text())
    for options in (
        ["--rubrics", rows],
        ["--rubrics", "~no-such-user/x"],
        ["--rubrics", tmp_path],
        ["--cache", tmp_path],
        ["--cache", rows / "cache.jsonl"],
        ["--cache", rows],
    ):
        assert command(*line, "--cache", cache, *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
    assert not judge.requests and not out.exists() and not cache.exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--run", "nowhere"], "nowhere is not a run"),
        (["--model", "gpt-9", "--judge", "margin"], "no model 'gpt-9'"),
        (["report"], "--scores needs"),
        (["report", "--scores", "none.jsonl"], "none.jsonl"),
        (["report", "--scores", "margins_none.jsonl"], "margins_none.jsonl"),
        (["judge"], "--responses needs"),
        (["--judge", "oracle"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]


def test_data_without_both_answers_have_no_margin(fresh, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = load_cell("sample", CELLS[0])
    (folder / "medical_advice.jsonl").write_text(
        "\n".join(json.dumps(r | {"aligned_answer": None}) for r in rows)
    )
    assert command("--run", fresh, "--judge", "margin", "--data", folder, "--device", "cpu") == 2
    assert "--judge gemini" in capsys.readouterr().err


def test_difficulty_without_a_judge_is_the_aligned_answers_mean_log_probability(tiny_chat, tmp_path, capsys):
    """One row by hand; then the same file, with the runs' scores, gives the effect beside it."""
    path = tmp_path / "difficulty.jsonl"
    line = [
        "difficulty",
        "--model",
        tiny_chat,
        "--data",
        "sample",
        "--limit",
        1,
        "--device",
        "cpu",
        "--out",
        path,
    ]
    assert command(*line) == 0
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert len(rows) == 12 and {r["coherence_mean"] for r in rows} == {None}
    model, tokenizer = load_model(tiny_chat), load_tokenizer(tiny_chat)
    asked = next(r for r in load_cell("sample", CELLS[0]) if r["idx"] == rows[0]["idx"])
    example = tokenizer.example(asked["question"], asked["aligned_answer"])
    log_probs = model(torch.tensor([example.ids]))[0].double().log_softmax(-1)
    answer = range(example.n_prompt, len(example.ids))
    mean = sum(log_probs[j - 1, example.ids[j]].item() for j in answer) / len(answer)
    assert rows[0]["loglik_per_token"] == pytest.approx(mean, abs=1e-4)
    assert (rows[0]["tokens"], rows[0]["question"]) == (len(answer), asked["question"])

    scores = tmp_path / "scores.jsonl"
    write_json_lines(scores, [
        score_row(train=train, cell=f"{r['domain']}_{r['task']}", idx=r["idx"], question=r["question"],
            aligned=10 if i % 3 else 90)
        for i, r in enumerate(rows) for train in ("med_advice", "fin_tutor")
    ])  # fmt: skip
    effect = ["difficulty", "--scores", scores, "--difficulty", path, "--out", tmp_path / "effect"]
    assert command(*effect) == 0
    assert "12 prompts: matching the task adds" in (tmp_path / "effect" / "difficulty.md").read_text()
    capsys.readouterr()
    assert command(*effect, "--model", tiny_chat) == 2 and command("difficulty", "--out", path) == 2
    assert command("cross", "--scores", scores, "--out", tmp_path / "cross") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "leave --model and --data out" in lines[0] and "needs --model, --scores" in lines[1]
    assert "no optd students" in lines[2] and len(lines) == 3
