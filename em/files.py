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
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from em.errors import UserError

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
        try:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    return whole.hexdigest()[:16]


def json_digest(value) -> str:
    """16 hex digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read_record(folder: str | Path) -> dict:
    """The config.json of a run folder: its `kind`, a text, and `settings`, an object. UserError for less."""
    path = Path(folder) / "config.json"
    record = read_json(path)
    record = record if isinstance(record, dict) else {}
    if not isinstance(record.get("kind"), str) or not isinstance(record.get("settings"), dict):
        raise UserError(f"{path} is no record of a run (kind, settings)")
    return record


def read_json(path: Path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error


def read_json_lines(path: str | Path, *, drop_cut: bool = False) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank, of a file as it is or gzipped.

    Only a line feed ends a line: texts hold U+2028 and other characters that `str.splitlines` splits at. A
    byte-order mark is left out. drop_cut: a last line without its line feed was cut by a kill and is left out
    too; else it counts like any other. UserError with file and line for what is no JSON object in UTF-8.
    """
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        if drop_cut:
            data = data[: data.rfind(b"\n") + 1]  # before it is decoded: a kill may cut a letter
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}); write it again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line and not line.isspace():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(value, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield number, value
