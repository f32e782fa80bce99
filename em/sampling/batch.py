"""A batch of rows that decode side by side: prefill, decode steps, and CUDA graphs of the steps.

Everything a step reads or writes lives in buffers that keep their address, so on a GPU a step is one graph
replay, sampling included. A graph is captured per adapter stack and rows in use, of which there are a few
sizes, and kept for later calls: its attention loops to each row's own length, so it serves all lengths.
Adapters run unmerged, from the buffers of `em.model.lora.stack(..., frozen=True)`. The first step of each
size runs eagerly: it is a real step, and it warms up what a capture may not.

Prompts are prefilled side by side in one row without padding, as packed training samples are. On a GPU
their total is rounded up to PREFILL_MULTIPLE: with few sizes of forward the allocator's blocks fit again.

The host looks at the batch every `steps_per_run` steps: on a GPU asking costs a synchronisation. A row that
ended meanwhile goes on in place, into a column that nobody reads.

    R rows, n ≤ R of them in a step; N tokens in a prefill, d width, V vocabulary
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from em.device import on_gpu, to_device
from em.sampling.cpu_linear import ReorderedModel
from em.sampling.draw import draw

PREFILL_TOKENS = 4096  # in one forward, unless one prompt is longer
PREFILL_MULTIPLE = 64


def _uses_graphs(device: torch.device) -> bool:
    return on_gpu(device)


def _captured(step: Callable[[], None], pool) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph.replay


def _new_pool():
    return torch.cuda.graph_pool_handle()


Prompt = tuple[int, list[int]]  # a cache row and the tokens that go there, from position 0


def _groups(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts that have tokens, in order, as many a group as PREFILL_TOKENS hold."""
    group, total = [], 0
    for row, ids in prompts:
        if group and total + len(ids) > PREFILL_TOKENS:
            yield group
            group, total = [], 0
        if ids:
            group.append((row, ids))
            total += len(ids)
    if group:
        yield group


def _packed(
    group: list[Prompt], multiple: int, longest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, cache rows and segments (1, N) of a group, N a multiple of `multiple`.

    For that the last prompt is padded, though not beyond `longest`: what lies beyond a prompt in a row is
    never read.
    """
    row, last = group[-1]
    padding = min(-sum(len(ids) for _, ids in group) % multiple, longest - len(last))
    group = [*group[:-1], (row, last + [0] * padding)]
    ids = [token for _, ids in group for token in ids]
    rows = [row for row, ids in group for _ in ids]
    segments = [number for number, (_, ids) in enumerate(group) for _ in ids]
    return tuple(torch.tensor([x]) for x in (ids, rows, segments))


class Batch:
    """Up to `n_rows` responses in progress on the model's device.

    Beside the cache, (R,) each: the token to feed next and its position, the key of the row's random
    numbers, how many tokens were sampled, and whether the row has ended (by a stop token or the limit); an
    ended row stays where it is. `ids` and `log_probs` (R, max_new_tokens + 1) are what was sampled, and one
    column that nobody reads.
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
        self.steps_per_run, self.prefill_multiple = (4, PREFILL_MULTIPLE) if self.graphed else (1, 1)
        self.cache = model.new_cache(n_rows, capacity)
        self.longest = min(self.cache.capacity, model.config.max_positions)  # that a row may become
        self.stops = torch.tensor(stop_ids, device=device)
        self.tokens, self.positions, self.keys, self.counts = (
            torch.zeros(n_rows, dtype=torch.long, device=device) for _ in range(4)
        )
        self.ended = torch.ones(n_rows, dtype=torch.bool, device=device)
        self.ids = torch.zeros(n_rows, max_new_tokens + 1, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(n_rows, max_new_tokens + 1, device=device)
        self._graphs: dict[tuple, tuple] = {}  # stack → its factors, its replays by n
        self._pool = None  # memory that the graphs share

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
        """Compute keys and values of (row, tokens) pairs, many in one forward."""
        for group in _groups(prompts):
            ids, rows, segments = _packed(group, self.prefill_multiple, self.longest)  # (1, N) each
            ids, rows = to_device([ids, rows], self.device)
            with self._autocast(), self.reordered.active():
                self.model.hidden(ids, segments=segments, cache=self.cache, rows=rows)

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
        for buffer in (self.counts, self.ended):
            buffer[rows] = 0

    def move(self, pairs: list[tuple[int, int]], length: int) -> None:
        """Move responses to other rows: (source, target) pairs; `length` cached positions are in use."""
        self.copy(pairs, length)
        sources, targets = self._tensor(pairs).T  # (pairs, 2) → (pairs,) each
        state = (self.tokens, self.positions, self.keys, self.counts, self.ended)
        for buffer in (*state, self.ids, self.log_probs):
            buffer[targets] = buffer[sources]

    def finished(self, n: int) -> list[int]:
        """Those of the first `n` rows that have ended, empty ones included."""
        return self.ended[:n].nonzero().flatten().tolist()

    def results(self, rows: list[int]) -> list[tuple[list[int], list[float]]]:
        """Sampled ids and their log-probabilities, of rows that have ended."""
        rows = self._tensor(rows)
        columns = (buffer[rows].tolist() for buffer in (self.counts, self.ids, self.log_probs))
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
        self.cache.n_rows = n
        if not self.graphed:
            self.cache.limit(min(longest + self.steps_per_run, self.cache.capacity))
        for _ in range(self.steps_per_run):
            self._graphed_step(n) if self.graphed else self._step(n)

    def _graphed_step(self, n: int) -> None:
        step = functools.partial(self._step, n)
        if n not in self._replays:  # the first step runs eagerly
            step()
            self._replays[n] = None
            return
        if self._replays[n] is None:  # the second is captured
            if not any(replay for _, replays in self._graphs.values() for replay in replays.values()):
                self._pool = _new_pool()  # with its last graph a pool is gone
            self._replays[n] = _captured(step, self._pool)
        self._replays[n]()

    def _autocast(self):
        """A model kept in fp32 computes in bf16 on a GPU, as in its training."""
        if self.device.type != "cuda" or self.model.head_weight.dtype != torch.float32:
            return contextlib.nullcontext()
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)

    def _step(self, n: int) -> None:
        """One token more for each of the first n rows. Nothing here reads a tensor's value on the host."""
        tokens, positions, counts, ended = (
            buffer[:n] for buffer in (self.tokens, self.positions, self.counts, self.ended)
        )  # (n,) each, views of what the next step reads
        with self._autocast(), self.reordered.active():
            hidden = self.model.hidden(tokens[:, None], positions=positions[:, None], cache=self.cache)[:, 0]
        logits = self.reordered.logits(hidden)  # (n, d) → fp32 (n, rows of the embedding)
        logits = logits[:, : self.model.config.vocab_size]  # (n, V): the rows beyond V are padding
        drawn, log_probs = draw(logits, self.temperature, self.keys[:n], counts)  # (n,) each
        tokens.copy_(drawn)
        self.ids[:n].scatter_(1, counts[:, None], drawn[:, None])
        self.log_probs[:n].scatter_(1, counts[:, None], log_probs[:, None])
        counts += ~ended
        ended |= (drawn[:, None] == self.stops).any(1) | (counts >= self.max_new_tokens)
        positions += ~ended
