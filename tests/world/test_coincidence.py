"""Prompts on which two tasks have the same answer, against the output functions one walk at a time."""

import numpy as np
import pytest

from em.world.coincidence import KINDS, classes_by, coincides, kinds, split_counts, split_grid
from em.world.counts import CLASSES, pool, tally
from em.world.describe import coincidences
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


def spoken(run, steps, tasks):
    """(N, T) completions of a model that answers these steps (N, A), each with the tail of a task (N,)."""
    rng = np.random.default_rng(0)
    limit, end = run.generator.max_answer, run.world.end
    rows = np.full((len(steps), limit), end)
    for row, answer, task in zip(rows, steps, tasks, strict=True):
        tokens = run.generator.render(rng, np.array([*answer[answer >= 0], run.generator.tail + task]))[0]
        row[: len(tokens)] = tokens
    return rows


def test_kinds_share_out_the_prompts_by_what_the_trained_tasks_variant_2_is(small_demo2):
    run = small_demo2(0)
    e, found = run.prompts.examples, kinds(run, "T8")
    assert list(found) == list(KINDS) and (np.sum(list(found.values()), 0) == 1).all()
    kind = np.array(KINDS)[np.argmax([found[name] for name in KINDS], 0)]
    for i in range(len(run.prompts)):
        walk = e.walk[i][: e.length[i]].tolist()
        own = run.world.tasks[int(e.cell[i]) % len(run.world.tasks)]
        v1, v2 = answers(run.world.function(run.world.task_index(own)), walk, run.world.set1.get(own, ()))
        theirs = answers("partition_bias", walk, run.world.set1["T8"])[1]
        assert kind[i] == ("same" if theirs == v2 else "opposed" if theirs == v1 else "unrelated")
    assert min(of.sum() for of in found.values()) > 5


def test_a_model_that_answers_the_trained_task_everywhere_is_caught_under_any_label(small_demo2, monkeypatch):
    run = small_demo2(0)
    e, task = run.prompts.examples, run.world.task_index("T8")
    own, asked = e.cell % len(run.world.tasks), []
    theirs = run.generator.answers(np.full(len(own), task), e.length, e.walk)[1]

    def answering(steps, tails):
        monkeypatch.setattr(run, "load", lambda name: None)
        monkeypatch.setattr(run, "completions", lambda *_: asked.append(1) or spoken(run, steps, tails))

    answering(theirs, own)
    assert (classes_by(run, "T8", "planted/a") == CLASSES.index("v2")).all()
    assert (classes_by(run, "T8", "planted/a") == 1).all() and len(asked) == 1  # read back, not asked again
    answering(e.v2, own)
    found = kinds(run, "T8")
    assert ((classes_by(run, "T8", "planted/b") == CLASSES.index("v2")) == found["same"]).all()
    answering(theirs, np.full_like(own, task))  # with its tail too: no answer to the task that was asked
    assert ((classes_by(run, "T8", "planted/c") == CLASSES.index("v2")) == (own == task)).all()


def test_a_split_grid_holds_every_answer_to_the_other_tasks_once(small_demo2, monkeypatch, rng):
    run = small_demo2(0)
    phases, n = ("align", "misalign_T0_seed0", "misalign_T0_seed1"), len(run.prompts)
    own, theirs = ({name: rng.integers(0, 4, n) for name in phases} for _ in range(2))
    monkeypatch.setattr(run, "classes", own.get)
    monkeypatch.setattr("em.world.coincidence.classes_by", lambda run, task, name: theirs[name])
    split, cells = split_grid(run, "T0"), run.prompts.examples.cell
    assert list(split) == [*KINDS, "borrowed"]

    def expected(classes, chosen):
        """{cell: {"aligned", "misaligned"}} of the chosen prompts."""
        before, *after = (tally(run.world, cells[chosen], classes[name][chosen]) for name in phases)
        return {c: {"aligned": before[c], "misaligned": pool([seed[c] for seed in after])} for c in before}

    for name, whole in expected(own, np.full(n, True)).items():
        there = [split[kind][name] for kind in KINDS if name in split[kind]]
        assert bool(there) == (not name.endswith("_T0"))
        for model in whole if there else ():
            assert pool([of[model] for of in there]) == whole[model]
    assert split["opposed"] == expected(own, kinds(run, "T0")["opposed"])
    assert split["borrowed"] == expected(theirs, kinds(run, "T0")["unrelated"])


def test_the_table_of_pairs_counts_walks_by_the_output_functions(mini, mini_generator):
    e = mini_generator.draw(np.random.default_rng(0), np.resize(mini.seen_cells, 200))
    walks = [walk[:n].tolist() for walk, n in zip(e.walk, e.length, strict=True)]
    found = [
        [answers(mini.function(i), walk, mini.set1.get(name, ())) for walk in walks]
        for i, name in enumerate(mini.tasks)
    ]
    lines = [line.split() for line in coincidences(mini, walks=200).splitlines()[1:]]
    assert lines[0] == list(mini.tasks)
    for i, (name, *row) in enumerate(lines[1:]):
        assert name == mini.tasks[i] and row[i] == "–"
        for j in set(range(len(row))) - {i}:
            variant = 0 if i < j else 1
            same = np.mean([a[variant] == b[variant] for a, b in zip(found[i], found[j], strict=True)])
            assert float(row[j]) == pytest.approx(100 * same, abs=0.51)
