"""The sampler's schedule replayed at full size with a batch that computes nothing."""

import random
from collections import Counter, deque
from types import SimpleNamespace

import pytest

from em.sampling.batch import PREFILL_MULTIPLE, PREFILL_TOKENS, Batch, _groups, _packed
from em.sampling.sampler import Sampler


class Replayed(Batch):
    """A batch with graphs, of responses of 130 tokens on average."""

    def __init__(self, n_rows: int, longest: int, limit: int):
        self.n_rows, self.limit, self.longest = n_rows, limit, longest
        self.graphed, self.steps_per_run = True, 4
        self.generator = random.Random(0)
        self.left, self.lengths = [0] * n_rows, [0] * n_rows
        self.shapes, self.sizes = Counter(), Counter()  # of prefills; rows of steps

    def prefill(self, prompts):
        for group in _groups(prompts):
            ids, rows, segments = _packed(group, PREFILL_MULTIPLE, self.longest)
            assert ids.shape == rows.shape == segments.shape
            self.shapes[tuple(ids.shape)] += 1

    def copy(self, pairs, length):
        pass

    def start(self, rows, *_):
        for row in rows:
            self.lengths[row] = min(self.limit, 1 + int(self.generator.expovariate(1 / 130)))
            self.left[row] = self.lengths[row]

    def move(self, pairs, length):
        for source, target in pairs:
            self.left[target], self.lengths[target] = self.left[source], self.lengths[source]

    def run(self, n, longest):
        self.sizes[n] += self.steps_per_run
        self.left[:n] = [left - self.steps_per_run for left in self.left[:n]]

    def finished(self, n):
        return [row for row in range(n) if self.left[row] <= 0]

    def results(self, rows):
        return [([0] * self.lengths[row], []) for row in rows]


@pytest.mark.parametrize("n", [1, 4])
def test_4800_responses_are_prefilled_in_few_forwards_of_few_shapes_and_stepped_in_few_sizes(n):
    generator = random.Random(0)
    prompts = [[1] * generator.randint(40, 109) for _ in range(4800 // n)]
    sampler = Sampler(SimpleNamespace(config=SimpleNamespace(max_positions=4096)), (1,), 600, rows=128)
    batch = Replayed(128, 709, 600)
    requests = sampler._requests(prompts, n, range(len(prompts)))
    rollouts = list(sampler._run(batch, deque(requests), seed=0))
    assert len(rollouts) == 4800
    forwards = sum(batch.shapes.values())
    assert forwards <= 4800 / 8 + PREFILL_TOKENS / 40  # eight rows are given on at once
    assert len(batch.shapes) <= PREFILL_TOKENS // PREFILL_MULTIPLE
    tokens = sum(rows * length * count for (rows, length), count in batch.shapes.items())
    assert tokens <= sum(len(prompt) - 1 for prompt in prompts) + 0.6 * PREFILL_MULTIPLE * forwards
    assert set(batch.sizes) <= {128, 64, 32, 16, 8}  # a graph each
    assert sum(n * steps for n, steps in batch.sizes.items()) < 1.15 * sum(len(r.ids) for r in rollouts)


def test_a_group_holds_every_prompt_once_in_its_own_row_and_pads_only_within_the_last():
    generator = random.Random(1)
    prompts = [(row, [row * 1000 + i for i in range(generator.randint(0, 900))]) for row in range(40)]
    prompts[7] = (7, [7000] * (PREFILL_TOKENS + 5))  # longer than a group
    held = {}
    for group in _groups(prompts):
        ids, rows, segments = (x[0].tolist() for x in _packed(group, PREFILL_MULTIPLE, PREFILL_TOKENS + 20))
        wanted = [token for _, tokens in group for token in tokens]
        assert ids[: len(wanted)] == wanted and not any(ids[len(wanted) :])
        assert len(ids) % PREFILL_MULTIPLE == 0 or len(ids) == PREFILL_TOKENS + 20
        assert len(wanted) <= PREFILL_TOKENS or len(group) == 1
        assert [rows[i] for i in range(len(ids)) if i == 0 or segments[i] != segments[i - 1]] == [
            r for r, _ in group
        ]
        for row, token in zip(rows, ids, strict=True):
            held.setdefault(row, []).append(token)
    assert set(held) == {row for row, tokens in prompts if tokens}
    for row, tokens in prompts:
        assert held.get(row, [])[: len(tokens)] == tokens
