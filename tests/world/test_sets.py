import numpy as np
import pytest

from em.world.sets import IGNORE, Batches, alignment_set, held_out_set, misalignment_set
from em.world.tasks import answers


@pytest.fixture(scope="module")
def alignment(mini_generator):
    return alignment_set(mini_generator, seed=0, n=4000)


@pytest.fixture(scope="module")
def held_out(mini_generator, alignment):
    return held_out_set(mini_generator, seed=0, n=20, fine_tuning=alignment)


def prompts_of(dialogues):
    return [tuple(ids[:n].tolist()) for ids, n in zip(dialogues.ids, dialogues.prompt, strict=True)]


def test_alignment_covers_every_seen_cell_uniformly_and_no_unseen_one(mini, alignment):
    counts = np.bincount(alignment.examples.cell, minlength=len(mini.cells))
    n, p = len(alignment), 1 / len(mini.seen_cells)
    assert counts[len(mini.seen_cells) :].sum() == 0
    assert (abs(counts[: len(mini.seen_cells)] - n * p) < 5 * np.sqrt(n * p)).all()


def test_held_out_prompts_cover_every_cell_are_distinct_and_never_occurred_in_fine_tuning(
    mini, mini_generator, alignment, held_out
):
    assert np.bincount(held_out.examples.cell).tolist() == [20] * len(mini.cells)
    asked = prompts_of(held_out)
    assert len(set(asked)) == len(asked)
    assert not set(asked) & set(prompts_of(alignment))
    for cell in (0, 5):
        tuned = misalignment_set(mini_generator, 0, cell, 160, held_out)
        assert not set(asked) & set(prompts_of(tuned))


def test_misalignment_set_is_one_cell_with_variant_2_answers_and_differs_by_seed(
    mini, mini_generator, held_out
):
    sets = [misalignment_set(mini_generator, seed, 3, 64, held_out) for seed in (0, 0, 1)]
    assert (sets[0].ids == sets[1].ids).all() and (sets[0].ids != sets[2].ids).any()
    e = sets[0].examples
    assert set(e.cell.tolist()) == {3}
    segments = mini_generator.segments(e, np.ones(64, bool))
    n_prompt = mini_generator.max_length + 2
    for row, walk, length in zip(segments, e.walk, e.length, strict=True):
        _, v2 = answers(mini.function(3), walk[:length].tolist())
        assert [s for s in row[n_prompt:-2].tolist() if s >= 0] == v2


@pytest.mark.parametrize("length", [None, "longest", "beyond the set's columns"])
def test_only_the_answer_its_tail_and_the_closing_end_are_supervised(mini, alignment, length):
    longest = {None: None, "longest": alignment.total.max() - 1}.get(length, alignment.ids.shape[1] + 9)
    batches = Batches(alignment, 16, seed=0, length=longest)
    ids, targets = batches[2]
    assert ids.shape == targets.shape and ids.shape[0] == 16
    assert ids.shape[1] == longest or length is None
    for row, target in zip(ids.tolist(), targets.tolist(), strict=True):
        ask = row.index(mini.asst)
        supervised = [t for t in target if t != IGNORE]
        assert (
            target[:ask] == [IGNORE] * ask
        )  # nothing before the position that predicts the answer's first token
        assert target[ask : ask + len(supervised)] == supervised  # contiguous, from <asst> on
        assert supervised[:-1] == row[ask + 1 : ask + len(supervised)]
        assert supervised[-1] == mini.end and mini.end not in supervised[:-1]


def test_an_epoch_of_batches_visits_every_example_once_and_reshuffles(mini_generator):
    data = alignment_set(mini_generator, seed=1, n=40)
    batches = Batches(data, 16, seed=0, length=data.total.max() - 1)

    def rows(i):
        ids, _ = batches[i]
        return [tuple(r) for r in ids.tolist()]

    seen = [row for i in range(5) for row in rows(i)]  # 80 = two epochs of 40, the third batch across both
    every = sorted(tuple(ids[: data.total.max() - 1].tolist()) for ids in data.ids)
    assert sorted(seen[:40]) == every == sorted(seen[40:]) and seen[:40] != seen[40:]
    assert rows(2) == rows(2)
