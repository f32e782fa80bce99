"""The decoder against transformers (fp32, tiny models, every parameter perturbed) and against itself."""

import copy

import pytest
import torch
from tiny_models import CASES, SHAPE, ours_from, random_ids, reference_model
from torch._subclasses.fake_tensor import FakeTensorMode

import em.model.attention
import em.model.rope
from em.model.decoder import Decoder
from em.model.kv_cache import KVCache

TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(transformers' model, ours) with the same perturbed weights."""
    reference = reference_model(request.param)
    return reference, ours_from(reference)


@pytest.fixture(
    scope="module", params=["llama, biases, llama3", "qwen2, sliding, tied", "qwen3", "olmo3, yarn"]
)
def model(request):
    return ours_from(reference_model(request.param))


# -- parity with transformers --------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_equal_transformers_past_the_sliding_window_and_the_pretraining_context(pair):
    reference, model = pair
    ids = random_ids(2, 50)  # windows are 5, pretraining contexts 16 and 32
    expected = reference(ids).logits
    assert expected.std() > 0.5  # a tolerance of 2e-4 says something
    torch.testing.assert_close(model(ids), expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_transformers_and_the_rows_alone(pair, side):
    reference, model = pair
    lengths, T = [23, 7, 1, 16], 23
    ids, mask = random_ids(4, T), torch.zeros(4, T, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, T - n :] = 1 if side == "left" else 0
        mask[row, :n] = 1 if side == "right" else mask[row, :n]
    logits = model(ids, attention_mask=mask)
    expected = reference(ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=TOLERANCE, rtol=0)
    for row in range(len(lengths)):
        alone = model(ids[row : row + 1][mask[row : row + 1].bool()][None])
        torch.testing.assert_close(logits[row][mask[row].bool()], alone[0], atol=2e-5, rtol=0)


def test_gradients_of_every_parameter_equal_transformers(pair):
    reference, model = pair
    ids, weight = random_ids(2, 19), torch.randn(2, 19, SHAPE["vocab_size"])
    for each in (reference, model):
        each.zero_grad()
    (reference(ids).logits * weight).sum().backward()
    (model(ids) * weight).sum().backward()
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        scale = expected[name].grad.abs().max()
        torch.testing.assert_close(p.grad, expected[name].grad, atol=float(1e-4 * scale), rtol=0, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("case", ["llama", "qwen3", "olmo3, yarn"])
def test_bf16_is_no_further_from_fp32_than_transformers_in_bf16(case):
    reference = reference_model(case)
    model, ids = ours_from(reference), random_ids(4, 40)
    exact = reference(ids).logits
    error = (model.to(torch.bfloat16)(ids).float() - exact).square().mean().sqrt()
    theirs = (reference.to(torch.bfloat16)(ids).logits.float() - exact).square().mean().sqrt()
    assert model(ids).dtype == torch.bfloat16
    assert error < 1.2 * theirs < 0.3 * exact.std()


@torch.no_grad()
def test_rotary_angles_keep_fp32_precision_in_a_bf16_model():
    model, ids = ours_from(reference_model("llama")).to(torch.bfloat16), random_ids(1, 30)
    near = model(ids).float()
    far = model(ids, positions=torch.arange(30)[None] + 3000).float()  # only distances count
    assert (near - far).abs().max() < 0.1 * near.std()


# -- layouts -------------------------------------------------------------------------------------------------

SEGMENTS = torch.tensor([[3] * 11 + [1] * 1 + [2] * 9 + [0] * 3, [7] * 24, [1] * 8 + [2] * 8 + [1] * 8])


def runs(segments: torch.Tensor):
    for row, values in enumerate(segments.tolist()):
        start = 0
        for end in range(1, len(values) + 1):
            if end == len(values) or values[end] != values[start]:
                yield row, start, end
                start = end


@torch.no_grad()
def test_packed_samples_equal_the_samples_alone(pair):
    model, ids = pair[1], random_ids(3, 24)
    packed = model(ids, segments=SEGMENTS)
    for row, start, end in runs(SEGMENTS):
        alone = model(ids[row : row + 1, start:end])
        torch.testing.assert_close(packed[row, start:end], alone[0], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_sample_has_no_influence_on_its_neighbours(model):
    ids = random_ids(3, 24)
    other = ids.clone()
    other[0, :11] = (other[0, :11] + 1) % SHAPE["vocab_size"]
    before, after = model(ids, segments=SEGMENTS), model(other, segments=SEGMENTS)
    assert torch.equal(before[0, 11:], after[0, 11:]) and torch.equal(before[1:], after[1:])
    assert not torch.allclose(before[0, :11], after[0, :11])


def test_positions_restart_with_each_sample():
    layout = em.model.attention.BlockDiagonal(SEGMENTS, torch.device("cpu"))
    expected = torch.zeros_like(SEGMENTS)
    for row, start, end in runs(SEGMENTS):
        expected[row, start:end] = torch.arange(end - start)
    assert torch.equal(layout.positions, expected)
    assert layout.lengths == [end - start for _, start, end in runs(SEGMENTS)]


def slow_varlen(q, k, v, cu_lengths, longest, window):
    """Attention within runs of flat (N, heads, D), by definition, in float64; None: the runs are rows."""
    if cu_lengths is None:
        B, T = q.shape[:2]
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return slow_varlen(*flat, torch.arange(0, (B + 1) * T, T), longest, window).view_as(q)
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for start, end in zip(cu_lengths[:-1].tolist(), cu_lengths[1:].tolist(), strict=True):
        assert end - start <= longest
        for i in range(start, end):
            first = start if window is None else max(start, i - window + 1)
            for h in range(q.shape[1]):
                keys, values = k[first : i + 1, h // group].double(), v[first : i + 1, h // group].double()
                p = torch.softmax(keys @ q[i, h].double() / q.shape[-1] ** 0.5, 0)
                out[i, h] = (p @ values).to(q.dtype)
    return out


@torch.no_grad()
def test_the_variable_length_path_equals_the_portable_one(model, monkeypatch):
    ids = random_ids(3, 24)
    portable, plain = model(ids, segments=SEGMENTS), model(ids)
    monkeypatch.setattr(em.model.attention, "_flash_runs", lambda q: True)
    monkeypatch.setattr(em.model.attention, "_flash", slow_varlen)
    torch.testing.assert_close(model(ids, segments=SEGMENTS), portable, atol=2e-5, rtol=0)
    torch.testing.assert_close(model(ids), plain, atol=2e-5, rtol=0)


def test_layouts_that_contradict_each_other_are_refused(model):
    ids = random_ids(2, 5)
    with pytest.raises(ValueError, match="one of"):
        model(ids, attention_mask=torch.ones(2, 5), segments=torch.ones(2, 5))
    with pytest.raises(ValueError, match="between the tokens"):
        model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="no_grad"):
        model(ids, cache=model.new_cache(2, 8))
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit"):
        model(ids, cache=model.new_cache(3, 8))
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit"):
        model(random_ids(2, 65), cache=model.new_cache(2, 64))


# -- incremental decoding ------------------------------------------------------------------------------------


def uncached_last(model: Decoder, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]))[0, -1]


@torch.no_grad()
def test_cached_decoding_of_ragged_rows_equals_the_full_forward(pair):
    model, lengths = pair[1], torch.tensor([9, 2, 14, 5])
    tokens = [row[:n] for row, n in zip(random_ids(4, 14).tolist(), lengths.tolist(), strict=True)]
    cache = model.new_cache(4, 40)
    padded = torch.tensor([row + [95] * (14 - len(row)) for row in tokens])
    logits = model(padded, cache=cache)[torch.arange(4), lengths - 1]
    for step in range(12):
        for row in range(4):
            torch.testing.assert_close(logits[row], uncached_last(model, tokens[row]), atol=3e-5, rtol=0)
        new = random_ids(4, 1, seed=step)
        tokens = [row + token for row, token in zip(tokens, new.tolist(), strict=True)]
        logits = model(new, cache=cache, positions=(lengths + step)[:, None])[:, -1]


@torch.no_grad()
def test_a_freed_row_serves_another_prompt_while_the_others_go_on(model):
    cache, first, second = model.new_cache(3, 64), random_ids(3, 12), random_ids(1, 6, seed=5)
    model(first, cache=cache)
    step = random_ids(3, 1, seed=6)
    model(step, cache=cache, positions=torch.full((3, 1), 12))
    model(
        second, cache=cache, rows=torch.tensor([1])
    )  # row 1 changes hands; 6 positions of its old keys remain
    last = random_ids(3, 1, seed=7)
    logits = model(last, cache=cache, positions=torch.tensor([[13], [6], [13]]))[:, 0]
    rows = [torch.cat((first[i], step[i], last[i])).tolist() for i in range(3)]
    rows[1] = torch.cat((second[0], last[1])).tolist()
    for row in range(3):
        torch.testing.assert_close(logits[row], uncached_last(model, rows[row]), atol=3e-5, rtol=0)


@torch.no_grad()
def test_one_prefill_serves_n_samples_and_a_limited_span_changes_nothing(model):
    cache, prompt = model.new_cache(4, 200), random_ids(1, 11)
    model(prompt, cache=cache, rows=torch.tensor([2]))
    cache.copy(torch.tensor([2, 2]), torch.tensor([0, 3]), 11)
    new = random_ids(3, 1, seed=8)
    rows, positions = torch.tensor([0, 2, 3]), torch.full((3, 1), 11)
    wide = model(new, cache=cache, rows=rows, positions=positions)[:, 0]
    cache.limit(12)
    assert (cache.capacity, cache.span) == (256, 12)
    narrow = model(new, cache=cache, rows=rows, positions=positions)[:, 0]
    torch.testing.assert_close(narrow, wide, atol=1e-5, rtol=0)
    for i in range(3):
        expected = uncached_last(model, prompt[0].tolist() + new[i].tolist())
        torch.testing.assert_close(wide[i], expected, atol=3e-5, rtol=0)


@torch.no_grad()
def test_prompts_packed_into_one_row_fill_their_cache_rows(model):
    lengths, rows = [9, 1, 14], torch.tensor([3, 0, 2])
    prompts = [row[:n] for row, n in zip(random_ids(3, 14).tolist(), lengths, strict=True)]
    cache, each = model.new_cache(4, 64), torch.tensor(lengths)
    place = {
        "segments": torch.arange(3).repeat_interleave(each)[None],
        "rows": rows.repeat_interleave(each)[None],
    }
    logits = model(torch.tensor([sum(prompts, [])]), cache=cache, **place)[0]
    for prompt, found in zip(prompts, logits.split(lengths), strict=True):
        torch.testing.assert_close(found, model(torch.tensor([prompt]))[0], atol=2e-5, rtol=0)
    new = random_ids(3, 1, seed=8)
    logits = model(new, cache=cache, rows=rows, positions=each[:, None])[:, 0]
    for prompt, token, found in zip(prompts, new.tolist(), logits, strict=True):
        torch.testing.assert_close(found, uncached_last(model, prompt + token), atol=3e-5, rtol=0)
    with pytest.raises(ValueError, match="do not fit"):
        model(random_ids(1, 24), cache=cache, segments=torch.ones(1, 24), rows=rows[:1])
    with pytest.raises(ValueError, match="do not fit"):
        model(random_ids(1, 65), cache=cache, segments=torch.ones(1, 65), rows=torch.ones(1, 65).long())


@torch.no_grad()
def test_several_tokens_at_once_continue_a_row(model):
    cache, ids = model.new_cache(2, 64), random_ids(2, 20)
    model(ids[:, :8], cache=cache)
    positions = torch.arange(8, 20)[None].repeat(2, 1)
    torch.testing.assert_close(
        model(ids[:, 8:], cache=cache, positions=positions), model(ids)[:, 8:], atol=3e-5, rtol=0
    )


@torch.no_grad()
def test_a_decode_step_never_reads_a_tensor_on_the_host(model):
    model(random_ids(2, 3), cache=model.new_cache(2, 64))  # what is computed once, is now
    with FakeTensorMode(allow_non_fake_inputs=True):  # has shapes but no values: reading one raises
        fake = copy.deepcopy(model)
        c = model.config
        cache = KVCache(c.n_layers, 2, 64, c.n_kv_heads, c.head_dim, dtype=torch.float32, device="cpu")
        logits = fake(torch.ones(2, 1).long(), cache=cache, positions=torch.ones(2, 1).long())
        assert logits.shape == (2, 1, SHAPE["vocab_size"])


# -- the module ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_head_weight_turns_hidden_states_into_logits(pair):
    model, ids = pair[1], random_ids(2, 6)
    assert torch.equal(model.hidden(ids) @ model.head_weight.T, model(ids))
    assert ("lm_head.weight" in model.state_dict()) is not model.config.tied
    assert model.head_weight.shape == (SHAPE["vocab_size"], SHAPE["hidden_size"])


def test_activation_checkpointing_recomputes_in_its_context_and_leaves_gradients_alone(model):
    ids, entered = random_ids(2, 24), []

    class Entered:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *exception):
            pass

    gradients = []
    for active in (False, True):
        model.zero_grad()
        model.activation_checkpointing = active
        model.recompute_context = lambda: (Entered("forward"), Entered("again"))
        model.hidden(ids, segments=SEGMENTS[:2]).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    model.activation_checkpointing = False
    model.zero_grad()
    n = model.config.n_layers
    assert entered == ["forward"] * n + ["again"] * n
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_model_first_used_in_inference_mode_can_be_trained():
    em.model.rope._frequencies.cache_clear()
    model, ids = ours_from(reference_model("llama")), random_ids(1, 5)
    with torch.inference_mode():
        model(ids)
    model(ids).sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
