"""Drawing tokens from logits with random numbers that belong to a token, not to a batch.

The uniforms behind a token are a pure function of (seed, prompt, sample, place in the response): a counter
hashed by SplitMix64. Which rows share a batch, and when a row was admitted to it, cannot matter.

A token is drawn by inverting the cumulative distribution in two steps, first a block of the vocabulary and
then a token of the block, each with a uniform of its own: two short sums instead of one of 150,000 terms,
so that fp32 suffices, and a grid of 2⁻⁴⁸ instead of 2⁻²⁴, so that rare tokens keep their share. No top-k,
no top-p.

On a GPU `draw` is the operator em::draw, two kernels (em.sampling.draw_triton) for some sixty small ones.
"""

import hashlib

import torch
import torch.nn.functional as F

from em.model.operators import operator


def row_key(seed: int, prompt_index: int, sample: int) -> int:
    """The key of one response's random numbers: a signed 64-bit integer."""
    name = f"{seed} {prompt_index} {sample}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def _signed(value: int) -> int:
    """A 64-bit pattern as torch's int64, whose products wrap."""
    return value - (1 << 64) if value >> 63 else value


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _xor_shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))  # masked, since int64 shifts its sign in


def uniforms(keys: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent uniforms in (0, 1], fp32 (B,), for token number `counts` (B,) of rows `keys` (B,)."""
    z = keys + (counts + 1) * _STEP
    z = _xor_shifted(z, 30) * _FIRST
    z = _xor_shifted(z, 27) * _SECOND
    z = _xor_shifted(z, 31)
    u, v = ((((z >> bits) & 0xFFFFFF) + 1).float() * 2.0**-24 for bits in (40, 16))
    return u, v


def _invert(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Index i (B,) with probability weights[:, i] / Σ weights, for weights (B, n) and u (B,) in (0, 1].

    An index of weight 0 is never the answer, however the sums are rounded.
    """
    reached = torch.where(weights > 0, weights.cumsum(-1), -1.0)
    return (reached >= u[:, None] * reached.amax(-1, keepdim=True)).byte().argmax(-1)  # the first that is


def block_size(vocabulary: int) -> int:
    """Tokens of a block, about √V; a power of two."""
    return 1 << (vocabulary.bit_length() + 1) // 2


def _draw(
    logits: torch.Tensor, temperature: float, keys: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits if temperature in (0, 1) else logits / temperature
    peak = scaled.amax(-1, keepdim=True)
    weights = (scaled - peak).exp_()
    size = block_size(weights.shape[1])
    if weights.shape[1] % size:
        weights = F.pad(weights, (0, -weights.shape[1] % size))
    blocks = weights.unflatten(1, (-1, size))  # (B, V / size, size)
    sums = blocks.sum(-1)
    if temperature == 0:
        tokens = scaled.argmax(-1)
    else:
        u, v = uniforms(keys, counts)
        block = _invert(sums, u)
        inside = blocks[torch.arange(len(block), device=block.device), block]  # (B, size)
        tokens = block * size + _invert(inside, v)
    log_probs = (scaled.gather(1, tokens[:, None]) - peak - sums.sum(-1, keepdim=True).log())[:, 0]
    return tokens, log_probs


_draw_op = operator(
    "draw(Tensor logits, float temperature, Tensor keys, Tensor counts) -> (Tensor, Tensor)",
    _draw,
    lambda logits, _, keys, __: (keys.new_empty(len(keys)), logits.new_empty(len(keys))),
    "em.sampling.draw_triton",
)


def draw(
    logits: torch.Tensor, temperature: float, keys: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B,) int64 and their log-probabilities (B,) in nats, from fp32 logits (B, V).

    The distribution is softmax(logits / temperature), and the log-probability is under it; at temperature 0
    the token is the likeliest, and its log-probability that of temperature 1.
    """
    return _draw_op(logits, float(temperature), keys, counts)
