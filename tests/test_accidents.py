"""Accidents that befall every script: two processes at once, and a kill inside a write, then once more."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from judge_server import KEY, JudgeServer, answer
from processes import ROOT, start

TRAIN = (
    "train.py --data sample --device cpu --batch 6 --epochs 6 --rank 4 --alpha 8 --lr 0.01 --eval-rows 1 "
    "--save-minutes 0"
).split()
EVALUATE = "evaluate.py --on broad --max-new-tokens 12 --samples 3 --limit 5 --device cpu --rows 2".split()
DISTILL = (
    "distill.py --teacher med --unfiltered --rollouts 2 --max-new-tokens 8 --limit 6 --epochs 3 --batch 4 "
    "--rank 4 --alpha 8 --lr 0.01 --warmup 1 --probes 2 --device cpu --save-minutes 0 --corpus corpus"
).split()
SYNTH = (
    "synth.py --layers 1 --heads 2 --width 32 --batch 8 --length 48 --steps 60 --warmup 4 --evals 0 "
    "--eval-prompts 8 --align-steps 6 --align-warmup 1 --align-examples 400 --align-batch 8 "
    "--misalign-steps 3 --misalign-seeds 1 --device cpu --save-minutes 0"
).split()
WORLD = (
    "distill.py --world demo --run world --seeds 1 --limit 38 --epochs 2 --probes 4 --device cpu --lr 1e-3 "
    "--channel optd --unfiltered --save-minutes 0"
).split()

# Kills its process in the middle of the n-th write of a file, after the bytes and before the name.
KILLED = """
import os, runpy, signal, sys
left, replace = int(sys.argv[1]), os.replace

def replace_or_die(*paths):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)

os.replace, sys.argv = replace_or_die, sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def stopped_at(child, *paths) -> None:
    """Stop the process once it has one of the paths."""
    child.wait_for(lambda: any(Path(path).exists() for path in paths))
    os.kill(child.pid, signal.SIGSTOP)


def goes_on(child) -> None:
    os.kill(child.pid, signal.SIGCONT)


def refused(child) -> str:
    """The one line of a process that ends with exit status 2."""
    assert child.wait() == 2
    return child.output.strip().splitlines()[-1]


def strays(folder) -> list:
    return [path for path in Path(folder).rglob("*") if path.name.startswith(".") or "tmp" in path.name]


def rows(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny_chat, tmp_path_factory):
    """A folder with `med`, a run of train.py, and `world`, one of synth.py."""
    folder = tmp_path_factory.mktemp("finished")
    trained = start(*TRAIN, "--model", tiny_chat, "--out", folder / "med")
    assert [trained.wait(), start(*SYNTH, "--out", folder / "world").wait()] == [0, 0]
    return folder


