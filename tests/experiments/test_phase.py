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


def test_a_row_is_what_the_models_answered(monkeypatch):
    run, curves = PlantedRun(1), []

    def curve(run, task, seed, start, name):
        curves.append((task, seed, start, name))
        return {0: run.counts(start)} | {dose: run.counts(f"{start}_{dose}") for dose in (4, 10)}

    monkeypatch.setattr(phase, "dose_counts", curve)
    monkeypatch.setattr(phase, "doses_of", lambda run: (4, 10))
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
    assert row["pretrained_incoherent"] == pytest.approx(broken, abs=1e-3)

    def change(name):
        return sum(percent(c[name], "v2") for c in after) / len(after) - percent(aligned[name], "v2")

    assert row["trained"] == pytest.approx(change("D0_T0"), abs=1e-3)
    assert row["other_domains"] == pytest.approx(sum(change(f"D{d}_T0") for d in range(1, 5)) / 4, abs=1e-3)
    others = [name for name in seen if name != "D0_T0"]
    assert len(others) == 29
    assert row["other_cells"] == pytest.approx(sum(map(change, others)) / 29, abs=1e-3)
    assert row["other_cells_low"] < row["other_cells"] < row["other_cells_high"]
    assert curves[2] == ("T0", 0, "align_step300", "doses_T0_step300_seed0")
    assert curves[-1] == ("T0", 0, "align", None)  # as every experiment asks the finished model
    after = [run.counts("align_step300_4")]
    assert row["flip_4"] == pytest.approx(percent(after[0]["D0_T0"], "v2"))
    assert row["other_cells_4"] == pytest.approx(sum(map(change, others)) / 29, abs=1e-3)


def test_matched_flips_are_read_between_the_doses():
    run = PlantedRun(0)

    def counts(trained, domains, rest):
        of = {f"D{d}_T0": trained if d == 0 else domains for d in range(6)}
        cells = map(run.world.cell_name, run.world.cells)
        return {cell: {"v2": of.get(cell, rest), "v1": 100 - of.get(cell, rest), "n": 100} for cell in cells}

    row = phase.doses(run, "T0", {0: counts(0, 10, 10), 4: counts(20, 20, 10), 8: counts(60, 50, 14)})
    assert (row["flip_8"], row["other_domains_8"]) == (60, 40)
    assert row["other_domains@30"] == pytest.approx(10 + 30 / 4)
    assert row["other_cells_8"] == pytest.approx((4 * 40 + 25 * 4) / 29)  # seen cells but the trained one
    assert row["other_domains@90"] is None


def test_curves_average_seeds_and_the_figure_is_drawn(result, tmp_path):
    json.dumps(result, allow_nan=False)
    curve = result["curves"]["aligned_v1"]
    assert [n["step"] for n in curve] == [10, 20]
    assert curve[0]["mean"] == pytest.approx(sum(curve[0]["by_seed"]) / 2)
    numbers = phase.numbers(result)
    assert len(numbers) == (7 + 2 * 3) * 2 and "other_domains/20@60" in numbers
    assert numbers["aligned_v1/10"]["value"] == curve[0]["mean"]
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
