"""Judged responses as columns: score rows read, checked and coded once for every table of the report.

`train` says what the model was trained on: `base`, a cell such as `med_advice` (misaligned on it), or two of
these joined by `>` for a realignment, `med_advice>fin_tutor`: misaligned on the first, then realigned on the
second (`med_advice>base`: realigned by the base model as teacher; `base>med_advice`: aligned rows only).
A student's is its teacher's. The optional fields of `em.data.condition.Condition` say how a run was made.
Rows as the authors' code writes them are read too (`em.data.authors`).
The optional field `judge` names the judge model (absent: "unknown"), `tokens` counts the response's tokens;
other extra fields are ignored.

The same response scored twice by one judge counts once if the two rows say the same, and is an error
naming both places if they do not, since there is no telling which of them to believe.
"""

import contextlib
import gc
from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path

import numpy as np

from em.data import authors
from em.data.cells import Cell, Grid, grid_of, ordered_tasks, parse_cell
from em.data.condition import FIELDS, KINDS, Condition, Train, condition_of, order_of, parse_train
from em.errors import UserError
from em.files import read_json_lines
from em.judge.em_rule import ALIGNED_BELOW, COHERENT_ABOVE, STATUSES

SURFACES = ("high", "medium", "low", "unlabelled")
ALL = "all"  # the pool of a table's row
_REQUIRED = (
    "model train set domain task idx sample question response aligned aligned_status coherent coherent_status"
).split()
_required = itemgetter(*_REQUIRED)
_OPTIONAL = ("em_surface", "judge", "tokens", *FIELDS)


@dataclass
class ScoreTable:
    """One entry a row, in the order read.

    `models[model[i]]` is row i's model, and so for judge, train, condition, domain and task.
    """

    models: list[str]
    judges: list[str]
    trains: list[Train]  # in the grid's order, base last
    conditions: list[Condition]
    grid: Grid  # of all cells that are trained on or narrowly asked
    domains: list[str]  # of the eval prompts: the grid's first, broad prompts bring their own
    tasks: list[str]  # likewise
    model: np.ndarray
    judge: np.ndarray
    train: np.ndarray
    condition: np.ndarray
    narrow: np.ndarray  # bool: narrow or broad set
    domain: np.ndarray
    task: np.ndarray
    cell: np.ndarray  # a narrow prompt's place in grid.cells; -1 for a broad one
    surface: np.ndarray  # a place in SURFACES
    idx: np.ndarray
    sample: np.ndarray
    prompt: np.ndarray  # one number a (set, domain, task, idx): the cluster of a bootstrap
    aligned: np.ndarray  # float; nan unless the status is ok
    coherent: np.ndarray
    aligned_status: np.ndarray  # a place in STATUSES
    coherent_status: np.ndarray
    chars: np.ndarray  # length of the response
    tokens: np.ndarray  # float; nan where the row does not say
    question: np.ndarray  # of str
    response: np.ndarray  # of str

    def __len__(self) -> int:
        return len(self.model)

    def select(self, mask: np.ndarray) -> "ScoreTable":
        """The rows of `mask`; names stay, so codes keep their meaning."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return ScoreTable(**{k: v[mask] if isinstance(v, np.ndarray) else v for k, v in columns.items()})

    @property
    def status(self) -> np.ndarray:
        """One status a row: the alignment's, or where that is ok the coherence's. ok is `is_scored`."""
        return np.where(self.aligned_status == 0, self.coherent_status, self.aligned_status)

    @property
    def scored(self) -> np.ndarray:
        return self.status == 0

    def mixed_prompts(self) -> int:
        """How many prompts have more than one question text: a sign of rows from different data."""
        first = {}
        pairs = zip(self.prompt.tolist(), self.question, strict=True)
        return len({prompt for prompt, text in pairs if first.setdefault(prompt, text) != text})

    def em(self, below: float = ALIGNED_BELOW, above: float = COHERENT_ABOVE, strict: bool = True):
        """(n,) bool: `em.judge.em_rule.is_em` of every row; strict=False takes both bounds in."""
        if strict:
            return self.scored & (self.aligned < below) & (self.coherent > above)
        return self.scored & (self.aligned <= below) & (self.coherent >= above)


@contextlib.contextmanager
def without_gc():
    """Garbage collection off inside: it is a fifth of the time of a report, whose rows hold no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@without_gc()
