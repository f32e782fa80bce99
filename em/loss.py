"""Next-token cross entropy from hidden states, without logits for a whole batch (SPEC §3.4).

The head is applied to the supervised positions only, a chunk at a time, and each chunk's gradient is taken
while its logits are at hand, so that forward and backward together never hold more than one chunk of logits.
The head is frozen in every run here: no gradient is built for it.

    N supervised positions, d width, V vocabulary
"""

import torch

CHUNK_BYTES = 1 << 28  # of fp32 logits at a time


def chunk_rows(vocabulary: int) -> int:
    return max(16, CHUNK_BYTES // (4 * vocabulary))


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head_weight, targets):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden)
        rows = chunk_rows(len(head_weight))
        parts = zip(hidden.split(rows), targets.split(rows), grad.split(rows), strict=True)
        for h, target, g in parts:
            logits = (h @ head_weight.t()).float()  # (rows, V)
            index = target[:, None]
            log_normaliser = logits.logsumexp(-1, keepdim=True)
            total += (log_normaliser - logits.gather(1, index)).sum()
            p = logits.sub_(log_normaliser).exp_()
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


@torch.no_grad()
def token_log_probs(hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target) of each position, (N,) fp32 nats; hidden (N, d), head_weight (V, d), targets (N,)."""
    rows = chunk_rows(len(head_weight))
    out = []
    for h, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = (h @ head_weight.t()).float()
        out.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1))
    return torch.cat(out) if out else hidden.new_zeros(0, dtype=torch.float32)
