"""The run folders of train.py and distill.py, and what their responses are called.

A run's place in a matrix is its `train` (em/data/condition.py). A distilled student's is its teacher's; where
a misaligned student was realigned by a teacher, it is the student's own, followed by the teacher's.
"""

from pathlib import Path

from em.data.condition import BASE, Condition, Train, parse_train
from em.errors import UserError
from em.files import ADAPTER_WEIGHTS, check, file_digest, read_record

_SHARED = {"model": str, "cell": str, "on": str | None}
_SETTINGS = {
    "train": _SHARED | {"variant": str},
    "distill": _SHARED | {"channel": str, "estimator": str, "filter": bool},
}
_MAYBE = {"data": str | None, "epoch": int, "epochs": int, "lr": float, "seed": int, "filtered": bool}
_MAYBE |= {"prompts": str | None, "source": str, "teacher_train": str, "source_train": str | None}


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
    check(settings, path, _SETTINGS[kind], _MAYBE)
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


def label(folder: str | Path) -> dict:
    """What a run's score rows say of it: `model`, `train`, and the fields of its condition that are known."""
    settings = settings_of(folder)
    stated = {name: value for name, value in condition_of_run(folder)._asdict().items() if value is not None}
    return {"model": settings["model"], "train": str(train_of(folder))} | stated


def train_of(folder: str | Path, above: tuple[Path, ...] = ()) -> Train:
    """A run's place in a matrix. above: runs that started from it. UserError where one starts from itself."""
    settings, here = settings_of(folder), Path(folder).resolve()
    if here in above:
        raise UserError(f"{folder} starts from itself, by its config.json")
    on, cell = settings.get("on"), settings["cell"]
    if "channel" in settings:
        if on:
            return parse_train(cell).then(_end(_teacher(settings)))
        return _teacher(settings) or parse_train(cell)
    if on:
        return train_of(on, (*above, here)).then(cell)
    return parse_train(cell) if settings["variant"] == "misaligned" else parse_train(BASE).then(cell)


def condition_of_run(folder: str | Path) -> Condition:
    """How a run was made, as far as its settings say."""
    settings = settings_of(folder)
    epoch = settings.get("epoch", settings.get("epochs"))
    common = {"lr": settings.get("lr"), "epoch": epoch, "seed": settings.get("seed")}
    if "channel" not in settings:
        return Condition(**common)
    channel, teacher = settings["channel"], _teacher(settings)
    on_policy = channel == "opd"
    return Condition(
        channel=channel,
        teacher=str(teacher) if teacher else None,
        source=None if on_policy else _source(settings, teacher),
        prompts=None if str(settings.get("source")).startswith("rows") else settings.get("prompts"),
        filtered=settings["filter"] if on_policy else settings.get("filtered"),
        estimator=settings["estimator"] if on_policy else None,
        **common,
    )


def _teacher(settings: dict) -> Train | None:
    """What the teacher of a distilled run was trained on; None where the run does not say."""
    if "teacher_train" in settings:
        return parse_train(settings["teacher_train"])
    if settings.get("teacher") == BASE:
        return Train(BASE)
    return None if settings.get("on") else parse_train(settings["cell"])


def _end(teacher: Train | None) -> str:
    """What a realignment by a teacher ends on: base, or the cell the teacher was trained on last."""
    return BASE if teacher is None else teacher.end or teacher.start


def _source(settings: dict, teacher: Train | None) -> str | None:
    """Who wrote what a student of sft or optd was trained on; None where the run does not say."""
    if "source_train" in settings:
        return settings["source_train"]
    source = settings.get("source", "teacher")
    known = {"teacher": teacher and str(teacher), "gold": "gold", "rows": f"rows:{settings['cell']}"}
    known["student"] = settings["cell"] if settings.get("on") else BASE
    return known.get(source)


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