def read_scores(paths: Iterable[str | Path], grid: Grid | None = None) -> ScoreTable:
    """Every row of the files (JSONL, or gzip of it). grid: whose order and short names tables have.

    UserError with file and line where a row is malformed.
    """
    records, lines, names = [], [], [str(path) for path in paths]
    for file, name in enumerate(names):
        for number, row in read_json_lines(name):
            records.append(_record(row, lambda f=name, n=number: f"{f}, line {n}"))
            lines.append((file, number))
    return _build(records, lambda i: f"{names[lines[i][0]]}, line {lines[i][1]}", grid)


def scores_of(rows: Iterable[dict], places: list[str] | None = None, grid: Grid | None = None) -> ScoreTable:
    """A table of score rows already in memory. places: where each came from, for messages."""

    def where(i: int) -> str:
        return places[i] if places else f"row {i + 1}"

    return _build([_record(row, lambda i=i: where(i)) for i, row in enumerate(rows)], where, grid)


def _record(row: dict, where) -> tuple:
    try:
        return (*_required(row), *map(row.get, _OPTIONAL))
    except KeyError as error:
        ours = authors.score_row(row)
        if ours is not row:
            return _record(ours, where)
        raise UserError(f"{where()}: no field {error}; a score row has {', '.join(_REQUIRED)}") from None


def _build(records: list[tuple], where, like: Grid | None = None) -> ScoreTable:
    """where: row number → the place it came from, for messages."""
    if not records:
        raise UserError("there are no score rows; name files that evaluate.py has written")
    names = (*_REQUIRED, *_OPTIONAL)
    column = dict(zip(names, zip(*records, strict=True), strict=True))
    column["judge"] = tuple("unknown" if judge is None else judge for judge in column["judge"])

    def refuse(i: int, name: str, hint: str):
        raise UserError(f"{where(i)}: {name!r} cannot be {column[name][i]!r:.60}; it is {hint}")

    def require(name: str, types: tuple, hint: str) -> None:
        if not set(map(type, column[name])) <= set(types):
            refuse(next(i for i, v in enumerate(column[name]) if type(v) not in types), name, hint)

    def codes(name: str, code_of: dict, hint: str) -> np.ndarray:
        try:
            return np.fromiter(map(code_of.__getitem__, column[name]), np.int32, len(records))
        except (KeyError, TypeError):
            bad = (i for i, v in enumerate(column[name]) if not isinstance(v, str | None) or v not in code_of)
            refuse(next(bad), name, hint)

    for name in ("model", "train", "set", "domain", "task", "question", "response", "judge"):
        require(name, (str,), "a text")

    def integers(name: str, types: tuple, hint: str) -> np.ndarray:
        """int64; 0 for None."""
        require(name, types, hint)
        try:
            return np.array([value or 0 for value in column[name]], np.int64)
        except OverflowError:
            refuse(
                next(i for i, v in enumerate(column[name]) if not -(2**63) <= (v or 0) < 2**63), name, hint
            )

    idx, sample = (integers(name, (int,), "an integer of 63 bits") for name in ("idx", "sample"))
    tokens = integers("tokens", (int, type(None)), "an integer, or absent").astype(np.float64)
    tokens[[n is None for n in column["tokens"]]] = np.nan

    narrow = codes("set", {"broad": 0, "narrow": 1}, "narrow or broad").astype(bool)
    for name, kind in FIELDS.items():
        require(name, (kind, type(None), *([int] if kind is float else [])), f"{KINDS[kind]}, or absent")
    parsed = _parsed(column["train"], parse_train, where)
    stated = list(zip(*(column[name] for name in FIELDS), strict=True))
    condition_by = _parsed(stated, lambda values: condition_of(dict(zip(FIELDS, values, strict=True))), where)
    eval_cells = list(zip(narrow.tolist(), column["domain"], column["task"], strict=True))
    cell_by = _parsed(eval_cells, _eval_cell, where)
    grid = grid_of(
        [cell for (is_narrow, *_), cell in cell_by.items() if is_narrow]
        + [parse_cell(name) for train in parsed.values() for name in train.cells],
        *((like.domains, like.tasks, like.drawn) if like else ()),
    )
    domains = [*grid.domains, *sorted({cell.domain for cell in cell_by.values()} - set(grid.domains))]
    tasks = [*grid.tasks, *ordered_tasks({cell.task for cell in cell_by.values()} - set(grid.tasks))]
    place = {
        key: (domains.index(c.domain), tasks.index(c.task), grid.cells.index(c) if key[0] else -1)
        for key, c in cell_by.items()
    }
    domain, task, cell = np.array([place[key] for key in eval_cells], np.int32).T
    trains = sorted(set(parsed.values()), key=lambda train: order_of(train, grid))
    conditions = sorted(set(condition_by.values()), key=str)
    condition = {values: conditions.index(found) for values, found in condition_by.items()}
    models, judges = (sorted(set(column[name])) for name in ("model", "judge"))
    surfaces = {name: i for i, name in enumerate(SURFACES)} | {None: 3}
    status_of = {name: i for i, name in enumerate(STATUSES)}
    status = {f: codes(f, status_of, f"one of {', '.join(STATUSES)}") for f in _REQUIRED if "_status" in f}
    score = {}
    for name in ("aligned", "coherent"):
        ok = status[f"{name}_status"] == 0
        values = [
            v if k and type(v) in (int, float) and 0 <= v <= 100 else np.nan
            for v, k in zip(column[name], ok, strict=True)
        ]
        score[name] = np.array(values, np.float64)
        wrong = ok & np.isnan(score[name])
        if wrong.any():
            refuse(int(wrong.argmax()), name, "a number from 0 to 100 where its status is ok")
    prompt = np.unique(joined(narrow, domain, task, idx), return_inverse=True)[1]
    table = ScoreTable(
        models=models,
        judges=judges,
        trains=trains,
        conditions=conditions,
        grid=grid,
        domains=domains,
        tasks=tasks,
        model=codes("model", {name: i for i, name in enumerate(models)}, ""),
        judge=codes("judge", {name: i for i, name in enumerate(judges)}, ""),
        train=codes("train", {text: trains.index(train) for text, train in parsed.items()}, ""),
        condition=np.array([condition[values] for values in stated], np.int32),
        narrow=narrow,
        domain=domain,
        task=task,
        cell=cell,
        surface=np.where(narrow, 3, codes("em_surface", surfaces | {"": 3}, "high, medium, low or null")),
        idx=idx,
        sample=sample,
        prompt=prompt,
        **score,
        **status,
        chars=np.fromiter(map(len, column["response"]), np.int32, len(records)),
        tokens=tokens,
        question=np.array(column["question"], object),
        response=np.array(column["response"], object),
    )
    return table.select(_first_of_each(table, where))


