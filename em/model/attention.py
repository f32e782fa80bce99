"""Causal self-attention over the layouts that a model meets; which key each query sees is decided here.

    Causal         rows of equal length
    BlockDiagonal  rows made of several samples, or padded rows: attention stays within a run of equal ids
    Cached         new tokens over the keys that a `KVCache` holds

Each has `attend(q, k, v, window)` with q (B, T, H, D), k and v (B, T, K, D), K dividing H (query head h reads
key head h // (H/K)), and returns (B, T, H, D). `window` is a number of positions, the query's own included,
or None. Keys are never expanded to H heads by us; the softmax scale is 1/sqrt(D).

On a GPU each layout names its kernel, none of which builds a plan for a shape: half precision without a cache
is flash attention, packed rows its variable-length form (no mask, no padding); a decode step is
`em.model.decode`; more tokens at once over a cache are the memory-efficient kernel. Elsewhere packed rows are
attended one run at a time, cheaper than a (T, T) mask.
"""

import torch
import torch.nn.functional as F

from em.device import on_gpu, to_device
from em.model.decode import attend_masked, decode_attention, visible


def _flash(q, k, v, cu_lengths: torch.Tensor | None, longest: int, window: int | None) -> torch.Tensor:
    """Attention within runs of flat q (N, H, D), k, v (N, K, D); cu_lengths (runs + 1,) int32, from 0 to N.

    cu_lengths None: the runs are rows, q (B, T, H, D), k, v (B, T, K, D), longest = T. It is the operator
    under `torch.nn.attention.varlen`, whose own signature differs between torch 2.11 and 2.13.
    """
    left = -1 if window is None else window - 1  # the kernel counts the keys left of the query's own
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_lengths, cu_lengths, longest, longest, 0.0, window is None, False,
        window_size_left=left, window_size_right=0,
    )[0]  # fmt: skip


def _flash_runs(q: torch.Tensor) -> bool:
    return (
        on_gpu(q)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
    )


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Rows of equal length: q (B, T, H, D) → (B, T, H, D)."""
    T, H = q.shape[1:3]
    if window is not None and window >= T:
        window = None
    if _flash_runs(q):
        return _flash(q, k, v, None, T, window)
    mask = None
    if window is not None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=mask is None, enable_gqa=H != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)  # (B, H, T, D) → (B, T, H, D)


class Causal:
    """Rows of equal length: a query sees its row up to itself."""

    attend = staticmethod(_causal)


CAUSAL = Causal()


class BlockDiagonal:
    """Rows of `segments` (B, T): a query sees the keys of its own run of equal ids, up to itself.

    The run lengths are needed on the host: pass `segments` on the CPU to spare a GPU a synchronisation.
    """

    def __init__(self, segments: torch.Tensor, device: torch.device):
        (B, T), segments = segments.shape, segments.cpu()
        starts = torch.ones(B, T, dtype=torch.bool)  # a row starts a run
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        index = torch.arange(T).expand(B, T)
        positions = index - torch.where(starts, index, 0).cummax(1).values  # from the start of its run
        bounds = torch.cat((starts.flatten().nonzero().flatten(), torch.tensor([B * T])))
        self.lengths = bounds.diff().tolist()
        self.positions, bounds = to_device([positions, bounds], device)  # (B, T), (runs + 1,)
        self.cu_lengths = bounds.to(torch.int32)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        B, T = q.shape[:2]
        if len(self.lengths) == B:  # one run a row
            return _causal(q, k, v, window)
        flat = [x.flatten(0, 1) for x in (q, k, v)]  # (B*T, heads, D)
        if _flash_runs(q):
            return _flash(*flat, self.cu_lengths, max(self.lengths), window).view_as(q)
        runs = zip(*(x[None].split(self.lengths, 1) for x in flat), strict=True)  # (1, length, heads, D)
        return torch.cat([_causal(*run, window) for run in runs], 1).view_as(q)


def padded(attention_mask: torch.Tensor, device: torch.device) -> BlockDiagonal:
    """Left- or right-padded rows, attention_mask (B, T) 1 = token, 0 = padding. Padding sees only padding."""
    layout = BlockDiagonal(attention_mask.bool().long(), device)
    changes = (attention_mask.bool()[:, 1:] != attention_mask.bool()[:, :-1]).sum(1)
    left_and_right = (changes == 2) & ~attention_mask[:, 0].bool()
    if not ((changes < 2) | left_and_right).all():
        raise ValueError(
            "attention_mask has padding between the tokens of a row; only padded ends are supported"
        )
    return layout


class Cached:
    """New tokens at `positions` (B, T): each sees the first `span` keys of its cache row up to its own.

    seen (B, T, S) bool: which keys each sees instead.
    """

    def __init__(self, positions: torch.Tensor, span: int, seen: torch.Tensor | None = None):
        self.positions, self.span, self.seen = positions, span, seen
        self._masks: dict[int | None, torch.Tensor] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """`visible`, once a step and not once a layer."""
        if window not in self._masks:
            self._masks[window] = visible(self.positions, self.span, window, dtype, self.seen)
        return self._masks[window]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        if q.shape[1] == 1 and on_gpu(q) and self.seen is None:
            return decode_attention(q[:, 0], k, v, self.positions[:, 0], window)[:, None]
        return attend_masked(q, k, v, self._mask(window, q.dtype))
