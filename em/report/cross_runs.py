"""The students of a cross of teachers and data, from score rows or margin rows, and the corpora they read.

A cross takes students of OPTD that differ in their teacher, in their corpus and in their seed alone. Who
wrote the corpus is its name; where one author's corpora differ in their prompts or in whether they were
filtered, that is added. Whether the runs of one row of the cross read one and the same corpus stands in their
folders alone (`made_from` in run.json).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from em.data.cells import grid_of, ordered_tasks, parse_cell
from em.data.condition import Condition, condition_of, describe
from em.data.lineage import label
from em.files import read_json, record_path
from em.report.score_table import ScoreTable

CHANNEL = "optd"
_OF_CORPUS = ("prompts", "filtered")  # besides its author


class Student(NamedTuple):
    """A run of the cross."""

    teacher: str
    data: str
    seed: int | None


class Cross(NamedTuple):
    """R students on P prompts in C eval columns, of one set."""

    students: list[Student]
    values: np.ndarray  # (R, P) EM of the scored responses, or a sum of changes of the margin
    counts: np.ndarray  # (R, P)
    column: np.ndarray  # (P,)
    columns: list[str]
    margins: bool


class Group(NamedTuple):
    """What all students of a cross share."""

    model: str
    judge: str  # empty for margins
    way: Condition

    @property
    def text(self) -> str:
        return describe(self.way)


class _Observation(NamedTuple):
    group: Group
    condition: Condition
    set: str
    column: str
    prompt: tuple
    value: float
    count: int


def crosses_of_scores(table: ScoreTable) -> dict[Group, dict[str, Cross]]:
    """set → cross, for each group of students with a scored row."""
    kept = table.select(np.array([_in_cross(condition) for condition in table.conditions])[table.condition])
    found, em = [], kept.em()
    for i in np.flatnonzero(kept.scored):
        condition, narrow = kept.conditions[kept.condition[i]], kept.narrow[i]
        found.append(
            _Observation(
                Group(kept.models[kept.model[i]], kept.judges[kept.judge[i]], _way(condition)),
                condition,
                "narrow" if narrow else "broad",
                str(kept.grid.cells[kept.cell[i]]) if narrow else kept.tasks[kept.task[i]],
                kept.prompt[i],
                em[i],
                1,
            )
        )
    return _crosses(found, margins=False)


def crosses_of_margins(rows: list[dict]) -> dict[Group, dict[str, Cross]]:
    """The same of rows of `em.report.margins.read_margins`."""
    found = []
    for row in rows:
        condition, cell = condition_of(row), f"{row['domain']}_{row['task']}"
        if _in_cross(condition):
            group, change = Group(row["model"], "", _way(condition)), row["after"] - row["before"]
            found.append(_Observation(group, condition, "narrow", cell, (cell, row["idx"]), change, 1))
    return _crosses(found, margins=True)


def _crosses(found: list[_Observation], margins: bool) -> dict[Group, dict[str, Cross]]:
    by_group: dict[Group, dict[str, list[_Observation]]] = {}
    for seen in found:
        by_group.setdefault(seen.group, {}).setdefault(seen.set, []).append(seen)
    result = {}
    for group, sets in sorted(by_group.items(), key=str):
        result[group] = {kind: _cross(sets[kind], margins) for kind in ("narrow", "broad") if kind in sets}
    return result


def _cross(found: list[_Observation], margins: bool) -> Cross:
    names = {seen.column for seen in found}
    if found[0].set == "narrow":
        columns = [str(cell) for cell in grid_of(map(parse_cell, names)).cells]
    else:
        columns = list(ordered_tasks(names))
    runs = {c: r for r, c in enumerate(sorted({seen.condition for seen in found}, key=str))}
    prompts = {prompt: p for p, prompt in enumerate(dict.fromkeys(seen.prompt for seen in found))}
    values, counts = np.zeros((2, len(runs), len(prompts)))
    column = np.zeros(len(prompts), int)
    for seen in found:
        run, prompt = runs[seen.condition], prompts[seen.prompt]
        values[run, prompt] += seen.value
        counts[run, prompt] += seen.count
        column[prompt] = columns.index(seen.column)
    return Cross(_students(list(runs)), values, counts, column, columns, margins)


def _way(condition: Condition) -> Condition:
    return condition._replace(teacher=None, source=None, seed=None, **dict.fromkeys(_OF_CORPUS))


def _in_cross(condition: Condition) -> bool:
    return condition.channel == CHANNEL and None not in (condition.teacher, condition.source)


def _students(conditions: list[Condition]) -> list[Student]:
    """Of one group."""
    differing = [
        name
        for name in _OF_CORPUS
        if any(len({getattr(c, name) for c in conditions if c.source == d.source}) > 1 for d in conditions)
    ]
    data = [", ".join(filter(None, (c.source, describe(c, differing)))) for c in conditions]
    return [Student(c.teacher, name, c.seed) for c, name in zip(conditions, data, strict=True)]


# -- corpora -----------------------------------------------------------------------------------------------


def corpus_digests(runs: Iterable[str | Path]) -> dict[tuple[str, Condition], str]:
    """(model, condition) → digest of the corpus, of each run that noted one. UserError for other folders."""
    digests = {}
    for folder in runs:
        stated = label(folder)
        record = read_json(record_path(folder), optional={"made_from": dict})
        if digest := record.get("made_from", {}).get("corpus"):
            digests[stated["model"], condition_of(stated)] = digest
    return digests


def same_corpora(group: Group, digests: dict[tuple[str, Condition], str]) -> list[dict]:
    """[{"data", "seed", "runs", "corpora"}] a row of the cross; corpora: how many its runs were made from."""
    own = {c: digest for (model, c), digest in digests.items() if model == group.model and _in_cross(c)}
    own = {c: digest for c, digest in own.items() if _way(c) == group.way}
    rows: dict[tuple, list[str]] = {}
    for student, digest in zip(_students(list(own)), own.values(), strict=True):
        rows.setdefault((student.data, student.seed), []).append(digest)
    return [
        {"data": data, "seed": seed, "runs": len(found), "corpora": len(set(found))}
        for (data, seed), found in sorted(rows.items(), key=str)
    ]
