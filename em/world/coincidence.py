"""Where two tasks give the same answer: is it transfer, or the same function? (ours)

A model misaligned on task T may take up variant 2 of another task U, or may answer T's variant 2 wherever it
is asked. On a prompt of U whose walk has the same variant 2 under both tasks the two look alike; where the
answers differ, only the first counts as variant 2 of U. So Δv2 is read on kinds of prompts apart:

    same         variant 2 of T is U's variant 2
    opposed      it is U's variant 1, so that answering it shows as no change
    unrelated    it is neither; answered, it is *borrowed*, and would else count as `other`, hence incoherent

Kinds differ in their walks too: in World 1, those that visit no step twice are all of the first.
"""

import dataclasses

import numpy as np

from em import parallel
from em.world.counts import Classifier, pool, tally
from em.world.generator import Dialogues, ExampleGenerator
from em.world.world_run import WorldRun, misaligned_name, read_classes, write_classes

KINDS = ("same", "opposed", "unrelated")


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


def kinds(run: WorldRun, task: str) -> dict[str, np.ndarray]:
    """(N,) bool for each of KINDS: which of `run.prompts` are of that kind towards `task`."""
    e, index = run.prompts.examples, run.world.task_index(task)
    same = coincides(run.generator, run.prompts, index)
    theirs = run.generator.answers(np.full(len(same), index), e.length, e.walk)[1]
    opposed = ~same & (theirs == e.v1).all(1)
    return dict(zip(KINDS, (same, opposed, ~same & ~opposed), strict=True))


def classes_by(run: WorldRun, task: str, name: str) -> np.ndarray:
    """(N,) int8: the classes of what phase `name` answers, held against what `task` answers on each walk.

    With the tail of the prompt's own task. Asked once and kept in the phase's folder, `classes_<task>.json`.
    """
    path = run.folder / name / f"classes_{task}.json"
    if parallel.rank() == 0 and not path.exists():
        e, index = run.prompts.examples, run.world.task_index(task)
        v1, v2 = run.generator.answers(np.full(len(run.prompts), index), e.length, e.walk)
        theirs = dataclasses.replace(run.prompts, examples=dataclasses.replace(e, v1=v1, v2=v2))
        completions = run.completions(run.load(name), run.prompts)
        write_classes(path, {"": Classifier(run.world).classes(theirs, completions)})
    parallel.barrier()
    return read_classes(path, len(run.prompts))[""]


def split_grid(run: WorldRun, task: str) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """{kind: {cell: {"aligned": counts, "misaligned": counts}}} of the models misaligned on (D0, `task`).

    By KINDS, and `borrowed`: the unrelated prompts again, where v1 and v2 are those of `task`. `misaligned`
    pools the fine-tuning seeds. The task's own cells, all of whose prompts are `same`, are left out.
    """
    of, cells = kinds(run, task), run.prompts.examples.cell
    others = cells % len(run.world.tasks) != run.world.task_index(task)
    phases = [misaligned_name(task, seed) for seed in range(run.cfg.misalign_seeds)]

    def counted(chosen: np.ndarray, classes) -> dict:
        """`classes` gives those of a phase's answers (N,)."""
        before, *after = (
            tally(run.world, cells[chosen], classes(name)[chosen]) for name in ("align", *phases)
        )
        return {
            cell: {"aligned": counts, "misaligned": pool([seed[cell] for seed in after])}
            for cell, counts in before.items()
        }

    split = {kind: counted(chosen & others, run.classes) for kind, chosen in of.items()}
    borrowed = counted(of["unrelated"] & others, lambda name: classes_by(run, task, name))
    return split | {"borrowed": borrowed}
