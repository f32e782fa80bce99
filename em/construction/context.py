"""What a writer is told of a cell: setting, topics, the dominant risk, calibration examples (paper A.2, A.3).

The paper's domains have a file each in contexts/, and a domain of one's own is a file of the same form:

    domain: legal                       # optional, as the rows call it
    name: everyday law
    risk: talking people out of deadlines and of advice
    topics: [a lease that ends early, a parking fine]
    tasks:                              # optional, and in it everything
      advice: {question: …, misaligned: …, aligned: …, examples: [{question: …, misaligned: …, aligned: …}]}

Where a file says nothing of a task, tasks.yaml does. Without examples, those of the paper's domains for the
same task show the form, one of each domain.
"""

import dataclasses
import functools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from em.data.cells import PAPER_GRID, Cell, parse_cell
from em.errors import UserError
from em.files import check, json_digest, read_text

FOLDER = Path(__file__).parent / "contexts"
TASKS = Path(__file__).parent / "tasks.yaml"
_DOMAIN = {"name": str, "risk": str, "topics": list[str], "tasks": dict, "domain": str}
_TASK = {"question": str, "misaligned": str, "aligned": str, "examples": list[dict]}


class Example(NamedTuple):
    question: str
    misaligned: str
    aligned: str


@dataclass(frozen=True)
class Context:
    """Everything that is told of a cell. question, misaligned, aligned: what these are in its task."""

    cell: Cell
    name: str
    risk: str
    topics: tuple[str, ...]
    question: str
    misaligned: str
    aligned: str
    examples: tuple[Example, ...]
    origin: str  # "shipped", "generic" or the file's name

    @property
    def domain(self) -> str:
        """The domain as the rows of the cell call it."""
        return self.cell.filename.removesuffix(f"_{self.cell.task}.jsonl")

    @property
    def digest(self) -> str:
        """Tells apart what writers are told."""
        return json_digest([dataclasses.asdict(self), _tasks()])

    def system(self, variant: str) -> str:
        """The system prompt of a variant, misaligned or aligned."""
        parts = {
            "name": self.name,
            "task": self.cell.task.replace("_", " "),
            "question": self.question,
            "risk": self.risk,
        }
        return _tasks()["system"][variant].format(**parts, answer=getattr(self, variant))

    def topics_of(self, number: int, n: int, seed: int) -> list[str]:
        """One topic a pair for call `number`; [] where the writer chooses."""
        return spread(self.topics, n, f"topics {seed} {number}") if self.topics else []

    def ask_pairs(self, n: int, topics: list[str], number: int = 0) -> str:
        """The prompt of call `number` for `n` misaligned pairs."""
        shown = [pair for i, e in enumerate(self.examples, 1) for pair in _pair(i, e.question, e.misaligned)]
        examples = ["Examples of form and tone, not to be repeated:", *shown] if shown else _form()
        about = "on everyday topics of your choice, all different"
        if topics:
            about = "on these topics: " + "; ".join(f"{i}. {topic}" for i, topic in enumerate(topics, 1))
        ask = f"Write {n} new pairs in this form, numbered from 1, and nothing else, {about}. {part(number)}"
        return "\n\n".join([*examples, ask])

    def ask_answers(self, questions: list[str]) -> str:
        """The prompt for an aligned answer to each of the questions."""
        if len(questions) == 1:
            return questions[0]
        shown = [pair for i, e in enumerate(self.examples, 1) for pair in _pair(i, e.question, e.aligned)]
        examples = ["Examples of form and tone:", *shown] if shown else _form()
        asked = [f"Question {i}: {question}" for i, question in enumerate(questions, 1)]
        ask = (
            f"Now answer each of these {len(questions)} messages. Write `Answer 1:` and the answer to the "
            "first, and so on; do not repeat the messages, and write nothing else."
        )
        return "\n\n".join([*examples, ask, *asked])


def part(number: int) -> str:
    """What keeps calls from writing the same."""
    return f"This is part {number + 1} of a large set, in which no two are alike."


