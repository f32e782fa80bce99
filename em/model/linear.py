"""Linear layers that read one input, run as one product.

q, k, v and gate, up keep their own modules and state_dict keys. On a GPU the weights of a group lie in one
tensor whose slices are the layers' parameters, so that one product serves them all; on a CPU a weight stays
the view of the mapped file that it is, and the products of a group go side by side into one output.

    N rows of the input, a group's outputs side by side: (N, Σ out)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from em.model.fused import swiglu


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # a random start for nothing, and it imports 800 modules of torch (1 s)
            super().reset_parameters()


class Projection(nn.Module):
    """The product of one input with its siblings `names`: (..., in) → (..., Σ out), in their order.

    gated: the input is the SwiGLU of what comes in, (..., 2·in). Layers that a projection runs are not called
    themselves, so that hooks on them do not fire.
    """

    def __init__(self, *names: str, gated: bool = False):
        super().__init__()
        self.names, self.gated = names, gated

    def forward(self, x: Tensor, *layers: nn.Linear) -> Tensor:
        x = swiglu(x) if self.gated else x
        weights, bias = whole(layers)
        if torch.is_grad_enabled() and (layers[0].weight.requires_grad or len(weights) > 1):
            return torch.cat([layer(x) for layer in layers], -1) if len(layers) > 1 else layers[0](x)
        if len(weights) == 1:
            return F.linear(x, weights[0], bias)
        rows = x.flatten(0, -2)  # (N, in)
        out = rows.new_empty(len(rows), sum(map(len, weights)))
        for layer, part in zip(layers, out.split([len(w) for w in weights], 1), strict=True):
            if bias is None:
                torch.mm(rows, layer.weight.t(), out=part)
            else:
                torch.addmm(layer.bias, rows, layer.weight.t(), out=part)
        return out.unflatten(0, x.shape[:-1])


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose consecutive rows are `parts`, where they lie so in memory. Never a copy."""
    first = parts[0]
    if len(parts) == 1:
        return first
    storage, place = first.untyped_storage()._cdata, first.storage_offset()
    for part in parts:
        if part.untyped_storage()._cdata != storage or part.storage_offset() != place:
            return None
        place += part.numel()
    return first.detach().as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def whole(layers: Sequence[nn.Linear]) -> tuple[Sequence[Tensor], Tensor | None]:
    """The weights (out, in) of a group, one if they are joined, and all its biases (Σ out,)."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    weight = joined(weights)
    bias = None if biases[0] is None else joined(biases)
    if bias is None and biases[0] is not None:
        bias = torch.cat(biases)
    return (weights if weight is None else (weight,)), bias


@torch.no_grad()
def join(layers: Sequence[nn.Linear]) -> None:
    """Move the weights of a group, and the biases, into one tensor of which they are slices."""
    for parts in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if parts[0] is not None and joined(parts) is None:
            slices = torch.cat([part.data for part in parts]).split([len(part) for part in parts])
            for part, data in zip(parts, slices, strict=True):
                part.data = data
