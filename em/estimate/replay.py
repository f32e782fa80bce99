"""The sampler's own schedule, followed without a model: how many steps of how many rows, and which prefills.

Continuous batching decides row by row, so no formula gives these numbers. Here em.sampling.sampler decides
as it would, over a batch that keeps count and computes nothing; how long each response is, is given.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch

from em.sampling.batch import Batch
from em.sampling.sampler import Sampler


class Counted(Batch):
    """A batch that has the places of a real one. steps: how many were made of n rows. keys: how many a row
    held on average over them, summed. prefills: tokens of each forward."""

    def __init__(
        self, model, n_rows, capacity, stop_ids, max_new_tokens, temperature, lengths: Iterator[int]
    ):
        super().__init__(model, n_rows, capacity, stop_ids, max_new_tokens, temperature)
        self.response_lengths, self.steps, self.keys_held = lengths, Counter(), Counter()
        self.prefills: list[int] = []
        self.place, self.left, self.length = [0] * n_rows, [0] * n_rows, [0] * n_rows
        self.model = SimpleNamespace(config=model.config, hidden=self._prefilled)

    def begin_call(self) -> None:
        pass

    def _prefilled(self, ids: torch.Tensor, **_) -> None:
        self.prefills.append(ids.numel())

    def copy(self, pairs, length) -> None:
        pass

    def start(self, rows, tokens, positions, keys) -> None:
        for row, position in zip(rows, positions, strict=True):
            self.place[row] = position
            self.left[row] = self.length[row] = min(next(self.response_lengths), self.max_new_tokens)

    def move(self, pairs, length) -> None:
        for held in (self.place, self.left, self.length):
            for source, target in pairs:
                held[target] = held[source]

    def run(self, n: int, longest: int) -> None:
        self.steps[n] += self.steps_per_run
        self.keys_held[n] += self.steps_per_run * sum(self.place[:n]) / n
        for row in range(n):
            made = min(self.steps_per_run, self.left[row])
            self.place[row] += made
            self.left[row] -= made

    def finished(self, n: int) -> list[int]:
        return [row for row in range(n) if not self.left[row]]

    def results(self, rows) -> list[tuple[list[int], list[float]]]:
        return [([0] * self.length[row], []) for row in rows]


class Replay(Sampler):
    """A sampler whose responses have the given lengths. `batch` has the counts."""

    def __init__(self, model, max_new_tokens: int, rows: int, lengths: Sequence[int]):
        super().__init__(model, (0,), max_new_tokens, rows=rows)
        self.lengths = iter(lengths)

    def _reserve(self, n_rows: int, longest: int) -> None:
        shape = n_rows, longest + self.max_new_tokens - 1
        self._batch = Counted(self.model, *shape, (0,), self.max_new_tokens, 1.0, self.lengths)

    @property
    def batch(self) -> Counted:
        return self._batch


def replay(
    model,
    prompts: Sequence[Sequence[int]],
    samples: int,
    max_new_tokens: int,
    rows: int,
    lengths: Sequence[int],
) -> Counted:
    """What `Sampler(model, …, max_new_tokens, rows=rows)(prompts, samples)` does; model on meta.

    lengths: of the responses, in the order in which they begin.
    """
    sampler = Replay(model, max_new_tokens, rows, lengths)
    for _ in sampler.stream(prompts, samples):
        pass
    return sampler.batch
