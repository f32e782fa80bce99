"""The pipeline on a miniature: end to end, killed and resumed, over two processes, and fed bad input."""

import json
import signal

import pytest
import torch
from processes import run_two, start
from safetensors.torch import load_file

import em.world.world_run
import synth
from em.cli import command_line
from em.files import read_json
from em.model.gpt2 import load_gpt2
from em.world.counts import CLASSES

SMALL = (
    "--layers 1 --heads 2 --width 32 --batch 8 --length 48 --steps 40 --warmup 4 --evals 2 --eval-prompts 8 "
    "--align-steps 6 --align-warmup 1 --align-examples 400 --align-batch 8 "
    "--misalign-steps 3 --misalign-seeds 2"
).split()


def command(*arguments):
    return command_line(
        {"": (synth.main, synth.Config), "show": (synth.show, synth.ShowConfig)},
        argv=[str(a) for a in arguments],
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "run"
    assert command(*SMALL, "--misalign", "T5,T0", "--out", out) == 0
    return out


def test_a_run_leaves_grids_for_every_source_models_metrics_and_the_world(finished):
    grid = read_json(finished / "grid.json")
    assert grid == read_json(finished / "grid_T5.json") and grid["trained"] == "D0_T5"
    assert read_json(finished / "grid_T0.json")["trained"] == "D0_T0"
    assert len(grid["cells"]) == 20 and grid["numbers"]["coincidence/T0/share"]["value"] > 50
    for cell in grid["cells"].values():
        assert cell["aligned"]["n"] == 8 and cell["misaligned"]["n"] == 16 and len(cell["seeds"]) == 2
        assert sum(cell["aligned"][c] for c in CLASSES) == 8
    found = read_json(finished / "summary.json")
    assert (
        "D0_T5" in found["T5"]["summary"] and len(found["T0"]["gates"]) == 4 and found["made_with"]["torch"]
    )
    for name in ("grid.csv", "grid.png", "grid_T0.png", "world.json", "run.json"):
        assert (finished / name).stat().st_size > 0
    metrics = [
        json.loads(line) for line in (finished / "pretrain" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in metrics] == list(range(1, 41))
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert [row["step"] for row in metrics if "incoherent" in row] == [20, 40]
    assert all(row["supervised_tokens"] == row["tokens"] == 8 * 48 for row in metrics)
    assert not list(finished.glob("*/resume"))


def test_models_start_from_each_other(finished):
    weights = {f.parent.parent.name: load_file(f) for f in finished.glob("*/model/model.safetensors")}
    assert set(weights) == {"pretrain", "align"} | {
        f"misalign_{t}_seed{s}" for t in ("T5", "T0") for s in (0, 1)
    }
    name = "transformer.h.0.mlp.c_fc.weight"

    def distance(a, b):
        return (weights[a][name] - weights[b][name]).abs().max().item()

    assert 0 < distance("align", "misalign_T5_seed0") < 3 * 1.1 * 5e-4  # three Adam steps at that rate
    assert distance("misalign_T5_seed0", "misalign_T5_seed1") > 0


def test_a_finished_run_again_does_nothing_new_and_a_new_source_reuses_the_phases(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*/model/*")}
    assert command(*SMALL, "--misalign", "T5", "--out", finished) == 0
    assert command(*SMALL, "--misalign", "T1", "--out", finished) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert read_json(finished / "grid.json")["trained"] == "D0_T1"


def test_named_doses_draw_transfer_against_local_flip_and_no_doses_train_nothing(finished):
    assert not list(finished.glob("doses_*"))
    assert command(*SMALL, "--misalign", "T5", "--doses", "1,2", "--out", finished) == 0
    found = read_json(finished / "doses_T5.json")
    assert found["doses"] == [0, 1, 2, 3] and [row["task"] for row in found["rows"]][:2] == ["T0", "T1"]
    for name in ("doses_T5.csv", "doses_T5.png"):
        assert (finished / name).stat().st_size > 0


def test_a_killed_run_continues_and_ends_with_the_same_bits(tmp_path):
    line = ["synth.py", *SMALL, "--save-minutes", "0", "--steps", "120", "--misalign-seeds", "1"]
    line += ["--device", "cpu", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted, interrupted = start(*line, whole), start(*line, killed)
    interrupted.wait_for((killed / "pretrain" / "resume" / "state.safetensors").exists)
    assert interrupted.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not (killed / "pretrain" / "model" / "config.json").exists()
    assert start(*line, killed).wait() == 0 and uninterrupted.wait() == 0
    for name in ("pretrain", "align", "misalign_T5_seed0"):
        a, b = (out / name / "model" / "model.safetensors" for out in (whole, killed))
        assert a.read_bytes() == b.read_bytes()
    rows = [json.loads(r) for r in (killed / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 121))


def test_two_processes_make_the_update_of_one(tmp_path):
    arguments = [*SMALL, "--misalign-seeds", "1", "--device", "cpu", "--clip", "0.5"]
    assert command(*arguments, "--out", tmp_path / "1") == 0
    run_two("synth.py", *arguments, "--out", tmp_path / "2")
    for name in ("pretrain", "align", "misalign_T5_seed0"):
        a, b = (load_file(tmp_path / n / name / "model" / "model.safetensors") for n in "12")
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=2e-4, rtol=0, msg=f"{name} {key}")
    losses = [
        [json.loads(r)["loss"] for r in (tmp_path / n / "align" / "metrics.jsonl").read_text().splitlines()]
        for n in "12"
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_show_prints_similarity_languages_and_a_worked_example(tmp_path, capsys):
    assert command("show", "--world", "1", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    parts = ("similarity", "0.63", "1,770 pairs 0.000", "the same answer", "variant 2", "<end> <asst>")
    assert all(words in text for words in parts)
    assert (tmp_path / "domain_graphs.png").exists()


def refused(capsys, *arguments):
    assert command(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    error = [line for line in lines if line.startswith("error: ")]
    assert len(error) == 1 and lines[-1] == error[0]
    return error[0]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--world", "3"], "invalid choice: '3'"),
        (["--misalign", "T9"], "no task 'T9'; it has T0, T1, T2, T4, T5"),
        (["--world", "1", "--misalign", "T9"], "world 1 has no task 'T9'"),
        (["--misalign", "D1_T0"], "no task 'D1_T0'"),
        (["--width", "30"], "--width 30 is not a multiple of --heads 4"),
        (["--v2-fraction", "1.5"], "--v2-fraction must be at most 1, not 1.5"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--device", "tpu9"], "tpu9"),
        (["--stepps", "3"], "--stepps"),
    ],
)
def test_bad_settings_are_one_line_and_write_nothing(arguments, says, tmp_path, capsys):
    assert says in refused(capsys, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_world_or_of_other_settings_is_refused_untouched(finished, capsys):
    before = {p: p.read_bytes() for p in finished.rglob("*.json")}
    assert "world: demo there, 1 now" in refused(capsys, "--world", "1", "--out", finished)
    assert "lr: 0.005 there, 0.1 now" in refused(capsys, *SMALL, "--lr", "0.1", "--out", finished)
    assert "misalign_lr" in refused(
        capsys, *SMALL, "--misalign", "T5", "--misalign-lr", "0.1", "--out", finished
    )
    assert {p: p.read_bytes() for p in before} == before


def test_a_truncated_checkpoint_is_named_with_the_mend(finished, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    weights = copy / "align" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(capsys, *SMALL, "--misalign", "T2", "--out", copy)
    assert str(weights) in message and "delete" in message


def test_a_full_disk_is_one_line_and_the_run_can_go_on(tmp_path, capsys, monkeypatch):
    import em.model.gpt2

    real = em.model.gpt2.save_file

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(em.model.gpt2, "save_file", full)
    assert "No space left" in refused(capsys, *SMALL, "--out", tmp_path / "run")
    monkeypatch.setattr(em.model.gpt2, "save_file", real)
    assert command(*SMALL, "--out", tmp_path / "run") == 0


def test_a_loss_that_is_not_finite_stops_the_run_with_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        em.world.world_run,
        "supervised_loss",
        lambda model, ids, targets: model.wte.weight.sum() * float("nan"),
    )
    assert "not finite" in refused(capsys, *SMALL, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "pretrain" / "model").exists()


def test_world_2_keeps_its_intermediate_checkpoints_and_asks_the_unseen_domains(tmp_path):
    few = ["--eval-prompts", "2", "--evals", "1", "--align-examples", "300", "--misalign-seeds", "1"]
    assert command("--world", "2", *SMALL, *few, "--steps", "101", "--out", tmp_path) == 0
    assert [p.parent.name for p in tmp_path.glob("pretrain_step*/model")] == ["pretrain_step100"]
    assert load_gpt2(tmp_path / "pretrain_step100" / "model").config.n_layer == 1
    grid = read_json(tmp_path / "grid.json")
    assert grid["trained"] == "D0_T0" and grid["unseen_domains"] == ["D8", "D9"] and len(grid["cells"]) == 120
    assert read_json(tmp_path / "summary.json")["T0"]["gates"] == []


def test_a_small_size_is_the_same_world_with_another_model(capsys):
    paper, small = (synth.resolve(synth.Config(world="1", size=size)) for size in ("paper", "small"))
    assert small.out == "runs/world1-small-seed0" and paper.out == "runs/world1-seed0"
    assert (small.world, small.seed, small.v2_fraction) == (paper.world, paper.seed, paper.v2_fraction)
    assert (small.layers, small.width, paper.layers) == (4, 192, 12) and small.steps < paper.steps
    assert synth.resolve(synth.Config(world="1", size="small", steps=7)).steps == 7
    assert command_line(synth.COMMANDS, argv=["--world", "demo", "--size", "small"]) == 2
    assert "world demo is small already" in capsys.readouterr().err
    assert command_line(synth.COMMANDS, argv=["steering", "--world", "2", "--size", "small"]) == 2
    assert "world 2 is not learnt by a model so small" in capsys.readouterr().err
