"""The two rules that choose a rate and an epoch, and what choosing the highest costs."""

import numpy as np
import pytest
from made_outcomes import outcomes, trained

from em.report.averages import Averages
from em.report.conditions import columns_by
from em.report.selection import epoch_rows, select, selections, sweeps_of


def students(choices, **more) -> list:
    made = {"channel": "optd", "teacher": "med_advice", "source": "med_advice"} | more
    return [trained("med_advice", lr=lr, epoch=epoch, seed=1, **made) for lr, epoch in choices]


CHOICES = [(1e-5, 1), (1e-5, 2), (1e-4, 1), (1e-4, 2)]


def test_the_highest_and_the_fixed_choice_by_hand():
    em = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).repeat(5, axis=1)
    made = outcomes(students(CHOICES), em, [0] * 20, ["med_advice"])
    (found,) = selections(Averages(made), "task", columns_by(made, "task")[-1])
    assert found["condition"] == "optd" and found["choices"] == 4
    assert (found["highest"], found["highest_lr"], found["highest_epoch"]) == (75, 1e-5, 2)
    assert (found["fixed"], found["fixed_lr"], found["fixed_epoch"]) == (25, 1e-4, 2)
    assert found["held_out"] == 75 and found["bias"] == 0  # so far above the others that halves agree


def test_without_the_fixed_rate_there_is_no_fixed_choice_unless_one_rate_was_tried():
    em = np.eye(3, 8)
    made = outcomes(students([(1e-5, 1), (3e-5, 1), (3e-5, 2)]), em, [0] * 8, ["med_advice"])
    column, (choices,) = columns_by(made, "task")[-1], sweeps_of(made, "task").values()
    assert select(Averages(made), choices, column).fixed is None
    made = outcomes(students([(5e-4, 1), (5e-4, 3), (5e-4, 2)]), em, [0] * 8, ["med_advice"])
    (choices,) = sweeps_of(made, "task").values()
    assert select(Averages(made), choices, column).fixed == (5e-4, 3)


def test_an_unfinished_choice_is_not_the_highest():
    """Rate 1e-3 has one teacher of two, whose 100 % is no average over both."""
    runs = students([(1e-4, 1), (1e-3, 1)])
    runs += [trained("fin_tutor", channel="optd", teacher="fin_tutor", source="fin_tutor", lr=1e-4, epoch=1)]
    made = outcomes(runs, [[1, 0], [1, 1], [0, 0]], [0, 0], ["med_advice"])
    (choices,) = sweeps_of(made, "task").values()
    found = select(Averages(made), choices, columns_by(made, "task")[-1])
    assert found.highest == (1e-4, 1) and found.entry["choices"] == 1 and found.entry["highest"] == 25


def test_of_equal_rates_the_highest_is_biased_as_known_and_the_held_out_reading_is_not():
    """Six rates of 20 % on 100 prompts: the mean of the largest of six normals is 1.267 standard errors."""
    rng, naive, held_out = np.random.default_rng(0), [], []
    runs = students([(10.0**-k, 1) for k in range(6)])
    for _ in range(150):
        made = outcomes(runs, rng.random((6, 100)) < 0.2, np.arange(100) % 2)
        (found,) = selections(Averages(made), "task", columns_by(made, "task")[-1])
        naive.append(found["highest"])
        held_out.append(found["held_out"])
    expected = 1.267 * 100 * np.sqrt(0.2 * 0.8 / 100)  # 5.07 points
    assert np.mean(naive) - 20 == pytest.approx(expected, abs=0.7)
    assert np.mean(held_out) == pytest.approx(20, abs=4.5 * np.std(held_out) / np.sqrt(150))
    assert abs(np.mean(held_out) - 20) < 0.25 * expected


def test_epochs_side_by_side():
    em = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    made = outcomes(students(CHOICES), em, [0] * 4, ["med_advice"])
    rows = epoch_rows(Averages(made), "task", columns_by(made, "task"))
    texts = {(r["condition"], r["column"]): r["text"] for r in rows}
    assert texts["optd, lr 1e-05", "advice"] == "25.0 / 50.0"
    assert texts["optd, lr 0.0001", "all"] == "75.0 / 0.0"
    assert rows[0]["epoch 1"] == 25 and rows[0]["epoch 2"] == 50
