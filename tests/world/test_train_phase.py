"""The GPU's way of training a phase, on a CPU: bf16 autocast and a compiled loss, here by Dynamo alone."""

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from em.model.gpt2 import GPT2, GPT2Config, supervised_loss
from em.run import Run
from em.world import world_run
from em.world.world_run import train_phase

CFG = SimpleNamespace(weight_decay=0.01, clip=1.0, save_minutes=9.0)


@pytest.fixture
def gpu_path(monkeypatch):
    """Phases as on a GPU, each compiled however short; graphs are run by PyTorch and not by Inductor."""
    torch._dynamo.reset()
    loss = torch.compile(supervised_loss, dynamic=False, backend="eager")
    monkeypatch.setattr(world_run, "on_gpu", lambda device: True)
    monkeypatch.setattr(world_run, "COMPILED_FROM", 0)
    monkeypatch.setattr(world_run, "_compiled_loss", lambda: loss)
    yield
    torch._dynamo.reset()


def compiled_frames() -> int:
    return counters["frames"]["ok"]


def test_a_process_of_many_worlds_and_models_compiles_one_frame_a_batch_shape(gpu_path, small_demo2):
    before = compiled_frames()
    # Pretraining 4 × 48, alignment 8 × 48 and misalignment 7 × 48, of two worlds and six misaligned models.
    for seed in (0, 1):
        run = small_demo2(seed, misalign_batch=7, steps=2, align_steps=2, align_examples=200 + seed)
        for task in ("T0", "T7"):
            run.misaligned_counts(task, steps=2)
    assert compiled_frames() - before == 3


def test_sets_of_any_length_share_a_few_batch_lengths(gpu_path, small_demo2):
    run = small_demo2(0, length=192, steps=1, align_steps=1)
    limits = range(run.alignment.total.min(), run.alignment.total.max() + 1)
    sets = [run.alignment.take(run.alignment.total <= limit) for limit in limits]
    assert len({data.total.max() for data in sets}) > 2
    assert {run.batches(data, 4, 0)[0][0].shape[1] for data in sets} == {64}
    run.cfg.length = 48  # too few places for 64
    assert run.batches(run.alignment, 4, 0)[0][0].shape[1] == 48


def test_a_phase_computes_its_stream_in_bf16_and_keeps_fp32_weights(gpu_path, tmp_path):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(70, 16, 2, 2, 32))
    seen = []
    for block in model.h:
        block.register_forward_hook(lambda block, given, x: seen.append(x.dtype))
    ids = torch.randint(0, 70, (4, 17)).numpy()
    batches = [(ids[:, :-1].copy(), ids[:, 1:].copy())] * 2
    train_phase(CFG, Run(tmp_path, "x", {}), model, batches, 2, 1e-3, 0, "constant")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
