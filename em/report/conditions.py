"""Rows and columns of a comparison: runs that differ in nothing but the seed and their column, by name.

A condition is what differs between runs in the fields of `em.data.condition.Condition`; the seed makes a
replicate. Where the columns are the teacher's task, domain or cell, the teacher is not in the condition's
name, and a source that goes with the teacher is named as such: its own text (not said), `rows` of its cell,
or another model that was misaligned on the same cell.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from em.data.cells import parse_cell
from em.data.condition import BASE, CHANNELS, Condition, ways_in_words
from em.errors import UserError
from em.report.averages import Averages, Pool
from em.report.outcomes import KINDS, NARROW, Outcomes, Trained
from em.report.score_table import ALL

BY = ("task", "domain", "teacher", "cells")
TEACHER = "teacher"


class Key(NamedTuple):
    """What runs of one condition share. subject, end: of their Train, where that is not the column."""

    kind: str
    subject: str
    end: str
    condition: Condition


def key_of(run: Trained, by: str) -> Key:
    """The condition of a run in a comparison by one of BY."""
    condition, end = run.condition._replace(seed=None), run.train.end
    if by == "cells":
        subject = "" if run.kind == "student" else run.train.start
        return Key(run.kind, subject, "" if run.kind == "student" else end, condition)
    if run.kind == "student" and run.cell:
        condition = condition._replace(teacher=None)
    return Key(run.kind, "", end, condition._replace(source=relative_source(run)))


def relative_source(run: Trained) -> str | None:
    """Who wrote the data, as seen from the run: None for its teacher; `student`; `rows` of its cell."""
    source, teacher, cell = run.condition.source, run.condition.teacher, run.cell
    if source is None or source == teacher:
        return None
    if run.kind == "realigned" and source == cell:
        return "student"
    if source == f"rows:{cell}":
        return "rows"
    match = re.fullmatch(r"(\S+) (.+)", source)
    return match[1] if match and match[2] == str(run.train) else source


def conditions_of(outcomes: Outcomes, by: str) -> dict[str, list[int]]:
    """Name → the runs of it, base and teacher first, then by channel."""
    members: dict[Key, list[int]] = {}
    for r, run in enumerate(outcomes.runs):
        members.setdefault(key_of(run, by), []).append(r)
    order = sorted(members, key=lambda key: (*_order(key), members[key]))
    return {name: members[key] for key, name in names_of(order).items()}


def _order(key: Key) -> tuple:
    c = key.condition
    channel = (None, *CHANNELS).index(c.channel)
    return KINDS.index(key.kind), channel, c.prompts == "math", c.source or "", c.lr or 0, c.epoch or 0


def names_of(keys: list[Key]) -> dict[Key, str]:
    """Each condition in words: its kind, and what differs between those of its kind and channel."""
    names = {}
    for kind in KINDS:
        alike = [key for key in keys if key.kind == kind]
        plain = [
            key.condition._replace(teacher=None) if kind == "realigned" else key.condition for key in alike
        ]
        several = len({key.subject for key in alike}) > 1
        for key, words in zip(alike, ways_in_words(plain), strict=True):
            subject = key.subject if several else ""
            channel, _, rest = words.partition(", ") if key.condition.channel else ("", "", words)
            what = {
                "base": BASE,
                "teacher": f"{TEACHER} {subject}".strip(),
                "student": f"teacher realigned on {key.end}" if key.end else "",
                "realigned": f"{subject} realigned {'by' if channel else 'on'} {key.end}".strip(),
                "aligned": f"aligned on {key.end}",
                "adapter": "adapter",
            }[kind]
            names[key] = ", ".join(filter(None, (channel, what, rest)))
    return names


# -- columns -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table: the runs that count in it, and the eval columns that are averaged over."""

    name: str
    runs: Callable[[Trained], bool]  # asked only of runs that have a cell; the others count in every column
    asked: list[int]
    by_cell: bool = True  # whether runs of different cells are different pairs, set against their like


