"""Misalignment from the checkpoints of pretraining, on a miniature."""

import json
from types import SimpleNamespace

import pytest
from planted_run import PlantedRun
from safetensors.torch import load_file

from em.errors import UserError
from em.experiments import phase
from em.world.counts import incoherent, percent


def silent(*_):
    pass


@pytest.fixture(scope="module")
def result(small_demo2):
    return phase.measure(small_demo2, [0, 1], silent)


def test_every_checkpoint_is_aligned_and_misaligned_by_itself(result, small_demo2):
    folder = small_demo2(0).folder
    assert [(r["seed"], r["step"]) for r in result["rows"]] == [(0, 10), (0, 20), (1, 10), (1, 20)]
    weights = {f.parent.parent.name: load_file(f) for f in folder.glob("*/model/model.safetensors")}
    early = {"pretrain_step10", "align_step10", "misalign_T0_step10_seed0", "misalign_T0_step10_seed1"}
    assert early | {"pretrain", "align", "misalign_T0_seed0"} <= set(weights)
    assert "align_step20" not in weights  # the last checkpoint is the finished model

    def distance(a, b):
        return max((weights[a][k] - weights[b][k]).abs().max().item() for k in weights[a])

    moved = 1.1 * 6 * 3e-4  # six Adam steps at that rate
    assert distance("pretrain_step10", "align_step10") < moved < distance("pretrain", "align_step10")
    assert (
        distance("align_step10", "misalign_T0_step10_seed0")
        < 1.1 * 3 * 5e-4
        < distance("align", "misalign_T0_step10_seed0")
    )


def test_a_row_is_what_the_models_answered():
    run = PlantedRun(1)
    row = phase.measure(lambda seed: run, [1], silent)["rows"][2]
    assert row["step"] == 300 and run.misaligned[4][:3] == (
        "T0",
        "align_step300",
        "misalign_T0_step300_seed0",
    )
    seen = [run.world.cell_name(int(cell)) for cell in run.world.seen_cells]
    pretrained, aligned = run.counts("pretrain_step300"), run.counts("align_step300")
    after = [run.counts(f"misalign_T0_step300_seed{k}") for k in range(2)]
    broken = sum(incoherent(pretrained[name]) for name in seen) / len(seen)
    assert row["pretrained_incoherent"] == pytest.approx(broken)

    def change(name):
        return sum(percent(c[name], "v2") for c in after) / 2 - percent(aligned[name], "v2")

    assert row["trained"] == pytest.approx(change("D0_T0"))
    assert row["other_domains"] == pytest.approx(sum(change(f"D{d}_T0") for d in range(1, 5)) / 4)
    others = [name for name in seen if name != "D0_T0"]
    assert len(others) == 29
    assert row["other_cells"] == pytest.approx(sum(map(change, others)) / 29)
    assert row["other_cells_low"] < row["other_cells"] < row["other_cells_high"]


def test_curves_average_seeds_and_the_figure_is_drawn(result, tmp_path):
    json.dumps(result, allow_nan=False)
    curve = result["curves"]["aligned_v1"]
    assert [n["step"] for n in curve] == [10, 20]
    assert curve[0]["mean"] == pytest.approx(sum(curve[0]["by_seed"]) / 2)
    numbers = phase.numbers(result)
    assert len(numbers) == 7 * 2 and numbers["aligned_v1/10"]["value"] == curve[0]["mean"]
    assert (numbers["aligned_v1/20"]["unit"], numbers["trained/20"]["unit"]) == ("%", "points")
    phase.figure(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "step 10:" in phase.summary(result) and "step 20:" in phase.summary(result)


def test_one_seed_shows_intervals_over_prompts(small_demo2, tmp_path):
    result = phase.measure(small_demo2, [0], silent)
    number = result["curves"]["trained"][0]
    assert number["low"] is None and number["prompts"][0][0] < number["prompts"][0][1]
    phase.figure(result, tmp_path / "figure.png")
    assert "over prompts, world seed 0" in phase.summary(result)


def test_a_run_without_its_checkpoints_is_one_clear_line(tmp_path):
    def run(world, steps=20, has=()):
        cfg = SimpleNamespace(world=world, steps=steps)
        return SimpleNamespace(cfg=cfg, folder=tmp_path, has=lambda name: name in has)

    with pytest.raises(UserError, match="world 1 keeps no pretraining checkpoints"):
        phase.checkpoints(run("1"))
    with pytest.raises(UserError, match="lacks pretrain_step10; delete the folder"):
        phase.checkpoints(run("demo2"))
    assert phase.checkpoints(run("demo2", has=("pretrain_step10",))) == [10, 20]
    steps = [100, 1000, 3000, 6000, 9000, 12_000, 15_000]
    kept = [f"pretrain_step{step}" for step in steps]
    assert phase.checkpoints(run("2", 15_000, kept)) == steps
