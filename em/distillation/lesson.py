"""Who teaches whom, on whose text: three choices that a run makes apart from each other (paper 4).

    teacher   a run, or base
    start     what the student starts from: base, or in a realignment a misaligned run (4.2)
    writer    who wrote a frozen corpus: a run, base, `gold` (MATH's own answers, E.4.2) or `rows:<cell>`, the
              misaligned answers of a cell's training rows (E.4.4)

All stand on one base model in memory, a run as an adapter; only a writer may be of another model (E.4.3).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from em.data import lineage
from em.data.cells import parse_cell
from em.data.condition import BASE, Train
from em.errors import UserError
from em.model import hub, lora

SOURCES = ("teacher", "student", BASE, "gold", "rows")  # or rows:CELL, or a run


def names_run(name: str | None) -> bool:
    """Whether a teacher, a start, a source or a writer is a run."""
    return name not in (None, *SOURCES) and not name.startswith("rows:")


class Lesson(NamedTuple):
    """A teacher, a student's start and a writer, and what each was trained on.

    source_train: who wrote, as a condition says it (em.data.condition). misaligned: whether that is a run
    that is misaligned, or of which nobody knows. foreign: the writer's model, where it is another one.
    """

    teacher: str
    start: str
    writer: str
    teacher_train: Train
    start_train: Train
    source_train: str
    misaligned: bool
    foreign: str | None

    @property
    def cell(self) -> str:
        """The student's row in a matrix: what it was misaligned on, or else what its teacher was."""
        return str(self.teacher_train) if self.start == BASE else self.start_train.start

    @property
    def adapters(self) -> dict[str, str]:
        """Adapter name → its run, each run once."""
        found = {}
        for name, run in (("teacher", self.teacher), ("start", self.start), ("source", self.writer)):
            if names_run(run) and run not in found.values():
                found[name] = run
        return found

    @property
    def ours(self) -> dict[str, str]:
        """Those of them that fit the base of teacher and student."""
        return {name: run for name, run in self.adapters.items() if not (self.foreign and run == self.writer)}

    @property
    def rows(self) -> bool:
        """Whether the corpus is a cell's rows, which bring their own questions."""
        return self.writer.startswith("rows:")

    def stack(self, who: str) -> tuple[str, ...]:
        """The adapters that `who`, one of the three, runs under."""
        return tuple(name for name, run in self.adapters.items() if run == who)

    def name(self, model: str) -> str:
        """What the folder of a run on this lesson is called first."""
        who = self.teacher if self.start == BASE else self.start
        return f"{Path(hub.canonical(model)).name.lower()}_base" if who == BASE else Path(who).name

    @property
    def realigned(self) -> str:
        """And what it is called then."""
        if self.start == BASE:
            return ""
        return "realigned" if self.teacher == BASE else f"realigned-by-{Path(self.teacher).name}"

    @contextlib.contextmanager
    def loaded(self, model) -> Iterator[None]:
        """With its adapters on `model`, which has none otherwise."""
        for name, run in self.ours.items():
            lora.load_adapter(model, name, run)
        try:
            yield
        finally:
            for name in self.ours:
                lora.remove_adapter(model, name)


def lesson_of(teacher: str, start: str, source: str, model: str, cell: str | None = None) -> Lesson:
    """teacher, start: a run or base. source: as --source names it. model: of teacher and student.

    cell: what a teacher or a start from elsewhere was trained on. UserError for a run that is none, a cell
    that cannot be one, and a start that never was misaligned.
    """
    teacher_train, start_train = _train(teacher, cell), _train(start, cell)
    if start != BASE and start_train.start == BASE:
        raise UserError(f"--on {start} never was misaligned, it is {start_train}; leave it out")
    writer, foreign, misaligned = {"teacher": teacher, "student": start}.get(source, source), None, False
    if names_run(writer) or writer == BASE:
        train = {teacher: teacher_train, start: start_train}.get(writer) or _train(writer)
        text, misaligned = str(train), train.start != BASE and not train.realigned
        its = (lineage.settings_of(writer)["model"] if writer != BASE else None) or model
        if hub.canonical(its) != hub.canonical(model):
            foreign, text = its, f"{hub.canonical(its)} {text}"
    elif writer == "gold":
        text = writer
    else:
        known = (teacher_train if start == BASE else start_train).cells
        named = writer.partition(":")[2] or (known[0] if known else "")
        if not named:
            raise UserError("--source rows: of which cell? Say it, as in --source rows:med_advice")
        text = writer = f"rows:{parse_cell(named)}"
    return Lesson(teacher, start, writer, teacher_train, start_train, text, misaligned, foreign)


def _train(who: str, cell: str | None = None) -> Train:
    return Train(BASE) if who == BASE else lineage.train_of(who, cell)
