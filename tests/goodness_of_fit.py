"""How far a sample is from the distribution it should have."""

import numpy as np
import torch


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """χ² in standard deviations from its mean; cells that expect fewer than 5 are pooled."""
    often = expected >= 5
    counts, expected = (
        torch.cat((x[often], x[~often].sum(0, keepdim=True))).double() for x in (counts, expected)
    )
    degrees = len(counts) - 1
    assert degrees > 3
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() - degrees) / (2 * degrees) ** 0.5


def ks_of_uniform(p: list[float]) -> float:
    """Kolmogorov–Smirnov distance of a sample from the uniform distribution on [0, 1]."""
    p, steps = np.sort(p), np.arange(len(p) + 1) / len(p)
    return float(max((steps[1:] - p).max(), (p - steps[:-1]).max()))
