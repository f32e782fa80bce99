"""AdamW as the paper uses it, and its learning-rate schedules (B.4, B.5, D.1)."""

import math

import torch
import torch.nn as nn


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay, ε = 1e-8; one fused kernel a group, and nothing that waits for the device.

    The kernel is that of torch.optim.AdamW(fused=True), whose front end takes no tensors on meta.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], weight_decay: float = 0.0):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(groups, defaults | {"fused": True})  # `fused`: a loaded `step` goes to the device

    @torch.no_grad()
    def step(self, skip: torch.Tensor | None = None) -> None:
        """Update what has a gradient. skip (0-d fp32, on the device): where it is 1 nothing changes."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self._state(p) for p in parameters]
            columns = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
            averages, squares, steps = columns
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                parameters, [p.grad for p in parameters], averages, squares, [], steps,
                lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=1e-8,
                weight_decay=group["weight_decay"], amsgrad=False, maximize=False, found_inf=skip,
            )  # fmt: skip
            if skip is not None:
                torch._foreach_sub_(steps, [skip] * len(steps))

    def _state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        return state


def gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Their gradients, zeros where this process had nothing to learn from.

    Gradients are dropped between steps: the first backward then leaves them where it made them.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    return [p.grad for p in parameters]


def adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> AdamW:
    """AdamW over the trainable parameters; no decay on biases and norms (ours)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr, betas)


def learning_rate(step: int, peak: float, steps: int, warmup: int, shape: str, floor: float = 0.0) -> float:
    """Learning rate of optimiser step `step` (0-based): linear warm-up, then `shape` down to floor · peak.

    shape: `constant`, `linear` or `cosine`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[shape]
    return peak * (floor + (1 - floor) * left)
