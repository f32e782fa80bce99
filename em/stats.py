"""Intervals for counts. All rates are fractions in [0, 1]; intervals are two-sided 95 %."""

import math

Z95 = 1.959963984540054


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson score interval of k successes in n trials; (0, 1) where n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and n the bound is the rate itself, which rounding would miss.
    return 0.0 if k == 0 else centre - half, 1.0 if k == n else centre + half


def newcombe(k1: int, n1: int, k0: int, n0: int) -> tuple[float, float]:
    """Newcombe's interval (1998, method 10) of k1/n1 − k0/n0, from the two Wilson intervals."""
    if n1 == 0 or n0 == 0:
        return -1.0, 1.0
    p1, p0 = k1 / n1, k0 / n0
    (low1, high1), (low0, high0) = wilson(k1, n1), wilson(k0, n0)
    low = p1 - p0 - math.hypot(p1 - low1, high0 - p0)
    high = p1 - p0 + math.hypot(high1 - p1, p0 - low0)
    return low, high
