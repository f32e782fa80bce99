"""Prompts on which two tasks have the same answer, against the output functions one walk at a time."""

import numpy as np
import pytest

from em.world.coincidence import coincides, split_counts
from em.world.counts import pool
from em.world.tasks import OUTPUT_FUNCTIONS, answers


@pytest.mark.parametrize("variant", [1, 2])
def test_coincidence_is_that_of_the_output_functions(mini, mini_generator, rng, variant):
    prompts = mini_generator.dialogues(rng, mini_generator.draw(rng, np.repeat(mini.cells, 20)), 1)
    e = prompts.examples
    for task, name in enumerate(mini.tasks):
        expected = []
        for i in range(len(prompts)):
            walk = e.walk[i][: e.length[i]].tolist()
            own = int(e.cell[i]) % len(mini.tasks)
            both = [
                answers(mini.function(t), walk, mini.set1.get(mini.tasks[t], frozenset()))[variant - 1]
                for t in (task, own)
            ]
            expected.append(list(both[0]) == list(both[1]))
        found = coincides(mini_generator, prompts, task, variant)
        assert found.tolist() == expected, name
        assert found[e.cell % len(mini.tasks) == task].all() and len(OUTPUT_FUNCTIONS) > 1
    assert 0 < found.mean() < 1


def test_a_split_loses_no_answer_and_keeps_each_with_its_kind(small_demo2):
    run = small_demo2(0)
    same = coincides(run.generator, run.prompts, run.world.task_index("T8"))
    classes = np.where(same, 1, 3).astype(np.int8)  # v2 where the answers coincide, else unparseable
    split = split_counts(run, "T8", classes)
    total = {kind: pool(list(counts.values())) for kind, counts in split.items()}
    assert total["same"]["v2"] == total["same"]["n"] == same.sum()
    assert total["different"]["unparseable"] == total["different"]["n"] == (~same).sum()
    assert "D0_T8" not in split["different"]
