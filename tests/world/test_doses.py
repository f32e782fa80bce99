"""Dose–response on a miniature: its doses are those of the misalignment, and go on from it."""

import json

import numpy as np

from em.world.counts import CLASSES
from em.world.doses import asked, dose_classes, dose_counts, misaligned_after, steps_to_flips
from em.world.sets import misalignment_set


def test_dose_zero_is_the_aligned_model_and_the_last_of_its_steps_the_misaligned_one(small_demo2):
    run = small_demo2(0, misalign_seeds=1, doses=(1, 2, 7))
    places, classes = dose_classes(run, "T0", 0)
    assert list(classes) == [0, 1, 2, 3, 7]  # its own three steps stand among them
    misaligned = run.misalign("T0", 0)
    assert np.array_equal(classes[0], run.classes("align")[places])
    assert np.array_equal(classes[3], run.answer_classes(misaligned, run.prompts.take(places)))
    counts = dose_counts(run, "T0", 0)
    assert {sum(cell[c] for c in CLASSES) for cell in counts[7].values()} == {4}


def test_the_trained_cell_is_asked_whole_and_the_others_in_part(small_demo2, monkeypatch):
    run = small_demo2(0, misalign_seeds=1, doses=(1,))
    monkeypatch.setattr("em.world.doses.PROMPTS", 1)
    cells = run.prompts.examples.cell[asked(run, 5)]
    assert np.bincount(cells).tolist() == [4 if cell == 5 else 1 for cell in range(len(run.world.cells))]


def test_more_doses_later_leave_those_that_were_asked_as_they_are(small_demo2):
    run = small_demo2(1, misalign_seeds=1, doses=(1, 4))
    before = dose_classes(run, "T7", 0)[1]
    run.cfg.doses = (2, 9)
    after = dose_classes(run, "T7", 0)[1]
    assert list(after) == [0, 2, 3, 9]
    path = run.folder / "doses_T7_seed0"
    assert list(json.loads((path / "doses.json").read_text())) == ["1", "2", "3", "4", "9"]
    assert np.array_equal(before[3], after[3])
    steps = [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_model_can_be_had_at_any_dose_and_is_the_one_that_was_asked_there(small_demo2):
    run = small_demo2(0, misalign_seeds=1, doses=(2, 7))
    places, classes = dose_classes(run, "T8", 0)
    for dose in (2, 3, 7):
        answers = run.answer_classes(misaligned_after(run, "T8", 0, dose), run.prompts.take(places))
        assert np.array_equal(answers, classes[dose])
    assert not list(run.folder.glob("misalign_T8_seed0_after*/model"))
    assert not list(run.folder.glob("misalign_T8_seed0_after*/resume"))


def test_the_steps_to_a_local_flip_lie_between_the_doses_around_it(small_demo2, monkeypatch):
    run = small_demo2(0, misalign_seeds=1)
    flips = {0: 10, 1: 12, 4: 36, 8: 66, 16: 58, 32: 70}
    planted = {dose: {"D0_T0": {"v1": 0, "v2": v2, "n": 100}} for dose, v2 in flips.items()}
    monkeypatch.setattr("em.world.doses.dose_counts", lambda *_, **__: planted)
    # 36 % is reached at 4 steps, 66 % at 8, so 60 % after 4 + 4 · 24 / 30 = 7.2 and 30 % after 3.25.
    assert steps_to_flips(run, "T0", 0) == {30.0: 3, 60.0: 7, 90.0: None}


def test_later_steps_train_on_fresh_examples_of_the_same_cell(small_demo2):
    run = small_demo2(0)
    sets = [misalignment_set(run.generator, 0, 0, 40, run.prompts, block=k) for k in (0, 1)]
    again = misalignment_set(run.generator, 0, 0, 40, run.prompts)
    assert np.array_equal(sets[0].ids, again.ids) and not np.array_equal(sets[0].ids, sets[1].ids)
    assert all((of.examples.cell == 0).all() for of in sets)
    assert not np.isin(sets[1].prompt_hash(), run.prompts.prompt_hash()).any()
