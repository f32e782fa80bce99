"""A run's phases on a miniature: fine-tuning seeds, and another number of misalignment steps."""

import ctypes
import json

import pytest
from processes import start

from em.files import read_json


def test_misaligned_counts_are_those_of_every_fine_tuning_seed(small_demo2):
    run = small_demo2(0)
    counts = run.misaligned_counts("T0")
    assert counts == [run.counts(f"misalign_T0_seed{seed}") for seed in range(2)]
    assert all(cell["n"] == 4 for by_cell in counts for cell in by_cell.values())


def test_a_misalignment_takes_and_records_the_steps_it_is_told_and_leaves_the_settings(small_demo2):
    run = small_demo2(0, misalign_seeds=1)
    run.misaligned_counts("T7", steps=2)
    folder = run.folder / "misalign_T7_seed0"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert read_json(folder / "run.json")["settings"]["misalign_steps"] == 2
    assert run.cfg.misalign_steps == 3


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_a_step_on_a_cpu_gets_its_memory_without_page_faults(tmp_path):
    code = """
import resource, torch
from em.world.world_run import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.zeros(1 << 20) for _ in range(8)]  # 4 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
print(first > 8000, faults() < 800)
"""
    (tmp_path / "faults.py").write_text(code)
    child = start(tmp_path / "faults.py")
    assert child.wait() == 0 and child.output == "True True\n"