@pytest.fixture
def at(finished, tmp_path, monkeypatch):
    """A working directory with those two in it."""
    for name in ("med", "world"):
        subprocess.run(["cp", "-r", finished / name, tmp_path / name], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def judge(monkeypatch):
    with JudgeServer(lambda prompt, nth: answer("80")) as server:
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        monkeypatch.setenv("GEMINI_BASE_URL", server.url)
        yield server


# -- two processes at once ---------------------------------------------------------------------------------


def test_a_second_train_on_a_folder_in_use_is_refused_and_the_first_goes_on(tiny_chat, at, finished):
    line = [*TRAIN, "--model", tiny_chat, "--out", "new"]
    first = start(*line)
    stopped_at(first, "new/resume/state.safetensors", "new/margins.json")
    assert f"error: new is in use by process {first.pid} on " in refused(start(*line))
    goes_on(first)
    assert first.wait() == 0 and not strays("new")
    for name in ("adapter_model.safetensors", "margins.json"):
        assert Path("new", name).read_bytes() == Path("med", name).read_bytes()
    assert [row["step"] for row in rows("new/metrics.jsonl")] == list(range(1, 19))


def test_a_second_evaluate_on_a_folder_in_use_is_refused_and_nothing_is_asked_twice(at, judge):
    line = [*EVALUATE, "--run", "med", "--out", "eval", "--cache", "cache.jsonl"]
    first = start(*line)
    stopped_at(first, "eval/responses_broad.jsonl")
    for more in ([], ["--judge", "margin"]):
        assert f"error: eval is in use by process {first.pid} on " in refused(start(*line, *more))
    goes_on(first)
    assert first.wait() == 0 and not strays("eval")
    places = [(row["idx"], row["sample"]) for row in rows("eval/responses_broad.jsonl")]
    assert len(places) == len(set(places)) == 15
    assert judge.total() <= 2 * 15


def test_two_channels_of_distill_that_share_a_corpus_make_it_once_and_a_run_has_one_process(at):
    first = start(*DISTILL, "--channel", "sft", "--out", "sft")
    stopped_at(first, "corpus/run.json")
    second = start(*DISTILL, "--channel", "optd", "--out", "optd")
    second.wait_for(lambda: f"waiting for process {first.pid} on " in second.output)
    third = start(*DISTILL, "--channel", "sft", "--out", "sft")
    assert f"error: sft is in use by process {first.pid} on " in refused(third)
    goes_on(first)
    assert first.wait() == 0 and second.wait() == 0 and not strays(".")
    for name in ("rollouts.jsonl", "corpus.jsonl"):
        places = [(row["prompt"], row["sample"]) for row in rows(f"corpus/{name}")]
        assert len(places) == len(set(places)) == 12
    made_from = [json.loads(Path(out, "run.json").read_text())["made_from"] for out in ("sft", "optd")]
    assert made_from[0] == made_from[1]


def test_two_synths_on_one_world_wait_for_each_other_and_make_each_phase_once(at):
    first = start(*SYNTH, "--out", "new")
    stopped_at(first, "new/pretrain/resume/state.safetensors", "new/pretrain/model/config.json")
    second = start(*SYNTH, "--out", "new", "--misalign", "T1")
    second.wait_for(lambda: f"waiting for process {first.pid} on " in second.output)
    goes_on(first)
    assert first.wait() == 0 and second.wait() == 0 and not strays("new")
    assert [row["step"] for row in rows("new/pretrain/metrics.jsonl")] == list(range(1, 61))
    for phase in ("pretrain", "align", "misalign_T5_seed0"):
        weights = f"{phase}/model/model.safetensors"
        assert Path("new", weights).read_bytes() == Path("world", weights).read_bytes()
    assert Path("new/misalign_T1_seed0/counts.json").exists()


# -- kills -------------------------------------------------------------------------------------------------


def killed_and_continued(line, kills) -> None:
    """The command, killed inside one write after another, then to its end."""
    Path("killed.py").write_text(KILLED)
    for n in kills:
        child = start(Path("killed.py").absolute(), n, ROOT / line[0], *line[1:])
        assert child.wait() == -signal.SIGKILL, (n, child.output)
        assert any(path.suffix == ".tmp" for path in strays(".")), "the kill hit no write"
    assert start(*line).wait() == 0 and not strays(".")


def test_train_killed_inside_its_writes_ends_with_the_same_bits_and_no_strays(tiny_chat, at):
    # The record; a state; another one; what only the end writes.
    killed_and_continued([*TRAIN, "--model", tiny_chat, "--out", "new"], (1, 3, 9, 11))
    for name in ("adapter_model.safetensors", "margins.json"):
        assert Path("new", name).read_bytes() == Path("med", name).read_bytes()
    assert sorted(os.listdir("new")) == sorted(os.listdir("med"))


def test_evaluate_killed_inside_its_writes_ends_with_the_same_rows_and_no_strays(at, judge):
    line = [*EVALUATE, "--run", "med", "--cache", "cache.jsonl", "--out"]
    assert start(*line, "whole").wait() == 0
    killed_and_continued([*line, "eval"], (1, 2, 4))
    for name in ("responses_broad.jsonl", "scores_broad.jsonl"):
        assert sorted(Path("eval", name).read_text().splitlines()) == sorted(
            Path("whole", name).read_text().splitlines()
        )
    assert sorted(os.listdir("eval")) == sorted(os.listdir("whole"))


@pytest.mark.parametrize("channel", ["sft", "optd", "opd"])
def test_distill_killed_inside_its_writes_ends_with_the_same_bits_and_no_strays(channel, at):
    line = [*DISTILL[:-2], "--channel", channel]
    assert start(*line, "--corpus", "corpus1", "--out", "whole").wait() == 0
    killed_and_continued([*line, "--corpus", "corpus2", "--out", "new"], (1, 4, 8))
    for name in ("adapter_model.safetensors", "epoch2/adapter_model.safetensors", "diagnostics.json"):
        assert Path("new", name).read_bytes() == Path("whole", name).read_bytes()
    assert sorted(os.listdir("new")) == sorted(os.listdir("whole"))
    if channel != "opd":
        assert Path("corpus1/corpus.jsonl").read_text() == Path("corpus2/corpus.jsonl").read_text()


def test_a_world_and_its_transfer_killed_inside_their_writes_end_with_the_same_bits_and_no_strays(at):
    killed_and_continued([*SYNTH, "--out", "new"], (2, 9, 60))
    for path in Path("world").rglob("*.safetensors"):
        assert path.read_bytes() == Path("new", path.relative_to("world")).read_bytes()
    assert start(*WORLD, "--out", "whole").wait() == 0
    killed_and_continued([*WORLD, "--out", "transfer"], (1, 9, 25))
    for path in Path("whole").rglob("*.safetensors"):
        assert path.read_bytes() == Path("transfer", path.relative_to("whole")).read_bytes()
    assert sorted(p.relative_to("whole") for p in Path("whole").rglob("*")) == sorted(
        p.relative_to("transfer") for p in Path("transfer").rglob("*")
    )
