import time

import pytest
import torch

from em.run import Run
from em.training import metrics as module
from em.training.metrics import Metrics, StepTimer


def test_a_part_within_another_counts_as_its_own_alone(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    timer = StepTimer(torch.device("cpu"))
    with timer("student"):  # 0 to 5
        with timer("teacher"):  # 1 to 2
            pass
        with timer("teacher"):  # 3 to 4
            pass
    with timer("decode"):  # 6 to 7
        pass
    assert timer.read()() == {"seconds_teacher": 2, "seconds_student": 3, "seconds_decode": 1}
    assert timer.read()() == {}


@pytest.mark.parametrize("every, expected", [(1, [0, 1, 2, 3, 5, 5, 6, 8]), (3, [0, 0, 0, 0, 5, 5, 5, 8])])
def test_rows_from_a_gpu_are_written_when_the_next_are_on_their_way_and_at_a_flush_and_the_end(
    tmp_path, every, expected, monkeypatch
):
    monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
    run, written = Run(tmp_path, "train", {}), []
    with Metrics(run, "training", 8, every=every) as metrics:
        for step in range(1, 9):
            seconds = {"seconds_x": step}
            metrics.add({"step": step, "tokens": 1}, lambda s=seconds: s, loss=torch.tensor(step / 2))
            if step == 5:
                metrics.flush()
            written.append(len(run.metrics()))
    assert written == expected
    rows = [(row["step"], row["loss"], row["seconds_x"]) for row in run.metrics()]
    assert rows == [(k, k / 2, k) for k in range(1, 9)]


def test_what_is_done_while_paused_makes_no_step_slower(tmp_path, monkeypatch):
    clock = iter(
        [0, 2, 2, 100, 104, 104]
    )  # start; two steps of a second; the pause; two steps of two seconds
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    run = Run(tmp_path, "train", {})
    with Metrics(run, "training", 4) as metrics:
        for step in range(1, 5):
            metrics.add({"step": step, "tokens": 12}, loss=torch.tensor(1.0))
            if step == 2:
                with metrics.paused():
                    assert len(run.metrics()) == 2
    assert [row["tokens_per_s"] for row in run.metrics()] == [12, 12, 6, 6]
