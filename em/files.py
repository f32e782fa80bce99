"""Files: atomic writes, lines that are appended, JSON, JSON lines, CSV, and digests of what is in them.

A file is written under a temporary name and renamed, so a reader never sees half of one; what grows line by
line grows by whole lines.
"""

import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from em.errors import UserError

RECORD = "run.json"  # of a run folder; before, config.json, which transformers takes for a model's
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # its presence means that a fine-tune is whole


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and rename the outcome to `path`. A full disk leaves the old file in place.

    The temporary file has the name of `path`, in a folder of its own beside it, so that whatever a library
    leaves there goes with it. What a killed process left of an earlier try is removed.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stray in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if not _is_written(stray):
                shutil.rmtree(stray, ignore_errors=True)
        scratch.mkdir()
        write(scratch / path.name)
        os.replace(scratch / path.name, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_written(scratch: Path) -> bool:
    """Whether the process that made a temporary folder may still be writing in it."""
    pid = scratch.name.split(".")[-2]
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False  # our own is of a process before us that had our number
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's, but alive
    return True


def _unwritable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot write {path}: {reason}; free some space or choose --out")


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict]) -> None:
    """One line a row under the union of their keys; what a row lacks, or holds as None, is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


class Appender:
    """Whole JSON lines at the end of a file, each handed to the system before `add` returns.

    A line that a kill cut short is ended first, so that ours begin on a line of their own. UserError where
    the file cannot be written, such as on a full disk.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab+", buffering=0)
            size = self._file.seek(0, os.SEEK_END)
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self._write(b"\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def add(self, rows: Iterable[dict]) -> None:
        """Append one line a row, all in one write."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            self._write(lines.encode("utf-8", "replace"))  # half a surrogate pair has no bytes
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _write(self, data: bytes) -> None:
        while data:  # a disk that fills up takes a part, and says why it takes no more
            data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def file_digest(*paths: str | Path) -> str:
    """16 hex digits of the bytes of files. UserError where one cannot be read."""
    whole = hashlib.sha256()
    for path in paths:
        one = hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while part := file.read(1 << 20):
                    one.update(part)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
        whole.update(one.digest())
    return whole.hexdigest()[:16]


def json_digest(value) -> str:
    """16 hex digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def unique_name(text: str, used: set[str]) -> str:
    """`text` as the name of a folder that is none of `used`, which it joins.

    Names that differ in case alone are one on some disks. A long one ends with a digest of the whole; where
    no letter is left, it is "model".
    """
    name = re.sub(r"[^\w.-]+", "_", text).lstrip(".") or "model"
    if len(name.encode()) > 100:  # bytes; a name may have 255, and temporary files have longer ones
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{name.encode()[:90].decode(errors='ignore')}-{digest}"
    stem, number = name, 1
    while name.lower() in used:
        number += 1
        name = f"{stem}-{number}"
    used.add(name.lower())
    return name


def record_path(folder: str | Path) -> Path:
    """Where a run folder's record is, or belongs: run.json, in an old folder config.json."""
    path, old = Path(folder) / RECORD, Path(folder) / "config.json"
    return old if old.exists() and not path.exists() else path


def read_record(folder: str | Path) -> dict:
    """The record of a run folder: its `kind`, a text, and `settings`, an object. UserError for less."""
    return read_json(record_path(folder), {"kind": str, "settings": dict})


# -- reading -----------------------------------------------------------------------------------------------

Fields = dict[str, object]  # name → type, such as `str`, `int | None`, `list[str]`; float takes integers too
_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false", dict: "an object"}
_NAMES |= {list: "a list", types.NoneType: "null"}


def read_json(path: Path, fields: Fields | None = None, optional: Fields | None = None, kind=dict):
    """The object in a JSON file; kind=list: a list of objects. `parse` and `check` say what is refused."""
    value = parse(read_text(path), path)
    if type(value) is not kind or (kind is list and not all(type(row) is dict for row in value)):
        raise UserError(f"{path}: not a JSON {'object' if kind is dict else 'list of objects'}")
    for row in value if kind is list else [value]:
        check(row, path, fields, optional)
    return value


def read_json_lines(
    path: str | Path, fields: Fields | None = None, *, drop_cut: bool = False
) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank, with `fields`.

    Only a line feed ends a line: texts hold U+2028 and other characters that `str.splitlines` splits at.
    drop_cut: a last line without its line feed was cut by a kill and is left out; else it counts like any
    other. UserError with file and line for what is no JSON object in UTF-8, or lacks a field.
    """
    for number, line in enumerate(read_text(path, drop_cut=drop_cut).split("\n"), 1):
        if line and not line.isspace():
            value = parse(line, path, number)
            if type(value) is not dict:
                raise UserError(f"{path}, line {number}: not a JSON object")
            if fields:
                check(value, f"{path}, line {number}", fields)
            yield number, value


def read_yaml(path: str | Path):
    """The value of a YAML file. UserError for a file that is none."""
    import yaml  # which few commands read

    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML ({' '.join(str(error).split())[:120]})") from error


def read_text(path: str | Path, *, drop_cut: bool = False) -> str:
    """The text of a UTF-8 file, as it is or gzipped, without a byte-order mark. UserError for other files.

    path: may be a zipfile.Path. drop_cut: what follows the last line feed is left out.
    """
    try:
        data = (Path(path) if isinstance(path, str) else path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        if drop_cut:
            data = data[: data.rfind(b"\n") + 1]  # before it is decoded: a kill may cut a letter
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); write it again") from error
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is no finite number")
    return value


_decode = json.JSONDecoder(parse_float=_finite, parse_constant=_finite).decode


def parse(text: str, path: str | Path, line: int | None = None):
    """The value of a JSON text from `path`. UserError, with the line, for what is no JSON.

    Refused besides: NaN and infinite numbers, integers over 4,300 digits, nesting about 1,000 deep, and half
    of a surrogate pair, which is in no text that can be written or sent. A key twice: the last one counts,
    as everywhere.
    """
    try:
        value = _decode(text)
        if "\\" in text and ("\\ud" in text or "\\uD" in text):  # a pair, or half of one
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        reason = "half of a surrogate pair"
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:
        reason = str(error).split(";")[0]  # after it, Python speaks of its own settings
    raise UserError(f"{path}{f', line {line}' if line else ''}: not JSON ({reason})")


def check(row: dict, where: str | Path, fields: Fields | None = None, optional: Fields | None = None) -> None:
    """UserError where one of `fields` is absent or of another type, or one of `optional` of another type.

    where: the place in messages. true and false are no integers, and an integer has at most 63 bits.
    """
    for name in fields or ():
        if name not in row:
            raise UserError(f"{where}: no field {name!r}; there should be {', '.join(fields)}")
    for name, kind in ((fields or {}) | (optional or {})).items():
        if name in row and not _is(row[name], kind):
            raise UserError(f"{where}: {name!r} cannot be {row[name]!r:.40}; it is {_name(kind)}")


def _is(value, kind) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in kind.__args__)
    if isinstance(kind, types.GenericAlias):  # list[…]
        return type(value) is list and all(_is(one, kind.__args__[0]) for one in value)
    if type(value) is int and kind in (int, float):
        return -(2**63) <= value < 2**63
    return type(value) is kind


def _name(kind) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_name, kind.__args__))
    if isinstance(kind, types.GenericAlias):
        return f"a list of {_name(kind.__args__[0]).split(' ', 1)[1]}s"
    return _NAMES[kind]
