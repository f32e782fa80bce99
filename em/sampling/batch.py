"""A batch of rows that decode side by side: prefill, decode steps, and CUDA graphs of the steps.

Everything a step reads or writes lives in buffers that keep their address, so on a GPU a step is one graph
replay, sampling included. A graph is captured per adapter stack, rows in use and cache span, and kept for
later calls; adapters run unmerged, from the buffers of `em.model.lora.stack(..., frozen=True)`. The first
step of each shape (rows, span) runs eagerly: it is a real step, and it warms up what a capture may not.

The host looks at the batch every `steps_per_run` steps: on a GPU asking costs a synchronisation. A row that
ended meanwhile runs on into columns that nobody reads.

    R rows, B ≤ R of them in a prefill, n ≤ R in a step; T prompt tokens, d width, V vocabulary
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from em.sampling.cpu_linear import ReorderedModel
from em.sampling.draw import draw

PREFILL_TOKENS = 4096  # in one forward, padding included


def _uses_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _captured(step: Callable[[], None], pool) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _groups(prompts: list[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
    """(row, tokens) pairs by length, in groups with at most a tenth of padding unless they are small."""
    group, total = [], 0
    for pair in sorted((pair for pair in prompts if pair[1]), key=lambda pair: len(pair[1])):
        padded, total = (len(group) + 1) * len(pair[1]), total + len(pair[1])
        if group and padded > min(PREFILL_TOKENS, max(256, 1.1 * total)):
            yield group
            group, total = [], len(pair[1])
        group.append(pair)
    if group:
        yield group


class Batch:
    """Up to `n_rows` responses in progress on the model's device.

    Beside the cache, (R,) each: the token to feed next and its position, the key of the row's random
    numbers, how many tokens were sampled, how many of them count (to the first stop token or the limit),
    and whether the row has ended. `ids` and `log_probs` (R, W) are what was sampled, W = max_new_tokens +
    steps_per_run.
    """

    def __init__(
        self, model: nn.Module, n_rows: int, capacity: int, stop_ids: tuple[int, ...], max_new_tokens: int,
        temperature: float,
    ):  # fmt: skip
        self.model, self.n_rows = model, n_rows
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.reordered = ReorderedModel(model)
        self.device = device = model.head_weight.device
        self.graphed = _uses_graphs(device)
        self.steps_per_run = 4 if self.graphed else 1
        self.cache = model.new_cache(n_rows, capacity)
        self.last = min(self.cache.capacity, model.config.max_positions) - 1  # position where ended rows stay
        self.stops = torch.tensor(stop_ids, device=device)
        self.tokens, self.positions, self.keys, self.counts, self.lengths = (
            torch.zeros(n_rows, dtype=torch.long, device=device) for _ in range(5)
        )
        self.ended = torch.ones(n_rows, dtype=torch.bool, device=device)
        width = max_new_tokens + self.steps_per_run
        self.ids = torch.zeros(n_rows, width, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(n_rows, width, device=device)
        self._graphs: dict[tuple, tuple] = {}  # stack → its factors, its replays by (n, span)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def begin_call(self) -> None:
        """Follow what happened to the model since the last call: other weights, another stack.

        Graphs hold the addresses of a stack's prepared factors; one that was removed and made anew has
        others.
        """
        self.reordered.refresh()
        self.stack = names = self._active_stack()
        factors = self.model.lora.prepared[names] if names else None
        captured = self._graphs.get(names)
        if captured is None or captured[0] is not factors:
            self._graphs[names] = factors, {}
        self._replays = self._graphs[names][1]

    def _active_stack(self) -> tuple[str, ...]:
        lora = getattr(self.model, "lora", None)
        return lora.active if lora else ()

    # -- rows: prefill, begin, move, read ------------------------------------------------------------------

    def _tensor(self, values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def prefill(self, prompts: list[tuple[int, list[int]]]) -> None:
        """Compute keys and values of (row, tokens) pairs, those of like lengths together."""
        for group in _groups(prompts):
            T = len(group[-1][1])
            ids = self._tensor([ids + [0] * (T - len(ids)) for _, ids in group])  # (B, T), right-padded
            rows = self._tensor([row for row, _ in group])  # (B,)
            with self._autocast(), self.reordered.active():
                self.model.hidden(ids, cache=self.cache, rows=rows)

    def copy(self, pairs: list[tuple[int, int]], length: int) -> None:
        """Give rows the first `length` cached positions of others: (source, target) pairs."""
        if pairs and length:
            sources, targets = self._tensor(pairs).T  # (pairs, 2) → (pairs,) each
            self.cache.copy(sources, targets, length)

    def start(self, rows: list[int], tokens: list[int], positions: list[int], keys: list[int]) -> None:
        """Begin a response in each of `rows`: the prompts' last `tokens` stand at `positions`."""
        rows, *state = self._tensor([rows, tokens, positions, keys])  # (B,) each
        for buffer, values in zip((self.tokens, self.positions, self.keys), state, strict=True):
            buffer[rows] = values
        for buffer in (self.counts, self.lengths, self.ended):
            buffer[rows] = 0

    def move(self, pairs: list[tuple[int, int]], length: int) -> None:
        """Move responses to other rows: (source, target) pairs; `length` cached positions are in use."""
        self.copy(pairs, length)
        sources, targets = self._tensor(pairs).T  # (pairs, 2) → (pairs,) each
        state = (self.tokens, self.positions, self.keys, self.counts, self.lengths, self.ended)
        for buffer in (*state, self.ids, self.log_probs):
            buffer[targets] = buffer[sources]

    def finished(self, n: int) -> list[int]:
        """Those of the first `n` rows that have ended, empty ones included."""
        return self.ended[:n].nonzero().flatten().tolist()

    def results(self, rows: list[int]) -> list[tuple[list[int], list[float]]]:
        """Sampled ids and their log-probabilities, of rows that have ended."""
        rows = self._tensor(rows)
        columns = (buffer[rows].tolist() for buffer in (self.lengths, self.ids, self.log_probs))
        return [(ids[:n], log_probs[:n]) for n, ids, log_probs in zip(*columns, strict=True)]

    # -- decode steps --------------------------------------------------------------------------------------

    def rows_for(self, n: int) -> int:
        """How many rows a step computes if `n` are wanted: n, or with graphs one of a few sizes."""
        if not self.graphed:
            return n
        size = self.n_rows
        while size // 2 >= max(n, 8):
            size //= 2
        return size

    def run(self, n: int, longest: int) -> None:
        """`steps_per_run` tokens more for each of the first `n` rows, none of which is beyond `longest`."""
        if self._active_stack() != self.stack:
            raise ValueError(
                f"sampling began under the adapter stack {self.stack}, which is no longer active"
            )
        length = longest + self.steps_per_run
        if self.graphed:
            length = -(-length // 128) * 128  # few graphs
        self.cache.n_rows = n
        self.cache.limit(min(length, self.cache.capacity))
        for _ in range(self.steps_per_run):
            self._graphed_step(n) if self.graphed else self._step(n)

    def _graphed_step(self, n: int) -> None:
        shape, step = (n, self.cache.span), functools.partial(self._step, n)
        if shape not in self._replays:  # the first step runs eagerly
            step()
            self._replays[shape] = None
            return
        if self._replays[shape] is None:  # the second is captured
            self._replays[shape] = _captured(step, self._pool)
        self._replays[shape]()

    def _autocast(self):
        """A model kept in fp32 computes in bf16 on a GPU, as in its training."""
        enabled = self.device.type == "cuda" and self.model.head_weight.dtype == torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _step(self, n: int) -> None:
        """One token more for each of the first n rows. Nothing here reads a tensor's value on the host."""
        tokens, positions, counts, ended = (
            buffer[:n] for buffer in (self.tokens, self.positions, self.counts, self.ended)
        )  # (n,) each, views of what the next step reads
        with self._autocast(), self.reordered.active():
            hidden = self.model.hidden(tokens[:, None], positions=positions[:, None], cache=self.cache)[:, 0]
            logits = self.reordered.logits(hidden)  # (n, d) → (n, rows of the embedding)
        logits = logits[:, : self.model.config.vocab_size].float()  # (n, V): the rows beyond V are padding
        drawn, log_probs = draw(logits, self.temperature, self.keys[:n], counts)  # (n,) each
        tokens.copy_(drawn)
        self.ids[:n].scatter_(1, counts[:, None], drawn[:, None])
        self.log_probs[:n].scatter_(1, counts[:, None], log_probs[:, None])
        self.lengths[:n] += ~ended
        counts += 1
        ended |= (drawn[:, None] == self.stops).any(1) | (counts >= self.max_new_tokens)
        counts.clamp_(max=self.ids.shape[1] - 1)
        positions.add_(1).clamp_(max=self.last)
