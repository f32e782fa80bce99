"""Loading and saving checkpoints, with transformers as the other party."""

import json
import re
import shutil

import pytest
import torch
import transformers
from processes import start
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, IDS, SHAPE, one_line, saved_by_transformers

from em.errors import UserError
from em.model.checkpoint import load_model, save_model


def rewrite(path, change) -> None:
    """Apply `change(tensors)` to a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_config(folder, **change) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


# -- loading and saving --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", [{}, {"max_shard_size": "12KB"}], ids=["single", "sharded"])
def test_what_transformers_saves_we_load_with_the_same_logits(tmp_path, family, shard):
    expected = saved_by_transformers(tmp_path, family, **shard)
    assert (tmp_path / "model.safetensors.index.json").exists() is bool(shard)
    model = load_model(tmp_path)
    torch.testing.assert_close(model(IDS), expected, atol=2e-5, rtol=0)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [10**9, 12_000], ids=["single", "sharded"])
def test_what_we_save_transformers_and_we_load_bit_for_bit(tmp_path, family, shard_bytes):
    saved_by_transformers(tmp_path / "one", family)
    model = load_model(tmp_path / "one")
    save_model(model, tmp_path / "two", shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("two/*.safetensors"))
    assert (len(files) > 1) is (shard_bytes == 12_000)
    assert all(file.stat().st_size < shard_bytes + 20_000 for file in files)
    again = load_model(tmp_path / "two").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=2e-5, rtol=0)


def test_weights_arrive_in_the_wanted_dtype_and_are_saved_in_it(tmp_path):
    saved_by_transformers(tmp_path / "half", dtype=torch.bfloat16)
    assert load_model(tmp_path / "half").head_weight.dtype == torch.float32  # what a CPU computes in
    half = load_model(tmp_path / "half", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save_model(half, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


def anonymous_memory() -> int:
    """Bytes of host memory that no file backs."""
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read())[1]) * 1024


def test_loading_makes_no_copy_of_the_weights_in_host_memory(tmp_path):
    shape = SHAPE | dict(vocab_size=20_000, hidden_size=512, num_attention_heads=8)
    config = transformers.AutoConfig.for_model("qwen2", **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="30MB")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    before = anonymous_memory()
    model = load_model(tmp_path)
    assert size > 80_000_000
    assert anonymous_memory() - before < 0.2 * size
    assert model.head_weight.sum().isfinite()


def test_a_tokenizer_travels_with_a_saved_model(tmp_path):
    saved_by_transformers(tmp_path / "one")
    for name, text in {
        "tokenizer.json": '{"a": 1}',
        "chat_template.jinja": "{{ x }}",
        "notes.txt": "no",
    }.items():
        (tmp_path / "one" / name).write_text(text)
    save_model(load_model(tmp_path / "one"), tmp_path / "two", tokenizer_from=tmp_path / "one")
    assert (tmp_path / "two" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == "{{ x }}"
    assert not (tmp_path / "two" / "notes.txt").exists()


# -- damaged and mismatched folders --------------------------------------------------------------------------


def drop(name):
    return lambda folder: rewrite(folder / "model.safetensors", lambda tensors: tensors.pop(name))


def add(name, tensor):
    return lambda folder: rewrite(
        folder / "model.safetensors", lambda tensors: tensors.update({name: tensor})
    )


def only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (
            add("model.layers.9.mlp.up_proj.weight", torch.ones(2)),
            r"has.* model\.layers\.9\.mlp\.up_proj\.weight",
        ),
        (
            add("model.norm.weight", torch.ones(31)),
            r"model\.norm\.weight has shape \(31,\).* asks for \(32,\)",
        ),
        (lambda folder: rewrite_config(folder, vocab_size=121), r"embed_tokens\.weight|lm_head\.weight"),
        (
            lambda folder: rewrite_config(folder, num_hidden_layers=2, layer_types=None),
            r"layers\.2\..* and 9 more",
        ),
        (only_bin, r"but pytorch_model\.bin; only safetensors are read"),
        (lambda folder: cut(folder / "model.safetensors"), r"model\.safetensors is truncated or damaged"),
        (not_safetensors, r"model\.safetensors is truncated or damaged"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
        (lambda folder: rewrite_config(folder, model_type="mamba"), "model_type 'mamba'"),
        (
            lambda folder: rewrite_config(folder, tie_word_embeddings=True),
            "lm_head.weight is not the embedding",
        ),
    ],
)
def test_a_damaged_or_mismatched_folder_is_named_in_one_line(tmp_path, damage, message):
    saved_by_transformers(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in one_line(caught)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shards, index: shards[1].unlink(), r"lacks model-00002-of-\d+\.safetensors, which its index"),
        (lambda shards, index: cut(shards[1]), r"model-00002-of-\d+\.safetensors is truncated"),
        (lambda shards, index: shutil.copy(shards[0], shards[1]), r"00002-of-\d+\.safetensors repeats"),
        (lambda shards, index: index.write_text('{"weight_map": {}}'), "has no weight_map"),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_named_in_one_line(tmp_path, damage, message):
    saved_by_transformers(tmp_path, max_shard_size="12KB")
    damage(sorted(tmp_path.glob("*.safetensors")), tmp_path / "model.safetensors.index.json")
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    one_line(caught)


@torch.no_grad()
def test_a_repeated_tied_head_and_stored_rotary_frequencies_are_accepted(tmp_path):
    expected = saved_by_transformers(tmp_path, "llama")
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    add("lm_head.weight", embedding.clone())(tmp_path)
    add("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))(tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(IDS), expected, atol=2e-5, rtol=0)


def test_a_full_disk_leaves_no_model_behind_and_says_so(tmp_path):
    saved_by_transformers(tmp_path / "one")
    script = tmp_path / "save.py"
    script.write_text(
        "import resource, signal, sys; from em.model.checkpoint import load_model, save_model\n"
        "from em.errors import UserError\n"
        "model = load_model(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: save_model(model, sys.argv[2])\n"
        "except UserError as error: print(error)\n"
    )
    child = start(script, tmp_path / "one", tmp_path / "two")
    assert child.wait() == 0
    assert re.match(r"cannot write .*model\.safetensors: .*free some space", child.output)
    assert not list((tmp_path / "two").iterdir())


def test_a_folder_that_holds_a_model_is_not_overwritten(tmp_path):
    saved_by_transformers(tmp_path)
    with pytest.raises(UserError, match="already holds a model"):
        save_model(load_model(tmp_path), tmp_path)
