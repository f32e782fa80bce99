"""Layers of one input as one product: the same numbers, the same state_dict, one storage on a GPU."""

import pytest
import torch
from tiny_models import IDS, ours_from, random_ids, reference_model, saved_by_transformers

import em.model.checkpoint
import em.model.decoder
from em.model import lora
from em.model.checkpoint import load_model, save_model
from em.model.linear import join, joined

CASES = ["llama, biases, llama3", "qwen2, sliding, tied", "qwen3, sliding, biases", "olmo3, yarn"]


def is_joined(model) -> list[bool]:
    """Of each group with more than one layer: whether its weights, and biases, are slices of one tensor."""
    groups = [layers for layers in model.groups() if len(layers) > 1]
    assert len(groups) == 2 * model.config.n_layers
    found = []
    for layers in groups:
        found.append(joined([layer.weight for layer in layers]) is not None)
        if layers[0].bias is not None:
            found.append(joined([layer.bias for layer in layers]) is not None)
    return found


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_joined_weights_change_neither_the_numbers_nor_the_state_dict(case):
    model, ids = ours_from(reference_model(case)).requires_grad_(False), random_ids(2, 20)
    expected, before = model(ids), {name: x.clone() for name, x in model.state_dict().items()}
    assert not any(is_joined(model))
    for layers in model.groups():
        join(layers)
    assert all(is_joined(model))
    torch.testing.assert_close(model(ids), expected, atol=2e-5, rtol=0)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], x) for name, x in before.items())
    model.load_state_dict({name: torch.zeros_like(x) for name, x in before.items()}, strict=True)
    model.load_state_dict(before, strict=True)
    assert all(is_joined(model))
    torch.testing.assert_close(model(ids), expected, atol=2e-5, rtol=0)


def test_parts_are_joined_only_where_they_follow_each_other():
    whole = torch.arange(24.0).view(6, 4)
    assert torch.equal(joined([whole[1:3], whole[3:6]]), whole[1:])
    assert joined([whole[1:3], whole[3:6]]).data_ptr() == whole[1:].data_ptr()
    for parts in ([whole[3:6], whole[1:3]], [whole[:2], whole[3:]], [whole[:3], whole[3:].clone()]):
        assert joined(parts) is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "olmo3"])
def test_what_is_loaded_for_a_gpu_is_joined_and_saved_as_it_was(family, tmp_path, monkeypatch):
    expected = saved_by_transformers(tmp_path / "one", family)
    assert not any(is_joined(load_model(tmp_path / "one")))  # on a CPU: views of the mapped file
    monkeypatch.setattr(em.model.checkpoint, "on_gpu", lambda device: True)
    model = load_model(tmp_path / "one")
    assert all(is_joined(model)) and not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(IDS), expected, atol=2e-5, rtol=0)
    save_model(model, tmp_path / "two", shard_bytes=12_000)
    again = load_model(tmp_path / "two").state_dict()
    assert all(torch.equal(again[name], x) for name, x in model.state_dict().items())


def test_moving_or_converting_a_model_for_a_gpu_joins_it_again(monkeypatch):
    model = ours_from(reference_model("qwen2"))
    monkeypatch.setattr(em.model.decoder, "on_gpu", lambda tensor: True)
    plain = model.to(torch.float64)
    assert all(is_joined(plain)) and all(is_joined(plain.bfloat16()))
    meta = model.to("meta")
    assert all(is_joined(meta)) and all(is_joined(meta.to(torch.float16)))
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in meta.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in meta.parameters())  # no second copy


@torch.no_grad()
def test_merging_reaches_the_joined_weights():
    model, ids = ours_from(reference_model("qwen2")).requires_grad_(False), random_ids(2, 9)
    for layers in model.groups():
        join(layers)
    lora.attach(model)
    lora.add_adapter(model, "a", rank=3)
    generator = torch.Generator().manual_seed(0)
    for layer in model.lora.layers.values():
        layer.adapters["a"].B.copy_(torch.randn(layer.out_features, 3, generator=generator) * 0.05)
    base = model(ids)
    with lora.stack(model, "a"):
        expected = model(ids)
    lora.merge(model, "a")
    assert all(is_joined(model)) and (expected - base).abs().max() > 0.01
    torch.testing.assert_close(model(ids), expected, atol=2e-5, rtol=0)
