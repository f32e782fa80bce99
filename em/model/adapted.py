"""The product of linear layers that carry LoRA adapters, forward and backward: y = W x + b + B A x.

A *group* is what runs as one: the layers of one input (an `em.model.linear.Projection`), or one layer. What a
stack of adapters is at a group are its `Factors`: `unfilled` makes their buffers, `rounded` fills those of
many groups at once, and `adapted` is the product. Which stack is active is em.model.lora's.

    N rows of the input; R ranks of all adapters of a stack at a group
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from em.device import on_gpu
from em.model.fused import swiglu, swiglu_backward
from em.model.linear import whole


class Adapter(nn.Module):
    """One adapter at one layer: A (r, in) and B (out, r) in fp32, outside the state_dict."""

    def __init__(self, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.A = nn.Parameter(A, requires_grad=False)
        self.B = nn.Parameter(B, requires_grad=False)
        self.scale = scale

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *arguments):
        pass


class Source(NamedTuple):
    """Where an adapter's factors lie in those of its stack: which outputs are its own, which ranks."""

    adapter: Adapter
    outs: tuple[int, int]
    ranks: tuple[int, int]


class Factors(NamedTuple):
    """A stack's factors at a group of layers, in the base's dtype; R ranks, those of a layer together."""

    A: Tensor  # (R, in)
    Bs: tuple[Tensor, ...]  # (outs, ranks) each, the scales in them
    places: tuple[tuple[int, int, int, int], ...]  # of each B: first and last output, first and last rank
    sources: tuple[Source, ...]


# -- factors -----------------------------------------------------------------------------------------------


def unfilled(layers: Sequence[nn.Linear], names: tuple[str, ...], as_one: bool = False) -> Factors | None:
    """Buffers for the factors of a stack at `layers`; as_one: one block-diagonal B."""
    out = rank = 0
    places, sources = [], []
    for layer in layers:
        outs, first = (out, out + layer.out_features), rank
        for name in names:
            if name in getattr(layer, "adapters", ()):
                adapter = layer.adapters[name]
                sources.append(Source(adapter, outs, (rank, rank + len(adapter.A))))
                rank += len(adapter.A)
        if rank > first:
            places.append((*outs, first, rank))
        out = outs[1]
    if not sources:
        return None
    weight = layers[0].weight
    new = weight.new_empty
    if as_one and len(places) > 1:
        places, new = [(0, out, 0, rank)], weight.new_zeros
    A = weight.new_empty(rank, weight.shape[1])
    Bs = tuple(new(o1 - o0, r1 - r0) for o0, o1, r0, r1 in places)
    return Factors(A, Bs, tuple(places), tuple(sources))


@torch.no_grad()
def rounded(made: list[Factors | None]) -> list[Factors | None]:
    """Fill factors from their adapters, those of all layers in a few kernels."""
    A_to, A_from, B_to, B_from, scales = [], [], [], [], []
    for factors in made:
        if factors is None:
            continue
        for adapter, (out, out_end), (rank, rank_end) in factors.sources:
            A_to.append(factors.A[rank:rank_end])
            A_from.append(adapter.A.detach())
            for B, (o0, o1, r0, _) in zip(factors.Bs, factors.places, strict=True):
                if o0 <= out < o1:
                    B_to.append(B[out - o0 : out_end - o0, rank - r0 : rank_end - r0])
            B_from.append(adapter.B.detach())
            scales.append(adapter.scale)
    if A_to:
        torch._foreach_copy_(A_to, A_from)
        torch._foreach_copy_(B_to, torch._foreach_mul(B_from, scales))
    return made


# -- the product -------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """All about a group's product that is no tensor."""

    places: tuple[tuple[int, int, int, int], ...]  # as in Factors
    parts: tuple[tuple[int, int], ...]  # first and last output of each weight
    sources: tuple[tuple[int, int, int, int, float], ...]  # of each adapter: outputs, ranks, scale
    gated: bool


