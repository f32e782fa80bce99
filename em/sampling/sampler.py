"""Sampling responses from a model (paper D.1: temperature 1, top-p 1).

    sampler = Sampler(model, tokenizer.stop_ids, max_new_tokens=600, rows=64)
    with stack(model, "student", frozen=True):
        rollouts = sampler(prompts, n=4, seed=0)  # token ids in, token ids out
        for rollout in tqdm(sampler.stream(prompts), total=len(prompts)): ...  # as they finish

A prompt is prefilled once, whatever `n`, up to its last token; that one is the first to be decoded, and
there its samples part. The row of a response that ended is given to the next request; when none is waiting,
the batch shrinks. Keep a `Sampler` to keep its cache and, on a GPU, its CUDA graphs: a second call starts at
once.

Same seed, same text, whatever the batch: a token's random numbers depend on seed, prompt, sample and place
alone (em.sampling.draw). Logits may differ in their last bits between batch shapes. In fp32 that changes a
token only where its uniform falls within about 1e-6 of a border, or at temperature 0 where two logits tie. In
bf16 borders are thousands of times wider: the same call on the same device repeats exactly, but a long
response may come to differ when `rows` or the other prompts do.

Log-probabilities are those that training gives the same hidden states (em.model.head), to within 1e-3 nats in
any dtype. Hidden states in bf16 are not the same in a decode step and in a forward of the whole text: what is
rounded is the same, but sums run in another order. SmolLM2-135M's log-probabilities differ by 0.03 nats on
average for that, at most 0.16 in 144 tokens; in fp32 by 1e-5.
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
    """One response that was asked for."""

    prompt: list[int]
    index: int  # the prompt's number
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

    def _run(self, batch: Batch, waiting: deque[_Request], seed: int) -> Iterator[Rollout]:
        """Continuous batching: a request takes the row of one that ended, while the others go on."""
        n_rows = min(self.rows, batch.n_rows)
        at_once = max(1, n_rows // 16)  # a prefill of one prompt costs almost that of a few
        active: dict[int, tuple[_Request, int]] = {}  # row → request, and the steps before it was admitted
        steps, last_prompt = 0, None

        while waiting or active:
            # 1. Give free rows to waiting requests, `at_once` at least.
            free = [row for row in range(n_rows) if row not in active]
            if waiting and len(free) >= min(at_once, len(waiting)):
                admitted = [(row, waiting.popleft()) for row in free[: len(waiting)]]
                last_prompt = self._admit(batch, admitted, last_prompt, seed)
                active |= {row: (request, steps) for row, request in admitted}

            # 2. Shrink the batch to n rows: responses in rows outside it move to free rows inside.
            longest = max(len(request.prompt) - 1 + steps - since for request, since in active.values())
            n = batch.rows_for(max(active) + 1 if waiting else len(active))
            if outside := sorted(row for row in active if row >= n):
                inside = [row for row in range(n) if row not in active]
                pairs = list(zip(outside, inside, strict=False))  # inside may have more
                batch.move(pairs, longest)
                for source, target in pairs:
                    active[target] = active.pop(source)

            # 3. Decode.
            batch.run(n, longest)
            steps += batch.steps_per_run

            # 4. Hand out the responses that ended; their rows are free.
            ended = [row for row in batch.finished(n) if row in active]
            for row, (ids, log_probs) in zip(ended, batch.results(ended) if ended else (), strict=True):
                request, _ = active.pop(row)
                log_probs = log_probs if self.log_probs else None
                yield Rollout(request.index, request.sample, ids, log_probs, ids[-1] in self.stop_ids)

    def _admit(
        self,
        batch: Batch,
        admitted: list[tuple[int, _Request]],
        last_prompt: tuple[int, int] | None,
        seed: int,
    ) -> tuple[int, int]:
        """Begin requests in their rows; the prefill of a prompt is copied to its other samples.

        last_prompt: (index, row) of the prompt admitted last. Samples of it that come only now copy its keys
        and values, which are still in that row. Returns the next call's last_prompt.
        """
        last_index, last_row = last_prompt or (None, None)
        first_row: dict[int, int] = {}  # prompt index → the row that is prefilled
        old_copies, new_copies = [], []  # (source, target) rows
        for row, request in admitted:
            if request.index == last_index:
                old_copies.append((last_row, row))
            elif request.index in first_row:
                new_copies.append((first_row[request.index], row))
            else:
                first_row[request.index] = row
        prompts = {request.index: request.prompt for _, request in admitted}
        length = max(map(len, prompts.values())) - 1  # the last token of a prompt is the first to be decoded
        batch.copy(old_copies, length)  # before their source is given to another prompt
        batch.prefill([(row, prompts[index][:-1]) for index, row in first_row.items()])
        batch.copy(new_copies, length)
        batch.start(
            [row for row, _ in admitted],
            [request.prompt[-1] for _, request in admitted],
            [len(request.prompt) - 1 for _, request in admitted],
            [row_key(seed, request.index, request.sample) for _, request in admitted],
        )
        row, request = admitted[-1]
        return request.index, row
