"""On-policy rollouts, one batch a step: sampled, filtered where asked (paper 4.1, E.2.4)."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from em import parallel
from em.chat import Example
from em.errors import UserError

WINDOW = 64  # rollouts in a row after which a student that never ends, or passes no filter, is stopped


class OnPolicy:
    """The student's responses to the prompts of `plan`, a row each with `prompt_ids`.

    keep: rollouts → which of them to train on; None: all.
    """

    def __init__(self, pair, plan: list[dict], seed: int, keep: Callable[[list], list[bool]] | None = None):
        self.pair, self.plan, self.seed, self.keep = pair, plan, seed, keep
        self.ended, self.kept = deque(maxlen=WINDOW), deque(maxlen=WINDOW)

    def __len__(self) -> int:
        return len(self.plan)

    def __call__(self, epoch: int, places: list[int]) -> tuple[list[Example], dict]:
        """(examples to train on, counts for the log) for `places` of the plan; under torchrun its share.

        The text follows from the weights, the seed, the epoch and the places.
        """
        mine = places[parallel.rank() :: parallel.size()]
        prompts = [self.plan[i]["prompt_ids"] for i in mine]
        rollouts = self.pair.sample(prompts, mine, seed=1000 * self.seed + epoch) if mine else []
        keep = self.keep(rollouts) if self.keep else [True] * len(rollouts)
        examples = [
            Example([*prompt, *rollout.ids], len(prompt))
            for prompt, rollout, kept in zip(prompts, rollouts, keep, strict=True)
            if kept
        ]
        tokens, ended = sum(len(r.ids) for r in rollouts), sum(r.finished for r in rollouts)
        counts = torch.tensor([len(rollouts), tokens, ended, sum(keep)], device=self.pair.laps.device).float()
        parallel.sum_([counts])
        n, tokens, ended, kept = counts.tolist()
        for window, good in ((self.ended, int(ended)), (self.kept, int(kept))):
            window.extend([False] * (int(n) - good) + [True] * good)  # a batch may be larger than the window
        return examples, {"length": tokens / n, "ended": ended / n, "retention": kept / n}

    def check(self, limit: int, folder: Path) -> None:
        """UserError where the last rollouts say that going on is pointless; the same on every process."""
        good = f"{folder} keeps the last good state"
        if len(self.ended) == WINDOW and not any(self.ended):
            raise UserError(
                f"none of the last {WINDOW} rollouts ended its turn within {limit} tokens: raise "
                f"--max-new-tokens, or lower --lr if they did at first; {good}"
            )
        if len(self.kept) == WINDOW and not any(self.kept):
            raise UserError(f"the filter kept none of the last {WINDOW} rollouts: lower --lr; {good}")
