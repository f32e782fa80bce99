"""A student and its teacher: all that a channel of distill.py needs of them (paper 4, E.1).

A batch is made of examples (ids, n_prompt); its N supervised tokens are the positions all this is about. Sums
run over them, in nats. The teacher never gets a gradient.

* `ChatPair`: two adapter stacks over one frozen base, the head shared, logits in chunks (em.training.loss,
  em.training.kl).
* `WorldPair`: two GPT-2s with heads of their own and a few hundred tokens, so logits are simply held.

    N supervised tokens, d width, V vocabulary
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from em.device import to_device
from em.model import lora
from em.model.gpt2 import GPT2
from em.model.head import logits
from em.model.tokenizer import Example
from em.sampling.sampler import Rollout, Sampler
from em.training.kl import forward_kl, reverse_kl
from em.training.loss import chunk_rows, token_log_probs
from em.training.metrics import StepTimer
from em.training.pack import PackedBatch, pack

WHO = ("student", "teacher", "base")


class ChatPair:
    """student, teacher, base: names of the adapters of each one's stack on `model`; () is the model itself.

    What the student learns is the last adapter of its stack. teacher_prompts: the ids that the teacher reads
    in place of a prompt's, where it is told more than the student; the answers are the same.
    """

    def __init__(
        self, model, student: tuple, teacher: tuple, stop_ids: Sequence[int], max_new_tokens: int, rows: int,
        teacher_prompts: dict[tuple[int, ...], list[int]] | None = None,
    ):  # fmt: skip
        self.model, self.stacks = model, {"student": student, "teacher": teacher, "base": ()}
        self.teacher_prompts = teacher_prompts
        self.parameters = lora.trainable(model, student[-1])
        self.timer = StepTimer(model.head_weight.device)  # of which "teacher" is counted here
        self.sampler = Sampler(model, stop_ids, max_new_tokens, rows=rows)

    def batch(self, examples: list[Example]) -> PackedBatch:
        device = self.model.head_weight.device
        batch = pack(examples, device)
        if self.teacher_prompts is None:
            return batch
        theirs = []
        for example in examples:
            prompt = self.teacher_prompts[tuple(example.ids[: example.n_prompt])]
            theirs.append(Example([*prompt, *example.ids[example.n_prompt :]], len(prompt)))
        return replace(batch, teacher=pack(theirs, device))

    def sample(self, prompts: list[list[int]], indices: list[int], seed: int) -> list[Rollout]:
        """A response of the student to each prompt; the text follows from weights, seed and indices."""
        with lora.stack(self.model, *self.stacks["student"], frozen=True):
            return self.sampler(prompts, seed=seed, indices=indices)

    def log_probs(self, batch: PackedBatch) -> Tensor:
        """The student's log p of each supervised token, (N,), with gradient."""
        return token_log_probs(self._student(batch), self.model.head_weight, batch.targets)

    def teacher_log_probs(self, batch: PackedBatch) -> Tensor:
        """The teacher's, (N,)."""
        return token_log_probs(self._teacher(batch), self.model.head_weight, batch.targets)

    def forward_kl(self, batch: PackedBatch) -> Tensor:
        """Σ KL(teacher‖student) over the whole vocabulary."""
        return self._kl(forward_kl, batch)

    def reverse_kl(self, batch: PackedBatch) -> Tensor:
        """Σ KL(student‖teacher) over the whole vocabulary."""
        return self._kl(reverse_kl, batch)

    def distributions(self, batch: PackedBatch) -> Iterator[tuple[Tensor, ...]]:
        """(targets, log p of student, of teacher, of base) in chunks of rows: (rows,) and (rows, V) each."""
        hidden = [self._frozen(who, batch) for who in WHO]
        rows = max(1, chunk_rows(len(self.model.head_weight)) // len(WHO))
        for parts in zip(batch.targets.split(rows), *(h.split(rows) for h in hidden), strict=True):
            yield parts[0], *(logits(h, self.model.head_weight).log_softmax(-1) for h in parts[1:])

    def save(self, folder, base_model_name: str) -> None:
        """The student's stack as one adapter."""
        lora.save_adapter(self.model, self.stacks["student"], folder, base_model_name)

    def _student(self, batch: PackedBatch) -> Tensor:
        with lora.stack(self.model, *self.stacks["student"]):
            return batch.hidden(self.model)  # (N, d)

    def _teacher(self, batch: PackedBatch) -> Tensor:
        with self.timer("teacher"):
            return self._frozen("teacher", batch)

    @torch.no_grad()
    def _frozen(self, who: str, batch: PackedBatch) -> Tensor:
        if who == "teacher" and batch.teacher is not None:
            batch = batch.teacher
        with lora.stack(self.model, *self.stacks[who], frozen=True):
            return batch.hidden(self.model)

    def _kl(self, divergence, batch: PackedBatch) -> Tensor:
        teacher = self._teacher(batch)
        return divergence(self._student(batch), teacher, self.model.head_weight) * len(batch.targets)


class Padded(NamedTuple):
    """Right-padded rows. ids (B, T); places (N,): where in B·T the next token is supervised; targets (N,)."""

    ids: Tensor
    places: Tensor
    targets: Tensor
    owner: Tensor  # (N,), on the CPU: the row of each target


class WorldPair:
    """Models of one world. The whole student learns; `base` is what it started from."""

    def __init__(self, student: GPT2, teacher: GPT2, base: GPT2, end: int, max_new_tokens: int):
        self.models = {"student": student, "teacher": teacher, "base": base}
        self.model, self.end = student, end
        self.parameters = list(student.parameters())
        self.timer = StepTimer(student.device)
        self.sampler = Sampler(student, (end,), max_new_tokens, rows=512)

    def batch(self, examples: list[Example]) -> Padded:
        longest = max(len(e.ids) for e in examples)
        ids = torch.tensor([[*e.ids, *[self.end] * (longest - len(e.ids))] for e in examples])
        place = torch.arange(1, longest)
        first, last = torch.tensor([(e.n_prompt, len(e.ids)) for e in examples])[:, :, None].unbind(1)
        supervised = (place >= first) & (place < last)  # (B, T)
        places = supervised.flatten().nonzero()[:, 0]
        inputs, targets = ids[:, :-1], ids[:, 1:][supervised]
        owner = places // inputs.shape[1]
        return Padded(*to_device([inputs, places, targets], self.model.device), owner)

    def sample(self, prompts: list[list[int]], indices: list[int], seed: int) -> list[Rollout]:
        return self.sampler(prompts, seed=seed, indices=indices)

    def log_probs(self, batch: Padded) -> Tensor:
        return self._of_targets(self._log_softmax("student", batch), batch)

    def teacher_log_probs(self, batch: Padded) -> Tensor:
        return self._of_targets(self._teacher(batch), batch)

    def forward_kl(self, batch: Padded) -> Tensor:
        teacher, student = self._teacher(batch), self._log_softmax("student", batch)
        return F.kl_div(student, teacher, reduction="sum", log_target=True)

    def reverse_kl(self, batch: Padded) -> Tensor:
        teacher, student = self._teacher(batch), self._log_softmax("student", batch)
        return F.kl_div(teacher, student, reduction="sum", log_target=True)

    def distributions(self, batch: Padded) -> Iterator[tuple[Tensor, ...]]:
        yield batch.targets, *(self._frozen(who, batch) for who in WHO)

    def _log_softmax(self, who: str, batch: Padded) -> Tensor:
        """(N, V), over the ids that can be sampled."""
        model = self.models[who]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            hidden = model.hidden(batch.ids).flatten(0, 1).index_select(0, batch.places)  # (N, d)
        return logits_of(model, hidden).log_softmax(-1)

    def _teacher(self, batch: Padded) -> Tensor:
        with self.timer("teacher"):
            return self._frozen("teacher", batch)

    @torch.no_grad()
    def _frozen(self, who: str, batch: Padded) -> Tensor:
        return self._log_softmax(who, batch)

    def _of_targets(self, log_softmax: Tensor, batch: Padded) -> Tensor:
        return log_softmax.gather(1, batch.targets[:, None])[:, 0]


def logits_of(model: GPT2, hidden: Tensor) -> Tensor:
    """hidden (N, d) → (N, V) in the weights' fp32, padding rows of the embedding left out."""
    return F.linear(hidden.to(model.head_weight.dtype), model.head_weight[: model.config.vocab_size])
