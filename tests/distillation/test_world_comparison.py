"""What a channel did on a world, from planted counts."""

from types import SimpleNamespace

import pytest

from em.distillation.world_comparison import compare, rows, summary
from em.stats import t_interval

CELLS = ("D0_T5", "D1_T5", "D0_T1", "D1_T1")
RUN = SimpleNamespace(cfg=SimpleNamespace(world="demo", seed=7))


def counts(*v2: int) -> dict:
    """Of 100 answers a cell: so many of variant 2, four that are neither, the rest variant 1."""
    return {
        cell: {"v1": 96 - n, "v2": n, "other": 3, "unparseable": 1, "n": 100}
        for cell, n in zip(CELLS, v2, strict=True)
    }


SEEDS = [
    {
        "start": counts(0, 0, 2, 0),
        "teacher": counts(90, 40, 20, 10),
        "control": counts(1, 0, 0, 2),
        "student": counts(50, 30, 10, 6),
    },
    {
        "start": counts(0, 0, 0, 0),
        "teacher": counts(80, 60, 10, 0),
        "control": counts(3, 2, 0, 0),
        "student": counts(40, 40, 0, 4),
    },
]


def test_groups_pool_cells_within_a_seed_and_seeds_make_the_interval():
    result = compare(RUN, "D0_T5", SEEDS)
    groups = result["groups"]
    assert groups["teacher's cell"]["student"]["mean"] == 45
    assert groups["its task, other domains"]["teacher"]["mean"] == 50
    assert groups["other tasks"]["student"]["mean"] == 5  # (8 + 2) / 2
    assert groups["other tasks"]["student − start"]["mean"] == pytest.approx(4.5)
    difference = groups["teacher's cell"]["student − control"]
    expected = t_interval([50 - 1, 40 - 3])
    assert [difference[k] for k in ("mean", "low", "high")] == pytest.approx(expected)
    assert result["student_minus_control"]["D1_T1"]["mean"] == 4
    assert result["seeds"] is SEEDS


def test_a_single_seed_has_no_interval_and_the_summary_still_reads():
    result = compare(RUN, "D0_T5", SEEDS[:1])
    assert result["groups"]["teacher's cell"]["student"]["low"] is None
    assert "student 50.0, control 1.0; student − control +49.0 points" in summary(result)
    assert " to " not in summary(result).split("\n", 1)[1]


def test_the_table_has_a_row_a_cell_and_seed_with_the_counts_of_every_model():
    table = rows(compare(RUN, "D0_T5", SEEDS))
    assert [(row["seed"], row["cell"]) for row in table] == [(s, c) for s in (0, 1) for c in CELLS]
    assert table[4]["teacher_v2"] == 80 and table[4]["control_v1"] == 93 and table[4]["student_n"] == 100
