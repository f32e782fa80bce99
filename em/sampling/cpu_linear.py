"""Faster linear layers for sampling in fp32 on a CPU: weights in the order that oneDNN's kernels read them.

A decode step multiplies a few dozen rows by every weight of the model. Torch's own product reorders the
weights anew in every call; here that is done once, at the cost of a second copy of them. Results are fp32 as
before and differ in rounding only. The kernels give no gradients, so they are in use within `active()`
alone. Where they are missing, or weights are not fp32 on a CPU, nothing changes.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from em.model.fused import swiglu
from em.model.head import logits
from em.model.linear import Projection

ROWS = 32  # the layout is chosen for batches of about this size


def _can_reorder(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # since torch 2.1, though not a public name
    )


class ReorderedWeight:
    """The reordered copy of one weight (out, in), or of several of one input as one (Σ out, in)."""

    def __init__(self, *weights: Tensor):
        self.weights, self.versions, self.copy = weights, None, None
        self.refresh()

    def refresh(self) -> None:
        """Copy the weights again if they have changed in place or may have.

        The fused optimisers do not count their steps in `_version`: a weight that learns is always copied.
        """
        versions = [weight._version for weight in self.weights]
        learns = any(weight.requires_grad for weight in self.weights)
        if all(map(_can_reorder, self.weights)) and (learns or self.versions != versions):
            self.versions = versions
            weight = self.weights[0].detach() if len(self.weights) == 1 else torch.cat(self.weights).detach()
            self.copy = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) → (..., Σ out)."""
        if self.copy is None:
            return F.linear(x, self.weights[0], bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.copy, bias, "none", [], "")


def _run(module: nn.Module, reordered: ReorderedWeight, x: Tensor, *layers: nn.Linear) -> Tensor:
    """What a linear layer gives for x, or a projection of `layers`, under the active, frozen stack if any."""
    layers = layers or (module,)
    x = swiglu(x) if getattr(module, "gated", False) else x
    biases = [layer.bias for layer in layers]
    bias = biases[0] if len(layers) == 1 or biases[0] is None else torch.cat(biases)
    out = reordered.linear(x, bias)  # (..., Σ out)
    factors = module.active.factors(module.group, layers) if hasattr(module, "active") else None
    if factors is not None:
        flat = out.view(-1, out.shape[-1])
        low = F.linear(x.reshape(-1, x.shape[-1]), factors.A)  # (rows, in) → (rows, R)
        for B, (o0, o1, r0, r1) in zip(factors.Bs, factors.places, strict=True):
            flat[:, o0:o1].addmm_(low[:, r0:r1], B.t())
    return out


class ReorderedModel:
    """ReorderedWeight copies of the weights of a Decoder's or GPT-2's linear layers and head."""

    def __init__(self, model: nn.Module):
        self._head = ReorderedWeight(model.head_weight)
        runs: dict[nn.Module, list[nn.Linear]] = {}  # a projection or a layer by itself → its layers
        for parent in model.modules():
            for child in parent.children():
                if isinstance(child, Projection):
                    runs[child] = [getattr(parent, name) for name in child.names]
        projected = {layer for layers in runs.values() for layer in layers}
        for layer in model.modules():
            alone = isinstance(layer, nn.Linear) and layer not in projected
            if alone and layer.weight is not model.head_weight:
                runs[layer] = [layer]
        weights = {
            module: ReorderedWeight(*(layer.weight for layer in layers))
            for module, layers in runs.items()
            if _can_reorder(layers[0].weight)
        }
        self._weights = [self._head, *weights.values()]
        self._forwards = [
            (module, functools.partial(_run, module, weight)) for module, weight in weights.items()
        ]

    def refresh(self) -> None:
        """Follow what training has done to the weights."""
        for weight in self._weights:
            weight.refresh()

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, d) → logits (B, V) of the head, fp32."""
        return logits(hidden, self._head.weights[0]) if self._head.copy is None else self._head.linear(hidden)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let layers and projections run on the reordered copies."""
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward  # an instance's attribute goes before its class's method
        try:
            yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)
