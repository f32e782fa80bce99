"""Experiments over seeds on a miniature: files, reuse, resuming, folders, report, make worlds, bad input."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

import synth
from em.cli import command_line
from em.files import read_json
from em.world.sets import Batches
from em.world.world import WORLDS

ROOT = Path(__file__).parent.parent
SMALL = (
    "--layers 1 --heads 2 --width 32 --batch 8 --length 48 --steps 30 --warmup 4 --evals 0 --eval-prompts 2 "
    "--align-steps 4 --align-warmup 1 --align-examples 400 --align-batch 8 "
    "--misalign-steps 2 --misalign-seeds 1 --doses 1,4 --device cpu"
).split()


def command(*arguments):
    return command_line(synth.COMMANDS, argv=[str(a) for a in arguments])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Runs of world demo cut to two tasks in three domains."""
    folder = tmp_path_factory.mktemp("experiments") / "runs"
    cut = dataclasses.replace(WORLDS["demo"], tasks=("T2", "T5"), overlaps=(6,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORLDS, "demo", cut)
        assert command("hardness", "--world", "demo", *SMALL, "--seeds", "0,1", "--out", folder) == 0
        assert command("realign", *SMALL, "--seeds", "1", "--out", folder) == 0
        yield folder


def test_hardness_has_a_row_a_task_and_seed_and_says_what_made_it(out, capsys):
    result = read_json(out / "hardness-worlddemo" / "hardness.json")
    assert result["experiment"] == "hardness" and result["world"] == "demo" and result["seeds"] == [0, 1]
    assert [(r["seed"], r["task"]) for r in result["rows"]] == [
        (seed, task) for seed in (0, 1) for task in ("T2", "T5")
    ]
    assert result["settings"]["steps"] == 30 and result["made_with"]["torch"] and result["seconds"] >= 0
    assert result["numbers"]["cross_delta_v2/r"]["over"] == "2 tasks, each a mean of 2 world seeds"
    lines = (out / "hardness-worlddemo" / "hardness.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[0].startswith("seed,task,step,aligned_v1,")
    assert (out / "hardness-worlddemo" / "hardness.png").stat().st_size > 0


def test_power_reads_what_hardness_left_and_trains_nothing(out, capsys):
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert command("hardness", "--power", "--world", "demo", "--out", out) == 0
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    folder = out / "hardness-worlddemo"
    assert made.keys() - before.keys() == {folder / "power.json", folder / "power.csv"}
    assert {p: made[p] for p in before} == before
    rows = read_json(folder / "hardness.json")["rows"]
    of_task = read_json(folder / "power.json")["quantities"]["cross_delta_v2"]["by_task"]
    for task, values in of_task.items():
        assert values["worlds"] == [0, 1]
        assert values["by_seed"] == pytest.approx([r["cross_delta_v2"] for r in rows if r["task"] == task])
    assert set(of_task) == {"T2", "T5"} and "not estimable" in capsys.readouterr().out


def test_realignment_meets_every_source_with_every_cell_and_keeps_counts_alone(out):
    result = read_json(out / "realign-worlddemo" / "realign.json")
    assert len(result["rows"]) == 2 * (2 + 6) and result["prompts_a_cell"] == 2
    kept = {p.name for p in (out / "worlddemo-seed1").glob("realign_*/*/*")}
    assert kept == {"run.json", "counts.json", "metrics.jsonl"}
    assert len(list((out / "worlddemo-seed1").glob("realign_*/*/counts.json"))) == 12


def test_a_realigned_model_starts_at_the_misaligned_one_and_trains_on_variant_1_of_its_cell(out, monkeypatch):
    """Trained again with the phases' own loop replaced by a look at what it is given."""
    import em.experiments.realign as realign

    settings = read_json(out / "worlddemo-seed1" / "run.json")["settings"]
    opened = synth.open_run(made(out, settings), synth.torch.device("cpu"))
    seen = {}

    def look(cfg, record, model, batches: Batches, steps, peak, *rest, **more):
        seen.update(model=model, data=batches.data, steps=steps, peak=peak)

    monkeypatch.setattr(realign, "train_phase", look)
    start, cell = opened.load("misalign_T5_seed0"), opened.world.cell(2, opened.world.task_index("T2"))
    realign.realign(opened, lambda: start, cell, record=None, name="realign_T5/D2_T2")
    assert seen["model"] is not start and seen["steps"] == 2 and seen["peak"] == 2e-4
    for a, b in zip(seen["model"].parameters(), start.parameters(), strict=True):
        assert (a == b).all()
    assert set(seen["data"].examples.cell) == {cell} and len(seen["data"]) > 4
    aligned = {row.tobytes() for row in opened.alignment.ids}
    assert all(row.tobytes() in aligned for row in seen["data"].ids)  # all of it variant 1


def made(out, settings):
    shared = {k: v for k, v in settings.items() if k != "fingerprint"}
    return synth.resolve(
        synth.Config(**shared, out=str(out / "worlddemo-seed1"), misalign_steps=2, misalign_seeds=1)
    )


def test_measuring_again_reuses_every_phase_and_gives_the_same_rows(out, capsys):
    before = {p: p.stat().st_mtime_ns for p in out.glob("*-seed*/**/*") if p.is_file()}
    rows = read_json(out / "realign-worlddemo" / "realign.json")["rows"]
    assert command("realign", *SMALL, "--seeds", "1", "--out", out) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("*-seed*/**/*") if p.is_file()} == before
    assert read_json(out / "realign-worlddemo" / "realign.json")["rows"] == rows


def test_what_a_kill_left_out_is_made_again_with_the_same_outcome(out):
    counts = out / "worlddemo-seed1" / "realign_T2" / "D1_T5" / "counts.json"
    before = counts.read_bytes()
    counts.unlink()
    assert command("realign", *SMALL, "--seeds", "1", "--out", out) == 0
    assert counts.read_bytes() == before


def test_the_main_command_shares_its_models_with_the_experiments(out):
    folder = out / "worlddemo-seed0"
    before = (folder / "pretrain" / "model" / "model.safetensors").stat().st_mtime_ns
    assert command(*SMALL, "--seed", "0", "--misalign", "T5", "--out", folder) == 0
    assert (folder / "pretrain" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert command("report", "--world", "demo", "--out", out) == 0
    page = (out / "report-worlddemo" / "report.md").read_text()
    assert "(../hardness-worlddemo/hardness.png)" in page and "prompts of 1 world seed" in page


def test_changed_pretraining_has_its_own_folder_and_changed_fine_tuning_does_not(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(synth, "open_run", lambda cfg, device: opened.append(cfg) or FakeRun())

    class FakeRun:
        folder = "fake"
        counts = pretrain = align = lambda *_: None

    class Module:
        def measure(make, seeds, say):
            make(4)
            make(4, v2_fraction=0.325)
            make(4, misalign_steps=9)
            return {"experiment": "hardness", "seeds": list(seeds), "rows": [{"a": 1}]}

        def figure(result, path):
            pass

        def numbers(result):
            return {}

        def summary(result):
            return "nothing"

    monkeypatch.setitem(synth.EXPERIMENTS, "hardness", (Module, ("1",)))
    assert command("hardness", "--world", "1", "--seeds", "4", "--lr", "0.1", "--out", tmp_path) == 0
    names = [Path(cfg.out).name for cfg in opened]
    assert names == ["world1-seed4", "world1-seed4-v2_0.325", "world1-seed4"]
    assert [cfg.v2_fraction for cfg in opened] == [0.6, 0.325, 0.6]
    assert [cfg.misalign_steps for cfg in opened] == [10, 10, 9] and {cfg.lr for cfg in opened} == {0.1}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["realign", "--world", "2"], "realign is measured on world demo or 1, not '2'"),
        (["fraction", "--world", "moon"], "fraction is measured on world demo2 or 2, not 'moon'"),
        (["realign", "--seeds", "a"], "--seeds: invalid comma-separated int value: 'a'"),
        (["realign", "--seeds", "1,1"], "--seeds 1,1: name each world seed once, none below 0"),
        (["realign", "--seeds", ","], "--seeds needs a value"),
        (["realign", "--seeds", "-1,2"], "--seeds"),
        (["hardness", "--width", "30"], "--width 30 is not a multiple of --heads 4"),
        (["hardness", "--misalign", "T0"], "--misalign"),
        (["hardnes"], "unknown command 'hardnes'"),
        (["report", "--world", "moon"], "invalid choice: 'moon'"),
    ],
)
def test_bad_settings_are_one_line_and_write_nothing(arguments, says, tmp_path, capsys):
    assert command(*arguments, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert not (tmp_path / "out").exists()


def test_a_run_folder_of_other_settings_is_refused_untouched(out, capsys):
    before = {p: p.read_bytes() for p in out.rglob("*.json")}
    again = ("hardness", "--world", "demo", *SMALL, "--seeds", "0", "--out", out)
    assert command(*again, "--lr", "0.1") == 2
    assert "lr: 0.005 there, 0.1 now" in capsys.readouterr().err
    assert command(*again, "--misalign-lr", "0.1") == 2
    assert "misalign_lr" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*.json")} == before


def test_a_result_that_is_not_json_is_named(out, tmp_path, capsys):
    (tmp_path / "hardness-worlddemo").mkdir()
    (tmp_path / "hardness-worlddemo" / "hardness.json").write_text("{")
    assert command("report", "--world", "demo", "--out", tmp_path) == 2
    assert "hardness.json: not JSON" in capsys.readouterr().err


# -- make worlds -------------------------------------------------------------------------------------------

STUB = f"""#!{sys.executable}
import pathlib, sys
options = dict(zip(sys.argv[2:], sys.argv[3:]))
command = sys.argv[2] if not sys.argv[2].startswith("-") else ""
words = " ".join(sys.argv)
seeds = words.partition("--seeds ")[2].partition(" --out")[0]
with open("log", "a") as log:
    print(command or "main", options["--world"], options.get("--seed", "") + seeds, file=log)
out = pathlib.Path(options["--out"])
if command == "":
    made = out / "summary.json"
else:
    made = out / f"{{command}}-world{{options['--world']}}" / f"{{command}}.json"
made.parent.mkdir(parents=True, exist_ok=True)
made.touch()
"""


def make(folder, *arguments):
    """What `make worlds` printed, and the commands it ran, in a folder whose python is the stub."""
    (folder / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
    for name in ("requirements.txt", "requirements-models.txt", ".venv/.installed"):
        if not (folder / name).exists():
            (folder / name).touch()
    (folder / "Makefile").write_text((ROOT / "Makefile").read_text())
    (folder / ".venv" / "bin" / "python").write_text(STUB)
    (folder / ".venv" / "bin" / "python").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "worlds", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    log = (folder / "log").read_text().splitlines()
    (folder / "log").unlink()
    return done.stdout, log


def test_make_worlds_prints_its_plan_makes_every_part_once_and_reports_last(tmp_path):
    output, log = make(tmp_path, "SEEDS=2")
    assert output.startswith("worlds 1 2, seeds 0 1;") and "to do  runs/phase-world2/phase.json" in output
    assert len(log) == len(set(log)) and log[-2:] == ["report 1 ", "report 2 "]
    of_world = {
        "1": "hardness steering realign cross",
        "2": "similarity steering fraction phase hardness",
    }
    for world, names in of_world.items():
        assert {f"main {world} {seed}" for seed in "01"} <= set(log)
        assert {f"{name} {world} 0,1" for name in names.split()} <= set(log)
    # What shares models waits for whoever makes them.
    for name in ("hardness", "steering", "cross", "realign"):
        assert max(log.index("main 1 0"), log.index("main 1 1")) < log.index(f"{name} 1 0,1")
    assert log.index("main 2 1") < log.index("phase 2 1") < log.index("phase 2 0,1")
    assert log.index("phase 2 1") < log.index("hardness 2 1") < log.index("hardness 2 0,1")


def test_make_worlds_again_only_reports_and_one_more_seed_makes_what_it_needs(tmp_path):
    make(tmp_path, "WORLD=demo", "SEEDS=1")
    output, log = make(tmp_path, "WORLD=demo", "SEEDS=1")
    assert log == ["report demo ", "report demo2 "] and "to do" not in output
    _, log = make(tmp_path, "WORLD=demo", "SEEDS=2")
    assert "main demo 2" in log and "main demo 1" not in log and "realign demo 1,2" in log
    assert "fraction demo2 2" in log and "fraction demo2 1" not in log and "fraction demo2 1,2" in log


def test_twelve_seeds_are_of_demo2_and_six_of_them_of_demo(tmp_path):
    output, log = make(tmp_path, "WORLD=demo")
    assert output.startswith("worlds demo demo2, seeds 1 2 3 4 5 6 7 8 9 10 11 12 (demo: 1 2 3 4 5 6);")
    assert "similarity demo2 1,2,3,4,5,6,7,8,9,10,11,12" in log and "steering demo 1,2,3,4,5,6" in log
    assert sorted(line for line in log if line.startswith("main demo ")) == [
        f"main demo {s}" for s in range(1, 7)
    ]


def test_a_launcher_stands_before_every_training(tmp_path):
    (tmp_path / "launch").write_text('#!/bin/sh\necho "$@" >> launched\nexec "$@"\n')
    (tmp_path / "launch").chmod(0o755)
    _, log = make(tmp_path, "WORLD=2", "SEEDS=1", "RUN=./launch", "-j4")
    launched = (tmp_path / "launched").read_text().splitlines()
    assert len(launched) == len([line for line in log if not line.startswith("report")]) == 9
    assert {line.split()[1] for line in log} == {"2"}
