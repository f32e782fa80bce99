"""What a decode step does between its projections, each as one kernel on a GPU.

    rotate_write(q, k, v, cos, sin, keys, values, positions, rows)   rotary embedding; k and v to the cache
    decode_attention(q, keys, values, positions, window)             a new token over its row's own keys

Both are operators of the library `em`: Triton's kernels (em.model.decode_triton) on CUDA, shapes on meta, and
on a CPU the functions below, the kernels' readable twins. The attention kernel reads the positions on the
device and loops to each row's own length: a step costs what its rows hold, not what the cache could, and a
CUDA graph of it serves every length.

    B rows, T tokens a row, H query and K key heads, D head size, S cache positions, R cache rows
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from em.device import on_gpu
from em.model.operators import operator
from em.model.rope import rotate


def visible(
    positions: Tensor, span: int, window: int | None, dtype: torch.dtype, seen: Tensor | None = None
) -> Tensor:
    """A mask (B, 1, T, S) for queries at positions (B, T): 0 where a key is seen, else -inf.

    seen (B, T, S) bool: in place of all keys up to the query's own. Additive, so that no layer converts it
    again.
    """
    slots = torch.arange(span, device=positions.device)
    if seen is None:
        seen = slots <= positions[..., None]  # (B, T, S)
    if window is not None:
        seen = seen & (slots > positions[..., None] - window)
    blank = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return blank.masked_fill_(~seen, float("-inf"))[:, None]


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of q (B, T, H, D) over k, v (B, S, K, D) under a mask (B, 1, T, S) → (B, T, H, D).

    The H/K queries that share a key head go as so many query positions: no backend expands keys.
    """
    B, T, H, D = q.shape
    K, S, G = k.shape[2], k.shape[1], H // k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, S, D)
    if T == 1:
        q, mask = q.view(B, K, G, D), mask.expand(B, 1, G, S)
    else:
        q = q.unflatten(2, (K, G)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, T, H, D) → (B, K, G*T, D)
        mask = mask.expand(B, G, T, S).flatten(1, 2)[:, None]  # (B, 1, G*T, S)
    if on_gpu(q):  # by name, for on meta the choice would fall on another
        mask = mask.expand(B, K, -1, S)
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if T == 1:
        return out.reshape(B, 1, H, D)
    return out.unflatten(2, (G, T)).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None
) -> Tensor:
    mask = visible(positions[:, None], keys.shape[1], window, q.dtype)
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    return attend_masked(q[:, None], keys, values, mask)[:, 0]


def _rotate_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, rows: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    write(k, v, keys, values, positions, rows)
    return q, k


def write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, positions: Tensor, rows: Tensor) -> None:
    """Store k, v (B, T, K, D) in keys, values (R, K, S, D) at (rows, positions), broadcast to (B, T) each."""
    keys[rows, :, positions] = k.to(keys.dtype)
    values[rows, :, positions] = v.to(values.dtype)


# -- operators ---------------------------------------------------------------------------------------------

KERNELS = "em.model.decode_triton"
_decode_attention_op = operator(
    "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor positions, int? window) -> Tensor",
    _decode_attention,
    lambda q, *_: q.new_empty(q.shape),
    KERNELS,
)
_rotate_write_op = operator(
    "rotate_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor positions, Tensor rows) -> (Tensor, Tensor)",
    _rotate_write,
    lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    KERNELS,
)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None
) -> Tensor:
    """q (B, H, D) over keys, values (B, S, K, D), any strides, up to positions (B,) int64 → (B, H, D).

    Row b sees its keys at positions (p − window, p], p = positions[b] < S; window None: from 0. fp32 inside.
    """
    return _decode_attention_op(q, keys, values, positions, window)


def rotate_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, rows: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (B, T, H, D) and k (B, T, K, D) turned as `rope.rotate` does; k and v also go to a layer's cache.

    keys, values (R, K, S, D) are written at (rows, positions), int64 and broadcast to (B, T) each. cos, sin
    (B or 1, T, 1, D) are a `Rope.table`.
    """
    return _rotate_write_op(q, k, v, cos, sin, keys, values, positions, rows)
