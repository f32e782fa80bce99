"""Causal self-attention over the layouts that a model meets; which key each query sees is decided here.

    Causal         rows of equal length
    BlockDiagonal  rows made of several samples, or padded rows: attention stays within a run of equal ids
    Cached         new tokens over the keys that a `KVCache` holds

Each has `attend(q, k, v, window)` with q (B, T, H, D), k and v (B, T, K, D), K dividing H (query head h reads
key head h // (H/K)), and returns (B, T, H, D). `window` is a number of positions, the query's own included,
or None. Keys are never expanded to H heads by us; the softmax scale is 1/sqrt(D).

On CUDA in half precision packed rows and windows go through flash attention's variable-length kernel: no
mask, no padding. Elsewhere packed rows are attended one run at a time, cheaper than a (T, T) mask.
"""

import torch
import torch.nn.functional as F


def _flash(q, k, v, cu_lengths: torch.Tensor, longest: int, window: int | None) -> torch.Tensor:
    """Attention within runs of flat q (N, H, D), k, v (N, K, D); cu_lengths (runs + 1,) int32, from 0 to N.

    The operator under `torch.nn.attention.varlen`, whose own signature differs between torch 2.11 and 2.13.
    """
    left = -1 if window is None else window - 1  # the kernel counts the keys left of the query's own
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_lengths, cu_lengths, longest, longest, 0.0, window is None, False,
        window_size_left=left, window_size_right=0,
    )[0]  # fmt: skip


def _flash_runs(q: torch.Tensor) -> bool:
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
    )


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Rows of equal length: q (B, T, H, D) → (B, T, H, D)."""
    B, T, H, _ = q.shape
    mask = None
    if window is not None and window < T:
        if _flash_runs(q):
            cu_lengths = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
            flat = [x.flatten(0, 1) for x in (q, k, v)]  # (B*T, heads, D)
            return _flash(*flat, cu_lengths, T, window).view_as(q)
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
        B, T = segments.shape
        starts = torch.ones(B, T, dtype=torch.bool, device=segments.device)  # a row starts a run
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        index = torch.arange(T, device=segments.device).expand(B, T)
        # (B, T): how far each token is from the start of its run
        self.positions = (index - torch.where(starts, index, 0).cummax(1).values).to(device)
        bounds = torch.cat((starts.flatten().nonzero().flatten().cpu(), torch.tensor([B * T])))
        self.lengths = bounds.diff().tolist()
        self.cu_lengths = bounds.to(device, torch.int32)

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

    visible (B, T, S) bool: which keys each sees instead.
    """

    def __init__(self, positions: torch.Tensor, span: int, visible: torch.Tensor | None = None):
        self.visible = visible
        self.positions = positions[:, :, None]  # (B, T, 1)
        self.slots = torch.arange(span, device=positions.device)  # (S,)
        self._masks: dict[int | None, torch.Tensor] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(B, 1, T, S), 0 where visible and -inf elsewhere: additive, so that no layer converts it again."""
        if window not in self._masks:
            visible = self.slots <= self.positions if self.visible is None else self.visible  # (B, T, S)
            if window is not None:
                visible = visible & (self.slots > self.positions - window)
            blank = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            self._masks[window] = blank.masked_fill_(~visible, float("-inf"))[:, None]
        return self._masks[window]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
        B, T, H, D = q.shape
        K, mask = k.shape[2], self._mask(window, q.dtype)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, S, D)
        if T == 1:
            # The H/K queries that share a key head as so many query positions: no backend expands keys.
            q, mask = q.view(B, K, H // K, D), mask.expand(B, 1, H // K, -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, 1, H, D)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, enable_gqa=H != K)
        return out.transpose(1, 2)  # (B, H, T, D) → (B, T, H, D)
