import copy

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from em.errors import UserError
from em.files import read_json, write_json
from em.model.gpt2 import GPT2, GPT2Config, load_gpt2, save_gpt2, supervised_loss
from em.model.kv_cache import KVCache

TINY = GPT2Config(vocab_size=70, n_positions=40, n_layer=3, n_head=4, n_embd=32)


def perturbed(module):
    """Every parameter moved, norms and biases included: fresh ones are 0 or 1 and hide swaps."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return module


@pytest.fixture
def model():
    torch.manual_seed(0)
    return perturbed(GPT2(TINY)).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 70, (3, 25), generator=torch.Generator().manual_seed(1))


def test_transformers_loads_our_export_and_gives_the_same_logits_and_gradients(model, ids, tmp_path):
    save_gpt2(model, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=2e-4, rtol=1e-4)
    model(ids).logsumexp(-1).sum().backward()
    theirs(ids).logits.logsumexp(-1).sum().backward()
    ours = dict(model.named_parameters())
    for name, p in theirs.transformer.named_parameters():
        grad = p.grad.t() if p.shape != ours[name].shape or name.endswith("attn.c_proj.weight") else p.grad
        torch.testing.assert_close(ours[name].grad, grad, atol=1e-3, rtol=1e-3)


def test_we_load_transformers_export_with_an_unpadded_vocabulary(ids, tmp_path):
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=70, n_positions=40, n_layer=2, n_head=4, n_embd=32)
    theirs = perturbed(transformers.GPT2LMHeadModel(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_gpt2(tmp_path)
    torch.testing.assert_close(ours(ids)[..., :70], theirs(ids).logits, atol=2e-4, rtol=1e-4)


def test_save_and_load_keep_every_bit_and_the_sampled_vocabulary(model, tmp_path):
    save_gpt2(model, tmp_path)
    again = load_gpt2(tmp_path)
    assert again.config == model.config and model.config.padded_vocab == 128
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_cached_steps_equal_the_full_forward_on_ragged_rows(model, ids):
    full = model(ids)
    lengths = torch.tensor([5, 12, 9])
    cache = model.new_cache(3, 40)
    positions = torch.arange(12).expand(3, 12)
    prefill = model(ids[:, :12], positions, cache)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(prefill[row, :length], full[row, :length], atol=1e-4, rtol=1e-4)
    for _ in range(10):
        step = model(ids.gather(1, lengths[:, None]), lengths[:, None], cache)
        torch.testing.assert_close(step[:, 0], full[torch.arange(3), lengths], atol=1e-4, rtol=1e-4)
        lengths += 1


@torch.no_grad()
def test_prompts_packed_into_one_row_fill_their_cache_rows(model, ids):
    cache, rows, lengths = model.new_cache(4, 40), torch.tensor([2, 0, 3]), torch.tensor([5, 12, 9])
    packed = torch.cat([row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)])[None]
    place = (x.repeat_interleave(lengths)[None] for x in (rows, torch.arange(3)))
    model.hidden(packed, None, cache, *place)
    step = model(ids.gather(1, lengths[:, None]), lengths[:, None], cache, rows)
    torch.testing.assert_close(step[:, 0], model(ids)[torch.arange(3), lengths], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("n_rows, rows, length", [(2, None, 5), (3, [0, 1], 5), (3, None, 65)])
def test_ids_that_do_not_fit_the_cache_are_refused(model, n_rows, rows, length):
    ids, rows = torch.zeros(3, length, dtype=torch.long), None if rows is None else torch.tensor(rows)
    with pytest.raises(ValueError, match="do not fit"):
        model(ids, cache=model.new_cache(n_rows, 64), rows=rows)


@torch.no_grad()
def test_a_decode_step_never_reads_a_tensor_on_the_host(model):
    with FakeTensorMode(allow_non_fake_inputs=True):  # has shapes but no values: reading one raises
        fake, cache = copy.deepcopy(model), KVCache(3, 2, 40, 4, 8, dtype=torch.float32, device="cpu")
        logits = fake(torch.ones(2, 1).long(), torch.ones(2, 1).long(), cache)
        assert logits.shape == (2, 1, TINY.padded_vocab)


def test_a_token_does_not_see_the_future(model, ids):
    changed = ids.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 70
    assert torch.equal(model(ids)[:, :15], model(changed)[:, :15])


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=512, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            expected = 0.02 / (2 * 8) ** 0.5 if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.03
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p))


def test_loss_counts_supervised_positions_only(model, ids):
    targets = torch.full_like(ids, -100)
    targets[0, 3:6] = ids[0, 4:7]
    log_probs = model(ids).double().log_softmax(-1)
    expected = -sum(log_probs[0, t, ids[0, t + 1]] for t in range(3, 6))
    torch.testing.assert_close(supervised_loss(model, ids, targets).double(), expected, atol=1e-4, rtol=1e-5)


def test_autocast_rounds_the_residual_stream_and_stays_within_its_error_budget(model, ids):
    """No further from fp32, in loss and gradient, than the same model in bf16 throughout with some room."""

    def gradient(model, loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters()])

    exact = gradient(model, supervised_loss(model, ids, ids))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.wte(ids).dtype == torch.float32 and model.h[0](model.wte(ids)).dtype == torch.float32
        assert model.hidden(ids).dtype == torch.bfloat16  # the same blocks behind rounded embeddings
        mixed = gradient(model, supervised_loss(model, ids, ids))
    low = copy.deepcopy(model).bfloat16()
    throughout = gradient(low, supervised_loss(low, ids, ids))
    assert (mixed - exact).norm() < 1.1 * (throughout - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("damage", ["truncated", "key missing", "other sizes", "no folder"])
def test_a_damaged_checkpoint_is_one_clear_line(model, tmp_path, damage):
    folder = tmp_path / "model"
    if damage != "no folder":
        save_gpt2(model, folder)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "key missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["transformer.h.1.ln_1.bias"]
        save_file(tensors, weights)
    elif damage == "other sizes":
        write_json(folder / "config.json", read_json(folder / "config.json") | {"n_embd": 64})
    with pytest.raises(UserError) as error:
        load_gpt2(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
