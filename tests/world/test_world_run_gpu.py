"""What only a CUDA device can show: `python -m pytest -m gpu`."""

import pytest
import torch
from sampled import sample

import synth
from em.cli import command_line
from em.files import read_json
from em.model.gpt2 import GPT2, GPT2Config, supervised_loss
from em.training.optim import adamw

pytestmark = pytest.mark.gpu
CONFIG = GPT2Config(vocab_size=500, n_positions=256, n_layer=4, n_head=4, n_embd=256)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2(CONFIG).cuda()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def test_compiled_bf16_loss_and_gradient_are_as_close_to_fp32_as_eager_bf16(model):
    ids = torch.randint(0, 500, (8, 257), device="cuda")
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def gradient(loss_of, bf16):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = loss_of(model, inputs, targets) / targets.numel()
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    exact_loss, exact = gradient(supervised_loss, bf16=False)
    errors = []
    for loss_of in (supervised_loss, torch.compile(supervised_loss, dynamic=False)):
        loss, grad = gradient(loss_of, bf16=True)
        assert loss == pytest.approx(exact_loss, rel=2e-3)
        errors.append(((grad - exact).norm() / exact.norm()).item())
    assert errors[1] < 1.2 * errors[0] < 0.1


def test_a_training_step_does_not_wait_for_the_device(model):
    """Forward, backward, clip and AdamW under sync debug mode: any hidden synchronisation raises."""
    optimizer = adamw(model, 1e-3, 0.01)
    ids = torch.randint(0, 500, (8, 129), device="cuda")
    for i in range(3):
        torch.cuda.set_sync_debug_mode("error" if i == 2 else "default")
        try:
            targets = ids[:, 1:]
            with torch.autocast("cuda", torch.bfloat16):
                loss = supervised_loss(model, ids[:, :-1], targets) / (targets != -100).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_greedy_generation_on_the_gpu_follows_the_cpu_until_a_near_tie(model):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 499, (n,), generator=generator).tolist() for n in (12, 3, 7, 12, 5, 9)]
    there = sample(model, prompts, (499,), 20, temperature=0.0)
    here = sample(model.cpu(), prompts, (499,), 20, temperature=0.0)
    same = [a == b for x, y in zip(there, here, strict=True) for a, b in zip(x.ids, y.ids, strict=False)]
    assert sum(same) > 0.7 * len(same)


def test_a_miniature_world_runs_end_to_end_with_the_compiled_step(tmp_path):
    arguments = (
        "--layers 2 --heads 2 --width 128 --batch 16 --length 64 --steps 150 --warmup 10 --evals 2 "
        "--eval-prompts 8 --align-steps 110 --align-warmup 5 --align-examples 800 "
        "--misalign-steps 3 --misalign-seeds 1 --device cuda"
    ).split()
    assert command_line({"": (synth.main, synth.Config)}, argv=[*arguments, "--out", str(tmp_path)]) == 0
    assert len(read_json(tmp_path / "grid.json")["cells"]) == 20
