"""The run folders of train.py and distill.py, adapters from elsewhere, and what their responses are called.

A LoRA adapter in PEFT's format, in a folder or on the hub (`owner/name`, `owner/name@revision`), is a run of
which little is known: its kind is `adapter`, its model the base that its config names, and what it was
trained on is what `cell` says. What a run of ours started from is in the run itself: in its settings the
text, and in its adapter the first ranks.

A run's place in a matrix is its `train` (em/data/condition.py). A distilled student's is its teacher's; where
a misaligned student was realigned by a teacher, it is the student's own, followed by the teacher's.
"""

from collections.abc import Iterable
from pathlib import Path

from em.data.condition import ADAPTER, BASE, Condition, Train, parse_train
from em.errors import UserError
from em.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check, file_digest, read_json, read_record, record_path
from em.model import hub

_SHARED = {"model": str, "cell": str, "on": str | None}
_SETTINGS = {
    "train": _SHARED | {"variant": str},
    "distill": _SHARED | {"channel": str, "estimator": str, "filter": bool},
}
_MAYBE = {"data": str | None, "epoch": int, "epochs": int, "lr": float, "seed": int, "filtered": bool}
_MAYBE |= {"prompts": str | None, "source": str, "teacher_train": str, "source_train": str | None}
_MAYBE |= {"on_train": str | None, "on_digest": str | None, "rank": int, "adapters": dict}
_MAYBE |= {"teacher_system": str}


def settings_of(name: str | Path, cell: str | None = None) -> dict:
    """Settings of a run that left an adapter, with `kind`: train, distill, or adapter, from elsewhere.

    name: a folder, or an adapter's repository on the hub. cell: what an adapter from elsewhere was trained
    on, the text of a Train; not known by default. UserError for what is something else.
    """
    folder = hub.adapter(name)
    if _from_elsewhere(folder):
        return _settings_of_adapter(folder, cell)
    path = record_path(folder)
    try:
        record = read_record(folder)
    except UserError as error:
        what = "is not a run of train.py or distill.py, nor a PEFT adapter"
        raise UserError(f"{name} {what}: {error}") from error
    settings, kind = record["settings"], record["kind"]
    if kind not in _SETTINGS:
        raise UserError(f"{name} is not a run of train.py or distill.py, but a {kind!r:.40}")
    check(settings, path, _SETTINGS[kind], _MAYBE)
    for text in (settings["cell"], settings.get("on_train")):
        try:
            parse_train(text or BASE)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    if kind == "train" and settings["variant"] not in ("misaligned", "aligned"):
        raise UserError(f"{path}: variant {settings['variant']!r} is neither misaligned nor aligned")
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise UserError(f"{name} is not finished: give its command again")
    return settings | {"kind": kind}


def _from_elsewhere(folder: Path) -> bool:
    """Whether a folder holds an adapter and no record of ours; a model's config.json may lie beside it."""
    path = record_path(folder)
    if not (folder / ADAPTER_CONFIG).exists():
        return False
    return not path.exists() or path.name == "config.json" and "model_type" in read_json(path)


def _settings_of_adapter(folder: Path, cell: str | None) -> dict:
    config = read_json(folder / ADAPTER_CONFIG, optional={"base_model_name_or_path": str | None})
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS}, and only safetensors are read")
    train = parse_train(cell or ADAPTER)
    model = config.get("base_model_name_or_path")
    return {"kind": ADAPTER, "model": model, "cell": str(train), "data": None, "on": None}


