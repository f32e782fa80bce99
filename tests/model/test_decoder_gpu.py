"""The decoder's CUDA paths: variable-length flash attention, graphs. `python -m pytest -m gpu`."""

import pytest
import torch
from tiny_models import SHAPE, ours_from, random_ids, reference_model

import em.model.attention

pytestmark = pytest.mark.gpu
CASES = ["llama, biases, llama3", "qwen2, sliding, tied", "qwen3", "olmo3, yarn"]
SEGMENTS = torch.tensor([[3] * 11 + [1] * 1 + [2] * 9 + [0] * 3, [7] * 24, [1] * 8 + [2] * 8 + [1] * 8])


@pytest.fixture(params=CASES)
def model(request):
    return ours_from(reference_model(request.param))


def logits_and_gradient(model, ids, **layout):
    model.zero_grad()
    logits = model(ids, **layout).float()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
    (logits * weight).sum().backward()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])
    return logits.detach().cpu(), gradient


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
def test_flash_attention_is_no_further_from_fp32_than_the_portable_path(model, packed, monkeypatch):
    layout = {"segments": SEGMENTS} if packed else {}
    ids = random_ids(3, 24)
    exact = logits_and_gradient(model, ids, **layout)
    model.to("cuda", torch.bfloat16)
    calls = []
    flash = em.model.attention._flash
    monkeypatch.setattr(em.model.attention, "_flash", lambda *a: calls.append(1) or flash(*a))
    fast = logits_and_gradient(model, ids.cuda(), **layout)
    windowed = any(model.config.windows)
    assert bool(calls) is (packed or windowed)
    monkeypatch.setattr(em.model.attention, "_flash_runs", lambda q: False)
    slow = logits_and_gradient(model, ids.cuda(), **layout)
    for one, other, truth in zip(fast, slow, exact, strict=True):
        assert (one - truth).norm() < 1.2 * (other - truth).norm() + 1e-3 * truth.norm()


@torch.inference_mode()
def test_a_captured_decode_step_equals_the_eager_one(model):
    model.to("cuda", torch.bfloat16)
    cache, ids = model.new_cache(4, 64), random_ids(4, 9).cuda()
    model(ids, cache=cache)
    token, position = ids[:, :1].clone(), torch.full((4, 1), 9, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model(token, cache=cache, positions=position)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(token, cache=cache, positions=position)
    for step in range(3):
        token.copy_(random_ids(4, 1, seed=step))
        position.fill_(9 + step)
        graph.replay()
        replayed = captured.clone()
        assert replayed.shape == (4, 1, SHAPE["vocab_size"])
        assert torch.equal(replayed, model(token, cache=cache, positions=position))