def columns_by(outcomes: Outcomes, by: str, cells: tuple[str, ...] = ()) -> list[Column]:
    """Columns of a comparison by one of BY over the narrow eval cells named (none: all), and `all`.

    UserError for a cell that no row asks.
    """
    asked = asked_cells(outcomes, cells)
    if by == "cells":
        columns = [Column(outcomes.columns[c], lambda run: True, [c], by_cell=False) for c in asked]
    else:
        known = [run.cell for run in outcomes.runs if run.cell]
        order = {"task": outcomes.grid.tasks, "domain": outcomes.grid.domains}
        names = order.get(by) or tuple(map(str, outcomes.grid.cells))
        there = {part_of(cell, by) for cell in known}
        columns = [
            Column(name, lambda run, name=name: part_of(run.cell, by) == name, asked)
            for name in names
            if name in there
        ]
    return [*columns, Column(ALL, lambda run: True, asked, by_cell=by != "cells")]


def part_of(cell: str, by: str) -> str:
    """A cell's task or domain, or, of `teacher`, the cell itself."""
    return cell if by == "teacher" else getattr(parse_cell(cell), by)


def asked_cells(outcomes: Outcomes, cells: tuple[str, ...] = ()) -> list[int]:
    """Places of the eval cells named among the columns; none named: all. UserError for one not asked."""
    if outcomes.set != NARROW:
        raise ValueError("eval cells are of narrow rows")
    if not cells:
        return list(range(len(outcomes.columns)))
    names = list(dict.fromkeys(str(parse_cell(cell)) for cell in cells))
    for name in names:
        if name not in outcomes.columns:
            raise UserError(f"--cells {name}: no row asks that cell; asked are {', '.join(outcomes.columns)}")
    return sorted(outcomes.columns.index(name) for name in names)


def pool(outcomes: Outcomes, runs: list[int], column: Column) -> Pool:
    """The runs that count in a column, by their cell, or by the two of a realignment where ends differ."""
    found: dict[str | None, list[int]] = {}
    counted = [r for r in runs if outcomes.runs[r].cell is None or column.runs(outcomes.runs[r])]
    several = len({outcomes.runs[r].train.end for r in counted}) > 1
    for r in counted:
        run = outcomes.runs[r]
        cell = str(run.train) if several and run.cell else run.cell
        found.setdefault(cell if column.by_cell else None, []).append(r)
    return Pool.of(found)


# -- tables ------------------------------------------------------------------------------------------------


def table_of(averages: Averages, rows: dict[str, list[int]], columns: list[Column]) -> dict:
    """{"model", "judge", "unit", "cells", "conditions", "columns", "entries"}: every row in every column.

    rows: name → runs. An entry is `Averages.entry` with its condition and column; values are None where there
    is no row.
    """
    o = averages.outcomes
    entries = [
        {"condition": name, "column": column.name} | averages.entry(pool(o, runs, column), column.asked)
        for name, runs in rows.items()
        for column in columns
    ]
    asked = sorted({c for column in columns for c in column.asked})
    about = {"model": o.model, "judge": o.judge, "set": o.set, "unit": o.unit}
    about |= {"cells": [o.columns[c] for c in asked]}
    return about | {"conditions": list(rows), "columns": [c.name for c in columns], "entries": entries}


def differences_of(averages: Averages, rows: dict[str, list[int]], columns: list[Column]) -> list[dict]:
    """Every condition minus every one before it, in each column, over the pairs that both have."""
    o, names, found = averages.outcomes, list(rows), []
    for column in columns:
        pools = {name: pool(o, rows[name], column) for name in names}
        for j, b in enumerate(names):
            for a in names[j + 1 :]:
                gap = averages.difference(pools[a], pools[b], column.asked)
                if gap:
                    found.append({"condition": a, "minus": b, "column": column.name} | gap)
    return found
