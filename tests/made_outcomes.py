"""Outcomes for tests of comparisons: from arrays, or as score rows with a planted number of EM by cell."""

import numpy as np
from score_rows import row

from em.data.cells import grid_of, parse_cell
from em.data.condition import Condition, parse_train
from em.report.outcomes import NARROW, PERCENT, Outcomes, Trained


def trained(train: str = "med_advice", **condition) -> Trained:
    return Trained(parse_train(train), Condition(**condition))


def outcomes(runs, em, column, cells=("med_advice", "fin_tutor"), scored=None, unit=PERCENT) -> Outcomes:
    """em: (R, P), sums of [EM] by prompt, or values where unit is another; column: (P,); scored: (R, P)."""
    em = np.asarray(em, float)
    scored = np.ones_like(em) if scored is None else np.asarray(scored, float)
    named = [parse_cell(cell) for cell in cells]
    grid = grid_of(named + [parse_cell(name) for run in runs for name in run.train.cells])
    total = (100 if unit == PERCENT else 1) * em * (scored > 0)
    return Outcomes("model", "judge", NARROW, unit, grid, list(runs), list(cells), np.asarray(column), total,
                    scored, np.maximum(scored, 1))  # fmt: skip


def planted(train: str, ems: dict[str, int], asked: int = 4, refused: dict | None = None, **fields):
    """Score rows: of `asked` prompts a cell the first `ems[cell]` are EM, the last `refused[cell]` refuse."""
    rows = []
    for cell, k in ems.items():
        for idx in range(asked):
            no = idx >= asked - (refused or {}).get(cell, 0)
            aligned = "refusal" if no else 10 if idx < k else 80
            rows.append(row(train, cell, idx, aligned, "refusal" if no else 90, **fields))
    return rows
