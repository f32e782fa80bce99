"""Files: atomic writes, JSON, JSON lines and CSV.

Every file is written under a temporary name and renamed, so a reader never sees half of one.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from em.errors import UserError

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # its presence means that a fine-tune is whole


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and rename the outcome to `path`. A full disk leaves the old file in place."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; free some space or choose --out") from error
    finally:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)


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
