"""What a model was trained on, and how: the fields by which a report tells runs apart.

`Train` is a run's place in a matrix. `Condition` is the rest: the channel and its teacher, who wrote the
data, and the settings that the paper varies. Score rows carry both, and tables group by their fields.
"""

import functools
import re
from typing import NamedTuple

from em.data.cells import Grid, parse_cell
from em.errors import UserError

BASE, ADAPTER = (
    "base",
    "adapter",
)  # the untrained model; one that somebody else trained, on what we do not know


class Train(NamedTuple):
    """What a model was trained on; `end` is empty where there was no realignment.

    As text: `base`; `med_advice`; `med_advice>fin_tutor` where it was then fine-tuned on aligned answers of
    another cell; `base>fin_tutor` where there was no misaligned cell before; `med_advice>base` where the base
    model was its teacher. `adapter` stands for training that is not known.
    """

    start: str
    end: str = ""

    def __str__(self) -> str:
        return f"{self.start}>{self.end}" if self.end else self.start

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of the cells in it."""
        return tuple(name for name in self if name not in ("", BASE, ADAPTER))

    @property
    def realigned(self) -> bool:
        return bool(self.end)

    @property
    def misaligned(self) -> bool:
        """Trained on one cell and nothing after."""
        return not self.end and self.start not in (BASE, ADAPTER)

    def then(self, end: str) -> "Train":
        """After a realignment on a cell, or by a teacher; one before it is forgotten."""
        return Train(self.start, end)


@functools.cache
def parse_train(text: str) -> Train:
    """The inverse of str(Train); cells by any of their names. UserError for anything else."""
    parts = text.split(">")
    if len(parts) > 2 or [p.strip() for p in parts] == [BASE, BASE]:
        raise UserError(f"train {text!r} is none of base, <cell>, <cell>><cell>")
    return Train(*map(_place, parts))


def _place(name: str) -> str:
    known = name.strip().lower()
    return known if known in (BASE, ADAPTER) else str(parse_cell(name))


def order_of(train: Train, grid: Grid) -> tuple[int, ...]:
    """Sorts trains as tables have them: cells, `adapter`, `base`; one that went no further comes first."""
    places = {"": -1} | {str(cell): i for i, cell in enumerate(grid.cells)}
    places |= {ADAPTER: len(places), BASE: len(places) + 1}
    return tuple(places[name] for name in train)


class Condition(NamedTuple):
    """How a student was made; a field that does not apply, or that a row does not say, is None.

    A run of train.py has no channel; its lr, epoch and seed are its own. Two runs whose conditions differ in
    the seed alone are replicates.
    """

    channel: str | None = None  # sft, optd, opd
    teacher: str | None = None  # what the teacher was trained on: text of a Train
    source: str | None = None  # who wrote the data: a Train, after its model if another; gold; rows:CELL
    prompts: str | None = None  # broad, math
    filtered: bool | None = None  # whether the text was judged before the student trained on it
    estimator: str | None = None  # of opd: sampled, exact
    lr: float | None = None  # peak learning rate
    epoch: int | None = None  # how many it was trained for
    seed: int | None = None
    system: str | None = None  # what the evaluation put before every question
    teacher_system: str | None = None  # what only the teacher saw

    def group(self) -> "Condition":
        """What all runs of one matrix share: no teacher, which is its row, no seed, a source if another."""
        source = None if self.source == self.teacher else self.source
        return self._replace(teacher=None, source=source, seed=None)


FIELDS = dict(channel=str, teacher=str, source=str, prompts=str, filtered=bool, estimator=str)
FIELDS |= dict(lr=float, epoch=int, seed=int, system=str, teacher_system=str)
_OPEN = re.compile(r"rows:(?P<rows>.+)|gold|(?P<model>.+) (?P<train>\S+)")


def condition_of(row: dict) -> Condition:
    """The condition that a score row states. UserError for a value that a field cannot have."""
    values = [row.get(name) for name in FIELDS]
    if not any(value is not None for value in values):
        return Condition()
    for (name, kind), value in zip(FIELDS.items(), values, strict=True):
        fits = type(value) is kind or (kind is float and type(value) is int)
        if value is not None and not fits:
            raise UserError(f"{name!r} cannot be {value!r:.60}; it is {KINDS[kind]}, or absent")
    condition = Condition(*values)
    for name, known in (("channel", CHANNELS), ("estimator", ("sampled", "exact"))):
        if (value := getattr(condition, name)) is not None and value not in known:
            raise UserError(f"{name!r} cannot be {value!r:.60}; it is one of {', '.join(known)}, or absent")
    changes = {}
    if condition.teacher is not None:
        changes["teacher"] = str(parse_train(condition.teacher))
    if condition.source is not None:
        changes["source"] = _source(condition.source)
    if condition.lr is not None:
        changes["lr"] = float(condition.lr)
    return condition._replace(**changes)


CHANNELS = ("sft", "optd", "opd")
KINDS = {str: "a text", bool: "true or false", float: "a number", int: "an integer"}


def _source(text: str) -> str:
    """A source with its cells by their names."""
    match = _OPEN.fullmatch(text)
    if match is None:
        return str(parse_train(text))
    if match["rows"]:
        return f"rows:{parse_cell(match['rows'])}"
    return f"{match['model']} {parse_train(match['train'])}" if match["model"] else text


_WORDS = dict(channel="{}", teacher="teacher {}", source="source {}", prompts="{} prompts", estimator="{}")
_WORDS |= dict(lr="lr {:g}", epoch="epoch {}", seed="seed {}", system="system {!r}")
_WORDS |= dict(teacher_system="teacher's system {!r}")


def describe(condition: Condition, names=Condition._fields, default: str = "") -> str:
    """The known fields of `names`, spelt out: `optd, teacher med_tutor, source spo_summarization`."""
    words = []
    for name in Condition._fields:
        value = getattr(condition, name)
        if name in names and value is not None:
            words.append(
                ("filtered" if value else "unfiltered") if name == "filtered" else _WORDS[name].format(value)
            )
    return ", ".join(words) or default


def ways_in_words(ways: list[Condition]) -> list[str]:
    """What tells ways apart: the channel, and every field in which two of the same channel differ."""
    words = []
    for way in ways:
        alike = [other for other in ways if other.channel == way.channel]
        differing = [name for name in Condition._fields if len({getattr(a, name) for a in alike}) > 1]
        words.append(describe(way, ["channel", *differing]))
    return words
