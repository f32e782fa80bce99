"""Examples of different lengths as one row without padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from em.device import to_device
from em.model.tokenizer import Example


@dataclass(frozen=True)
class PackedBatch:
    """One row of several examples; N tokens of it are supervised.

    ids (1, T); segments (1, T), on the CPU: which example a token belongs to; predictions (N,): the places in
    T whose next token is supervised; targets (N,): those tokens; owner (N,), on the CPU: their examples.
    teacher: the same answers after what a teacher reads before them, where that is something else.
    """

    ids: torch.Tensor
    segments: torch.Tensor
    predictions: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    teacher: "PackedBatch | None" = None

    def hidden(self, model) -> torch.Tensor:
        """The model's hidden states where something is predicted, (N, d): the head is needed nowhere else."""
        return model.hidden(self.ids, segments=self.segments)[0].index_select(0, self.predictions)


def pack(examples: Sequence[Example], device: torch.device | str) -> PackedBatch:
    """One row of all examples. The last token of each is only predicted, never read, and stays out of ids."""
    ids, segments, predictions, targets, owner = [], [], [], [], []
    for i, example in enumerate(examples):
        tokens, n_prompt = example.ids, example.n_prompt
        if not 0 < n_prompt < len(tokens):
            raise ValueError(
                f"an example needs a prompt and an answer; this has {n_prompt} of {len(tokens)} tokens"
            )
        places = example.supervised if example.between else range(n_prompt, len(tokens))
        predictions += [len(ids) + place - 1 for place in places]
        targets += [tokens[place] for place in places]
        owner += [i] * len(places)
        ids += tokens[:-1]
        segments += [i] * (len(tokens) - 1)
    ids, predictions, targets = to_device([torch.tensor(x) for x in ([ids], predictions, targets)], device)
    return PackedBatch(ids, torch.tensor([segments]), predictions, targets, torch.tensor(owner))


def packs_of(examples: Sequence[Example], tokens: int) -> list[list[int]]:
    """Indices of examples in groups of at most `tokens` tokens, in order; a longer one has a group alone."""
    groups: list[list[int]] = []
    room = 0
    for i, example in enumerate(examples):
        if len(example.ids) > room or not groups:
            groups.append([])
            room = tokens
        groups[-1].append(i)
        room -= len(example.ids)
    return groups
