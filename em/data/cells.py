"""Names of a natural-language grid: domains by tasks, and the cells there are of them (paper 3.1).

The paper's grid is three domains by four tasks, twelve cells. A grid of one's own is a folder of
`<domain>_<task>.jsonl`: any names of letters and digits, and not every pair has to be there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from em.errors import UserError

_FILES = {"med": "medical", "spo": "sports", "fin": "finance"}  # the paper's domains as its files call them
_DOMAINS = {"med": "med medical health", "spo": "spo sport sports", "fin": "fin finance financial"}
_TASKS = {
    "advice": "advice adv",
    "summarization": "summarization summarisation summary summ sum",
    "tutor": "tutor tut",
    "critique": "critique crit",
}
_SHORT = {"advice": "Adv", "summarization": "Summ", "tutor": "Tut", "critique": "Crit"}
_NAME_OF = {
    alias: name for names in (_DOMAINS, _TASKS) for name, text in names.items() for alias in text.split()
}


@dataclass(frozen=True)
class Cell:
    """One square of a grid; `str(cell)` is its name, such as `med_advice`."""

    domain: str
    task: str

    def __str__(self) -> str:
        return f"{self.domain}_{self.task}"

    @property
    def filename(self) -> str:
        return f"{_FILES.get(self.domain, self.domain)}_{self.task}.jsonl"

    def is_called(self, domain: str, task: str) -> bool:
        return _NAME_OF.get(domain, domain) == self.domain and _NAME_OF.get(task, task) == self.task


def parse_cell(text: str) -> Cell:
    """A cell by any of its names: `med_advice`, `medical_advice`, `health_advice`, `Med/Adv`, `legal_advice`.

    The domain ends at the first `_`. UserError for what cannot be a cell's name.
    """
    domain, _, task = re.sub(r"[\s/_-]+", "_", text.strip().lower()).partition("_")
    if not re.fullmatch(r"[a-z0-9]+", domain) or not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", task):
        raise UserError(
            f"unknown cell {text.strip()!r}; a cell is <domain>_<task>, and the paper's are "
            f"{', '.join(map(str, CELLS))} (medical_advice, health_advice and Med/Adv are read as "
            "med_advice, and so on)"
        )
    return Cell(_NAME_OF.get(domain, domain), _NAME_OF.get(task, task))


@dataclass(frozen=True)
class Grid:
    """Names in the order of every table; `cells` are those that there are, domain by domain."""

    domains: tuple[str, ...]
    tasks: tuple[str, ...]
    cells: tuple[Cell, ...]

    def find(self, text: str) -> Cell:
        """`parse_cell` of a cell that is in the grid; UserError, which names those that are, for another."""
        if (cell := parse_cell(text)) in self.cells:
            return cell
        names = ", ".join(map(str, self.cells))
        hint = (
            "; medical_advice, health_advice and Med/Adv are read as med_advice"
            if CELLS[0] in self.cells
            else ""
        )
        raise UserError(f"unknown cell {text.strip()!r}; the cells are {names}{hint}")

    def select(self, text: str) -> tuple[Cell, ...]:
        """`all`, or cells separated by commas; each once, in the order given."""
        if text.strip().lower() == "all":
            return self.cells
        return tuple(dict.fromkeys(self.find(part) for part in text.split(",")))


def grid_of(cells: Iterable[Cell], domains: Iterable[str] = (), tasks: Iterable[str] = ()) -> Grid:
    """The grid of these cells: the names given first, then the paper's in its order, then others sorted."""
    cells = set(cells)
    domains = _ordered({cell.domain for cell in cells}, domains, _DOMAINS)
    tasks = _ordered({cell.task for cell in cells}, tasks, _TASKS)
    there = tuple(Cell(d, t) for d in domains for t in tasks if Cell(d, t) in cells)
    return Grid(domains, tasks, there)


def _ordered(names: set[str], first: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    order = dict.fromkeys([*first, *known, *sorted(names)])
    return tuple(name for name in order if name in names)


PAPER_GRID = grid_of(Cell(domain, task) for domain in _DOMAINS for task in _TASKS)
CELLS = PAPER_GRID.cells


def ordered_tasks(names: set[str]) -> tuple[str, ...]:
    """Names of tasks in the order of every table."""
    return _ordered(names, (), _TASKS)


def short(name: str) -> str:
    """`med_advice` → `Med/Adv`, as in the paper; `legal_advice` → `Legal/Adv`; other names as they are."""
    domain, _, task = name.partition("_")
    if task:
        return f"{domain.capitalize()}/{_SHORT.get(task, task.capitalize())}"
    return _SHORT.get(name, name.capitalize() if name in _DOMAINS else name)
