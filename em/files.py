"""Files that are whole or absent: atomic writes, JSON and CSV.

Every file is written under a temporary name and renamed, so a reader never sees half of one.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable
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
