"""KL and its gradient from a chunk of logits in one Triton kernel a direction, for `em.training.kl`.

One program a row. A first sweep over it finds both log-sum-exps online; the second sums the forward KL and
writes p_s − p_t over the student's logits, in the head's dtype. The reverse gradient needs the KL of its row,
so there the writing is a third sweep. Import it where it is used only: Triton decides at its own import
whether it compiles for a GPU or, with TRITON_INTERPRET=1, interprets on a CPU.

Rows of logits are `width` apart, `vocabulary` of which count. Loads and stores are masked by the width: where
it is a multiple of 128 (em.training.loss.empty_logits) they are whole vectors for any vocabulary. What lies
beyond the vocabulary may be anything and is replaced after the load.
"""

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from em.errors import UserError

BLOCK = 2048  # logits of each side that a program holds at a time: 8 a thread with 8 warps, so six fit an SM


@triton.jit
def _load(row, columns, vocabulary: tl.constexpr, width: tl.constexpr):
    """Logits at `columns`, -inf beyond the vocabulary."""
    x = tl.load(row + columns, mask=columns < width, other=float("-inf"))
    if vocabulary < width:
        x = tl.where(columns < vocabulary, x, float("-inf"))
    return x


@triton.jit
def _log_normalisers(student, teacher, vocabulary: tl.constexpr, width: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum and log Σ exp(x − maximum) of both sides.

    Apart, since the sum of the two would round at the size of the logits.
    """
    max_s = float("-inf")
    max_t = float("-inf")
    sum_s = 0.0
    sum_t = 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _load(student, columns, vocabulary, width)
        t = _load(teacher, columns, vocabulary, width)
        new_s = tl.maximum(max_s, tl.max(s, 0))
        new_t = tl.maximum(max_t, tl.max(t, 0))
        sum_s = sum_s * tl.exp(max_s - new_s) + tl.sum(tl.exp(s - new_s), 0)
        sum_t = sum_t * tl.exp(max_t - new_t) + tl.sum(tl.exp(t - new_t), 0)
        max_s = new_s
        max_t = new_t
    return max_s, max_t, tl.log(sum_s), tl.log(sum_t)


@triton.jit
def _log_p(row, columns, peak, log_sum, vocabulary: tl.constexpr, width: tl.constexpr):
    """log p of the tokens at `columns`, from what `_log_normalisers` gives of the row."""
    return (_load(row, columns, vocabulary, width) - peak) - log_sum


@triton.jit
def _store(grad, columns, values, vocabulary: tl.constexpr, width: tl.constexpr):
    """A gradient over the logits of its own row.

    In bf16 it lies in the first half of their fp32: element i over the bytes of logit i // 2. Every warp must
    have read this block before any writes; later blocks lie further on.
    """
    tl.debug_barrier()
    tl.store(grad + columns, values.to(grad.dtype.element_ty), mask=columns < width)


@triton.jit
def _forward_kl(
    student, teacher, grad, kl, grad_stride, vocabulary: tl.constexpr, width: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # rows × V passes 2³¹ in a long chunk
    student += row * width
    teacher += row * width
    grad += row * grad_stride
    max_s, max_t, log_sum_s, log_sum_t = _log_normalisers(student, teacher, vocabulary, width, BLOCK)
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_s = _log_p(student, columns, max_s, log_sum_s, vocabulary, width)
        log_t = _log_p(teacher, columns, max_t, log_sum_t, vocabulary, width)
        p_t = tl.exp(log_t)
        difference = tl.exp(log_s) - p_t
        inside = columns < vocabulary
        terms += tl.where(inside, p_t * (log_t - log_s) + difference, 0.0)  # em.training.kl._forward says why
        _store(grad, columns, difference, vocabulary, width)
    tl.store(kl + row, tl.sum(terms, 0))


@triton.jit
def _reverse_kl(
    student, teacher, grad, kl, grad_stride, vocabulary: tl.constexpr, width: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * width
    teacher += row * width
    grad += row * grad_stride
    max_s, max_t, log_sum_s, log_sum_t = _log_normalisers(student, teacher, vocabulary, width, BLOCK)
    terms = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_s = _log_p(student, columns, max_s, log_sum_s, vocabulary, width)
        log_t = _log_p(teacher, columns, max_t, log_sum_t, vocabulary, width)
        terms += tl.where(columns < vocabulary, tl.exp(log_s) * (log_s - log_t), 0.0)
    row_kl = tl.sum(terms, 0)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        log_s = _log_p(student, columns, max_s, log_sum_s, vocabulary, width)
        log_t = _log_p(teacher, columns, max_t, log_sum_t, vocabulary, width)
        values = tl.where(columns < vocabulary, tl.exp(log_s) * (log_s - log_t - row_kl), 0.0)
        _store(grad, columns, values, vocabulary, width)
    tl.store(kl + row, row_kl)


def check(head_weight: torch.Tensor) -> None:
    """UserError, one line, if the kernels cannot run where `head_weight` lies or in its dtype."""
    interpreted = isinstance(_forward_kl, InterpretedFunction) and isinstance(tl.sum, InterpretedFunction)
    if not head_weight.is_cuda and not interpreted:
        raise UserError(
            "impl 'triton' needs a CUDA device (or TRITON_INTERPRET=1 set before Triton is imported); "
            "use impl 'auto' or 'torch'"
        )
    if head_weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"impl 'triton' takes fp32, bf16 or fp16, not {head_weight.dtype}: use impl 'torch'")


def _launch(kernel, student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    n, vocabulary = student.shape
    width = student.stride(0)
    if teacher.stride() != student.stride():
        raise ValueError("student and teacher need rows that lie alike")
    kl = torch.empty(n, dtype=torch.float32, device=student.device)
    grad = student.view(dtype)
    with torch.cuda.device_of(student):
        kernel[(n,)](student, teacher, grad, kl, grad.stride(0), vocabulary, width, BLOCK, num_warps=8)
    return kl.sum()


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Σ over rows of KL(teacher‖student); p_s − p_t in `dtype` is left at the start of each student's row.

    student, teacher (rows, V): fp32 logits as em.training.loss.empty_logits lays them; both are spent.
    """
    return _launch(_forward_kl, student, teacher, dtype)


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Σ over rows of KL(student‖teacher); its gradient is left as `forward_kl` leaves its own."""
    return _launch(_reverse_kl, student, teacher, dtype)
