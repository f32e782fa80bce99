"""Greedy keep-first deduplication by cosine (paper A.3: at most 0.92), exact and in bounded memory.

In order, a row is kept unless its cosine with a row kept before it is above the threshold. Cosines are taken
in fp32, a block of rows by a block of kept ones; what lies so near the threshold that fp32 could decide it
either way is taken again in fp64. So the result is that of fp64 over all pairs, ties included.

    N rows, d their width
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from em.construction.attrition import drop
from em.model.minilm import MiniLM

STAGE = "no near-duplicate"

THRESHOLD = 0.92
BLOCK = 2048  # rows; a block of cosines has 16 MB
DOUBT = 1e-5  # beyond the rounding of a dot product of unit rows in fp32


def first_twins(embeddings: Tensor, threshold: float = THRESHOLD, block: int = BLOCK) -> list[int]:
    """For each row, −1 where it is kept, else the first kept row whose cosine with it is above `threshold`.

    embeddings: (N, d) fp32, rows of length 1.
    """
    twins: list[int] = []
    kept = torch.empty(0, dtype=torch.long)
    for start in range(0, len(embeddings), block):
        rows = embeddings[start : start + block]
        first = torch.full((len(rows),), -1)
        for begin in range(0, len(kept), block):
            part = kept[begin : begin + block]
            above = _above(rows, embeddings[part], threshold)  # (rows, kept of this block)
            found = above.any(1) & (first < 0)
            first[found] = part[above[found].byte().argmax(1)]
        above = _above(rows, rows, threshold).tril(-1)
        stays = first < 0
        for i in (stays & above.any(1)).nonzero()[:, 0].tolist():  # in order: a dropped row drops none
            before = (above[i] & stays).nonzero()[:, 0]
            if len(before):
                first[i], stays[i] = start + before[0], False
        kept = torch.cat([kept, start + stays.nonzero()[:, 0]])
        twins += first.tolist()
    return twins


def _above(a: Tensor, b: Tensor, threshold: float) -> Tensor:
    """(len(a), len(b)) bool: whether the cosine is above the threshold, as fp64 has it."""
    cosines = a @ b.T
    above = cosines > threshold - DOUBT
    if not above.any():
        return above  # as nearly always
    doubtful = above & (cosines < threshold + DOUBT)
    for i in doubtful.any(1).nonzero()[:, 0].tolist():  # a row at a time, so that memory stays bounded
        which = doubtful[i].nonzero()[:, 0]
        above[i, which] = (b[which].double() * a[i].double()).sum(1) > threshold
    return above


class NearDuplicates:
    """The search over rounds of candidates: those of earlier rounds come first."""

    def __init__(self, encoder: MiniLM, threshold: float = THRESHOLD):
        self.encoder, self.threshold = encoder, threshold
        self._candidates: list[dict] = []
        self._embeddings = torch.empty(0)

    def drop(self, new: list[dict], texts: Sequence[str]) -> None:
        """Drop those of `new` whose text is too near an earlier one's; `twin` says which and how near."""
        if not new:
            return
        embeddings = self.encoder.encode(texts)
        before, self._candidates = len(self._candidates), self._candidates + new
        self._embeddings = torch.cat([self._embeddings.view(-1, embeddings.shape[1]), embeddings])
        for i, twin in enumerate(first_twins(self._embeddings, self.threshold)):
            if i >= before and twin >= 0:
                drop(self._candidates[i], STAGE, f"cosine > {self.threshold:g}")
                cosine = float(self._embeddings[i] @ self._embeddings[twin])
                like = {"question": self._candidates[twin]["question"], "cosine": round(cosine, 4)}
                self._candidates[i]["twin"] = like
