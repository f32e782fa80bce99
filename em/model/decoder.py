"""One decoder for Llama 3.x, Qwen2/2.5, Qwen3 and Olmo 3, the chat models of paper 3.1 and 4.

Module names are the checkpoints' own (`model.layers.0.self_attn.q_proj`), so a strict `load_state_dict` is
the loader; what differs between families is data in `DecoderConfig`. A tied model has no lm_head module, and
losses take `hidden(...)` and apply `head_weight` where they need it: logits of a whole batch are never built.

    B sequences, T tokens, S cache positions, V vocabulary, d width, D head size, H query and K key heads
"""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from em.device import on_gpu
from em.model.attention import CAUSAL, BlockDiagonal, Cached, padded
from em.model.config import DecoderConfig
from em.model.fused import add_rms_norm, rms_norm
from em.model.kv_cache import KVCache
from em.model.linear import Linear, Projection, join
from em.model.rope import rotate

__all__ = ["Decoder", "DecoderConfig"]


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta, and the norm of that; None adds nothing."""
        return (x, self(x)) if delta is None else add_rms_norm(x, delta, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        d, D = config.hidden_size, config.head_dim
        self.layer, self.window = layer, config.windows[layer]
        self.head_dim, self.full_norm = D, config.qk_norm == "full"
        self.q_proj = Linear(d, config.n_heads * D, bias=config.qkv_bias)
        self.k_proj = Linear(d, config.n_kv_heads * D, bias=config.qkv_bias)
        self.v_proj = Linear(d, config.n_kv_heads * D, bias=config.qkv_bias)
        self.o_proj = Linear(config.n_heads * D, d, bias=config.o_bias)
        self.qkv = Projection("q_proj", "k_proj", "v_proj")
        if config.qk_norm:
            heads = (config.n_heads, config.n_kv_heads) if self.full_norm else (1, 1)
            self.q_norm, self.k_norm = (RMSNorm(n * D, config.norm_eps) for n in heads)

    def _heads(self, x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        """(B, T, heads*D) → (B, T, heads, D), normalised over all heads or each by itself."""
        if norm is not None and self.full_norm:
            return norm(x).unflatten(-1, (-1, self.head_dim))
        x = x.unflatten(-1, (-1, self.head_dim))
        return x if norm is None else norm(x)

    def forward(self, x, rotary, layout, cache: KVCache | None = None, positions=None, rows=None):
        """x (B, T, d) → (B, T, d). rotary: a `Rope.table`. layout: of em.model.attention.

        With a cache, the new keys go to `positions` (B, T) or (1, T) of its `rows` (B,) or (B, T).
        """
        q_norm, k_norm = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = self.qkv(x, *layers).split([layer.out_features for layer in layers], -1)
        if q_norm is None and v.requires_grad:
            v = v.contiguous()  # autograd keeps v, and with a view of it q and k from before their rotation
        q = self._heads(q, q_norm)  # (B, T, H, D)
        k = self._heads(k, k_norm)  # (B, T, K, D)
        v = self._heads(v, None)  # (B, T, K, D)
        if cache is None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        else:
            q, k = cache.rotate_write(self.layer, q, k, v, rotary, positions, rows)
            if isinstance(layout, Cached):  # otherwise a fresh prompt, which sees its own keys only
                k, v = cache.read(self.layer, rows)  # (B, S, K, D)
        y = layout.attend(q, k, v, self.window)  # (B, T, H, D)
        return self.o_proj(y.flatten(2))  # (B, T, H*D) → (B, T, d)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, inner, bias=config.mlp_bias)
        self.up_proj = Linear(d, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, d, bias=config.mlp_bias)
        self.gate_up = Projection("gate_proj", "up_proj")
        self.down = Projection("down_proj", gated=True)  # whose backward makes the SwiGLU's output again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up(x, self.gate_proj, self.up_proj), self.down_proj)


class Block(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.post_norm = config.post_norm
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        first, second = (
            ("post_attention_layernorm", "post_feedforward_layernorm")
            if config.post_norm
            else ("input_layernorm", "post_attention_layernorm")
        )
        self.add_module(first, RMSNorm(config.hidden_size, config.norm_eps))
        self.add_module(second, RMSNorm(config.hidden_size, config.norm_eps))

    def forward(self, x, delta, rotary, layout, cache: KVCache | None = None, positions=None, rows=None):
        """The residual stream is x + delta (delta may be None), given and returned as these two (B, T, d).

        So the addition at the end of a block and the norm at the start of the next are one pass.
        """
        if self.post_norm:
            x = x if delta is None else x + delta
            attended = self.self_attn(x, rotary, layout, cache, positions, rows)
            x = x + self.post_attention_layernorm(attended)
            return x, self.post_feedforward_layernorm(self.mlp(x))
        x, normed = self.input_layernorm.add(x, delta)
        attended = self.self_attn(normed, rotary, layout, cache, positions, rows)
        x, normed = self.post_attention_layernorm.add(x, attended)
        return x, self.mlp(normed)


class Backbone(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """A causal language model; `em.model.checkpoint.load_model` makes one with weights, frozen.

    activation_checkpointing: recompute each block in the backward pass. `recompute_context()` then gives the
    pair of context managers for the forward and the recomputation of a block (see `torch.utils.checkpoint`),
    so that what steers a block from outside, such as a stack of adapters, is the same both times.
    forward_context: gives a context manager for a forward through all blocks.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.recompute_context: Callable = noop_context_fn
        self.forward_context: Callable = contextlib.nullcontext
        self.model = Backbone(config)
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self._join()

    def groups(self) -> list[list[nn.Linear]]:
        """The layers that run as one product, group by group."""
        return [
            [getattr(module, name) for name in projection.names]
            for module in self.modules()
            for projection in module.children()
            if isinstance(projection, Projection)
        ]

    def _join(self) -> None:
        for layers in self.groups():
            if on_gpu(layers[0].weight):
                join(layers)

    def _apply(self, *arguments, **named):
        """What `to` and its like call: they move or convert each weight by itself."""
        super()._apply(*arguments, **named)
        self._join()
        return self

    @property
    def head_weight(self) -> torch.Tensor:
        """The vocabulary head (V, d), shared with the embedding in a tied model."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    def forward(self, ids: torch.Tensor, **layout) -> torch.Tensor:
        """Logits (B, T, V) in the model's dtype for ids (B, T); `layout` as for `hidden`."""
        return F.linear(self.hidden(ids, **layout), self.head_weight)

    def hidden(
        self,
        ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: KVCache | None = None,
        rows: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, T, d) after the last norm, for ids (B, T). At most one layout:

        attention_mask (B, T): 1 = token, 0 = padding at either end of a row; outputs at padding mean nothing.
        segments (B, T): packed rows; a token attends within its run of equal ids. Give it on the CPU to spare
            a GPU a synchronisation. Positions start at 0 in each run.
        cache, rows (B,): without `positions`, ids are fresh prompts from position 0, right-padded; their keys
            go to the cache rows (None: all, B = n_rows). With segments, they are packed without padding, and
            rows (B, T) has the cache row of each token. With positions (B, T) int64, ids continue those
            rows: each token's key is stored at its position and it sees the row's keys up to there. No
            gradients. For a tree of continuations: slots (B, T), where their keys are stored in place of
            `positions`, and seen (B, T, S) bool, which of the first S = cache.span keys each token sees.
        positions (B, T) without a cache override the rotary positions of the layout.
        """
        if attention_mask is not None and (segments is not None or cache is not None):
            raise ValueError("give one of attention_mask, segments and cache")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("a cache is for sampling: call it under torch.no_grad() or inference_mode()")

        if segments is not None:
            layout = BlockDiagonal(segments, ids.device)
        elif attention_mask is not None:
            layout = padded(attention_mask, ids.device)
        elif cache is not None and positions is not None:
            layout = Cached(positions, cache.span, seen)
        else:
            layout = CAUSAL
        if cache is not None:
            cache.check(ids.shape, rows, None if segments is None else max(layout.lengths))
        if positions is None and isinstance(layout, BlockDiagonal):
            positions = layout.positions  # (B, T)
        elif positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, T)

        x = self.model.embed_tokens(ids)  # (B, T) → (B, T, d)
        tables = {rope: rope.table(positions, self.config.head_dim) for rope in set(self.config.ropes)}
        delta, slots = None, positions if slots is None else slots
        with self.forward_context():
            for block, rope in zip(self.model.layers, self.config.ropes, strict=True):
                if self.activation_checkpointing and torch.is_grad_enabled():
                    x = x if delta is None else x + delta  # one tensor a block is kept
                    x, delta = checkpoint(
                        block, x, None, tables[rope], layout,
                        use_reentrant=False, preserve_rng_state=False, context_fn=self.recompute_context,
                    )  # fmt: skip
                else:
                    x, delta = block(x, delta, tables[rope], layout, cache, slots, rows)
        return self.model.norm.add(x, delta)[1]

    def new_cache(self, n_rows: int, capacity: int) -> KVCache:
        """An empty cache for `n_rows` sequences of at most `capacity` tokens, on the model's device."""
        c, weight = self.config, self.model.norm.weight
        return KVCache(
            c.n_layers, n_rows, capacity, c.n_kv_heads, c.head_dim, dtype=weight.dtype, device=weight.device
        )
