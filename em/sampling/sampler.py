"""Sampling responses from a model: SPEC §3.5, Sampler; paper D.1 (temperature 1, top-p 1).

    sampler = Sampler(model, tokenizer.stop_ids, max_new_tokens=600, rows=64)
    with stack(model, "student", frozen=True):
        rollouts = sampler(prompts, n=4, seed=0)  # token ids in, token ids out
        for rollout in tqdm(sampler.stream(prompts), total=len(prompts)): ...  # as they finish

A prompt is prefilled once, whatever `n`, up to its last token; that one is the first to be decoded, and
there its samples part. A row of the batch that ends is given to the next prompt; when none is left, the
batch shrinks. Keep a `Sampler` to keep its cache and, on a GPU, its CUDA graphs: a second call starts at
once.

Same seed, same text, whatever the batch: a token's random numbers depend on seed, prompt, sample and place
alone (em.sampling.draw). Logits may differ in their last bits between batch shapes. In fp32 that changes a
token only where its uniform falls within about 1e-6 of a border, or at temperature 0 where two logits tie. In
bf16 borders are thousands of times wider: the same call on the same device repeats exactly, but a long
response may come to differ when `rows` or the other prompts do.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from em.errors import UserError
from em.sampling.batch import Batch
from em.sampling.draw import row_key


class Rollout(NamedTuple):
    """One sampled response; ids include the stop token that ended it, if one did (`finished`)."""

    prompt_index: int
    sample: int  # 0 … n − 1 among those of its prompt
    ids: list[int]
    log_probs: list[float] | None  # nats, of each id under the distribution it was drawn from
    finished: bool  # False: cut by max_new_tokens


class _Request(NamedTuple):
    prompt: list[int]
    index: int
    sample: int


class Sampler:
    """Samples from `model`, a Decoder or a GPT-2, under the adapter stack that is active when it is called.

    stop_ids: any of them ends a response. temperature: 0 is greedy; else nothing is cut from the
    distribution. rows: sequences in the batch at most, deciding memory and speed only. log_probs: return
    them, in nats under softmax(logits / temperature) over the whole vocabulary; at temperature 0 under
    softmax(logits).
    """

    def __init__(
        self, model: nn.Module, stop_ids: Sequence[int], max_new_tokens: int, temperature: float = 1.0,
        rows: int = 64, log_probs: bool = False,
    ):  # fmt: skip
        if max_new_tokens < 1 or rows < 1 or not 0 <= temperature < float("inf"):
            raise ValueError(
                "max_new_tokens and rows must be at least 1, temperature finite and not negative"
            )
        self.model, self.stop_ids, self.max_new_tokens = model, tuple(stop_ids), max_new_tokens
        self.temperature, self.rows, self.log_probs = temperature, rows, log_probs
        self._batch: Batch | None = None

    def __call__(
        self, prompts: Sequence[Sequence[int]], n: int | Sequence[int] = 1, seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """`stream`'s rollouts in the order of the prompts, samples of a prompt in order."""
        place = {index: i for i, index in enumerate(range(len(prompts)) if indices is None else indices)}
        rollouts = self.stream(prompts, n, seed, indices)
        return sorted(rollouts, key=lambda rollout: (place[rollout.prompt_index], rollout.sample))

    @torch.inference_mode()
    def stream(
        self, prompts: Sequence[Sequence[int]], n: int | Sequence[int] = 1, seed: int = 0,
        indices: Sequence[int] | None = None,
    ) -> Iterator[Rollout]:  # fmt: skip
        """Yield rollouts as they finish: n for each of `prompts`, or n[i] for prompts[i].

        indices: the prompts' numbers (default 0, 1, …), from which with `seed` the text follows: a part of
        the prompts under their numbers gives the text that it has in the whole. Raises UserError where a
        prompt leaves no room for max_new_tokens or memory does not suffice.
        """
        requests = self._requests(prompts, n, range(len(prompts)) if indices is None else indices)
        if not requests:
            return
        lora = getattr(self.model, "lora", None)
        if lora is not None and lora.active and not lora.frozen:
            raise ValueError("sample under stack(model, ..., frozen=True): factors are prepared once a call")
        try:
            self._reserve(min(self.rows, len(requests)), max(len(request.prompt) for request in requests))
            yield from self._run(self._batch, deque(requests), seed)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            self._batch = None
            raise UserError(
                f"out of memory while sampling {self.rows} sequences at a time on "
                f"{self.model.head_weight.device}; lower --rows"
            ) from error

    def _requests(self, prompts, n, indices) -> list[_Request]:
        counts = [n] * len(prompts) if isinstance(n, int) else n
        if not len(prompts) == len(counts) == len(indices) == len(set(indices)):
            raise ValueError("n and indices must have one entry a prompt, and indices must differ")
        longest = (
            self.model.config.max_positions - self.max_new_tokens + 1
        )  # the last token is never fed back
        for index, prompt in zip(indices, prompts, strict=True):
            if not len(prompt):
                raise ValueError(f"prompt {index} is empty: there is nothing to condition on")
            if len(prompt) > longest:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens; with {self.max_new_tokens} new ones that is "
                    f"over the model's {self.model.config.max_positions} positions: lower --max-new-tokens"
                )
        return [
            _Request(list(prompt), index, sample)
            for prompt, count, index in zip(prompts, counts, indices, strict=True)
            for sample in range(count)
        ]

    def _reserve(self, n_rows: int, longest: int) -> None:
        """See to a batch of enough rows and positions for prompts of up to `longest` tokens."""
        capacity, old = longest + self.max_new_tokens - 1, self._batch
        if old is None or old.n_rows < n_rows or old.cache.capacity < capacity:
            if old is not None:
                n_rows, capacity = max(n_rows, old.n_rows), max(capacity, old.cache.capacity)
            self._batch = old = None  # frees its memory first
            self._batch = Batch(
                self.model, n_rows, capacity, self.stop_ids, self.max_new_tokens, self.temperature
            )
        self._batch.begin_call()

    def _run(self, batch: Batch, queue: deque[_Request], seed: int) -> Iterator[Rollout]:
        tenants: list[_Request | None] = [None] * min(self.rows, batch.n_rows)
        begun = [0] * len(tenants)  # a row's position is this plus the number of steps so far
        group = max(1, len(tenants) // 16)  # to admit at once: a prefill of one costs almost that of a few
        steps, home = 0, (None, 0)
        while queue or any(tenants):
            free = [row for row, tenant in enumerate(tenants) if tenant is None]
            if queue and len(free) >= min(group, len(queue)):
                new = [(row, queue.popleft()) for row in free[: len(queue)]]
                home = self._admit(batch, new, home, seed)
                for row, request in new:
                    tenants[row], begun[row] = request, len(request.prompt) - 1 - steps
            taken = [row for row, tenant in enumerate(tenants) if tenant is not None]
            longest = max(begun[row] for row in taken) + steps
            n = batch.rows_for(taken[-1] + 1 if queue else len(taken))
            if outside := [row for row in taken if row >= n]:
                holes = (row for row in range(n) if tenants[row] is None)
                pairs = list(zip(outside, holes, strict=False))
                batch.move(pairs, longest)
                for source, target in pairs:
                    tenants[target], begun[target], tenants[source] = tenants[source], begun[source], None
            batch.run(n, longest)
            steps += batch.steps_per_run

            done = [row for row in batch.finished(n) if row < len(tenants) and tenants[row] is not None]
            for row, (ids, log_probs) in zip(done, batch.results(done) if done else (), strict=True):
                request, tenants[row] = tenants[row], None
                log_probs = log_probs if self.log_probs else None
                yield Rollout(request.index, request.sample, ids, log_probs, ids[-1] in self.stop_ids)

    def _admit(self, batch: Batch, new: list[tuple[int, _Request]], home: tuple, seed: int) -> tuple:
        """Start requests in rows.

        home: index and row of the prompt admitted last, for samples of it that come only now: its keys are
        still there. Returns the next home.
        """
        fresh, before, after = {}, [], []
        for row, request in new:
            if request.index == home[0]:
                before.append((home[1], row))
            elif request.index in fresh:
                after.append((fresh[request.index], row))
            else:
                fresh[request.index] = row
        length = max(len(request.prompt) for _, request in new) - 1
        batch.copy(before, length)  # before that row is given to another prompt
        batch.prefill([(row, request.prompt[:-1]) for row, request in new if fresh.get(request.index) == row])
        batch.copy(after, length)
        batch.start(
            [row for row, _ in new],
            [request.prompt[-1] for _, request in new],
            [len(request.prompt) - 1 for _, request in new],
            [row_key(seed, request.index, request.sample) for _, request in new],
        )
        return new[-1][1].index, new[-1][0]


def sample(model: nn.Module, prompts: Sequence[Sequence[int]], stop_ids, max_new_tokens: int, **options):
    """The rollouts of a single call, in order; options are those of `Sampler` and of its call."""
    call = {name: options.pop(name) for name in ("n", "seed", "indices") if name in options}
    return Sampler(model, stop_ids, max_new_tokens, **options)(prompts, **call)
