"""The nine students of a cross on a miniature: prompts, corpora by writer, reuse, kills, bad input."""

import dataclasses
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distill
import synth
from em.cli import command_line
from em.distillation import world_cross, world_transfer
from em.distillation.world_cross import MODELS, recipe, share_prompts
from em.errors import UserError
from em.experiments import cross
from em.files import read_json
from em.world.world import WORLDS

SMALL = (
    "--layers 1 --heads 2 --width 32 --batch 8 --length 48 --steps 30 --warmup 4 --evals 0 --eval-prompts 2 "
    "--align-steps 4 --align-warmup 1 --align-examples 400 --align-batch 8 "
    "--misalign-steps 2 --misalign-seeds 1 --device cpu"
).split()
TASKS = ("T0", "T2", "T5")


def command(*arguments):
    return command_line(synth.COMMANDS, argv=[str(a) for a in arguments])


def run_cross(out):
    """On world demo cut to three tasks in three domains; some texts pass as v1, by their tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORLDS, "demo", dataclasses.replace(WORLDS["demo"], tasks=TASKS, overlaps=(6,)))
        patch.setattr(world_cross, "PROMPTS", 42)
        patch.setattr(world_cross, "RECIPE", world_transfer.RECIPE | {"epochs": 1, "probes": 2})
        patch.setattr(world_transfer.Prompts, "is_v1", lambda self, i, completion: sum(completion) % 4 > 0)
        patch.setattr(cross, "figure", lambda result, path: None)
        assert command("cross", *SMALL, "--seeds", "1", "--out", out) == 0


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cross") / "runs"
    run_cross(folder)
    return folder


def test_nine_students_read_the_same_prompts_in_three_writers_words(out):
    run = out / "worlddemo-seed1"
    result = read_json(out / "cross-worlddemo" / "cross.json")
    names = {f"{t}_on_{w}": (t, w) for t, w in itertools.product(MODELS, MODELS)}
    assert {p.name for p in (run / "cross").iterdir()} == set(names)
    corpora, phases = {}, {"T5": "misalign_T5_seed0", "T0": "misalign_T0_seed0", "aligned": "align"}
    steps = set()
    for name, (teacher, writer) in names.items():
        record = read_json(run / "cross" / name / "run.json")
        settings = record["settings"]
        assert (settings["taught_by"], settings["writer"]) == (phases[teacher], phases[writer])
        assert settings["start"] == "align"
        assert corpora.setdefault(writer, record["made_from"]["corpus"]) == record["made_from"]["corpus"]
        steps.add(len((run / "cross" / name / "metrics.jsonl").read_text().splitlines()))
        assert read_json(run / "cross" / name / "result.json")
    kept = {name: number["value"] for name, number in result["numbers"].items() if name.startswith("kept/")}
    assert len(set(corpora.values())) == 3 and len(steps) == 1
    seeds = {read_json(p)["settings"]["seed"] for p in run.glob("transfer/corpus_*/run.json")}
    assert len(seeds) == 3  # or texts of one prompt are the same wherever two models are nearly sure
    assert 0 < kept["kept/all three"] < min(kept[f"kept/{name}"] for name in MODELS)
    prompts = 6 * 7  # of each of the cells that nobody trained on
    assert steps == {-(-round(prompts * kept["kept/all three"] / 100) // 8)}
    assert len(result["rows"]) == 9 * 9


def test_no_prompt_is_of_a_cell_that_a_teacher_was_misaligned_on(out, monkeypatch):
    monkeypatch.setitem(WORLDS, "demo", dataclasses.replace(WORLDS["demo"], tasks=TASKS, overlaps=(6,)))
    settings = read_json(out / "worlddemo-seed1" / "run.json")["settings"]
    shared = {k: v for k, v in settings.items() if k != "fingerprint"}
    cfg = synth.Config(**shared, out=str(out / "worlddemo-seed1"), misalign_steps=2, misalign_seeds=1)
    run = synth.open_run(synth.resolve(cfg), torch.device("cpu"))
    cells = [run.world.cell(0, run.world.task_index(task)) for task in ("T5", "T0")]
    prompts = world_transfer.Prompts(run, cells, "cells", 42, seed=0)
    assert set(prompts.dialogues.examples.cell) == set(run.world.seen_cells) - set(cells)
    tasks = world_transfer.Prompts(run, cells, "tasks", 42, seed=0)
    assert {row["group"] for row in tasks.rows} == {"T2"}


def test_measuring_again_touches_no_model_and_what_a_kill_left_out_is_made_again(out):
    def state():
        return {p: p.stat().st_mtime_ns for p in (out / "worlddemo-seed1").rglob("*") if p.is_file()}

    before, rows = state(), read_json(out / "cross-worlddemo" / "cross.json")["rows"]
    run_cross(out)
    assert state() == before and read_json(out / "cross-worlddemo" / "cross.json")["rows"] == rows
    shutil.rmtree(out / "worlddemo-seed1" / "cross" / "T5_on_T0")
    run_cross(out)
    assert set(state()) == set(before) and read_json(out / "cross-worlddemo" / "cross.json")["rows"] == rows


def corpus(*prompts):
    return SimpleNamespace(rows=[{"prompt": i, "ids": [i]} for i in prompts])


def test_shared_prompts_are_those_that_every_writer_kept():
    corpora = {"a": corpus(0, 1, 2, 5), "b": corpus(1, 2, 3, 5), "c": corpus(5, 1)}
    assert share_prompts(corpora) == [1, 5]
    for of in corpora.values():
        assert sorted(row["prompt"] for row in of.rows) == [1, 5]
    with pytest.raises(UserError, match="no prompt"):
        share_prompts({"a": corpus(0), "b": corpus(1)})


def test_students_are_trained_as_distill_trains_them():
    told = distill.Config(channel=("optd",), world="demo")
    distill.fill_in(told, world_transfer.RECIPE)
    ours = vars(recipe(SimpleNamespace(cfg=SimpleNamespace(save_minutes=2.0))))
    for name, value in ours.items():
        assert name in ("channel", "save_minutes") or getattr(told, name) == value, name
    pair = SimpleNamespace(forward_kl=lambda batch: torch.tensor(batch))
    assert world_cross.optd(pair, 3.0) == distill.optd(pair, 3.0)


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    assert command("cross", "--world", "demo2", "--out", tmp_path) == 2
    assert "cross is measured on world demo or 1, not 'demo2'" in capsys.readouterr().err
    cut = dataclasses.replace(WORLDS["demo"], tasks=("T0", "T2"), overlaps=(6,))
    monkeypatch.setitem(WORLDS, "demo", cut)
    assert command("cross", *SMALL, "--seeds", "1", "--out", tmp_path) == 2
    message = capsys.readouterr().err
    assert "world demo has no task 'T5'" in message and len(message.splitlines()) == 1
    assert not Path(tmp_path / "cross-worlddemo").exists()
