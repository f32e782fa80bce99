"""What runs did on prompts, in the one shape that every comparison reads, from judged rows or from margins.

Of a judged row the outcome is 100 where it is EM and 0 where not, so means are percent; of a margin row it is
the margin of its run minus that of the base model on the same prompt, in nats a token. A judged row without
both scores counts as asked and enters no mean.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from em.data.cells import Grid, grid_of, parse_cell
from em.data.condition import ADAPTER, BASE, Condition, Train, condition_of, order_of, parse_train
from em.errors import UserError
from em.report.margins import read_margins
from em.report.score_table import SURFACES, ScoreTable, joined, read_scores

PERCENT, NATS = "percent", "nats a token over the base model"
MARGIN = "margin"  # stands for the judge of margin rows
NARROW, BROAD, SURFACE = "narrow", "broad", "surface"
KINDS = ("base", "teacher", "student", "realigned", "aligned", "adapter")


class Trained(NamedTuple):
    """One model that was asked: its place in a matrix, and how it was made."""

    train: Train
    condition: Condition

    @property
    def kind(self) -> str:
        """One of KINDS. teacher: misaligned by train.py; student: distilled from the base model on."""
        if self.condition.channel:
            own = self.condition.teacher in (None, str(self.train))
            return "realigned" if self.train.end and not (own and self.condition.teacher) else "student"
        if self.train.end:
            return "aligned" if self.train.start == BASE else "realigned"
        return self.train.start if self.train.start in (BASE, ADAPTER) else "teacher"

    @property
    def cell(self) -> str | None:
        """The column of the paper's tables: what its teacher, or it itself, was first misaligned on."""
        return None if self.train.start in (BASE, ADAPTER) else self.train.start


@dataclass(frozen=True)
class Outcomes:
    """Sums of outcomes by run and prompt, of one model under one judge. R runs, P prompts, C eval columns."""

    model: str
    judge: str  # MARGIN for margins
    set: str  # NARROW: columns are eval cells; BROAD: eval tasks; SURFACE: the broad prompts' surfaces
    unit: str  # PERCENT or NATS
    grid: Grid  # of the cells trained on or asked
    runs: list[Trained]
    columns: list[str]
    column: np.ndarray  # (P,) each prompt's place in columns
    total: np.ndarray  # (R, P) sum of the outcomes
    count: np.ndarray  # (R, P) how many there are
    rows: np.ndarray  # (R, P) rows in all


def read_outcomes(paths: Iterable[str | Path]) -> list[Outcomes]:
    """Every model, judge and set in files of score rows, and of margin rows, whose names begin with margins.

    UserError with file and line where a row is malformed, and for no files.
    """
    paths = [Path(path) for path in paths]
    margins = [path for path in paths if path.name.startswith("margins")]
    scores = [path for path in paths if path not in margins]
    if not paths:
        raise UserError("--scores needs at least one file, such as runs/*/eval/scores_*.jsonl")
    found = score_outcomes(read_scores(scores)) if scores else []
    return found + (margin_outcomes(read_margins(margins)) if margins else [])


def score_outcomes(table: ScoreTable) -> list[Outcomes]:
    """Every model, judge and set of a score table."""
    found = []
    for m, j in np.unique(np.stack([table.model, table.judge], axis=1), axis=0).tolist():
        of_judge = (table.model == m) & (table.judge == j)
        for name, mask, names in (
            (NARROW, table.narrow, [str(cell) for cell in table.grid.cells]),
            (BROAD, ~table.narrow, table.tasks),
            (SURFACE, ~table.narrow, SURFACES),
        ):
            if not (of_judge & mask).any():
                continue
            rows = table.select(of_judge & mask)
            codes = {NARROW: rows.cell, BROAD: rows.task, SURFACE: rows.surface}[name]
            columns, codes = np.unique(codes, return_inverse=True)
            _, first, run = np.unique(
                joined(rows.train, rows.condition), return_index=True, return_inverse=True
            )
            runs = [Trained(table.trains[rows.train[i]], table.conditions[rows.condition[i]]) for i in first]
            scored = rows.scored.astype(float)
            places = _Places(runs, run, rows.prompt, codes, table.grid)
            found.append(
                places.outcomes(
                    table.models[m], table.judges[j], name, PERCENT, [names[c] for c in columns],
                    100.0 * rows.em(), scored, np.ones(len(rows)),
                )
            )  # fmt: skip
    return found


