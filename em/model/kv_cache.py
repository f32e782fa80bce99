"""The static key/value cache of incremental decoding, shared by the chat models and GPT-2.

One slot a sequence ("row"), `capacity` positions a slot, allocated once. Rows are independent: each writes at
its own positions, so rows of different lengths share a batch and a finished row can be given to another
prompt at once. Nothing here reads a tensor's value on the host, so a decode step can be captured in a CUDA
graph: positions and rows are int64 tensors whose contents change under the captured addresses.

A query at position p sees the keys of its row at positions <= p (and inside the layer's window), so what lies
beyond is never read: a prompt's right padding and the keys of a row's earlier prompt need no cleaning.
"""

import torch

from em.device import on_gpu
from em.model.decode import rotate_write, write


class KVCache:
    """Keys and values (L, R, K, S, D): layers, rows, key heads, positions, head size.

    capacity is rounded up to a multiple of 64. Writing at a position >= capacity is an error (on CUDA an
    assertion in the kernel), so the caller stops or clamps rows that reach it. `n_rows` may be lowered and
    raised again: "all rows" are then the first n_rows.
    """

    def __init__(
        self, n_layers: int, n_rows: int, capacity: int, n_kv_heads: int, head_dim: int,
        *, dtype: torch.dtype, device: torch.device | str,
    ):  # fmt: skip
        self.n_rows, self.capacity = n_rows, -(-capacity // 64) * 64
        shape = (n_layers, n_rows, n_kv_heads, self.capacity, head_dim)
        # Zeros, not empty: a masked key has probability 0, and 0 times a stray NaN would still be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.span = self.capacity
        self._all_rows = torch.arange(n_rows, device=device)

    def limit(self, length: int) -> None:
        """Read only the first `length` positions of every row; on a GPU rounded up to 64.

        For a CPU, where attention reads the whole span. The caller promises that no query's position
        reaches it.
        """
        if not 0 < length <= self.capacity:
            raise ValueError(f"length {length} is outside 1..{self.capacity}")
        self.span = min(self.capacity, -(-length // 64) * 64) if on_gpu(self.keys) else length

    def check(self, shape: tuple[int, int], rows: torch.Tensor | None, longest: int | None = None) -> None:
        """ValueError where ids of shape (B, T) do not fit the cache rows that they are meant for.

        longest: of the runs of packed ids, whose rows are (B, T); None: ids are not packed.
        """
        if longest is None:
            fits = shape[0] == (self.n_rows if rows is None else len(rows)) and shape[1] <= self.capacity
        else:
            fits = rows is not None and rows.shape == shape and longest <= self.capacity
        if not fits:
            raise ValueError(f"ids {shape} do not fit a cache of {self.n_rows} rows by {self.capacity}")

    def _rows(self, rows: torch.Tensor | None) -> torch.Tensor:
        """(B, T) or (B, 1)."""
        rows = self._all_rows[: self.n_rows] if rows is None else rows
        return rows[:, None] if rows.dim() == 1 else rows

    def write(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        """Store keys and values (B, T, K, D) at positions (B, T) or (1, T) of rows (B,) or (B, T).

        rows None: all, in order.
        """
        write(keys, values, self.keys[layer], self.values[layer], positions, self._rows(rows))

    def rotate_write(self, layer: int, q, k, v, rotary, positions, rows) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k turned by `rotary`, a `Rope.table`; stores the turned k and v as `write` does."""
        held = self.keys[layer], self.values[layer]
        return rotate_write(q, k, v, *rotary, *held, positions, self._rows(rows))

    def read(self, layer: int, rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, span, K, D); views for all rows, copies for a choice of rows."""
        keys, values = (x[layer, :, :, : self.span].transpose(1, 2) for x in (self.keys, self.values))
        return (keys[: self.n_rows], values[: self.n_rows]) if rows is None else (keys[rows], values[rows])

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, length: int | None = None) -> None:
        """Give rows `targets` (N,) the first `length` positions of rows `sources` (N,); None: all.

        So one prefill serves n samples.
        """
        self.keys[:, targets, :, :length] = self.keys[:, sources, :, :length]
        self.values[:, targets, :, :length] = self.values[:, sources, :, :length]
