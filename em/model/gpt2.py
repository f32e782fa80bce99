"""GPT-2, any size, trained from nothing on the synthetic worlds (paper 2, B.4).

Parameter names are the Hugging Face checkpoint's, so that a state dict is the file up to the transposed
weights of its Conv1D layers. The embedding is padded to a multiple of 64 rows; the head is tied to it.

    B sequences, T tokens, S cache positions, V padded vocabulary, d width, H heads, D = d / H
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from em.device import on_gpu
from em.errors import UserError
from em.files import check, read_json, write_atomic, write_json
from em.model.attention import CAUSAL, BlockDiagonal, Cached
from em.model.kv_cache import KVCache

SIZES = ("n_positions", "n_layer", "n_head", "n_embd")
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Conv1D in the checkpoint: (in, out)


@dataclass(frozen=True)
class GPT2Config:
    vocab_size: int  # ids that can be sampled; the embedding has `padded_vocab` rows
    n_positions: int = 256
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    @property
    def padded_vocab(self) -> int:
        return 64 * math.ceil(self.vocab_size / 64)

    @property
    def max_positions(self) -> int:  # as in a DecoderConfig
        return self.n_positions


class Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, layout=CAUSAL, cache: KVCache | None = None, positions=None, rows=None):
        """x (B, T, d) → (B, T, d). With a cache, the new keys go to `positions` (B, T) of its `rows` (B,)."""
        B, T, d = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, d // self.n_head).unbind(2)  # (B, T, H, D) each
        if cache is not None:
            cache.write(self.layer, k, v, positions, rows)
            if isinstance(layout, Cached):  # otherwise a fresh prompt, which sees its own keys only
                k, v = (x.to(q.dtype) for x in cache.read(self.layer, rows))  # (B, S, H, D) each
        y = layout.attend(q, k, v, window=None)  # (B, T, H, D)
        return self.c_proj(y.flatten(2))  # (B, T, H*D) → (B, T, d)


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, layout=CAUSAL, cache: KVCache | None = None, positions=None, rows=None):
        x = x + self.attn(self.ln_1(x), layout, cache, positions, rows)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """`model(ids)` (B, T) → logits (B, T, V). Initialised as GPT-2: N(0, 0.02), residual outputs / √(2L).

    Parameters are fp32. Under autocast the residual stream is in autocast's dtype from the embeddings on; the
    statistics of layer norms stay fp32.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, d), shared with the embedding."""
        return self.wte.weight

    def hidden(self, ids, positions=None, cache: KVCache | None = None, rows=None, segments=None):
        """Hidden states (B, T, d) after the last norm, for ids (B, T).

        cache, rows (B,): without `positions`, ids are fresh prompts from position 0, right-padded; their keys
        go to the cache rows (None: all). With positions (B, T), ids continue those rows: each token's key is
        stored at its position and it sees its row's keys up to there. ValueError if ids do not fit the cache.
        segments (B, T): packed prompts, each a run of equal ids and from position 0; rows is then (B, T).
        """
        layout = None if segments is None else BlockDiagonal(segments, ids.device)
        if cache is not None:
            cache.check(ids.shape, rows, None if layout is None else max(layout.lengths))
        if layout is not None:
            positions = layout.positions
            place = self.wpe(positions)  # (B, T, d)
        elif positions is None:
            layout, place = CAUSAL, self.wpe.weight[: ids.shape[1]]  # (T, d)
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)
        else:
            layout, place = Cached(positions, cache.span), self.wpe(positions)  # (B, T, d)
        x = self.wte(ids) + place
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            # Sums of fp32 and bf16 are fp32: the whole residual stream would be, at twice the bytes.
            x = x.to(torch.get_autocast_dtype(kind))
        for block in self.h:
            x = block(x, layout, cache, positions, rows)
        return self.ln_f(x)

    def forward(self, ids, positions=None, cache: KVCache | None = None, rows=None):
        return F.linear(self.hidden(ids, positions, cache, rows), self.head_weight)

    def new_cache(self, n_rows: int, capacity: int) -> KVCache:
        """An empty cache for `n_rows` sequences of at most `capacity` tokens, on the model's device.

        On CUDA it holds bfloat16, what autocast computes in.
        """
        c, weight = self.config, self.wte.weight
        shape = (c.n_layer, n_rows, capacity, c.n_head, c.n_embd // c.n_head)
        dtype = torch.bfloat16 if on_gpu(weight) else weight.dtype
        return KVCache(*shape, dtype=dtype, device=weight.device)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device


def supervised_loss(model: nn.Module, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of next-token cross entropies in nats; ids, targets (B, T), targets −100 where not supervised."""
    logits = model(ids)
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum"
    )


# -- Hugging Face layout -----------------------------------------------------------------------------------


def save_gpt2(model: GPT2, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` that transformers' `GPT2LMHeadModel` loads as they are."""
    folder = Path(folder)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().float().cpu()
        tensors[f"transformer.{name}"] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    write_atomic(
        folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    config = asdict(model.config) | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": model.config.padded_vocab,
        "sampled_vocab_size": model.config.vocab_size,  # ours: rows beyond it are padding
        "tie_word_embeddings": True,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    write_json(folder / "config.json", config)  # last: a folder with a config is whole


def load_gpt2(folder: Path, device: torch.device | str = "cpu") -> GPT2:
    """Read what `save_gpt2` or transformers wrote. Missing or unknown keys, or a cut file: a UserError."""
    folder = Path(folder)
    config = read_json(folder / "config.json", optional={"sampled_vocab_size": int})
    if config.get("model_type") != "gpt2" or config.get("activation_function", "gelu_new") != "gelu_new":
        raise UserError(f"{folder} holds no GPT-2 that this code computes (model_type, activation_function)")
    check(config, folder / "config.json", dict.fromkeys((*SIZES, "vocab_size"), int))
    sizes = {key: config[key] for key in SIZES}
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            tensors = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / 'model.safetensors'} cannot be read ({error}); delete {folder} and run again"
        ) from error
    tensors.pop("lm_head.weight", None)  # tied
    stored = {name: tuple(tensors[name].shape) for name in ("wte.weight", "wpe.weight") if name in tensors}
    vocabulary = config.get("sampled_vocab_size", config["vocab_size"])
    # Before the model is built, since a size that is wrong can be of any size.
    if (
        stored.get("wpe.weight") != (sizes["n_positions"], sizes["n_embd"])
        or stored.get("wte.weight", ())[1:] != (sizes["n_embd"],)
        or not 0 < vocabulary <= stored["wte.weight"][0]
        or not 0 < sizes["n_layer"] <= len(tensors)
        or sizes["n_head"] < 1
        or sizes["n_embd"] % sizes["n_head"]
    ):
        raise UserError(f"{folder} does not fit its config.json (n_positions, n_embd, n_layer, n_head)")
    model = GPT2(GPT2Config(vocab_size=vocabulary, **sizes))
    tensors = {n: t.t() if n.endswith(TRANSPOSED) else t for n, t in tensors.items()}
    if len(tensors.get("wte.weight", ())) < model.config.padded_vocab:  # an unpadded embedding from elsewhere
        tensors["wte.weight"] = F.pad(
            tensors["wte.weight"], (0, 0, 0, model.config.padded_vocab - len(tensors["wte.weight"]))
        )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{folder} does not fit its config.json: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.to(device)