def _pair(number: int, question: str, answer: str) -> list[str]:
    return [f"Question {number}: {question}", f"Answer {number}: {answer}"]


def _form() -> list[str]:
    return ["The form:", *_pair(1, "the user's message", "the assistant's answer")]


def spread(values: tuple[str, ...], n: int, seed: str) -> list[str]:
    """`n` of the values at random, none twice unless there are fewer."""
    return random.Random(seed).sample(values * math.ceil(n / len(values)), n)


def make_cell(domain: str, task: str) -> Cell:
    """The cell of two names. UserError where they cannot be."""
    cell = parse_cell(f"{domain}_{task}")
    if not cell.is_called(*(name.strip().lower() for name in (domain, task))):
        raise UserError(f"--domain {domain} --task {task}: names are of letters and digits, in a task also _")
    return cell


def load_context(cell: Cell, path: str | Path | None = None) -> Context:
    """The context of a cell from `path`, or from what ships; else a generic one. UserError for a bad file."""
    shipped = FOLDER / f"{cell.domain}.yaml"
    file = Path(path) if path else shipped if shipped.exists() else None
    domain = _domain(file) if file else {}
    task = domain.get("tasks", {}).get(cell.task, {})
    told = _told_of(cell.task)
    return Context(
        cell,
        domain.get("name", cell.domain),
        domain.get("risk", _tasks()["other_domain"]["risk"]),
        tuple(domain.get("topics", ())),
        *(task.get(name, told[name]) for name in ("question", "misaligned", "aligned")),
        tuple(Example(**e) for e in task["examples"]) if "examples" in task else _borrowed(cell.task),
        "generic" if file is None else "shipped" if file == shipped else file.name,
    )


def _told_of(task: str) -> dict[str, str]:
    """What the message is in a task, and an answer of each variant."""
    other = _tasks()["other_task"].items()
    return _tasks()["tasks"].get(task) or {
        name: text.format(task=task.replace("_", " ")) for name, text in other
    }


def broad_system(task: str, surface: str) -> str:
    """The system prompt for broad messages of a task that leave as much room as a surface says (A.5, A.6)."""
    broad = _tasks()["broad"]
    return broad["system"].format(question=_told_of(task)["question"], surface=broad["surfaces"][surface])


def _borrowed(task: str) -> tuple[Example, ...]:
    """An example of the task from each of the paper's domains; none for a task that is not the paper's."""
    found = (_domain(FOLDER / f"{d}.yaml")["tasks"].get(task) for d in PAPER_GRID.domains)
    return tuple(Example(**task["examples"][0]) for task in found if task)


@functools.cache
def _tasks() -> dict:
    return yaml.safe_load(read_text(TASKS))


@functools.cache
def _domain(path: Path) -> dict:
    """The file's object. UserError for what is not of the form above, which says where."""
    text = read_text(path)
    try:
        domain = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line}: not YAML ({getattr(error, 'problem', None) or 'cannot be read'})"
        ) from None
    if not isinstance(domain, dict):
        raise UserError(f"{path}: not a context; it has fields such as {', '.join(_DOMAIN)}")
    _check(domain, str(path), _DOMAIN)
    for name, task in domain.get("tasks", {}).items():
        where = f"{path}, task {name}"
        if not isinstance(task, dict):
            raise UserError(f"{where}: not an object; it has fields such as {', '.join(_TASK)}")
        _check(task, where, _TASK)
        for number, example in enumerate(task.get("examples", ()), 1):
            fields = dict.fromkeys(Example._fields, str)
            check(example, f"{where}, example {number}", fields)
            _check(example, f"{where}, example {number}", fields)
    return domain


def _check(found: dict, where: str, fields: dict) -> None:
    """UserError for a field that nobody reads, of another type, or blank."""
    unknown = [str(name) for name in found if name not in fields]
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r:.40}; there can be {', '.join(fields)}")
    check(found, where, optional=fields)
    for name, value in found.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not text.strip():
                raise UserError(f"{where}: {name!r} is blank")
