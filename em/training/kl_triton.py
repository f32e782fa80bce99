"""Forward KL and its gradient from a chunk of logits in one Triton kernel, for `em.training.kl`.

One program a row, two sweeps over it: the first finds both log-sum-exps online, the second sums the KL and
writes p_s − p_t over the student's logits, in the head's dtype. Import it where it is used only: Triton
decides at its own import whether it compiles for a GPU or, with TRITON_INTERPRET=1, interprets on a CPU.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from em.errors import UserError

BLOCK = 4096  # logits of each side that a program holds at a time: 16 a thread with 8 warps


@triton.jit
def _forward_kl(
    student, teacher, grad, kl, row_stride, grad_stride, vocabulary: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # rows × V passes 2³¹ in a long chunk
    student += row * row_stride
    teacher += row * row_stride
    grad += row * grad_stride
    offsets = tl.arange(0, BLOCK)

    max_s = float("-inf")
    max_t = float("-inf")
    sum_s = 0.0
    sum_t = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + offsets < vocabulary
        s = tl.load(student + start + offsets, mask=inside, other=float("-inf"))
        t = tl.load(teacher + start + offsets, mask=inside, other=float("-inf"))
        new_s = tl.maximum(max_s, tl.max(s, 0))
        new_t = tl.maximum(max_t, tl.max(t, 0))
        sum_s = sum_s * tl.exp(max_s - new_s) + tl.sum(tl.exp(s - new_s), 0)
        sum_t = sum_t * tl.exp(max_t - new_t) + tl.sum(tl.exp(t - new_t), 0)
        max_s = new_s
        max_t = new_t
    log_sum_s = tl.log(sum_s)
    log_sum_t = tl.log(sum_t)

    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        inside = start + offsets < vocabulary
        # the maximum apart from the rest: their sum would round at the size of the logits
        log_s = (tl.load(student + start + offsets, mask=inside, other=0.0) - max_s) - log_sum_s
        log_t = (tl.load(teacher + start + offsets, mask=inside, other=0.0) - max_t) - log_sum_t
        p_t = tl.exp(log_t)
        difference = tl.exp(log_s) - p_t
        terms += tl.where(inside, p_t * (log_t - log_s) + difference, 0.0)  # em.training.kl._forward says why
        # A bf16 gradient lies in the first half of its own row of fp32 logits: element i over the bytes of
        # logit i // 2. Every warp must have read this block before any writes; later blocks lie further on.
        tl.debug_barrier()
        tl.store(grad + start + offsets, difference.to(grad.dtype.element_ty), mask=inside)
    tl.store(kl + row, tl.sum(terms, 0))


def check(head_weight: torch.Tensor) -> None:
    """UserError, one line, if the kernel cannot run where `head_weight` lies or in its dtype."""
    interpreted = isinstance(_forward_kl, InterpretedFunction) and isinstance(tl.sum, InterpretedFunction)
    if not head_weight.is_cuda and not interpreted:
        raise UserError(
            "impl 'triton' needs a CUDA device (or TRITON_INTERPRET=1 set before Triton is imported); "
            "use impl 'auto' or 'torch'"
        )
    if head_weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"impl 'triton' takes fp32, bf16 or fp16, not {head_weight.dtype}: use impl 'torch'")


def forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ over rows of KL(teacher‖student), and p_s − p_t (rows, V) in `dtype`, a view over `student`.

    student, teacher (rows, V): fp32 logits, rows contiguous; the student's are overwritten.
    """
    n, vocabulary = student.shape
    grad = student.view(dtype)[:, :vocabulary]  # bf16: (rows, 2V) cut to (rows, V)
    kl = torch.empty(n, dtype=torch.float32, device=student.device)
    with torch.cuda.device_of(student):
        _forward_kl[(n,)](
            student, teacher, grad, kl, student.stride(0), grad.stride(0), vocabulary, BLOCK, num_warps=8
        )
    return kl.sum(), grad
