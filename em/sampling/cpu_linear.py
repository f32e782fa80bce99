"""Faster linear layers for sampling in fp32 on a CPU: weights in the order that oneDNN's kernels read them.

A decode step multiplies a few dozen rows by every weight of the model. Torch's own product reorders the
weights anew in every call; here that is done once, at the cost of a second copy of them. Results are fp32 as
before and differ in rounding only. The kernels give no gradients, so they are in use within `active()`
alone. Where they are missing, or weights are not fp32 on a CPU, nothing changes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from em.model.head import logits

ROWS = 32  # the layout is chosen for batches of about this size


def _can_reorder(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # since torch 2.1, though not a public name
    )


class ReorderedWeight:
    """One weight (out, in) and its reordered copy."""

    def __init__(self, weight: Tensor):
        self.weight, self.version, self.copy = weight, None, None
        self.refresh()

    def refresh(self) -> None:
        """Copy the weight again if it has changed in place or may have.

        The fused optimisers do not count their steps in `_version`: a weight that learns is always copied.
        """
        if _can_reorder(self.weight) and (self.weight.requires_grad or self.version != self.weight._version):
            self.version = self.weight._version
            self.copy = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), ROWS)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) → (..., out)."""
        if self.copy is None:
            return F.linear(x, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.copy, bias, "none", [], "")


def _adapted(layer: nn.Linear, reordered: ReorderedWeight, x: Tensor) -> Tensor:
    """What an `em.model.lora.LoRALinear` gives for x under the active stack, which is frozen."""
    out = reordered.linear(x, layer.bias)  # (..., out)
    factors = layer.prepared.get(layer.state.active)
    if factors is not None:
        A, B = factors  # (r, in), (out, r), scaled
        low = F.linear(x.reshape(-1, x.shape[-1]), A)  # (rows, in) → (rows, r)
        out.view(-1, out.shape[-1]).addmm_(low, B.t())  # (rows, out)
    return out


def _forward(layer: nn.Linear, reordered: ReorderedWeight) -> Callable[[Tensor], Tensor]:
    if hasattr(layer, "prepared"):
        return functools.partial(_adapted, layer, reordered)
    return functools.partial(reordered.linear, bias=layer.bias)


class ReorderedModel:
    """ReorderedWeight copies of the weights of a Decoder's or GPT-2's linear layers and head."""

    def __init__(self, model: nn.Module):
        self._head = ReorderedWeight(model.head_weight)
        layers = [
            m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is not model.head_weight
        ]
        reordered = [(layer, ReorderedWeight(layer.weight)) for layer in layers if _can_reorder(layer.weight)]
        self._weights = [self._head, *(weight for _, weight in reordered)]
        self._forwards = [(layer, _forward(layer, weight)) for layer, weight in reordered]

    def refresh(self) -> None:
        """Follow what training has done to the weights."""
        for weight in self._weights:
            weight.refresh()

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, d) → logits (B, V) of the head, fp32."""
        return logits(hidden, self._head.weight) if self._head.copy is None else self._head.linear(hidden)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the layers run on the reordered copies."""
        for layer, forward in self._forwards:
            layer.__dict__["forward"] = forward  # an instance's attribute goes before its class's method
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                layer.__dict__.pop("forward", None)
