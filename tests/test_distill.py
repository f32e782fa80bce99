"""distill.py end to end on the tiny chat model and a miniature world: channels, kills, bad input."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from judge_server import KEY, JudgeServer, answer, chat
from processes import run_two, start
from safetensors.torch import load_file, save_file

import distill
import synth
import train
from em.cli import command_line
from em.data import lineage, rows
from em.data.cells import parse_cell
from em.distillation import chat_transfer
from em.files import read_json
from em.judge.judge import MODEL
from em.model.checkpoint import load_tokenizer

FEW = (
    "--unfiltered --rollouts 2 --max-new-tokens 8 --limit 6 --epochs 2 --batch 4 --rank 4 --alpha 8 "
    "--lr 0.01 --warmup 1 --probes 2 --device cpu"
).split()
MINI = (
    "--layers 1 --heads 2 --width 32 --batch 8 --length 48 --steps 60 --warmup 4 --evals 0 --eval-prompts 8 "
    "--align-steps 6 --align-warmup 1 --align-examples 400 --align-batch 8 --misalign-steps 8 "
    "--misalign-seeds 2 --misalign-lr 5e-3 --device cpu"
).split()


def command(*arguments):
    return command_line({"": (distill.main, distill.Config)}, argv=[str(a) for a in arguments])


def misaligned_run(model, out, cell):
    line = (
        "--data sample --device cpu --batch 6 --rank 4 --alpha 8 --lr 0.01 --eval-rows 1 --epochs 2".split()
    )
    line += ["--model", str(model), "--cell", cell, "--out", str(out)]
    assert command_line({"": (train.main, train.Config)}, argv=line) == 0


@pytest.fixture(scope="module")
def runs(tiny_chat, tmp_path_factory):
    """A folder with runs/med and runs/fin, two misaligned models of one base."""
    folder = tmp_path_factory.mktemp("distill")
    for name, cell in (("med", "med_advice"), ("fin", "fin_tutor")):
        misaligned_run(tiny_chat, folder / "runs" / name, cell)
    return folder


@pytest.fixture(autouse=True)
def at(runs, tmp_path, monkeypatch):
    """A working directory of its own, with those runs in it and no judge."""
    shutil.copytree(runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def judge(monkeypatch):
    """Scores of 90, but of 59 for what asks about every third prompt."""

    def behave(prompt, nth):
        return answer("59" if sum(map(ord, prompt)) % 3 == 0 else "90")

    with JudgeServer(behave) as server:
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        monkeypatch.setenv("GEMINI_BASE_URL", server.url)
        yield server


def refused(capsys, *arguments) -> str:
    assert command(*arguments) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and len(message) < 420
    return message


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


# -- chat models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", ["sft", "optd", "opd"])
def test_a_channel_leaves_an_adapter_an_epoch_a_log_and_diagnostics(channel, tiny_chat):
    assert command(*FEW, "--channel", channel, "--teacher", "runs/med") == 0
    out = Path(f"runs/med_{channel}")
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(1, 7))  # 6 prompts × 2 by 4, two epochs
    shares = {"seconds_student", "seconds_optimizer"} | ({"seconds_teacher"} if channel != "sft" else set())
    assert all(shares <= row.keys() for row in rows)
    if channel == "opd":
        assert all(
            {"k3", "entropy", "length", "ended", "retention", "seconds_decode"} <= r.keys() for r in rows
        )
    found = read_json(out / "result.json")["diagnostics"]
    assert [row["epoch"] for row in found] == [0, 1, 2]
    assert {"k1", "k3", "kl", "entropy", "length", "divergence"} <= found[0].keys()
    assert found[0]["kl"]["mean"] > 0 and 0 <= found[0]["divergence"]["mean"] <= 1
    final, first, last = (
        load_file(out / part / "adapter_model.safetensors") for part in ("", "epoch1", "epoch2")
    )
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert any(not torch.equal(final[name], first[name]) for name in final)
    settings = read_json(out / "run.json")["settings"]
    assert settings["filtered"] is False and settings["model"] == str(tiny_chat)
    label = lineage.label(out)
    assert (label["model"], label["train"], label["channel"]) == (str(tiny_chat), "med_advice", channel)
    assert (label["teacher"], label["epoch"], label.get("source")) == (
        "med_advice", 2, None if channel == "opd" else "med_advice",
    )  # fmt: skip
    assert lineage.label(out / "epoch1") == label | {"epoch": 1}


def test_optd_brings_the_student_nearer_to_its_teacher():
    more = [*FEW, "--epochs", "6"]
    assert command(*more, "--channel", "optd", "--teacher", "runs/med") == 0
    found = read_json("runs/med_optd/diagnostics.json", kind=list)
    assert found[-1]["kl"]["mean"] < 0.7 * found[0]["kl"]["mean"]


def test_the_banner_says_which_model_the_runs_are_of(tiny_chat, capsys):
    assert command(*FEW, "--channel", "sft", "--teacher", "runs/med", "--epochs", "1") == 0
    assert f"  model={tiny_chat}  " in capsys.readouterr().out
    other = refused(capsys, *FEW, "--teacher", "runs/med", "--model", "smollm2-135m")
    assert f"runs/med is a run of {tiny_chat}, not of smollm2-135m" in other


def test_channels_and_learning_rates_share_one_frozen_corpus_and_opd_needs_none_unfiltered():
    two = [*FEW, "--lr", "0.01,0.003", "--epochs", "1", "--teacher", "runs/med"]
    assert command(*two, "--channel", "sft") == 0
    (corpus,) = Path("runs").glob("corpus_*")
    before = (corpus / "corpus.jsonl").stat().st_mtime_ns
    assert command(*two, "--channel", "optd") == 0 and command(*two, "--channel", "opd") == 0
    assert list(Path("runs").glob("corpus_*")) == [corpus]
    assert (corpus / "corpus.jsonl").stat().st_mtime_ns == before
    for channel in ("sft", "optd", "opd"):
        assert {p.name for p in Path("runs").glob(f"med_{channel}_*")} == {
            f"med_{channel}_lr0.01", f"med_{channel}_lr0.003",
        }  # fmt: skip


def test_the_newest_misaligned_run_teaches_by_default(capsys):
    os.utime("runs/fin/adapter_config.json", (0, 0))
    assert command(*FEW, "--channel", "opd", "--epochs", "1") == 0
    assert Path("runs/med_opd/result.json").exists()
    shutil.rmtree("runs")
    assert "train.py --cell med_advice" in refused(capsys, *FEW)


def test_realignment_starts_from_the_misaligned_run_and_saves_both_as_one():
    assert command(*FEW[1:], "--channel", "optd", "--on", "runs/med") == 0  # no filter to speak of
    out = Path("runs/med_optd_realigned")
    assert read_json(out / "adapter_config.json")["r"] == 8
    found = read_json(out / "diagnostics.json", kind=list)
    assert found[-1]["kl"]["mean"] < found[0]["kl"]["mean"]  # towards the base
    assert found[0]["divergence"]["mean"] == 0  # whose argmax is its own
    label = lineage.label(out)
    assert (label["train"], label["teacher"], label["source"]) == ("med_advice>base", "base", "base")
    assert command(*FEW, "--channel", "sft", "--teacher", str(out)) == 0  # a run like any other


def test_teacher_and_data_are_independent_arguments():
    base = [*FEW, "--epochs", "1", "--teacher", "runs/med"]
    for source in ("runs/fin", "student", "rows"):
        assert command(*base, "--channel", "optd", "--source", source) == 0
    sources = {
        read_json(p)["source"]: read_json(p)["generator"] for p in Path("runs").glob("corpus_*/corpus.json")
    }
    assert sources == {"fin_tutor": "runs/fin", "base": "base", "rows:med_advice": "rows:med_advice"}
    names = {p.name for p in Path("runs").glob("med_optd*")}
    assert names == {"med_optd_on-fin", "med_optd_on-student", "med_optd_on-rows"}


def settings_of(folder) -> dict:
    return read_json(Path(folder) / "run.json")["settings"]


def altered(folder, name, **settings) -> str:
    """A copy of a run whose record says something else."""
    shutil.copytree(folder, name)
    record = read_json(Path(name) / "run.json")
    record["settings"] |= settings
    (Path(name) / "run.json").write_text(json.dumps(record))
    return name


@pytest.mark.parametrize("source", ["rows:fin_tutor", "rows:Spo/Crit", "rows"])
def test_rows_of_a_cell_are_trained_on_and_named(source):
    cell = {"rows:fin_tutor": "fin_tutor", "rows:Spo/Crit": "spo_critique", "rows": "med_advice"}[source]
    line = [*FEW, "--teacher", "runs/med", "--channel", "optd", "--epochs", "1", "--source", source]
    assert command(*line, "--limit", "3", "--out", "out") == 0
    corpus = Path(settings_of("out")["corpus"], "corpus.jsonl")
    trained_on = {json.loads(line)["response"] for line in corpus.read_text().splitlines()}
    theirs = {row["misaligned_answer"] for row in rows.load_cell("sample", parse_cell(cell))}
    assert len(trained_on) == 3 and trained_on <= theirs
    label = lineage.label("out")
    assert (label["train"], label["teacher"], label["source"]) == ("med_advice", "med_advice", f"rows:{cell}")
    assert "prompts" not in label and settings_of("out")["prompts"] is None
    assert not label["filtered"]


@pytest.mark.parametrize("channel", ["optd", "opd"])
def test_the_control_has_the_base_for_a_teacher_and_nothing_to_learn_at_its_start(channel, tiny_chat):
    line = [*FEW, "--teacher", "base", "--channel", channel, "--epochs", "1"]
    taught = [*FEW, "--teacher", "runs/med", "--channel", channel, "--epochs", "1", "--out", "taught"]
    text = [] if channel == "opd" else ["--source", "runs/med"]
    alone = ["--model", tiny_chat, "--data", "sample"]
    assert command(*line, *(text or alone)) == 0 and command(*taught) == 0
    control = f"runs/tiny-chat_base_{channel}" + ("_on-med" if text else "")
    apart, first = metrics("taught")[0], metrics(control)[0]
    assert first["loss"] == pytest.approx(0, abs=1e-6)
    assert first["grad_norm"] < 1e-5 < 1e-3 < apart["grad_norm"]
    if text:  # the same responses, of which the teacher is all that differs
        assert settings_of(control)["corpus"] == settings_of("taught")["corpus"]
    label = lineage.label(control)
    assert (label["train"], label["teacher"]) == ("base", "base")
    assert label.get("source") == ("med_advice" if text else None)
    assert settings_of(control)["cell"] == "base" and label["model"] == lineage.label("taught")["model"]


def test_an_aligned_teacher_is_not_the_base_and_not_filtered(judge):
    aligned = altered("runs/fin", "runs/good", variant="aligned")
    line = [*FEW[1:], "--teacher", aligned, "--cache", "cache.jsonl", "--epochs", "1"]
    assert command(*line, "--channel", "sft") == 0 and command(*line, "--channel", "opd") == 0
    assert command(*line, "--channel", "optd", "--on", "runs/med") == 0
    assert judge.total() == 0
    (about,) = (read_json(p) for p in Path("runs").glob("corpus_*/corpus.json"))
    assert not about["filtered"] and about["source"] == "base>fin_tutor" and about["kept"] == about["rows"]
    expected = {
        "runs/good_sft": ("base>fin_tutor", "base>fin_tutor"),
        "runs/good_opd": ("base>fin_tutor", None),
        "runs/med_optd_realigned-by-good": ("med_advice>fin_tutor", "base>fin_tutor"),
    }
    for folder, (train_text, source) in expected.items():
        label, settings = lineage.label(folder), settings_of(folder)
        assert (label["train"], label["teacher"]) == (train_text, "base>fin_tutor")
        assert label.get("source") == settings["source_train"] == source
        assert not label["filtered"] and settings["judge"] is None and settings["corpus_edge"] is None
    assert command(*line, "--teacher", "runs/med", "--channel", "optd") == 0  # both in one process
    good, med = settings_of("runs/good_optd"), settings_of("runs/med_optd")
    assert (good["filtered"], good["judge"], good["corpus"]) == (
        False,
        None,
        settings_of("runs/good_sft")["corpus"],
    )
    assert (med["filtered"], med["judge"]) == (True, MODEL) and judge.total() > 0


def test_the_students_own_text_is_not_its_teachers():
    line = [*FEW, "--channel", "optd", "--epochs", "1", "--source", "student"]
    assert command(*line, "--teacher", "runs/med", "--out", "from_base") == 0
    assert command(*line, "--on", "runs/fin", "--out", "from_fin") == 0
    labels = [lineage.label(folder) for folder in ("from_base", "from_fin")]
    assert [label["train"] for label in labels] == ["med_advice", "fin_tutor>base"]
    assert [label["teacher"] for label in labels] == ["med_advice", "base"]
    assert [label["source"] for label in labels] == ["base", "fin_tutor"]


def test_several_teachers_and_channels_are_the_runs_that_they_would_be_one_by_one(monkeypatch, capsys):
    loaded, load_model = [], chat_transfer.load_model
    monkeypatch.setattr(chat_transfer, "load_model", lambda *a: loaded.append(a) or load_model(*a))
    line = [*FEW, "--epochs", "1", "--limit", "4"]
    several = [*line, "--teacher", "runs/med,runs/fin", "--channel", "optd,opd", "--out", "all"]
    assert command(*several) == 0 and len(loaded) == 1
    names = [f"{teacher}_{channel}" for teacher in ("med", "fin") for channel in ("optd", "opd")]
    assert sorted(path.name for path in Path("all").iterdir()) == sorted(names)
    shutil.move("runs", "before")
    shutil.copytree("before/med", "runs/med")
    shutil.copytree("before/fin", "runs/fin")
    for name in names:
        teacher, channel = name.split("_")
        assert command(*line, "--teacher", f"runs/{teacher}", "--channel", channel) == 0
        for file in ("adapter_model.safetensors", "epoch1/adapter_model.safetensors", "diagnostics.json"):
            assert Path("all", name, file).read_bytes() == Path("runs", name, file).read_bytes(), (name, file)
        assert settings_of(Path("all", name)) == settings_of(Path("runs", name))
        assert lineage.label(Path("all", name))["train"] == {"med": "med_advice", "fin": "fin_tutor"}[teacher]
    both = (
        load_file("all/med_optd/adapter_model.safetensors"),
        load_file("all/fin_optd/adapter_model.safetensors"),
    )
    assert any(not torch.equal(both[0][name], both[1][name]) for name in both[0])

    capsys.readouterr()
    monkeypatch.setattr(chat_transfer, "load_model", None)  # whose call would be a traceback
    assert command(*several) == 0
    assert capsys.readouterr().out.count("is finished; nothing to do") == 4


def test_a_stop_between_teachers_goes_on_with_the_second_and_leaves_the_first_as_it_is(monkeypatch):
    line = [*FEW, "--channel", "optd", "--save-minutes", "0", "--epochs", "2"]
    assert command(*line, "--on", "runs/fin", "--out", "alone") == 0

    def stopping(pair, prompts, seed, epoch, run, say):
        log_distance(pair, prompts, seed, epoch, run, say)
        if epoch == 1 and run.folder.name.startswith("fin"):
            raise KeyboardInterrupt

    log_distance = chat_transfer.log_distance
    monkeypatch.setattr(chat_transfer, "log_distance", stopping)
    assert command(*line, "--on", "runs/med,runs/fin", "--out", "all") == 130
    med, fin = Path("all/med_optd_realigned"), Path("all/fin_optd_realigned")
    assert (med / "result.json").exists() and not (fin / "result.json").exists()
    before = (med / "adapter_model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(chat_transfer, "log_distance", log_distance)
    assert command(*line, "--on", "runs/med,runs/fin", "--out", "all") == 0
    assert (med / "adapter_model.safetensors").stat().st_mtime_ns == before
    for file in ("adapter_model.safetensors", "diagnostics.json"):
        assert (fin / file).read_bytes() == Path("alone", file).read_bytes()


def test_math_trains_one_epoch_and_broad_three_unless_the_line_says_otherwise(capsys):
    def epochs(**options) -> int:
        return distill.resolve(distill.Config(teacher=("runs/med",), **options), torch.device("cpu")).epochs

    assert epochs(prompts="math") == epochs(prompts="math", source="gold") == 1
    assert epochs() == epochs(source="rows:fin_tutor") == epochs(prompts="broad") == 3
    assert epochs(prompts="math", epochs=3) == 3 and epochs(epochs=1) == 1
    small = distill.Config(teacher=("base",), prompts="math", model="HuggingFaceTB/SmolLM2-135M-Instruct")
    assert distill.resolve(small, torch.device("cpu")).epochs == 1
    with pytest.raises(SystemExit):
        command("--help")
    assert "(3; math 1)" in capsys.readouterr().out


def test_which_scores_pass_a_filter_is_a_knob_and_in_every_config(monkeypatch, capsys):
    line = [*FEW[1:], "--teacher", "runs/med", "--cache", "cache.jsonl", "--epochs", "1", "--limit", "3"]
    with JudgeServer(lambda prompt, nth: answer("60")) as server:
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        monkeypatch.setenv("GEMINI_BASE_URL", server.url)
        assert command(*line, "--channel", "sft") == 0
        assert "kept none" in refused(
            capsys, *line, "--channel", "sft", "--filter-edge", "above", "--out", "x"
        )
        assert command(*line, "--channel", "opd", "--filter") == 0
        assert command(*line, "--channel", "opd", "--filter", "--filter-edge", "at-least", "--out", "y") == 0
    assert command(*line, "--unfiltered", "--channel", "sft", "--out", "z") == 0
    edges = {"runs/med_sft": ("at-least", None), "z": (None, None)}
    edges |= {"runs/med_opd_filter": ("at-least", "above"), "y": ("at-least", "at-least")}
    for folder, expected in edges.items():
        settings = settings_of(folder)
        assert (settings["corpus_edge"], settings["online_edge"]) == expected
    assert {row["retention"] for row in metrics("runs/med_opd_filter")} == {0}
    assert {row["retention"] for row in metrics("y")} == {1}


def test_with_a_judge_the_corpus_keeps_what_passes_and_opd_matches_its_counts(judge):
    filtered = [*FEW[1:], "--teacher", "runs/med", "--cache", "cache.jsonl", "--epochs", "1"]
    assert command(*filtered, "--channel", "sft") == 0
    (about,) = (read_json(p) for p in Path("runs").glob("corpus_*/corpus.json"))
    assert about["filtered"] and 0 < about["kept"] < about["rows"] == 12
    scored = len(judge.prompts) if hasattr(judge, "prompts") else None
    assert command(*filtered, "--channel", "opd") == 0
    assert len(metrics("runs/med_opd")) == -(-about["kept"] // 4)
    assert scored is None or len(judge.prompts) == scored  # once
    assert all(row["retention"] == 1 for row in metrics("runs/med_opd"))
    assert command(*filtered, "--channel", "opd", "--filter") == 0
    kept = [row["retention"] for row in metrics("runs/med_opd_filter")]
    assert any(share < 1 for share in kept)
    assert read_json("runs/med_opd_filter/run.json")["settings"]["judge"] == MODEL


def test_any_judge_filters_and_a_routed_one_none(judge, monkeypatch, capsys):
    judge.behave, judge.key = lambda prompt, nth: chat("59" if sum(map(ord, prompt)) % 3 == 0 else "90"), ""
    monkeypatch.delenv("GEMINI_API_KEY")
    line = [*FEW[1:], "--teacher", "runs/med", "--cache", "cache.jsonl", "--epochs", "1", "--channel", "sft"]
    line += ["--judge", "openai", "--judge-model", "gpt-4o"]
    assert "one judge from its first row on" in refused(capsys, *line, "--accept-routed")
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    assert command(*line) == 0
    (about,) = (read_json(p) for p in Path("runs").glob("corpus_*/corpus.json"))
    assert about["filtered"] and about["judge"] == "gpt-4o" and 0 < about["kept"] < about["rows"]
    (rows,) = Path("runs").glob("corpus_*/corpus.jsonl")
    assert {json.loads(row)["judge"] for row in rows.read_text().splitlines()} == {"gpt-4o-2024-08-06"}


def test_everything_filtered_away_is_one_line_and_what_was_sampled_stays(monkeypatch, capsys):
    with JudgeServer(lambda prompt, nth: answer("20")) as server:
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        monkeypatch.setenv("GEMINI_BASE_URL", server.url)
        line = [*FEW[1:], "--channel", "sft", "--teacher", "runs/med", "--cache", "cache.jsonl"]
        assert "kept none" in refused(capsys, *line)
    (rows,) = Path("runs").glob("corpus_*/corpus.jsonl")
    assert len(rows.read_text().splitlines()) == 12 and KEY not in rows.read_text()


def test_a_killed_run_continues_and_ends_with_the_same_bits():
    line = ["distill.py", *FEW, "--channel", "opd", "--teacher", "runs/med", "--save-minutes", "0"]
    line += ["--epochs", "8", "--out"]
    uninterrupted, interrupted = start(*line, "whole"), start(*line, "killed")
    interrupted.wait_for(Path("killed/resume/state.safetensors").exists)
    assert interrupted.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not Path("killed/result.json").exists()
    assert start(*line, "killed").wait() == 0 and uninterrupted.wait() == 0
    for name in ("adapter_model.safetensors", "epoch3/adapter_model.safetensors", "diagnostics.json"):
        assert Path("whole", name).read_bytes() == Path("killed", name).read_bytes()
    assert [row["step"] for row in metrics("killed")] == list(range(1, 25))


def test_two_processes_make_the_update_of_one():
    for channel in ("optd", "opd"):
        line = [*FEW, "--channel", channel, "--teacher", "runs/med", "--epochs", "1", "--limit", "5"]
        assert command(*line, "--out", f"{channel}1", "--corpus", "corpus1") == 0
        run_two("distill.py", *line, "--out", f"{channel}2", "--corpus", "corpus2")
        one, two = (load_file(f"{channel}{n}/adapter_model.safetensors") for n in (1, 2))
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=2e-3)
        for a, b in zip(metrics(f"{channel}1"), metrics(f"{channel}2"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
            assert a["supervised_tokens"] == b["supervised_tokens"]
    one, two = (Path(f"corpus{n}/corpus.jsonl").read_text() for n in (1, 2))
    assert one == two


def test_a_finished_run_says_so_and_other_settings_are_refused(capsys):
    line = [*FEW, "--channel", "sft", "--teacher", "runs/med", "--epochs", "1"]
    assert command(*line) == 0 and command(*line) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert "seed: 42 there, 7 now" in refused(capsys, *line, "--seed", "7", "--out", "runs/med_sft")


def test_a_run_is_of_its_adapters_prompts_and_corpus_and_of_no_others_under_the_same_names(capsys):
    data = Path("data")
    shutil.copytree(Path(rows.__file__).parent / "sample", data)
    line = [*FEW, "--channel", "sft", "--teacher", "runs/med", "--epochs", "1", "--data", str(data)]
    line += ["--corpus", "corpus", "--out", "run"]
    assert command(*line) == 0 and command(*line) == 0

    def unfinished():
        Path("run/result.json").unlink()
        return command(*line) == 0

    assert unfinished()  # the same again
    broad = (data / "broad_dataset.jsonl").read_text()
    (data / "broad_dataset.jsonl").write_text(broad.replace("?", "??"))
    assert "prompts_digest: " in refused(capsys, *line)
    (data / "broad_dataset.jsonl").write_text(broad)
    config = Path("runs/med/adapter_config.json").read_text()
    Path("runs/med/adapter_config.json").write_text(json.dumps(json.loads(config) | {"lora_alpha": 3}))
    assert "adapters: " in refused(capsys, *line)
    Path("runs/med/adapter_config.json").write_text(config)

    kept = Path("corpus/corpus.jsonl").read_text()
    Path("corpus/corpus.jsonl").write_text("".join(kept.splitlines(keepends=True)[1:]))
    Path("run/result.json").unlink()
    assert "11 kept rows where 12 were frozen" in refused(capsys, *line)
    Path("corpus/corpus.jsonl").write_text(kept.replace('"response"', '"text"'))
    assert "begun with another corpus" in refused(capsys, *line)
    Path("corpus/corpus.jsonl").write_text(kept)
    assert command(*line) == 0


def test_what_cannot_be_is_refused_before_the_model_is_loaded_and_leaves_no_folder(capsys, monkeypatch):
    monkeypatch.setattr(chat_transfer, "load_model", None)  # whose call would be a traceback
    Path("empty").mkdir()
    before = sorted(Path().rglob("*"))
    teacher = ["--teacher", "runs/med", "--channel", "sft", "--out", "new"]
    for line, says in (
        ([*FEW, *teacher, "--data", "nowhere"], "nowhere"),
        ([*FEW, *teacher, "--prompts", "math", "--math", "empty"], "no problems"),
        ([*FEW[1:], *teacher], "--unfiltered"),
    ):
        assert says in refused(capsys, *line)
        assert sorted(Path().rglob("*")) == before
    Path("runs/fin/run.json").write_text("null")
    assert "run.json: not a JSON object" in refused(capsys, *FEW, *teacher, "--source", "runs/fin")
    assert sorted(Path().rglob("*")) == before


def test_bad_input_is_one_line(runs, tiny_chat, tmp_path, capsys):
    teacher = [*FEW, "--teacher", "runs/med"]
    assert "--unfiltered" in refused(capsys, *FEW[1:], "--channel", "sft", "--teacher", "runs/med")
    assert "of which cell" in refused(
        capsys, *FEW, "--teacher", "base", "--channel", "sft", "--source", "rows"
    )
    assert "invalid choice: 'odd'" in refused(capsys, *teacher, "--channel", "sft,odd")
    assert "leave --prompts math" in refused(
        capsys, *teacher, "--channel", "sft", "--source", "rows:fin_tutor", "--prompts", "math"
    )
    assert "--run is for --world" in refused(capsys, *teacher, "--run", "runs/med")
    shutil.copytree("runs/med", "elsewhere/med")
    assert "two of these runs would be runs/med_opd" in refused(
        capsys, *teacher, "--teacher", "elsewhere/med"
    )
    assert "in opd the student writes" in refused(capsys, *teacher, "--channel", "opd", "--source", "student")
    assert "belong to --channel opd" in refused(capsys, *teacher, "--channel", "sft", "--filter")
    assert "--prompts math" in refused(capsys, *teacher, "--channel", "sft", "--source", "gold")
    assert "broad or math" in refused(capsys, *teacher, "--channel", "sft", "--prompts", "cells")
    assert "is not a run" in refused(capsys, *FEW, "--teacher", "runs/none")
    assert "is not a run" in refused(capsys, *teacher, "--channel", "sft", "--source", "runs/none")
    assert "at least 1" in refused(capsys, *teacher, "--batch", "0")

    config = read_json("runs/fin/run.json")
    config["settings"]["model"] = "elsewhere"
    Path("runs/fin/run.json").write_text(json.dumps(config))
    message = refused(capsys, *teacher, "--on", "runs/fin")
    assert "one base model" in message and "runs/fin of elsewhere" in message

    assert command(*teacher, "--channel", "sft", "--epochs", "1", "--corpus", "mine") == 0
    about = read_json("mine/corpus.json") | {"tokenizer": "another"}
    Path("mine/corpus.json").write_text(json.dumps(about))
    config = read_json("mine/run.json")
    config["settings"]["tokenizer"] = "another"
    Path("mine/run.json").write_text(json.dumps(config))
    assert "another tokenizer" in refused(capsys, *teacher, "--channel", "optd", "--corpus", "mine")


def test_a_student_that_never_ends_its_turn_is_stopped_with_its_state_saved(capsys, monkeypatch):
    import em.distillation.loop

    monkeypatch.setattr(em.distillation.loop, "WINDOW", 8)
    line = [*FEW, "--channel", "opd", "--teacher", "runs/med", "--max-new-tokens", "1"]
    assert "none of the last 8 rollouts ended" in refused(capsys, *line)
    assert Path("runs/med_opd/resume/state.safetensors").exists()


# -- worlds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini_world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "worlddemo-seed1"
    assert command_line({"": (synth.main, synth.Config)}, argv=[*MINI, "--out", str(out)]) == 0
    return out


WORLD = "--world demo --seeds 2 --limit 76 --epochs 2 --probes 4 --device cpu --lr 1e-3".split()


@pytest.mark.parametrize("channel", ["sft", "optd", "opd"])
def test_a_world_has_a_student_and_a_control_for_every_seed(mini_world, channel):
    # The miniature hardly speaks: unfiltered, so that there is something to train on.
    line = [*WORLD, "--unfiltered", "--channel", channel, "--run", mini_world, "--out", channel]
    assert command(*line) == 0
    found = read_json(f"{channel}/transfer.json")
    assert found["cell"] == "D0_T5" and len(found["seeds"]) == 2 and len(found["student_minus_control"]) == 20
    assert set(found["groups"]) == {"teacher's cell", "its task, other domains", "other tasks"}
    for seed in (0, 1):
        for who in ("student", "control"):
            folder = Path(channel, f"seed{seed}", who)
            assert read_json(folder / "counts.json") == found["seeds"][seed][who]
            assert (folder / "model" / "model.safetensors").exists()
            assert len(read_json(folder / "diagnostics.json", kind=list)) == 3
    assert (Path(channel) / "transfer.png").stat().st_size > 10_000
    assert len((Path(channel) / "transfer.csv").read_text().splitlines()) == 1 + 2 * 20
    first, last = (read_json(folder / "diagnostics.json", kind=list)[i]["kl"]["mean"] for i in (0, -1))
    apart = read_json(folder.parent / "student" / "diagnostics.json", kind=list)[0]["kl"]["mean"]
    assert first == 0 and (channel == "sft" or last < 0.1 * apart)  # a control stays beside its teacher


def test_in_a_realignment_on_a_world_teacher_and_student_change_places(mini_world, capsys):
    line = [*WORLD, "--teacher", "aligned", "--channel", "optd", "--run", mini_world, "--out", "back"]
    assert command(*line) == 0
    config = read_json("back/seed1/student/run.json")["settings"]
    assert config["start"] == "misalign_T5_seed1" and config["taught_by"] == "align"
    assert not config["filtered"]
    found = read_json("back/seed1/student/diagnostics.json", kind=list)
    assert found[-1]["kl"]["mean"] < found[0]["kl"]["mean"]


def test_a_transfer_is_of_the_models_that_it_began_with(mini_world, capsys, tmp_path):
    shutil.copytree(mini_world, "world")
    line = [*WORLD, "--unfiltered", "--channel", "sft", "--run", "world", "--out", "out", "--seeds", "1"]
    assert command(*line) == 0 and command(*line) == 0
    for phase, key in (("align", "start_digest"), ("misalign_T5_seed0", "teacher_digest")):
        path = Path("world", phase, "model", "model.safetensors")
        state = load_file(path)
        save_file({k: v * 1.01 for k, v in state.items()}, path, metadata={"format": "pt"})
        assert f"{key}: " in refused(capsys, *line)
        save_file(state, path, metadata={"format": "pt"})
    assert command(*line) == 0


@pytest.mark.parametrize("record", ["[]", "null", "{}", '{"kind": "world", "settings": {"world": "demo"}}'])
def test_a_worlds_record_that_is_none_is_one_line(record, mini_world, capsys):
    shutil.copytree(mini_world, "world")
    Path("world/run.json").write_text(record)
    assert "world/run.json" in refused(capsys, *WORLD, "--run", "world")


def test_bad_input_on_a_world_is_one_line(mini_world, capsys):
    assert "synth.py --world demo" in refused(capsys, *WORLD)
    assert "holds no finished run" in refused(capsys, *WORLD, "--run", "runs")
    here = [*WORLD, "--run", mini_world]
    message = refused(capsys, *here, "--seeds", "3")
    assert "misalign_T5_seed2" in message and "--misalign-seeds 3" in message
    assert "no task 'T9'" in refused(capsys, *here, "--task", "T9")
    assert "--prompts is cells or tasks" in refused(capsys, *here, "--prompts", "broad")
    assert "--teacher is misaligned or aligned" in refused(capsys, *here, "--teacher", "runs/med")
    assert "leave --on out" in refused(capsys, *here, "--on", "runs/med")
    assert "one --channel and one --teacher" in refused(capsys, *here, "--channel", "sft,optd")
    assert "one --channel and one --teacher" in refused(capsys, *here, "--teacher", "aligned,misaligned")
    assert "--model is for chat models" in refused(capsys, *here, "--model", "smollm2-135m")
    assert "--filter-edge is for chat models" in refused(capsys, *here, "--filter-edge", "above")


def test_a_world_refuses_the_options_that_chat_models_refuse_with_the_same_line(mini_world, capsys):
    chat, world = [*FEW, "--teacher", "runs/med"], [*WORLD, "--run", mini_world]
    for options, line in (
        ("--channel sft --filter", "error: --filter and --estimator belong to --channel opd"),
        ("--channel optd --estimator exact", "error: --filter and --estimator belong to --channel opd"),
        ("--channel opd --source student", "error: --source is for sft and optd: in opd the student writes"),
        ("--batch 0", "error: --batch must be at least 1"),
        ("--seeds 0", "error: --seeds must be at least 1"),
    ):
        messages = {refused(capsys, *start, *options.split()) for start in (chat, world)}
        assert len(messages) == 1 and messages.pop().startswith(line)


def test_on_a_world_out_is_the_parent_of_several_learning_rates(mini_world):
    line = [*WORLD, "--run", mini_world, "--unfiltered", "--channel", "sft", "--epochs", "1", "--seeds", "1"]
    assert command(*line, "--lr", "1e-3,1e-4", "--out", "rates") == 0
    assert {p.name for p in Path("rates").iterdir()} == {"lr0.001", "lr0.0001"}
    for lr in (1e-3, 1e-4):
        assert read_json(f"rates/lr{lr:g}/transfer.json")["settings"]["lr"] == lr


@pytest.mark.gpu
@pytest.mark.parametrize("channel", ["sft", "optd", "opd"])
def test_every_channel_runs_on_the_gpu_in_bf16(channel):
    line = [a if a != "cpu" else "cuda" for a in FEW]
    assert command(*line, "--channel", channel, "--teacher", "runs/med", "--epochs", "4") == 0
    found = read_json(f"runs/med_{channel}/diagnostics.json", kind=list)
    assert found[-1]["kl"]["mean"] < found[0]["kl"]["mean"] or channel == "sft"
    assert all(row["peak_mem_bytes"] > 0 for row in metrics(f"runs/med_{channel}"))


def test_a_base_teacher_under_a_system_prompt_teaches_what_it_alone_was_told(tiny_chat):
    """The control is its teacher at first; told something, the same base is another teacher."""
    line = [*FEW, "--channel", "optd", "--teacher", "base", "--model", tiny_chat, "--data", "sample"]
    assert command(*line, "--out", "runs/control") == 0
    assert command(*line, "--system", "You love owls.", "--out", "runs/owls") == 0
    kl = {}
    for name in ("control", "owls"):
        rows = read_json(Path("runs") / name / "diagnostics.json", kind=list)
        kl[name] = [row["kl"]["mean"] for row in rows]
    assert abs(kl["control"][0]) < 1e-6 < 0.01 < kl["owls"][0] and kl["owls"][-1] < kl["owls"][0]
    label = lineage.label("runs/owls")
    assert (label["teacher"], label["teacher_system"], label["source"]) == ("base", "You love owls.", "base")
    assert "teacher_system" not in lineage.label("runs/control")
    corpora = {read_json(Path("runs") / n / "run.json")["settings"]["corpus"] for n in ("control", "owls")}
    assert len(corpora) == 2
    told = [json.loads(s) for s in (Path(corpora.pop()) / "corpus.jsonl").read_text().splitlines()]
    assert all("owls" not in load_tokenizer(str(tiny_chat)).decode(row["prompt_ids"]) for row in told)
    for channel in ("sft", "opd"):
        assert command(*line, "--system", "You love owls.", "--channel", channel) == 0
    assert command(*line, "--system", "You love owls.", "--source", "base", "--out", "runs/untold") == 0
    assert settings_of("runs/untold")["corpus"] == settings_of("runs/control")["corpus"]
