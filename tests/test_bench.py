"""bench/gpu.sh with an interpreter that only pretends, and the benches that a CPU goes through in seconds."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from em.files import read_json, write_json

ROOT = Path(__file__).parent.parent

# Stands in for Python: notes its arguments, then fails, is cut off, or leaves what the real command would.
STUB = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
-c*) exit 0 ;;
*"$FAIL"*) echo "it went wrong"; exit 3 ;;
*"$CUT"*) kill -TERM $$ ;;
esac
while [ $# -gt 0 ]; do
    if [ "$1" = --out ]; then
        case "$2" in
        *.json) mkdir -p "$(dirname "$2")"; echo '{}' > "$2" ;;
        *) mkdir -p "$2/align/model" "$2/report-world1" "$2/report-world2"
           for file in summary.json grid.csv grid.png align/metrics.jsonl align/model/config.json \\
               align/model/model.safetensors report-world1/report.json report-world2/report.json; do
               echo '{}' > "$2/$file"
           done ;;
        esac
    fi
    shift
done
"""


@pytest.fixture
def gpu_sh(tmp_path):
    """call(*arguments, **environment) → (exit status, output, the commands that were begun)."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {"PYTHON": str(stub), "OUT": str(tmp_path / "gpu"), "RUNS": str(tmp_path / "runs")}
    environment |= {"CALLS": str(calls), "FAIL": "nothing fails", "CUT": "nothing is cut off", "SEEDS": "0 1"}

    def call(*arguments, **more):
        calls.write_text("")
        done = subprocess.run(
            [str(ROOT / "bench" / "gpu.sh"), *arguments], env=os.environ | environment | more,
            capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()[1:]

    return call


def test_every_part_runs_once_in_order_and_leaves_its_result(gpu_sh, tmp_path):
    status, output, begun = gpu_sh()
    assert status == 0 and "left" not in output
    assert begun[0].startswith("-m pytest -m gpu") and begun[-1].startswith("bench/calibrate.py")
    assert len(begun) == 13 + 2 * 3 + 1 == len(set(begun))
    assert gpu_sh() == (0, "", [])
    kept = {str(p.relative_to(tmp_path)) for p in tmp_path.glob("world1/*-seed*/**/*") if p.is_file()}
    names = ("summary.json", "grid.csv", "grid.png", "align/metrics.jsonl", "wall.json")
    assert {f"world1/world1-seed1/{name}" for name in names} <= kept  # numbers and figures, and no model
    assert not any("model" in path for path in kept)
    assert read_json(tmp_path / "world1" / "world1-seed1" / "wall.json")["from_nothing"] is True


def test_a_part_that_fails_stops_no_other_and_is_tried_again_only_by_name(gpu_sh, tmp_path):
    status, output, begun = gpu_sh(FAIL="bench/kl.py")
    assert status == 1 and len(begun) == 20 and "failed, tried again only where named: kl" in output
    assert "it went wrong" in (tmp_path / "gpu" / "kl.log").read_text()
    assert gpu_sh()[0::2] == (1, [])
    status, _, begun = gpu_sh("kl")
    assert status == 0 and [line.split()[0] for line in begun] == ["bench/kl.py"] and gpu_sh()[0] == 0


def test_a_part_that_is_cut_off_runs_again_and_what_is_about_all_parts_waits_for_it(gpu_sh, tmp_path):
    status, output, begun = gpu_sh(CUT="--world 1 --seed 1")
    assert status == 0 and not list(tmp_path.glob("gpu/*.failed"))
    assert "left for the next call: world1-seed1 world1-report world2-report calibration" in output
    status, output, begun = gpu_sh()
    assert status == 0 and "synth.py --world 1 --seed 1" in begun[0] and len(begun) == 4


def test_a_result_that_does_not_come_is_a_failure(gpu_sh):
    status, output, _ = gpu_sh("kl", "opd-14b", FAIL="nothing", CUT="", PYTHON="/bin/true")
    assert status == 1 and "named: kl opd-14b" in output


def test_a_call_begins_no_part_that_its_minutes_may_not_end(gpu_sh):
    _, output, begun = gpu_sh("--minutes", "1")
    assert len(begun) == 1 and "left for the next call: kl decode-14b-8" in output


@pytest.mark.parametrize("arguments", [["--minutes"], ["--minutes", "soon"], ["--fast"], ["unheard-of"]])
def test_a_mistake_is_one_line_and_nothing_begins(gpu_sh, arguments):
    status, output, begun = gpu_sh(*arguments)
    assert status == 2 and len(output.splitlines()) == 1 and begun == []


def test_a_world_that_was_cut_off_is_not_timed_from_nothing(gpu_sh, tmp_path):
    (tmp_path / "runs" / "world2-seed0").mkdir(parents=True)
    gpu_sh("world2-seed0")
    assert read_json(tmp_path / "world2" / "world2-seed0" / "wall.json")["from_nothing"] is False


# -- the benches themselves --------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    """bench("cell"): a bench as a module; those beside it are found as when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


def test_a_cell_is_trained_by_train_py_itself_on_rows_of_the_papers_number_and_lengths(bench, tmp_path):
    from em.data.cells import CELLS
    from em.model.decoder import Decoder, DecoderConfig

    cell = bench("cell")
    ids = cell.RandomIds(500)
    examples = [ids.example(row["question"], row["aligned_answer"]) for row in cell.rows_of(CELLS[0], 400)]
    assert 215 < sum(len(e.ids) for e in examples) / 400 < 235
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = cell.SHAPES["14b"] | sizes | {"vocab_size": 500, "num_key_value_heads": 1}
    model = Decoder(DecoderConfig.from_hf(config)).requires_grad_(False)
    seconds = cell.train_cells(model, 24, str(tmp_path), "cpu")
    assert len(seconds) == 2 and len(list(tmp_path.glob("*/adapter_model.safetensors"))) == 2


def test_calibration_lists_estimate_beside_measured_and_leaves_out_worlds_that_were_cut_off(bench, tmp_path):
    calibrate, made_with = bench("calibrate"), {"made_with": {"device": "NVIDIA H100 80GB HBM3"}}
    goals = [{"what": "a step", "measured": 3.0, "unit": "s", "at_most": 4, "met": True}]
    write_json(tmp_path / "gpu" / "opd.json", made_with | {"goals": goals})
    for seed, seconds in enumerate((300, 340, 20)):
        folder = tmp_path / "world1" / f"world1-seed{seed}"
        write_json(folder / "summary.json", made_with)
        write_json(folder / "wall.json", {"seconds": seconds, "from_nothing": seed < 2})
    calibrate.estimates = lambda gpu: {"a step": 3.3}
    for _ in range(2):  # the second time, the file itself is among the results
        calibrate.main(calibrate.Config(str(tmp_path / "gpu"), str(tmp_path)))
        assert json.loads((tmp_path / "gpu" / "calibration.json").read_text()) == [
            {"what": "a step", "estimate": 3.3, "measured": 3.0, "unit": "s", "gpu": "h100"},
            {"what": "World 1 from nothing", "estimate": None, "measured": 320, "unit": "s", "gpu": "h100"},
        ]
