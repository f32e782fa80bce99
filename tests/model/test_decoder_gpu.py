"""The decoder's CUDA paths: flash attention, decode kernels, graphs. `python -m pytest -m gpu`."""

import pytest
import torch
from tiny_models import SHAPE, ours_from, random_ids, reference_model

import em.model.attention
from em.model.decode import _decode_attention, _rotate_write, decode_attention, rotate_write
from em.model.head import logits
from em.model.rope import Rope

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
    assert len(calls) == model.config.n_layers
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


@torch.inference_mode()
def test_a_packed_prefill_and_its_steps_are_no_further_from_fp32_than_full_forwards(model):
    lengths, rows = torch.tensor([9, 1, 14]), torch.tensor([3, 0, 2])
    ids, new = random_ids(3, 14), random_ids(3, 1, seed=8)
    texts = [torch.cat((row[:n], token))[None] for row, n, token in zip(ids, lengths, new, strict=True)]
    exact = torch.stack([model(text)[0, -1] for text in texts])
    model.to("cuda", torch.bfloat16)
    full = torch.stack([model(text.cuda())[0, -1].float().cpu() for text in texts])
    cache = model.new_cache(4, 64)
    packed = torch.cat([text[0, :-1] for text in texts])[None].cuda()
    segments, owners = (x.repeat_interleave(lengths)[None] for x in (torch.arange(3), rows))
    model(packed, cache=cache, segments=segments, rows=owners.cuda())
    places = dict(cache=cache, rows=rows.cuda(), positions=lengths[:, None].cuda())
    steps = model(new.cuda(), **places)[:, 0].float().cpu()
    assert (steps - exact).norm() < 1.2 * (full - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("B, K, G, D", [(8, 8, 5, 128), (40, 8, 4, 128), (2, 3, 3, 64), (5, 12, 1, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_attention_kernel_is_no_further_from_float64_than_the_masked_one(B, K, G, D, window, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    options = dict(device="cuda", generator=generator)
    q = torch.randn(B, K * G, D, **options).to(dtype)
    keys, values = torch.randn(2, B, K, 768, D, **options).to(dtype).transpose(2, 3)
    positions = torch.randint(0, 768, (B,), **options)
    positions[0], positions[-1] = 0, 767
    case = keys, values, positions
    for row, last in enumerate(positions.tolist()):
        keys[row, last + 1 :] = values[row, last + 1 :] = float("inf")  # which would be seen at once
    found = decode_attention(q, *case, window)
    for x in (keys, values):
        x.masked_fill_(x.isinf(), 0)  # 0 times infinity would be NaN where a mask hides it
    assert torch.equal(found, decode_attention(q, *case, window))
    wide = (x.double().cpu() for x in (q, keys, values))
    exact = _decode_attention(*wide, positions.cpu(), window)
    error, masked = ((x.cpu() - exact).norm() for x in (found, _decode_attention(q, *case, window)))
    assert error <= 1.2 * masked + 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rotation_kernel_equals_its_twin(dtype):
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(3, 5, 56 * 128, generator=generator).to(dtype)
    positions, rows = torch.tensor([[3, 4, 5, 9, 10]]) + 3000, torch.tensor([[2], [0], [6]])
    results = []
    for device, apply in (("cpu", _rotate_write), ("cuda", rotate_write)):
        product = fused.to(device).split((40 * 128, 8 * 128, 8 * 128), -1)
        cache = torch.zeros(2, 7, 8, 3072, 128, dtype=dtype, device=device)
        table = (x.to(device) for x in Rope(theta=1e6).table(positions, 128))
        heads = (x.unflatten(-1, (-1, 128)) for x in product)
        turned = apply(*heads, *table, *cache, positions.to(device), rows.to(device))
        results.append([x.cpu() for x in (*turned, cache)])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found == 0, expected == 0)
        torch.testing.assert_close(
            found, expected, atol=1e-6, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5
        )


def test_logits_of_bf16_are_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 512, generator=generator).bfloat16() for n in (33, 1001))
    found = logits(hidden.cuda(), head.cuda()).cpu()
    torch.testing.assert_close(found.double(), hidden.double() @ head.double().t(), atol=2e-4, rtol=0)
