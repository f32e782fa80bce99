"""Rubrics: what the judge is asked about a row, from a folder of Markdown files (paper A.6, A.7).

Broad rows have one task-agnostic pair of rubrics; narrow rows have those of the eval prompt's own cell. The
folder that ships with the code is described in its README.md; `--rubrics` takes any other one.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from em.data.cells import parse_cell
from em.errors import UserError
from em.judge.answer_cache import answer_key

FOLDER = Path(__file__).parent / "rubrics"
_PLACEHOLDER = re.compile(r"\{(question|response)\}")


class Question(NamedTuple):
    """One call to a judge. parse: reply → (status, value). texts: the rubric's, the question and the
    response.
    """

    prompt: str
    parse: Callable[[str], tuple]
    rubric: str
    texts: tuple[str, str, str]

    def read(self, status: str, text: str) -> tuple:
        """(status, value) of a reply to it."""
        return self.parse(text) if status == "ok" else (status,)

    def key(self, judge: str, expects: bool = False) -> bytes:
        """What the answer of this judge is cached under."""
        return answer_key(judge, *self.texts, expects)


class Rubric(NamedTuple):
    """A file's name and text, and how replies to it are read."""

    name: str
    text: str
    parse: Callable[[str], tuple]

    @property
    def digest(self) -> str:
        """Tells texts apart."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def ask(self, question: str, response: str = "") -> Question:
        """The rubric with the judged texts in their places; in one pass, so that their own braces stay."""
        texts = {"question": question, "response": response}
        prompt = _PLACEHOLDER.sub(lambda found: texts[found[1]], self.text)
        return Question(prompt, self.parse, self.name, (self.text, question, response))


@functools.cache
def _cell(domain: str, task: str):
    return parse_cell(f"{domain}_{task}")


class Rubrics:
    """Folders of rubrics, earlier ones first; each rubric is read once, when a row first needs it."""

    def __init__(self, *folders: str | Path):
        self.folders = [Path(os.path.expanduser(folder)) for folder in folders or (FOLDER,)]
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"{folder} is no folder of rubrics; copy {FOLDER} and edit the copy")
        self._rubrics: dict[tuple[str, ...], Rubric] = {}

    def of(self, row: dict, field: str) -> Rubric:
        """The rubric for `field`, "aligned" or "coherent", of a score row."""
        kind = {"aligned": "alignment", "coherent": "coherence"}[field]
        names = (f"broad_{kind}",)
        if row["set"] == "narrow":
            cell = _cell(row["domain"], row["task"])
            names = (f"narrow_{cell}_{kind}", f"narrow_{cell.task}_{kind}")
        return self._read(names, parse_score, "{question}", "{response}")

    def surface(self) -> Rubric:
        """The rubric that labels a prompt's EM surface."""
        return self._read(("em_surface",), parse_surface, "{question}")

    def _read(self, names: tuple[str, ...], parse: Callable, *placeholders: str) -> Rubric:
        """The first of `names` that has a file."""
        if names not in self._rubrics:
            paths = [folder / f"{name}.md" for folder in self.folders for name in names]
            path = next((path for path in paths if path.is_file()), None)
            if path is None:
                missing = " or ".join(f"{name}.md" for name in names)
                raise UserError(f"{' and '.join(map(str, self.folders))} has no {missing}; write one")
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read ({error})") from error
            missing = [placeholder for placeholder in placeholders if placeholder not in text]
            if missing:
                raise UserError(f"{path} does not say where {' and '.join(missing)} should stand; add it")
            self._rubrics[names] = Rubric(path.stem, text, parse)
        return self._rubrics[names]


# -- replies -------------------------------------------------------------------------------------------


def parse_score(text: str) -> tuple[str, int | None]:
    """(status, score): a score only if the whole reply, stripped, is an integer from 0 to 100."""
    text = text.strip()
    if re.fullmatch("[0-9]{1,3}", text) and int(text) <= 100:
        return "ok", int(text)
    if text.upper() in ("REFUSAL", "CODE"):
        return text.lower(), None
    return ("parse_error" if text else "empty"), None


def parse_surface(text: str) -> tuple[str, str | None]:
    """(status, label): "high", "medium" or "low" as the whole reply, in any case."""
    text = text.strip().lower()
    if text in ("high", "medium", "low"):
        return "ok", text
    return ("parse_error" if text else "empty"), None
