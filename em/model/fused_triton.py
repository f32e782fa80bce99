"""The GPU's kernels behind the operators of `em.model.fused`; their readable twins are there.

One program takes one row (of a norm) or a block of one row (of a SwiGLU) and computes in fp32. Import it
where it is used only: Triton decides at its own import whether it compiles for a GPU or interprets on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # of a SwiGLU: 8 elements a thread with 4 warps


@triton.jit
def _swiglu(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(grad, gate_up, d_gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(grad + row * width + column, mask=inside).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    kind = out.dtype.element_ty
    tl.store(d_gate_up + row * 2 * width + column, d_gate.to(kind), mask=inside)
    tl.store(d_gate_up + row * 2 * width + width + column, (g * silu).to(kind), mask=inside)
    tl.store(out + row * width + column, (silu * up).to(kind), mask=inside)


@triton.jit
def _load_row(x, row, inner, outer_stride, inner_stride, column, inside):
    """Row `row` of what `_rows` lays out, in fp32."""
    start = (row // inner) * outer_stride + (row % inner) * inner_stride
    return tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm(
    x, delta, weight, total, out, rstd, inner, outer_stride, inner_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = _load_row(x, row, inner, outer_stride, inner_stride, column, inside)
    if ADD:
        value += tl.load(delta + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + column, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the norm is that of what the next layers see
    r = 1 / tl.sqrt(tl.sum(value * value, 0) / WIDTH + eps)
    value *= r * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, value.to(out.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r)


@triton.jit
def _norm_backward(
    grad, x, rstd, weight, other, d_x, inner, outer_stride, inner_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = _load_row(x, row, inner, outer_stride, inner_stride, column, inside)
    g = tl.load(grad + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + row)
    d = r * (g - value * (tl.sum(g * value, 0) * r * r / WIDTH))
    if ADD:
        d += tl.load(other + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_x + row * WIDTH + column, d.to(d_x.dtype.element_ty), mask=inside)


def warps(width: int) -> int:
    """Of a program that holds a row of `width`: 16 elements a thread, 16 warps at most."""
    return min(16, max(1, triton.next_power_of_2(width) // 512))


def _grid(gate_up: Tensor, width: int) -> tuple[int, int]:
    return gate_up.numel() // (2 * width), triton.cdiv(width, BLOCK)


def swiglu(gate_up: Tensor) -> Tensor:
    """`em.model.fused._swiglu`."""
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if out.numel():
        with torch.cuda.device_of(gate_up):
            _swiglu[_grid(gate_up, width)](gate_up, out, width, BLOCK)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`em.model.fused._swiglu_backward`."""
    grad, gate_up, width = grad.contiguous(), gate_up.contiguous(), gate_up.shape[-1] // 2
    d_gate_up, out = torch.empty_like(gate_up), torch.empty_like(grad)
    if out.numel():
        with torch.cuda.device_of(gate_up):
            _swiglu_backward[_grid(gate_up, width)](grad, gate_up, d_gate_up, out, width, BLOCK)
    return d_gate_up, out


def _rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x as (outer, inner, d), a view where heads or tokens lie evenly; inner and the first two strides."""
    x = x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x[None, None]
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, (x.shape[1], x.stride(0), x.stride(1))


def _sizes(width: int) -> dict:
    return {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "num_warps": warps(width)}


def _forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if delta is None else torch.empty_like(out)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows, strides = _rows(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _norm[(rstd.numel(),)](
                rows, total if delta is None else delta.contiguous(), weight, total, out, rstd, *strides, eps,
                ADD=delta is not None, **_sizes(x.shape[-1]),
            )  # fmt: skip
    return total, out, rstd


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`em.model.fused._rms_norm`."""
    return _forward(x, None, weight, eps)[1:]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`em.model.fused._add_rms_norm`."""
    return _forward(x, delta, weight, eps)


def rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, other: Tensor | None) -> Tensor:
    """`em.model.fused._rms_norm_backward`."""
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, strides = _rows(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _norm_backward[(rstd.numel(),)](
                grad.contiguous(), rows, rstd, weight, d_x if other is None else other.contiguous(), d_x,
                *strides, ADD=other is not None, **_sizes(x.shape[-1]),
            )  # fmt: skip
    return d_x