def _product(plan: Plan, x: Tensor, bias: Tensor | None, A: Tensor, Bs, weights) -> tuple[Tensor, Tensor]:
    """W x + b + B A x of rows x (N, in), (N, Σ out); and A x, (N, R)."""
    down, width = F.linear(x, A), plan.parts[-1][1]
    if plan.places[0][:2] == (0, width):
        out = F.linear(down, Bs[0], bias)
    else:
        plain = bias is None and sum(o1 - o0 for o0, o1, *_ in plan.places) == width
        out = x.new_empty(len(x), width)
        if not plain:
            out.copy_(bias) if bias is not None else out.zero_()
        for B, (o0, o1, r0, r1) in zip(Bs, plan.places, strict=True):
            part, thin = out[:, o0:o1], down[:, r0:r1]
            torch.mm(thin, B.t(), out=part) if plain else part.addmm_(thin, B.t())
    for weight, (o0, o1) in zip(weights, plan.parts, strict=True):
        # last, so that the large term is rounded once and not again with the sum
        out[:, o0:o1].addmm_(x, weight.t())
    return out, down


def _outer(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale · aᵀ b in fp32 (fp64 where they are fp64): a (N, m), b (N, n) → (m, n)."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == dtype:
        return torch.addmm(a.new_empty(()), a.t(), b, beta=0, alpha=scale)
    if on_gpu(a):
        nothing = a.new_empty((), dtype=dtype)
        return torch.addmm(nothing, a.t(), b, out_dtype=dtype, beta=0, alpha=scale)
    return (a.t() @ b).to(dtype).mul_(scale)


class _AdaptedProduct(torch.autograd.Function):
    """A group's product, with gradients to its input and to fp32 A and B; the base is frozen.

    What the gradients need is kept once: the input (of a gated group before its SwiGLU), A x, the factors.
    """

    @staticmethod
    def forward(ctx, x, plan, bias, A, *tensors):
        """tensors: the rounded Bs, the weights, and the fp32 A and B of each source."""
        Bs, weights = tensors[: len(plan.places)], tensors[len(plan.places) :][: len(plan.parts)]
        out, down = _product(plan, swiglu(x) if plan.gated else x, bias, A, Bs, weights)
        ctx.plan, ctx.n_tensors = plan, len(tensors)
        ctx.save_for_backward(x, down, A, *Bs, *weights)
        return out

    @staticmethod
    def backward(ctx, grad):
        plan = ctx.plan
        x, down, A, *rest = ctx.saved_tensors
        Bs, weights = rest[: len(plan.places)], rest[len(plan.places) :]
        d_down = torch.empty_like(down)
        for B, (o0, o1, r0, r1) in zip(Bs, plan.places, strict=True):
            torch.mm(grad[:, o0:o1], B, out=d_down[:, r0:r1])
        d_x = None
        if ctx.needs_input_grad[0]:
            for weight, (o0, o1) in zip(weights, plan.parts, strict=True):
                part = grad[:, o0:o1]
                d_x = part @ weight if d_x is None else d_x.addmm_(part, weight)
            d_x.addmm_(d_down, A)
        if plan.gated:
            d_x, x = (None, swiglu(x)) if d_x is None else swiglu_backward(d_x, x)
        learns = ctx.needs_input_grad[4 + len(rest) :]
        d_A = _outer(d_down, x) if any(learns[::2]) else None
        factors = []
        for i, (o0, o1, r0, r1, scale) in enumerate(plan.sources if learns else ()):
            factors.append(d_A[r0:r1] if learns[2 * i] else None)
            factors.append(_outer(grad[:, o0:o1], down[:, r0:r1], scale) if learns[2 * i + 1] else None)
        return d_x, None, None, None, *[None] * len(rest), *factors


def adapted(
    x: Tensor, layers: Sequence[nn.Linear], factors: Factors, frozen: bool, gated: bool = False
) -> Tensor:
    """x (..., in; gated: 2·in) → (..., Σ out), of layers with a frozen base under a stack's factors."""
    weights, bias = whole(layers)
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + len(weight))
    sources = tuple((*outs, *ranks, adapter.scale) for adapter, outs, ranks in factors.sources)
    plan = Plan(factors.places, tuple(zip(ends[:-1], ends[1:], strict=True)), sources, gated)
    learning = [] if frozen else [p for adapter, *_ in factors.sources for p in (adapter.A, adapter.B)]
    rows = x.flatten(0, -2)  # (N, in)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in learning)):
        out = _AdaptedProduct.apply(rows, plan, bias, factors.A, *factors.Bs, *weights, *learning)
    else:
        rows = swiglu(rows) if gated else rows
        out, _ = _product(plan, rows, bias, factors.A, factors.Bs, weights)
    return out.unflatten(0, x.shape[:-1])
