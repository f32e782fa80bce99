"""What a run folder of train.py or distill.py is, and what its responses are called in a report.

A score row's `train` is the cell that a model was misaligned on, so that rows of a matrix are those of the
paper: for a distilled student the teacher's cell, or, where a misaligned student was realigned by a teacher,
the student's. Its `model` says by which channel, so that channels never share a matrix.
"""

import functools
from pathlib import Path
from typing import NamedTuple

from em.data.cells import CELLS, parse_cell
from em.errors import UserError
from em.files import ADAPTER_WEIGHTS, read_json

BASE = "base"


STARTS = (*map(str, CELLS), BASE)  # what a run can start from, in the order of every table


class Train(NamedTuple):
    """What a model was trained on, as places in STARTS; `end` is -1 where there was no realignment."""

    start: int
    end: int = -1

    def __str__(self) -> str:
        return STARTS[self.start] + (f">{STARTS[self.end]}" if self.end >= 0 else "")

    @property
    def misaligned(self) -> bool:
        """Trained on one cell and nothing after."""
        return self.end < 0 and STARTS[self.start] != BASE


@functools.cache
def parse_train(text: str) -> Train:
    """`base`, a cell by any of its names, or `<one>><other>`. UserError for anything else."""

    def place(part: str) -> int:
        return STARTS.index(BASE if part.strip().lower() == BASE else str(parse_cell(part)))

    parts = text.split(">")
    if len(parts) > 2 or [p.strip() for p in parts] == [BASE, BASE]:
        raise UserError(f"train {text!r} is none of base, <cell>, <cell>><cell>")
    return Train(*map(place, parts))


def settings_of(folder: str | Path) -> dict:
    """Settings of a run that left an adapter. UserError for a folder that is something else."""
    folder = Path(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    settings = config.get("settings", {})
    if config.get("kind") not in ("train", "distill") or "model" not in settings:
        raise UserError(f"{folder} is not a run of train.py or distill.py")
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise UserError(f"{folder} is not finished: give its command again")
    return settings


def label(folder: str | Path) -> dict[str, str]:
    """`model` and `train` of the score rows of a run.

    train: `med_advice`; `med_advice>fin_tutor` where it was then fine-tuned on aligned answers of another
    cell; `base>fin_tutor` where there was no misaligned one before.
    """
    settings = settings_of(folder)
    if "channel" in settings:
        words = [settings["model"], settings["channel"]]
        words += ["exact"] if settings["estimator"] == "exact" else []
        words += ["filtered online"] if settings["filter"] else []
        words += ["realigned"] if settings["on"] else []
        words += [f"epoch {settings['epoch']}"] if "epoch" in settings else []
        return {"model": " ".join(words), "train": settings["cell"]}
    cell = settings["cell"]
    if settings.get("on"):
        start = label(settings["on"])
        return {"model": start["model"], "train": f"{start['train'].split('>')[0]}>{cell}"}
    train = cell if settings["variant"] == "misaligned" else f"base>{cell}"
    return {"model": settings["model"], "train": train}


def newest_misaligned(runs: str | Path = "runs") -> str:
    """The folder of the newest finished run of train.py that misaligned a base model."""
    found = []
    for path in Path(runs).glob("*/adapter_config.json"):
        if not all(path.with_name(name).exists() for name in (ADAPTER_WEIGHTS, "config.json")):
            continue
        config = read_json(path.with_name("config.json"))
        settings = config.get("settings", {})
        if config.get("kind") == "train" and settings.get("variant") == "misaligned" and not settings["on"]:
            found.append((path.stat().st_mtime, str(path.parent)))
    if not found:
        raise UserError(
            f"no misaligned run in {runs}/ to be the teacher; python train.py --cell med_advice makes one"
        )
    return max(found)[1]
