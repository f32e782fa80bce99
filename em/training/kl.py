"""Full-vocabulary KL between a student and a teacher over one frozen head (paper 4).

`forward_kl` is KL(teacher‖student), off-policy distillation; `reverse_kl` is KL(student‖teacher), the exact
control of the on-policy estimator. Both take hidden states. Logits exist for one chunk of rows at a time, in
fp32; the chunk's gradient is written over them and goes straight back through the head, so that neither N × V
logits nor a gradient of the head is ever built. What follows here is the reference and the path of a CPU;
`em.training.kl_triton` does the middle step of `forward_kl`, from logits to their gradient, in one pass of a
kernel.

    N positions, d width, V vocabulary; KL in nats
"""

from functools import partial
from importlib.util import find_spec

import torch

from em.errors import UserError
from em.training.loss import chunk_rows, logits

# Bytes of logits at a time, student and teacher together. The kernel takes larger chunks: on a GPU
# every chunk streams the whole head three times, and it takes about 512 rows to hide that.
CHUNK_BYTES = {"torch": 96 << 20, "triton": 640 << 20}
BLOCK_BYTES = 4 << 20  # of one side's logits, that the elementwise steps take at a time: what a cache holds


def _forward(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Σ over rows of KL(teacher‖student). `student` (rows, V) becomes p_s − p_t; `teacher` is spent.

    Summed as p_t (log p_t − log p_s) + p_s − p_t: the last two sum to nothing but the rounding of the
    normalisers, which is what would drown a small KL in the first.
    """
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    p_s, p_t = torch.exp(log_s, out=student), torch.exp(log_t, out=teacher)
    difference = p_s.sub_(p_t)
    return log_t.sub_(log_s).mul_(p_t).add_(difference).sum()


def _reverse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Σ over rows of KL(student‖teacher). `student` becomes p_s (log p_s − log p_t − KL of its row)."""
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    p_s = torch.exp(log_s, out=student)
    log_ratio = log_s.sub_(log_t)
    kl = torch.mul(p_s, log_ratio, out=teacher).sum(-1, keepdim=True)
    p_s *= log_ratio.sub_(kl)
    return kl.sum()


def _in_blocks(divergence, student, teacher, dtype):
    """(Σ KL, gradient to the student's logits in `dtype`), from the logits of a chunk, (rows, V) each."""
    rows = max(1, BLOCK_BYTES // (4 * student.shape[1]))
    blocks = zip(student.split(rows), teacher.split(rows), strict=True)
    total = sum(divergence(s, t) for s, t in blocks)
    return total, student.to(dtype)


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_student, h_teacher, head_weight, mask, chunk, divergence):
        valid = mask.nonzero()[:, 0]  # (n,)
        n = len(valid)
        dtype = torch.promote_types(head_weight.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=h_student.device)
        grad = torch.zeros_like(h_student) if ctx.needs_input_grad[0] else None
        buffers = torch.empty(2, min(n, chunk), len(head_weight), dtype=dtype, device=h_student.device)
        for rows in valid.split(chunk) if n else ():
            student = logits(h_student[rows], head_weight, buffers[0, : len(rows)])
            teacher = logits(h_teacher[rows], head_weight, buffers[1, : len(rows)])
            kl, grad_logits = divergence(student, teacher, head_weight.dtype)  # both logits are spent by this
            total += kl
            if grad is not None:
                grad[rows] = grad_logits @ head_weight
        ctx.save_for_backward(grad)
        ctx.n = max(n, 1)
        return total / ctx.n

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        scale = grad_output / ctx.n  # fp32, for rounded to bf16 it would bend every element alike
        return (grad.to(scale.dtype) * scale).to(grad.dtype), None, None, None, None, None


def _apply(h_student, h_teacher, head_weight, mask, chunk, impl, divergence):
    if h_student.shape != h_teacher.shape or h_student.shape[1:] != head_weight.shape[1:]:
        shapes = [tuple(x.shape) for x in (h_student, h_teacher, head_weight)]
        raise ValueError(f"student (N, d), teacher (N, d) and head (V, d) do not fit: {shapes}")
    if mask.dtype != torch.bool or mask.shape != h_student.shape[:1]:
        raise ValueError(f"the mask must be bool (N,), not {mask.dtype} {tuple(mask.shape)}")
    if chunk is None:
        chunk = chunk_rows(2 * len(head_weight), CHUNK_BYTES[impl])  # a row has logits of both sides
        chunk = chunk // 128 * 128 if chunk > 128 else chunk  # tiles of a matrix product are 128 rows
    return _ChunkedKL.apply(h_student, h_teacher.detach(), head_weight.detach(), mask, chunk, divergence)


def forward_kl(
    h_student: torch.Tensor,
    h_teacher: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor,
    *,
    chunk: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Mean over valid positions of KL(teacher‖student) over the whole vocabulary, nats; 0 if none is valid.

    h_student, h_teacher (N, d); head_weight (V, d), frozen and of their dtype; mask (N,) bool, true where a
    position counts. The gradient, (p_s − p_t) W / N_valid, goes to h_student alone. Logits of `chunk` rows
    are held at a time. `impl`: auto (triton on CUDA, else torch), torch, or triton. UserError where triton
    cannot run, ValueError for shapes that do not fit.
    """
    if impl == "auto":
        low = head_weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        impl = "triton" if h_student.is_cuda and low and find_spec("triton") else "torch"
    if impl == "torch":
        divergence = partial(_in_blocks, _forward)
    elif impl == "triton":
        if not find_spec("triton"):
            raise UserError("impl 'triton' needs the triton package: pip install triton, or use impl 'torch'")
        from em.training import kl_triton

        kl_triton.check(head_weight)
        divergence = kl_triton.forward_kl
    else:
        raise ValueError(f"impl is auto, torch or triton, not {impl!r}")
    return _apply(h_student, h_teacher, head_weight, mask, chunk, impl, divergence)


def reverse_kl(
    h_student: torch.Tensor,
    h_teacher: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor,
    *,
    chunk: int | None = None,
) -> torch.Tensor:
    """Mean over valid positions of KL(student‖teacher), with its exact gradient; all else as `forward_kl`.

    It has no Triton kernel, so no `impl`.
    """
    return _apply(h_student, h_teacher, head_weight, mask, chunk, "torch", partial(_in_blocks, _reverse))
