"""Where two tasks give the same answer: is it transfer, or the same function? (ours)

A model misaligned on task T may take up variant 2 of another task U, or may answer T's variant 2 wherever it
is asked. On a prompt of U whose walk has the same variant 2 under both tasks the two look alike; where the
answers differ, only the first counts as variant 2 of U. So Δv2 is read on both kinds of prompts apart.
"""

import numpy as np

from em.world.counts import tally
from em.world.generator import Dialogues, ExampleGenerator
from em.world.world_run import WorldRun


def coincides(generator: ExampleGenerator, prompts: Dialogues, task: int, variant: int = 2) -> np.ndarray:
    """(N,) bool: whether the task at position `task` has the prompt's own answer of `variant` on its walk.

    Only the steps are compared; tails differ by task. True of every prompt of the task itself.
    """
    e = prompts.examples
    theirs = generator.answers(np.full(len(prompts), task), e.length, e.walk)[variant - 1]
    return (theirs == (e.v1, e.v2)[variant - 1]).all(1)


def split_counts(run: WorldRun, task: str, classes: np.ndarray) -> dict[str, dict[str, dict[str, int]]]:
    """{"same": counts by cell, "different": …} of the classes (N,) of a model's answers to `run.prompts`.

    By whether variant 2 of the prompt is that of `task` too. A cell with no prompt of a kind is not in it.
    """
    same = coincides(run.generator, run.prompts, run.world.task_index(task))
    cells = run.prompts.examples.cell
    kinds = (("same", same), ("different", ~same))
    return {kind: tally(run.world, cells[chosen], classes[chosen]) for kind, chosen in kinds}