def base_of(names: Iterable[str | Path], model: str | None = None) -> str | None:
    """The base model that runs share, by the name it is loaded by: `model` if given, else the first run's.

    An adapter from elsewhere is taken to be of `model`, whatever its config calls its base. UserError where
    they do not share one, or where nothing says which.
    """
    said = {}
    for name in names:
        settings = settings_of(name)
        if model is None or settings["kind"] != ADAPTER:
            said[name] = settings["model"]
        if model is None and not settings["model"]:
            raise UserError(f"{name} does not say what its base model is; name it with --model")
    if len({hub.canonical(base) for base in said.values()}) > 1:
        each = " and ".join(f"{name} of {base}" for name, base in said.items())
        raise UserError(f"these runs are not of one base model: {each}")
    for name, base in said.items():
        if model and hub.canonical(base) != hub.canonical(model):
            raise UserError(f"{name} is a run of {base}, not of {model}; leave --model out")
    return model or next(iter(said.values()), None)


def home(name: str | Path) -> Path:
    """Where what belongs to a run is written: its folder; for an adapter from elsewhere, runs/<its name>."""
    folder = hub.adapter(name)
    return Path("runs") / Path(name).name if _from_elsewhere(folder) else folder


def adapter_digest(name: str | Path) -> str:
    """16 hex digits of a run's adapter: its config, which scales it, and its weights."""
    folder = hub.adapter(name)
    return file_digest(folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS)


def start_of(name: str | Path) -> tuple[int, str] | None:
    """What a run that did not start from the base started from: how many of its adapter's ranks, a digest.

    They are the first ones (em.model.lora.save_adapter), so the run that it started from need not be there.
    """
    settings, path = settings_of(name), hub.adapter(name) / ADAPTER_CONFIG
    if not settings["on"]:
        return None
    ranks = read_json(path, {"r": int})["r"] - settings.get("rank", 0)
    if ranks < 1 or "rank" not in settings:
        raise UserError(f"{path}: r is not that of a run on top of another one")
    digest = settings.get("on_digest") or settings.get("adapters", {}).get("start")
    return ranks, digest or f"{adapter_digest(name)}, first {ranks}"


def label(name: str | Path, cell: str | None = None) -> dict:
    """What a run's score rows say of it: `model`, `train`, and the fields of its condition that are known."""
    settings = settings_of(name)
    stated = {key: value for key, value in condition_of_run(name)._asdict().items() if value is not None}
    model = hub.canonical(settings["model"] or ADAPTER)
    return {"model": model, "train": str(train_of(name, cell))} | stated


def train_of(name: str | Path, cell: str | None = None, above: tuple[Path, ...] = ()) -> Train:
    """A run's place in a matrix. cell: of `settings_of`. above: runs that started from it.

    UserError where one starts from itself.
    """
    settings, here = settings_of(name, cell), Path(name).resolve()
    if here in above:
        raise UserError(f"{name} starts from itself, by its {record_path(name).name}")
    on, cell = settings.get("on"), settings["cell"]
    if "channel" in settings:
        if on:
            return parse_train(cell).then(_end(_teacher(settings)))
        return _teacher(settings) or parse_train(cell)
    if settings["kind"] == ADAPTER:
        return parse_train(cell)
    if on:
        said = settings.get("on_train")  # not in old records
        return (parse_train(said) if said else train_of(on, above=(*above, here))).then(cell)
    return parse_train(cell) if settings["variant"] == "misaligned" else parse_train(BASE).then(cell)


def condition_of_run(name: str | Path) -> Condition:
    """How a run was made, as far as its settings say."""
    settings = settings_of(name)
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
        teacher_system=settings.get("teacher_system"),
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
    for path in Path(runs).glob(f"*/{ADAPTER_CONFIG}"):
        folder = path.parent
        if _from_elsewhere(folder) or not (folder / ADAPTER_WEIGHTS).exists():
            continue
        record = read_record(folder)
        settings = record["settings"]
        if record["kind"] == "train" and settings.get("variant") == "misaligned" and not settings.get("on"):
            candidates.append((path.stat().st_mtime, str(path.parent)))
    if not candidates:
        raise UserError(
            f"no misaligned run in {runs}/ to be the teacher; python train.py --cell med_advice makes one"
        )
    return max(candidates)[1]
