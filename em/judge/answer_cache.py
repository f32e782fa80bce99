"""The judge's answers on disk: one JSON line each, only ever appended.

An answer's key is the SHA-256 of (judge, rubric text, question, response), where the judge is the model that
answered, so the file can serve any number of runs, judges and rubrics, and two files are merged by `cat`.
Where a judge was asked for by another name than its own (an alias, or a model that is routed to another), the
line says by which, so that the next run finds its answers. A line is one write in append mode: a killed
process leaves at most one cut line, which is skipped, and several processes may append at once.

The first line is HEADER, which says what the file is, or in a file from before there was one an answer. Any
other file is refused and left as it is.

What the judge said is kept for good, whatever it was, so that a score stays what it was; only where it said
nothing ("error", and an empty reply that may pass) the next run asks again. To ask again for more, take
the lines out.
"""

import codecs
import hashlib
import json
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

from em.errors import UserError
from em.judge.em_rule import STATUSES

HEADER = b'{"file": "answers of a judge", "version": 1}\n'
_CUT = re.compile(rb'\{"key": "([0-9a-f]{64}"|[0-9a-f]*$)')  # how an answer begins, cut or whole


class Answer(NamedTuple):
    """A status of `em_rule.STATUSES` with its value: a score, a label, or None unless the status is
    "ok". expected: the expectation over the numbers 0–100, where it was asked for and could be had.
    """

    status: str
    value: int | str | None = None
    expected: float | None = None


def answer_key(judge: str, rubric: str, question: str, response: str, expects: bool = False) -> bytes:
    """32 bytes that stand for one question to one judge. rubric: its text, not its name. expects: whether the
    answer carries an expectation, which makes it another question.
    """
    parts = [judge, rubric, question, response] + ["expected"] * expects
    return hashlib.sha256(json.dumps(parts).encode()).digest()


class AnswerCache:
    """Answers by key. Memory holds a digest and a shared `Answer` for each, about 170 bytes."""

    def __init__(self, path: str | Path):
        """Reads what is there. UserError for a file that is something else, or cannot be read."""
        self.path = Path(path)
        self.answered_as: dict[str, str] = {}  # a name that was asked for → the judge that answered, last
        self._answers: dict[bytes, Answer] = {}
        self._distinct: dict[Answer, Answer] = {}
        self._lock = threading.Lock()
        self._file = None
        try:
            if self.path.exists() and not self.path.is_file():
                raise UserError(f"--cache {self.path} is not a file; name one")
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    self._read(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); name another --cache") from error

    def _read(self, line: bytes, number: int) -> None:
        # Not `read_json_lines`, where only the last line can be cut: a process that was killed may have cut
        # any line, and the line of another one may follow on the same.
        if _is_header(line):
            return  # in the middle too, where files were joined
        entry = _parse(line) or _parse(line[line.rfind(b'{"key": ') :])
        if entry is None and (number > 1 or _CUT.match(line)):
            return  # cut short by a kill; its answer is asked again
        try:
            key = bytes.fromhex(entry["key"])
            answer = Answer(entry["status"], entry["value"], entry.get("expected"))
            if len(key) != 32 or not self.allows(answer):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self.path}, line {number}, is no answer of a judge; name another --cache"
            ) from None
        self._remember(key, answer)
        if isinstance(asked := entry.get("asked"), str) and isinstance(entry.get("judge"), str):
            self.answered_as[asked] = entry["judge"]

    @staticmethod
    def allows(answer: Answer) -> bool:
        """Whether a judge can have said it: a score or a label where the status is "ok", else no value."""
        if not (
            answer.expected is None or (type(answer.expected) in (int, float) and 0 <= answer.expected <= 100)
        ):
            return False
        if answer.status != "ok":
            return answer.status in STATUSES and answer.value is None
        return answer.value in ("high", "medium", "low") or (
            type(answer.value) is int and 0 <= answer.value <= 100
        )

    def _remember(self, key: bytes, answer: Answer) -> None:
        self._answers[key] = self._distinct.setdefault(answer, answer)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: bytes) -> Answer | None:
        return self._answers.get(key)

    def add(self, key: bytes, answer: Answer, **notes) -> None:
        """Append an answer, with `notes` for whoever reads the file. From any thread.

        UserError where the file cannot be written.
        """
        entry = {"key": key.hex(), "status": answer.status, "value": answer.value}
        entry |= notes if answer.expected is None else {"expected": answer.expected} | notes
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self._append(self._open(), line)
            self._remember(key, answer)

    def open(self) -> None:
        """Make the file, if there is none. UserError where it cannot be written."""
        if self._file is None:
            with self._lock:
                self._open()

    def _open(self):
        if self._file is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = open(self.path, "ab+", buffering=0)  # unbuffered: a write is one system call
            except OSError as error:
                raise UserError(
                    f"cannot write {self.path}: {error.strerror}; name another --cache"
                ) from error
            size = file.seek(0, os.SEEK_END)
            if not size:
                self._append(file, HEADER)
            elif os.pread(file.fileno(), 1, size - 1) != b"\n":
                self._append(file, b"\n")  # ends a line that a kill cut short
            self._file = file
        return self._file

    def _append(self, file, data: bytes) -> None:
        try:
            written = file.write(data)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; free some space") from error
        if written < len(data):
            raise UserError(f"cannot write {self.path}: the disk is full; free some space")


def _parse(line: bytes):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_header(line: bytes) -> bool:
    """Whether it is HEADER, or the beginning of it that a full disk left."""
    return len(line) > len(b'{"file') and HEADER.startswith(line.removesuffix(b"\n"))
