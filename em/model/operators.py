"""How a kernel of ours becomes an operator of torch's library `em`: one rule for all of them.

    swiglu = operator("swiglu(Tensor gate_up) -> Tensor", twin, shapes, "em.model.fused_triton")

An operator has three sides: Triton's kernel on CUDA, shapes alone on meta, and on a CPU its readable twin. So
fake and meta tensors flow through, and whoever counts sees one name for each.
"""

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec

import torch

from em.device import on_gpu

LIB = torch.library.Library("em", "FRAGMENT")


def operator(signature: str, twin: Callable, shapes: Callable, kernels: str) -> Callable:
    """Define an operator; returns what calls it, whose first argument is a tensor.

    kernels: the module of its kernel, a function of the operator's name (less the underscore of one that
    writes in place). CUDA takes the twin for fp64, and where there is no Triton.
    """
    name = signature.partition("(")[0]

    @functools.cache
    def kernel() -> Callable:
        return getattr(importlib.import_module(kernels), name.rstrip("_")) if find_spec("triton") else twin

    def launch(first, *rest):
        return (twin if first.dtype == torch.float64 else kernel())(first, *rest)

    LIB.define(signature)
    LIB.impl(name, twin, "CPU")
    LIB.impl(name, launch, "CUDA")
    LIB.impl(name, shapes, "Meta")
    dispatched = getattr(torch.ops.em, name)

    def call(first, *rest):
        # On a CPU the dispatcher's way would only cost time.
        return (dispatched if on_gpu(first) else twin)(first, *rest)

    return call
