"""Next-token cross entropy from hidden states, without logits for a whole batch.

The head is applied to the supervised positions only, a chunk at a time, and each chunk's gradient is taken
while its logits are at hand, so that forward and backward together never hold more than one chunk of logits.
The head is frozen in every run here: no gradient is built for it.

    N supervised positions, d width, V vocabulary
"""

import torch

from em.model.head import empty_logits, logits

CHUNK_BYTES = 1 << 28  # of fp32 logits at a time


def chunk_rows(vocabulary: int, n_bytes: int | None = None) -> int:
    """How many rows of fp32 logits `n_bytes` (default CHUNK_BYTES) hold; 16 at least."""
    return max(16, (n_bytes or CHUNK_BYTES) // (4 * vocabulary))


def times_head(p: torch.Tensor, head_weight: torch.Tensor, out: torch.Tensor) -> None:
    """out (rows, d) = p (rows, V) @ head_weight, p rounded to the head's dtype."""
    if p.dtype != head_weight.dtype:
        p = empty_logits(len(p), head_weight, head_weight.dtype).copy_(p)
    torch.mm(p, head_weight, out=out)


def scaled(grad: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """grad (N, d) times `by` (0-d, fp32), rounded once.

    `by` stays fp32: 1 / N rounded to bf16 would bend every element alike, by up to 0.4 %.
    """
    return torch.mul(grad, by.view(1, 1), out=torch.empty_like(grad))


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, targets):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        rows = chunk_rows(len(head_weight))
        buffer = empty_logits(min(rows, len(hidden)), head_weight)
        parts = zip(hidden.split(rows), targets.split(rows), grad.split(rows), strict=True)
        for h, target, g in parts:
            x, index = logits(h, head_weight, buffer[: len(h)]), target[:, None]
            log_normaliser = x.logsumexp(-1, keepdim=True)
            total += (log_normaliser - x.gather(1, index)).sum()
            p = x.sub_(log_normaliser).exp_()
            p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))  # softmax − one-hot
            times_head(p, head_weight, g)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return scaled(grad, grad_output), None, None


def summed_cross_entropy(
    hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Σ −log p(target), nats; hidden (N, d), frozen head_weight (V, d), targets (N,). Gradient to hidden."""
    return _SummedCrossEntropy.apply(hidden, head_weight, targets)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, targets):
        out = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        rows = chunk_rows(len(head_weight))
        buffer = empty_logits(min(rows, len(hidden)), head_weight)
        for h, target, o in zip(hidden.split(rows), targets.split(rows), out.split(rows), strict=True):
            x = logits(h, head_weight, buffer[: len(h)])
            torch.sub(x.gather(1, target[:, None])[:, 0], x.logsumexp(-1), out=o)
        ctx.save_for_backward(hidden, head_weight, targets)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        hidden, head_weight, targets = ctx.saved_tensors
        grad = torch.empty_like(hidden)
        rows = chunk_rows(len(head_weight))
        buffer = empty_logits(min(rows, len(hidden)), head_weight)
        split = (x.split(rows) for x in (hidden, targets, grad_output, grad))
        for h, target, weight, g in zip(*split, strict=True):
            p = logits(h, head_weight, buffer[: len(h)]).softmax(-1)
            p.mul_(-weight[:, None]).scatter_add_(1, target[:, None], weight[:, None])  # w (one-hot − p)
            times_head(p, head_weight, g)
        return grad, None, None


def token_log_probs(hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) of each position, (N,) fp32 nats; hidden (N, d), frozen head_weight (V, d), targets (N,).

    Differentiable to hidden: the backward pass computes the logits again, a chunk at a time.
    """
    return _TokenLogProbs.apply(hidden, head_weight, targets)
