"""The kernels of `em.model.decode` in Triton.

Import it where it is used only: Triton decides at its own import whether it compiles for a GPU or, with
TRITON_INTERPRET=1, interprets on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # keys that a program holds at a time
# With fewer programs a row's keys are split among several. By estimate: a program has 64 KB in flight, and 64
# of them keep an H100's memory busy; the kernel that joins the parts costs as much as a few hundred keys.
PROGRAMS = 64


@triton.jit
def _attend(
    q, keys, values, positions, out, partial,
    q_row, q_head, key_row, key_slot, key_head, value_row, value_slot, value_head,
    scale,  # of the logits, times log2(e)
    WINDOW: tl.constexpr,  # 0: none
    SHARED: tl.constexpr,  # H / K, query heads of a key head
    HEAD: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, key head and part of the row's keys; the GROUP ≥ SHARED queries of the key head together.

    out (B, H, D) where SPLITS is 1; else partial (B, K, SPLITS, GROUP, WIDTH + 2) in fp32: the weighted sum
    of values, the maximum of the logits, the sum of the weights.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    n_heads = tl.num_programs(1)
    last = tl.load(positions + row).to(tl.int32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(last - WINDOW + 1, 0)
    # Parts of this row's own length, so that all splits of a short row have work too.
    part = tl.cdiv(tl.cdiv(last + 1 - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * part
    end = tl.minimum(begin + part, last + 1)

    group = tl.arange(0, GROUP)
    channel = tl.arange(0, WIDTH)
    offset = tl.arange(0, BLOCK)
    inside = channel < HEAD
    queries = tl.load(
        q + row * q_row + (head * SHARED + group)[:, None] * q_head + channel[None, :],
        mask=(group < SHARED)[:, None] & inside[None, :], other=0.0,
    ).to(keys.dtype.element_ty)  # (GROUP, WIDTH)  # fmt: skip
    keys += row * key_row + head * key_head
    values += row * value_row + head * value_head

    top = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    mixed = tl.zeros((GROUP, WIDTH), tl.float32)
    for start in range(begin, end, BLOCK):
        slot = start + offset
        held = slot < end
        mask = held[:, None] & inside[None, :]
        k = tl.load(keys + slot[:, None] * key_slot + channel[None, :], mask=mask, other=0.0)
        v = tl.load(values + slot[:, None] * value_slot + channel[None, :], mask=mask, other=0.0)
        logits = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale  # (GROUP, BLOCK)
        logits = tl.where(held[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top

    if SPLITS == 1:
        out += (row * n_heads + head) * SHARED * HEAD
        mixed = mixed / total[:, None]
        tl.store(
            out + group[:, None] * HEAD + channel[None, :], mixed.to(out.dtype.element_ty),
            mask=(group < SHARED)[:, None] & inside[None, :],
        )  # fmt: skip
    else:
        partial += ((row * n_heads + head) * SPLITS + split) * GROUP * (WIDTH + 2)
        line = partial + group * (WIDTH + 2)
        tl.store(line[:, None] + channel[None, :], mixed)
        tl.store(line + WIDTH, top)
        tl.store(line + WIDTH + 1, total)


@triton.jit
def _join(
    partial, out,
    SHARED: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The SPLITS parts of one query head; program b * H + h. The first part of a row always has a key."""
    program = tl.program_id(0).to(tl.int64)
    query = program % SHARED
    partial += (program // SHARED * SPLITS * GROUP + query) * (WIDTH + 2)
    split = tl.arange(0, SPLITS)
    channel = tl.arange(0, WIDTH)
    line = partial + split * GROUP * (WIDTH + 2)
    top = tl.load(line + WIDTH)
    share = tl.exp2(top - tl.max(top, 0))  # (SPLITS,)
    total = tl.sum(share * tl.load(line + WIDTH + 1), 0)
    mixed = tl.sum(share[:, None] * tl.load(line[:, None] + channel[None, :]), 0) / total
    tl.store(out + program * HEAD + channel, mixed.to(out.dtype.element_ty), mask=channel < HEAD)


def n_splits(programs: int, span: int) -> int:
    """Into how many parts a row's keys go if each alone gave `programs` programs; fixed under a graph."""
    splits = 1
    while splits * programs < PROGRAMS and splits * 2 * BLOCK <= span:
        splits *= 2
    return splits


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, window: int | None
) -> Tensor:
    """`em.model.decode.decode_attention`."""
    (B, H, D), (S, K) = q.shape, keys.shape[1:3]
    q, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values))
    splits = n_splits(B * K, S)
    group, width = max(16, triton.next_power_of_2(H // K)), max(16, triton.next_power_of_2(D))
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    parts = (B, K, splits, group, width + 2)
    partial = out if splits == 1 else torch.empty(parts, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _attend[(B, K, splits)](
            q, keys, values, positions.contiguous(), out, partial,
            q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
            values.stride(0), values.stride(1), values.stride(2), D**-0.5 * 1.4426950408889634,
            WINDOW=window or 0, SHARED=H // K, HEAD=D, SPLITS=splits, GROUP=group, WIDTH=width, BLOCK=BLOCK,
            num_warps=4, num_stages=3 if width * keys.element_size() <= 512 else 1,  # what an SM holds
        )  # fmt: skip
        if splits > 1:
            _join[(B * H,)](
                partial, out, SHARED=H // K, HEAD=D, SPLITS=splits, GROUP=group, WIDTH=width, num_warps=1
            )
    return out


@triton.jit
def _rotate_and_write(
    q, k, v, cos, sin, keys, values, positions, rows, q_out, k_out,
    tokens,  # T, a row's
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, table_row, table_token,
    positions_row, positions_token, rows_row, rows_token, key_row, key_head, key_slot,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,  # HALF = D/2, WIDTH ≥ HALF
):  # fmt: skip
    """One head of one token: the H query heads, then the K of the keys, then the K of the values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    b = token // tokens
    t = token % tokens
    low = tl.arange(0, WIDTH)  # channels of the first half
    inside = low < HALF
    cos += b * table_row + t * table_token
    sin += b * table_row + t * table_token
    place = tl.load(rows + b * rows_row + t * rows_token) * key_row
    place += tl.load(positions + b * positions_row + t * positions_token) * key_slot

    if head < H + K:
        if head < H:
            x = q + b * q_row + t * q_token + head * q_head
        else:
            x = k + b * k_row + t * k_token + (head - H) * k_head
        first = tl.load(x + low, mask=inside).to(tl.float32)
        second = tl.load(x + HALF + low, mask=inside).to(tl.float32)
        new_first = first * tl.load(cos + low, mask=inside) + second * tl.load(sin + low, mask=inside)
        new_second = second * tl.load(cos + HALF + low, mask=inside)
        new_second += first * tl.load(sin + HALF + low, mask=inside)
        if head < H:
            y = q_out + (token * H + head) * (2 * HALF)
            tl.store(y + low, new_first.to(q_out.dtype.element_ty), mask=inside)
            tl.store(y + HALF + low, new_second.to(q_out.dtype.element_ty), mask=inside)
        else:
            y = k_out + (token * K + head - H) * (2 * HALF)
            tl.store(y + low, new_first.to(k_out.dtype.element_ty), mask=inside)
            tl.store(y + HALF + low, new_second.to(k_out.dtype.element_ty), mask=inside)
            held = keys + place + (head - H) * key_head
            tl.store(held + low, new_first.to(keys.dtype.element_ty), mask=inside)
            tl.store(held + HALF + low, new_second.to(keys.dtype.element_ty), mask=inside)
    else:
        x = v + b * v_row + t * v_token + (head - H - K) * v_head
        held = values + place + (head - H - K) * key_head
        for half in tl.static_range(2):
            channel = half * HALF + low
            tl.store(
                held + channel, tl.load(x + channel, mask=inside).to(values.dtype.element_ty), mask=inside
            )


def rotate_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, rows: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`em.model.decode.rotate_write`."""
    (B, T, H, D), K = q.shape, k.shape[2]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin = (x.expand(B, T, 1, D) for x in (cos, sin))
    positions, rows = positions.expand(B, T), rows.expand(B, T)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    with torch.cuda.device_of(q):
        _rotate_and_write[(B * T, H + 2 * K)](
            q, k, v, cos, sin, keys, values, positions, rows, q_out, k_out, T,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *cos.stride()[:2], *positions.stride(),
            *rows.stride(), *keys.stride()[:3], H=H, K=K, HALF=D // 2, WIDTH=triton.next_power_of_2(D // 2),
            num_warps=1,
        )  # fmt: skip
    return q_out, k_out