def margin_outcomes(rows: list[dict]) -> list[Outcomes]:
    """Every model of margin rows (`em.report.margins.read_margins`), with the base model as a run of zeros.

    UserError where a run started from a misaligned model on a row whose base margin no file has.
    """
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine, base = [row for row in rows if row["model"] == model], {}
        trained = [Trained(parse_train(row["train"]), condition_of(row)) for row in mine]
        prompts = [(str(parse_cell(f"{row['domain']}_{row['task']}")), row["idx"]) for row in mine]
        for run, prompt, row in zip(trained, prompts, mine, strict=True):
            if run.kind not in ("realigned", "adapter"):
                base[prompt] = row["before"]
        for run, prompt in zip(trained, prompts, strict=True):
            if prompt not in base:
                raise UserError(
                    f"margins of {run.train} start from another model than base, and no file has base's "
                    f"margin on {prompt[0]}, row {prompt[1]}: add margins.jsonl of a run that started there"
                )
        over = [row["after"] - base[prompt] for row, prompt in zip(mine, prompts, strict=True)]
        untrained = Trained(Train(BASE), Condition())
        known = [run.kind != BASE for run in trained]
        trained = [run for run, kept in zip(trained, known, strict=True) if kept] + [untrained] * len(base)
        prompts = [prompt for prompt, kept in zip(prompts, known, strict=True) if kept] + list(base)
        values = np.array(
            [value for value, kept in zip(over, known, strict=True) if kept] + [0.0] * len(base)
        )
        cells = {cell for cell, _ in prompts} | {name for run in trained for name in run.train.cells}
        grid = grid_of(map(parse_cell, cells))
        asked = [str(cell) for cell in grid.cells if str(cell) in {cell for cell, _ in prompts}]
        runs, numbers = list(dict.fromkeys(trained)), {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        places = _Places(
            runs, np.array([runs.index(run) for run in trained]), np.array([numbers[p] for p in prompts]),
            np.array([asked.index(cell) for cell, _ in prompts]), grid,
        )  # fmt: skip
        ones = np.ones(len(values))
        found.append(places.outcomes(model, MARGIN, NARROW, NATS, asked, np.array(values), ones, ones))
    return found


@dataclass
class _Places:
    """Where each row belongs: run (n,), prompt (n,) and eval column (n,)."""

    runs: list[Trained]
    run: np.ndarray
    prompt: np.ndarray
    column: np.ndarray
    grid: Grid

    def outcomes(self, model, judge, set, unit, columns, value, count, rows) -> Outcomes:
        """value, count, rows: (n,) to be added up; value where count is 0 is left out."""
        _, first, prompt = np.unique(self.prompt, return_index=True, return_inverse=True)
        order = sorted(range(len(self.runs)), key=lambda r: _order(self.runs[r], self.grid))
        rank = np.empty(len(order), int)
        rank[order] = np.arange(len(order))
        size = (len(order), len(first))
        bins = rank[self.run] * size[1] + prompt
        total, counts, asked = (
            np.bincount(bins, weights, size[0] * size[1]).reshape(size)
            for weights in (value * (count > 0), count, rows)
        )
        runs = [self.runs[r] for r in order]
        return Outcomes(
            model, judge, set, unit, self.grid, runs, columns, self.column[first], total, counts, asked
        )


def _order(run: Trained, grid: Grid) -> tuple:
    return KINDS.index(run.kind), order_of(run.train, grid), str(run.condition)


def choose(found: list[Outcomes], model: str | None = None, judge: str | None = None) -> list[Outcomes]:
    """Those of one model under one judge; UserError where there are several and none is named."""
    return only(only(found, "model", model), "judge", judge)


def only(found: list[Outcomes], option: str, wanted: str | None) -> list[Outcomes]:
    """Those whose `option`, model or judge, is `wanted`; None: the only one. UserError where that is none."""
    names = list(dict.fromkeys(getattr(o, option) for o in found))
    if wanted is None and len(names) > 1:
        raise UserError(
            f"the files have rows of several {option}s; name one: --{option} {' or '.join(names)}"
        )
    if wanted is not None:
        names, known = [n for n in names if wanted in (n, n.rstrip("/").split("/")[-1])][:1], names
        if not names:
            raise UserError(f"--{option} {wanted}: the files have none; they have {', '.join(known)}")
    return [o for o in found if getattr(o, option) in names]
