"""Alias tables: draw from many discrete distributions at once, two look-ups each (Walker 1977, Vose 1991)."""

from collections.abc import Sequence

import numpy as np


class AliasTable:
    """Rows of distributions, each of its own size, stored end to end.

    `draw(rng, rows)` gives flat indices: `start[row] + outcome`, so that a table of outcomes laid out the
    same way is read with one more look-up.
    """

    def __init__(self, distributions: Sequence[Sequence[float]]):
        sizes = np.array([len(d) for d in distributions])
        self.size = sizes.astype(np.float32)
        self.start = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int32)
        self.accept = np.ones(sizes.sum(), np.float32)
        self.alias = np.arange(sizes.sum(), dtype=np.int32)
        for start, p in zip(self.start, distributions, strict=True):
            self._fill(int(start), np.asarray(p, float))

    def _fill(self, start: int, p: np.ndarray) -> None:
        """Each slot keeps its own outcome with `accept`, else gives that of `alias`."""
        scaled = p * len(p) / p.sum()
        small, large = list(np.flatnonzero(scaled < 1)), list(np.flatnonzero(scaled >= 1))
        while small and large:
            under, over = small.pop(), large.pop()
            self.accept[start + under] = scaled[under]
            self.alias[start + under] = start + over
            scaled[over] -= 1 - scaled[under]
            (small if scaled[over] < 1 else large).append(over)
        # What is left is 1 up to rounding, and keeps accept = 1.

    def draw(self, rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        """One flat index a row, int32. A float32 uniform has 24 bits: enough for 86 outcomes at 1e-5."""
        x = rng.random(len(rows), dtype=np.float32) * self.size[rows]
        slot = x.astype(np.int32)
        x -= slot
        slot += self.start[rows]
        return np.where(x < self.accept[slot], slot, self.alias[slot])
