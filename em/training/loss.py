"""Next-token cross entropy from hidden states, without logits for a whole batch.

The head is applied to the supervised positions only, a chunk at a time, and each chunk's gradient is taken
while its logits are at hand, so that forward and backward together never hold more than one chunk of logits.
The head is frozen in every run here: no gradient is built for it.

    N supervised positions, d width, V vocabulary
"""

import torch

from em.model.head import logits

CHUNK_BYTES = 1 << 28  # of fp32 logits at a time


def chunk_rows(vocabulary: int, n_bytes: int | None = None) -> int:
    """How many rows of fp32 logits `n_bytes` (default CHUNK_BYTES) hold; 16 at least."""
    return max(16, (n_bytes or CHUNK_BYTES) // (4 * vocabulary))


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, targets):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        rows = chunk_rows(len(head_weight))
        parts = zip(hidden.split(rows), targets.split(rows), grad.split(rows), strict=True)
        for h, target, g in parts:
            x, index = logits(h, head_weight), target[:, None]
            log_normaliser = x.logsumexp(-1, keepdim=True)
            total += (log_normaliser - x.gather(1, index)).sum()
            p = x.sub_(log_normaliser).exp_()
            p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))  # softmax − one-hot
            torch.mm(p.to(h.dtype), head_weight, out=g)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        (grad,) = ctx.saved_tensors
        return grad * grad_output.to(grad.dtype), None, None


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
        for h, target, o in zip(hidden.split(rows), targets.split(rows), out.split(rows), strict=True):
            x = logits(h, head_weight)
            torch.sub(x.gather(1, target[:, None])[:, 0], x.logsumexp(-1), out=o)
        ctx.save_for_backward(hidden, head_weight, targets)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        hidden, head_weight, targets = ctx.saved_tensors
        grad = torch.empty_like(hidden)
        rows = chunk_rows(len(head_weight))
        split = (x.split(rows) for x in (hidden, targets, grad_output, grad))
        for h, target, weight, g in zip(*split, strict=True):
            p = logits(h, head_weight).softmax(-1)
            p.mul_(-weight[:, None]).scatter_add_(1, target[:, None], weight[:, None])  # w (one-hot − p)
            torch.mm(p.to(h.dtype), head_weight, out=g)
        return grad, None, None


def token_log_probs(hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) of each position, (N,) fp32 nats; hidden (N, d), frozen head_weight (V, d), targets (N,).

    Differentiable to hidden: the backward pass computes the logits again, a chunk at a time.
    """
    return _TokenLogProbs.apply(hidden, head_weight, targets)
