"""What a model was trained on, and the run folders of train.py and distill.py that it comes from.

A report groups responses by two texts. `train` is the cell that a model was misaligned on, followed by the
cell of its realignment if there was one. `model` is the base model and, for a distilled student, its channel,
so that channels never share a matrix. The row of a distilled student is the teacher's cell, or, where a
misaligned student was realigned by a teacher, the student's own.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from em.data.cells import CELLS, parse_cell
from em.errors import UserError
from em.files import ADAPTER_WEIGHTS, check, file_digest, read_record

BASE = "base"
STARTS = (*map(str, CELLS), BASE)  # what a run can start from, in the order of every table

# -- what a model was trained on ---------------------------------------------------------------------------


class Train(NamedTuple):
    """What a model was trained on, as places in STARTS; `end` is -1 where there was no realignment.

    As text: `base`; `med_advice`; `med_advice>fin_tutor` where it was then fine-tuned on aligned answers of
    another cell; `base>fin_tutor` where there was no misaligned cell before; `med_advice>base` where the base
    model was its teacher.
    """

    start: int
    end: int = -1

    def __str__(self) -> str:
        return STARTS[self.start] + (f">{STARTS[self.end]}" if self.realigned else "")

    @property
    def first(self) -> str:
        """The name of what it started from: a cell or `base`."""
        return STARTS[self.start]

    @property
    def realigned(self) -> bool:
        return self.end >= 0

    @property
    def misaligned(self) -> bool:
        """Trained on one cell and nothing after."""
        return not self.realigned and self.first != BASE

    def then(self, cell: str) -> "Train":
        """After a realignment on `cell`; one before it is forgotten."""
        return Train(self.start, _place(cell))


@functools.cache
def parse_train(text: str) -> Train:
    """The inverse of str(Train); cells by any of their names. UserError for anything else."""
    parts = text.split(">")
    if len(parts) > 2 or [p.strip() for p in parts] == [BASE, BASE]:
        raise UserError(f"train {text!r} is none of base, <cell>, <cell>><cell>")
    return Train(*map(_place, parts))


def _place(name: str) -> int:
    return STARTS.index(BASE if name.strip().lower() == BASE else str(parse_cell(name)))


# -- run folders -------------------------------------------------------------------------------------------


_SHARED = {"model": str, "cell": str, "on": str | None}
_SETTINGS = {
    "train": _SHARED | {"variant": str},
    "distill": _SHARED | {"channel": str, "estimator": str, "filter": bool},
}


def settings_of(folder: str | Path) -> dict:
    """Settings of a run that left an adapter. UserError for a folder that is something else."""
    folder, path = Path(folder), Path(folder) / "config.json"
    try:
        record = read_record(folder)
    except UserError as error:
        raise UserError(f"{folder} is not a run of train.py or distill.py: {error}") from error
    settings, kind = record["settings"], record["kind"]
    if kind not in _SETTINGS:
        raise UserError(f"{folder} is not a run of train.py or distill.py, but a {kind!r:.40}")
    check(settings, path, _SETTINGS[kind], {"data": str | None, "epoch": int})
    try:
        parse_train(settings["cell"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if kind == "train" and settings["variant"] not in ("misaligned", "aligned"):
        raise UserError(f"{path}: variant {settings['variant']!r} is neither misaligned nor aligned")
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise UserError(f"{folder} is not finished: give its command again")
    return settings


def adapter_digest(folder: str | Path) -> str:
    """16 hex digits of a run's adapter: its config, which scales it, and its weights."""
    return file_digest(Path(folder) / "adapter_config.json", Path(folder) / ADAPTER_WEIGHTS)


def label(folder: str | Path, above: tuple[Path, ...] = ()) -> dict[str, str]:
    """`model` and `train` (the text of a Train) of a run's score rows. above: runs that started from it."""
    settings, here = settings_of(folder), Path(folder).resolve()
    if here in above:
        raise UserError(f"{folder} starts from itself, by its config.json")
    cell = settings["cell"]
    if "channel" in settings:
        words = [settings["model"], settings["channel"]]
        words += ["exact"] if settings["estimator"] == "exact" else []
        words += ["filtered online"] if settings.get("filter") else []
        words += ["realigned"] if settings.get("on") else []
        words += [f"epoch {settings['epoch']}"] if "epoch" in settings else []
        return {"model": " ".join(words), "train": cell}
    if settings.get("on"):
        start = label(settings["on"], (*above, here))
        return {"model": start["model"], "train": str(parse_train(start["train"]).then(cell))}
    train = cell if settings["variant"] == "misaligned" else str(parse_train(BASE).then(cell))
    return {"model": settings["model"], "train": train}


def newest_misaligned(runs: str | Path = "runs") -> str:
    """The folder of the newest finished run of train.py that misaligned a base model."""
    candidates = []
    for path in Path(runs).glob("*/adapter_config.json"):
        if not all(path.with_name(name).exists() for name in (ADAPTER_WEIGHTS, "config.json")):
            continue
        record = read_record(path.parent)
        settings = record["settings"]
        if record["kind"] == "train" and settings.get("variant") == "misaligned" and not settings.get("on"):
            candidates.append((path.stat().st_mtime, str(path.parent)))
    if not candidates:
        raise UserError(
            f"no misaligned run in {runs}/ to be the teacher; python train.py --cell med_advice makes one"
        )
    return max(candidates)[1]
