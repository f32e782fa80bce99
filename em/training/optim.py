"""AdamW as the paper uses it, and its learning-rate schedules (B.4, B.5, D.1)."""

import math

import torch
import torch.nn as nn


def adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no decay on biases and norms (ours). One fused kernel a step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def learning_rate(step: int, peak: float, steps: int, warmup: int, shape: str, floor: float = 0.0) -> float:
    """Learning rate of optimiser step `step` (0-based): linear warm-up, then `shape` down to floor · peak.

    shape: `constant`, `linear` or `cosine`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[shape]
    return peak * (floor + (1 - floor) * left)
