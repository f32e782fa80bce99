"""The vocabulary head: logits from hidden states, the same ones wherever they are wanted."""

import torch

from em.device import on_gpu

CHUNK_BYTES = 1 << 24  # of the head in fp32 at a time, on a CPU


def logits(hidden: torch.Tensor, head_weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """hidden (rows, d) @ head_weightᵀ, (rows, V), accumulated and kept in fp32 (fp64 where they are fp64).

    Rounding logits to bf16 would put errors of some hundredths of a nat into every log-probability. Training
    scores these logits and the sampler draws from them, so that on-policy means one distribution.
    """
    dtype = torch.promote_types(head_weight.dtype, torch.float32)
    hidden = hidden.to(head_weight.dtype)
    if out is None:
        out = torch.empty(len(hidden), len(head_weight), dtype=dtype, device=hidden.device)
    if head_weight.dtype == dtype:
        return torch.mm(hidden, head_weight.t(), out=out)
    if on_gpu(hidden):
        return torch.mm(hidden, head_weight.t(), out_dtype=dtype, out=out)
    # CPUs have no product of bf16 that ends in fp32; the whole head in fp32 would be a large copy.
    hidden, rows = hidden.to(dtype), max(16, CHUNK_BYTES // (4 * head_weight.shape[1]))
    for weight, columns in zip(head_weight.split(rows), out.split(rows, 1), strict=True):
        torch.mm(hidden, weight.to(dtype).t(), out=columns)
    return out
