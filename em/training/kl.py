"""Full-vocabulary KL between a student and a teacher over one frozen head (paper 4).

`forward_kl` is KL(teacher‖student), off-policy distillation; `reverse_kl` is KL(student‖teacher), the exact
control of the on-policy estimator. Both take hidden states. Logits exist for one chunk of rows at a time, in
fp32; the chunk's gradient is written over them and goes straight back through the head, so that neither N × V
logits nor a gradient of the head is ever built. What follows here is the reference and the path of a CPU;
`em.training.kl_triton` does the middle step, from logits to their gradient, in one kernel. That step is an
operator of torch.library, `em::forward_kl_` and `em::reverse_kl_`, so that meta tensors pass through it.

    N positions, d width, V vocabulary; KL in nats
"""

from functools import partial
from importlib.util import find_spec

import torch

from em.device import on_gpu
from em.errors import UserError
from em.model.head import empty_logits, logits, logits_dtype
from em.model.operators import operator
from em.training.loss import chunk_rows, scaled

# Bytes of logits at a time, student and teacher together. A GPU takes larger chunks: every chunk streams the
# whole head three times, and it takes about 512 rows to hide that.
CHUNK_BYTES = {"cpu": 72 << 20, "gpu": 640 << 20}
BLOCK_BYTES = 4 << 20  # of one side's logits, that a CPU's elementwise steps take at a time: a cache holds it

# -- from the logits of a chunk to their gradient ------------------------------------------------------------


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


def _gradient(student: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where the gradient of logits lies that were spent: in the first bytes of each of their rows."""
    return student.view(dtype)[:, : student.shape[1]]  # bf16: (rows, 2V) cut to (rows, V)


def _in_torch(divergence, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Σ KL of a chunk, the gradient of its logits (rows, V) left in `student` as `_gradient` finds it."""
    rows = len(student) if on_gpu(student) else max(1, BLOCK_BYTES // (4 * student.shape[1]))
    total = 0
    for s, t in zip(student.split(rows), teacher.split(rows), strict=True):
        total = total + divergence(s, t)
        if dtype != s.dtype:
            _gradient(s, dtype).copy_(s.to(dtype))
    return total


DIVERGENCES = {"forward_kl": _forward, "reverse_kl": _reverse}
OPERATORS = {
    name: operator(
        f"{name}_(Tensor(a!) student, Tensor(b!) teacher, ScalarType dtype) -> Tensor",
        partial(_in_torch, divergence),
        lambda student, teacher, dtype: student.new_empty(()),
        "em.training.kl_triton",
    )
    for name, divergence in DIVERGENCES.items()
}

# -- chunk by chunk ------------------------------------------------------------------------------------------


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_student, h_teacher, head_weight, mask, chunk, divergence):
        if mask is not None:
            valid, everything = mask.nonzero()[:, 0], h_student  # (n,)
            h_student, h_teacher = h_student[valid], h_teacher[valid]
        n = len(h_student)
        total = torch.zeros((), dtype=logits_dtype(head_weight), device=h_student.device)
        grad = torch.empty_like(h_student) if ctx.needs_input_grad[0] else None
        buffers = empty_logits(2 * min(n, chunk), head_weight).chunk(2) if n else ()
        for start in range(0, n, chunk):
            rows = slice(start, start + chunk)
            student, teacher = (
                logits(h[rows], head_weight, buffer[: len(h[rows])])
                for h, buffer in zip((h_student, h_teacher), buffers, strict=True)
            )
            total += divergence(student, teacher, head_weight.dtype)  # both logits are spent by this
            if grad is not None:
                grad_logits = _gradient(student, head_weight.dtype)
                if not on_gpu(grad_logits):  # oneDNN multiplies bf16 beyond a row's end by 0, and NaN stays
                    grad_logits = grad_logits.contiguous()
                torch.mm(grad_logits, head_weight, out=grad[rows])
        if grad is not None and mask is not None:
            grad = torch.zeros_like(everything).index_copy_(0, valid, grad)
        ctx.save_for_backward(grad)
        ctx.n = max(n, 1)
        return total / ctx.n

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return scaled(grad, grad_output / ctx.n), None, None, None, None, None


def _apply(name, h_student, h_teacher, head_weight, mask, chunk, impl):
    if h_student.shape != h_teacher.shape or h_student.shape[1:] != head_weight.shape[1:]:
        shapes = [tuple(x.shape) for x in (h_student, h_teacher, head_weight)]
        raise ValueError(f"student (N, d), teacher (N, d) and head (V, d) do not fit: {shapes}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != h_student.shape[:1]):
        raise ValueError(f"the mask must be bool (N,), not {mask.dtype} {tuple(mask.shape)}")
    if impl == "auto":
        divergence = OPERATORS[name]
    elif impl == "torch":
        divergence = partial(_in_torch, DIVERGENCES[name])
    elif impl == "triton":
        if not find_spec("triton"):
            raise UserError("impl 'triton' needs the triton package: pip install triton, or use impl 'torch'")
        from em.training import kl_triton

        kl_triton.check(head_weight)
        divergence = getattr(kl_triton, name)
    else:
        raise ValueError(f"impl is auto, torch or triton, not {impl!r}")
    if chunk is None:
        n_bytes = CHUNK_BYTES["gpu" if on_gpu(h_student) else "cpu"]
        chunk = chunk_rows(2 * len(head_weight), n_bytes)  # a row has logits of both sides
        chunk = chunk // 128 * 128 if chunk > 128 else chunk  # tiles of a matrix product are 128 rows
    return _ChunkedKL.apply(h_student, h_teacher.detach(), head_weight.detach(), mask, chunk, divergence)


def forward_kl(
    h_student: torch.Tensor,
    h_teacher: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    chunk: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Mean over valid positions of KL(teacher‖student) over the whole vocabulary, nats; 0 if none is valid.

    h_student, h_teacher (N, d); head_weight (V, d), frozen and of their dtype; mask (N,) bool, true where a
    position counts. None: all count, and then a GPU is not waited for. The gradient, (p_s − p_t) W / N_valid,
    goes to h_student alone. Logits of `chunk` rows are held at a time. `impl`: auto (triton on CUDA, else
    torch), torch, or triton. UserError where triton cannot run, ValueError for shapes that do not fit.
    """
    return _apply("forward_kl", h_student, h_teacher, head_weight, mask, chunk, impl)


def reverse_kl(
    h_student: torch.Tensor,
    h_teacher: torch.Tensor,
    head_weight: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    chunk: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Mean over valid positions of KL(student‖teacher), with its exact gradient; all else as `forward_kl`."""
    return _apply("reverse_kl", h_student, h_teacher, head_weight, mask, chunk, impl)
