"""What stands between the matrix products of a decoder, each as one pass over its rows.

    swiglu(gate_up)                         silu(gate) · up
    rms_norm(x, weight, eps)                x / rms(x) · weight
    add_rms_norm(x, delta, weight, eps)     x + delta, and the rms_norm of that

On a GPU each is one kernel forward and one backward (em.model.fused_triton), an operator of the library `em`
that flows through meta and fake tensors. On a CPU they are the functions below, which are also the kernels'
readable twins: arithmetic in fp32 (fp64 where the input is), each output rounded once.

    N rows, d width, I inner width of an MLP
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from em.model.operators import operator


def _swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (..., 2I) → (..., I)."""
    gate, up = gate_up.chunk(2, -1)
    if gate.dtype in (torch.float32, torch.float64):
        return F.silu(gate).mul_(up)
    return (F.silu(gate.float()) * up).to(gate.dtype)


def _swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient (..., 2I) of `_swiglu` from that of its output, and the output (..., I) again."""
    dtype, wide = grad.dtype, torch.promote_types(grad.dtype, torch.float32)
    grad, gate_up = grad.to(wide), gate_up.to(wide)
    out = torch.empty_like(gate_up)
    (gate, up), (d_gate, d_up) = gate_up.chunk(2, -1), out.chunk(2, -1)
    silu = F.silu(gate)
    torch.mul(grad, silu, out=d_up)
    torch.mul(grad, up, out=d_gate)
    torch.ops.aten.silu_backward(d_gate, gate, grad_input=d_gate)
    return out.to(dtype), silu.mul_(up).to(dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., d) → its norm (..., d) and 1 / rms(x) (..., 1) in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # in one pass: squares would be written out
    rstd = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).mul_(weight).to(x.dtype), rstd


def _add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta (..., d), rounded; then the norm of it and 1 / rms as of `_rms_norm`."""
    x = x + delta
    return x, *_rms_norm(x, weight, eps)


def _rms_norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, other: Tensor | None) -> Tensor:
    """The gradient (..., d) to x: from `grad` through the norm, plus `other`, what reached x elsewhere."""
    g, wide = grad * weight.to(rstd.dtype), x.to(rstd.dtype)
    inner = torch.linalg.vecdot(g, wide)[..., None] * rstd.pow(3) / x.shape[-1]
    g = g.mul_(rstd).addcmul_(wide, inner, value=-1)
    return (g if other is None else g.add_(other)).to(x.dtype)


# -- operators ---------------------------------------------------------------------------------------------

KERNELS = "em.model.fused_triton"


def _new(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape or x.shape)


def _rstd(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))


_swiglu_op = operator(
    "swiglu(Tensor gate_up) -> Tensor",
    _swiglu,
    lambda gate_up: _new(gate_up, *gate_up.shape[:-1], gate_up.shape[-1] // 2),
    KERNELS,
)
_swiglu_backward_op = operator(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> (Tensor, Tensor)",
    _swiglu_backward,
    lambda grad, gate_up: (_new(gate_up), _new(grad)),
    KERNELS,
)
_rms_norm_op = operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm,
    lambda x, weight, eps: (_new(x), _rstd(x)),
    KERNELS,
)
_add_rms_norm_op = operator(
    "add_rms_norm(Tensor x, Tensor delta, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm,
    lambda x, delta, weight, eps: (_new(x), _new(x), _rstd(x)),
    KERNELS,
)
_rms_norm_backward_op = operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor rstd, Tensor weight, Tensor? other) -> Tensor",
    _rms_norm_backward,
    lambda grad, x, rstd, weight, other: _new(x),
    KERNELS,
)


# -- with gradients ----------------------------------------------------------------------------------------


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return _swiglu_op(gate_up)

    @staticmethod
    def backward(ctx, grad):
        return swiglu_backward(grad, *ctx.saved_tensors)[0]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, gate_up (..., 2I) → (..., I). Autograd keeps the input only."""
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwiGLU.apply(gate_up)
    return _swiglu_op(gate_up)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient to gate_up (..., 2I) from that to `swiglu`'s output, and that output (..., I) again."""
    return _swiglu_backward_op(grad, gate_up)


class _RMSNorm(torch.autograd.Function):
    """delta None: the norm of x. Else x + delta and the norm of that."""

    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        ctx.set_materialize_grads(False)
        if delta is None:
            out, rstd = _rms_norm_op(x, weight, eps)
        else:
            x, out, rstd = _add_rms_norm_op(x, delta, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        return out if delta is None else (x, out)

    @staticmethod
    def backward(ctx, *grads):
        x, rstd, weight = ctx.saved_tensors
        *other, grad = grads  # to the sum, where there is one; to its norm
        other = other[0] if other else None
        if grad is None:
            return other, other, None, None
        d_x = _rms_norm_backward_op(grad, x, rstd, weight, other)
        d_weight = None
        if ctx.needs_input_grad[2]:
            d_weight = (grad * (x * rstd)).flatten(0, -2).sum(0).to(weight.dtype)
        return d_x, d_x if ctx.needs_input_grad[1] else None, d_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension; x (..., d), weight (d,)."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, None, weight, eps)
    return _rms_norm_op(x, weight, eps)[0]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, rounded to their dtype, and the rms_norm of that; x, delta (..., d), weight (d,)."""
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, delta, weight, eps)
    return _add_rms_norm_op(x, delta, weight, eps)[:2]
