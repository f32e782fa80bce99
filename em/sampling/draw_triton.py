"""The kernels of `em.sampling.draw` in Triton: one sweep over the logits, then a draw from what it found.

Import it where it is used only: Triton decides at its own import whether it compiles for a GPU or, with
TRITON_INTERPRET=1, interprets on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from em.sampling.draw import block_size

TILE = 4096  # logits that a program of the sweep holds


@triton.jit
def _load(row, token, scale, vocabulary, width):
    """Scaled logits, -inf beyond the vocabulary. Masked by the width, for whole vectors: see `draw`."""
    x = tl.load(row + token, mask=token < width, other=float("-inf"))
    return tl.where(token < vocabulary, x, float("-inf")) * scale


@triton.jit
def _sweep(
    logits, tops, sums, row_stride, n_blocks, scale, vocabulary, width,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The maximum of each of BLOCKS blocks of a row and Σ exp(x − maximum), x = scale · logits."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    token = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]  # (BLOCKS, SIZE)
    x = _load(logits + row * row_stride, token, scale, vocabulary, width)
    top = tl.max(x, 1)
    # A block whose logits are all −inf has no weight, and −inf − −inf would be NaN.
    base = tl.where(top == float("-inf"), 0.0, top)
    held = block < n_blocks
    tl.store(tops + row * n_blocks + block, top, mask=held)
    tl.store(sums + row * n_blocks + block, tl.sum(tl.exp(x - base[:, None]), 1), mask=held)


@triton.jit
def _uniform(z, BITS: tl.constexpr):
    return (((z >> BITS) & 0xFFFFFF) + 1).to(tl.float32) * 5.9604644775390625e-08  # 2⁻²⁴


@triton.jit
def _first(weights, index, u):
    """The first index whose cumulative share reaches u, as em.sampling.draw._invert has it."""
    reached = tl.where(weights > 0, tl.cumsum(weights, 0), -1.0)
    return tl.min(tl.where(reached >= u * tl.max(reached, 0), index, 2147483647), 0)


@triton.jit
def _pick(
    logits, tops, sums, keys, counts, tokens, log_probs, row_stride, n_blocks, scale, vocabulary, width,
    GREEDY: tl.constexpr, MANY: tl.constexpr, SIZE: tl.constexpr,  # MANY ≥ n_blocks
):  # fmt: skip
    """One row: a block by its share, then a token of it; SplitMix64 as in em.sampling.draw.uniforms."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, MANY)
    held = block < n_blocks
    top = tl.load(tops + row * n_blocks + block, mask=held, other=float("-inf"))
    peak = tl.max(top, 0)
    shares = tl.load(sums + row * n_blocks + block, mask=held, other=0.0) * tl.exp(top - peak)

    z = tl.load(keys + row).to(tl.uint64) + (tl.load(counts + row) + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)

    if GREEDY:
        chosen = tl.min(tl.where(top == peak, block, 2147483647), 0)
    else:
        chosen = _first(shares, block, _uniform(z, 40))
    index = tl.arange(0, SIZE)
    token = chosen * SIZE + index
    x = _load(logits + row * row_stride, token, scale, vocabulary, width)
    if GREEDY:
        place = tl.min(tl.where(x == tl.max(x, 0), index, 2147483647), 0)
    else:
        place = _first(tl.exp(x - peak), index, _uniform(z, 16))
    tl.store(tokens + row, (chosen * SIZE + place).to(tl.int64))
    likely = tl.sum(tl.where(index == place, x, 0.0), 0) - peak
    tl.store(log_probs + row, likely - tl.log(tl.sum(shares, 0)))


def draw(logits: Tensor, temperature: float, keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """`em.sampling.draw.draw`."""
    B, V = logits.shape
    size = block_size(V)
    n_blocks, scale = triton.cdiv(V, size), 1 / temperature if temperature else 1.0
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    # Rows of logits end in padding (em.model.head), so that vectors are whole for any vocabulary. Where the
    # last row does not have it, nothing is read beyond the vocabulary.
    stride, held = logits.stride(0), logits.untyped_storage().nbytes() // 4 - logits.storage_offset()
    width = stride if stride >= V and B * stride <= held else V
    tops, sums = torch.empty(2, B, n_blocks, device=logits.device)
    tokens = torch.empty(B, dtype=torch.long, device=logits.device)
    log_probs = torch.empty(B, device=logits.device)
    blocks = max(1, TILE // size)
    with torch.cuda.device_of(logits):
        _sweep[(B, triton.cdiv(n_blocks, blocks))](
            logits, tops, sums, stride, n_blocks, scale, V, width, BLOCKS=blocks, SIZE=size
        )
        _pick[(B,)](
            logits, tops, sums, keys, counts, tokens, log_probs, stride, n_blocks, scale, V, width,
            GREEDY=temperature == 0, MANY=triton.next_power_of_2(n_blocks), SIZE=size,
        )  # fmt: skip
    return tokens, log_probs
