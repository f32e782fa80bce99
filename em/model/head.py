"""The vocabulary head: logits from hidden states, the same ones wherever they are wanted."""

import torch

from em.device import on_gpu

CHUNK_BYTES = 1 << 24  # of the head in fp32 at a time, on a CPU
ROW = 128  # columns, of which a row of logits in memory has a multiple


def logits_dtype(head_weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(head_weight.dtype, torch.float32)


def empty_logits(rows: int, head_weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Blank (rows, V); on a GPU each row begins a multiple of 128 columns after the one before it.

    Else a vocabulary such as Olmo 3's 100,278 would halve the speed of matrix products and kernels. dtype: by
    default what logits are kept in.
    """
    vocabulary, dtype = len(head_weight), dtype or logits_dtype(head_weight)
    width = -(-vocabulary // ROW) * ROW if on_gpu(head_weight) else vocabulary
    return torch.empty(rows, width, dtype=dtype, device=head_weight.device)[:, :vocabulary]


def logits(hidden: torch.Tensor, head_weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """hidden (rows, d) @ head_weightᵀ, (rows, V), accumulated and kept in fp32 (fp64 where they are fp64).

    Rounding logits to bf16 would put errors of some hundredths of a nat into every log-probability. Training
    scores these logits and the sampler draws from them, so that on-policy means one distribution.
    """
    dtype = logits_dtype(head_weight)
    hidden = hidden.to(head_weight.dtype)
    if out is None:
        out = empty_logits(len(hidden), head_weight)
    if head_weight.dtype == dtype:
        return torch.mm(hidden, head_weight.t(), out=out)
    if on_gpu(hidden):
        return torch.mm(hidden, head_weight.t(), out_dtype=dtype, out=out)
    # CPUs have no product of bf16 that ends in fp32; the whole head in fp32 would be a large copy.
    hidden, rows = hidden.to(dtype), max(16, CHUNK_BYTES // (4 * head_weight.shape[1]))
    for weight, columns in zip(head_weight.split(rows), out.split(rows, 1), strict=True):
        torch.mm(hidden, weight.to(dtype).t(), out=columns)
    return out