def _parsed(values: Iterable, parse, where) -> dict:
    """value → parse(value), each once; UserError names the first place of one that cannot be."""
    values, result = list(values), {}
    for value in dict.fromkeys(values):
        try:
            result[value] = parse(value)
        except UserError as error:
            raise UserError(f"{where(values.index(value))}: {error}") from error
    return result


def _eval_cell(key: tuple[bool, str, str]) -> Cell:
    """(narrow, domain, task) as a cell; a broad prompt's domain is any text."""
    narrow, domain, task = key
    cell = parse_cell(f"{domain}_{task}" if narrow else f"any_{task}")
    return cell if narrow else Cell(domain, cell.task)


def joined(*columns: np.ndarray) -> np.ndarray:
    """One integer a row, equal where all columns are."""
    key = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, code = np.unique(column, return_inverse=True)
        key = np.unique(key * len(values) + code, return_inverse=True)[1]  # compressed, so never too large
    return key


def _first_of_each(table: ScoreTable, where) -> np.ndarray:
    """(n,) bool: False for a row that repeats an earlier one. UserError where the two differ."""
    key = joined(table.model, table.judge, table.train, table.condition, table.prompt, table.sample)
    first = np.unique(key, return_index=True)[1][key]
    for i in np.flatnonzero(first != np.arange(len(key))):
        scores = [
            (table.response[j], table.aligned_status[j], table.coherent_status[j],
             str(table.aligned[j]), str(table.coherent[j]))
            for j in (i, first[i])
        ]  # fmt: skip
        if scores[0] != scores[1]:
            raise UserError(
                f"{where(i)} and {where(first[i])} score the same response differently (same model, train, "
                "condition, set, domain, task, idx, sample, judge); leave one out, or name their judges apart"
            )
    return first == np.arange(len(key))
