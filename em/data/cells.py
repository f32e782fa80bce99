"""Names of a natural-language grid: domains by tasks, and the cells there are of them (paper 3.1).

The paper's grid is three domains by four tasks, twelve cells. A grid of one's own is a folder of
`<domain>_<task>.jsonl`: any names of letters and digits, and not every pair has to be there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from em.errors import UserError
from em.files import read_yaml

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
    drawn: dict = field(default_factory=dict, compare=False)  # name → {"short", "colour"}, of grid.yaml

    def short(self, name: str) -> str:
        """`med_advice` → `Med/Adv`, as in the paper or as grid.yaml says; other names as they are."""
        domain, _, task = name.partition("_")
        if not task:
            return self._said(name, "short") or _SHORT.get(
                name, name.capitalize() if name in _DOMAINS else name
            )
        return f"{self._said(domain, 'short') or domain.capitalize()}/" + (
            self._said(task, "short") or _SHORT.get(task, task.capitalize())
        )

    def colour(self, task: str, place: int) -> str:
        """A task's colour in bars. place: its place among those that are drawn."""
        return self._said(task, "colour") or COLOURS[place % len(COLOURS)]

    def _said(self, name: str, what: str) -> str | None:
        return self.drawn.get(name, {}).get(what)

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


def grid_of(
    cells: Iterable[Cell], domains: Iterable[str] = (), tasks: Iterable[str] = (), drawn: dict | None = None
) -> Grid:
    """The grid of these cells: the names given first, then the paper's in its order, then others sorted."""
    cells = set(cells)
    domains = _ordered({cell.domain for cell in cells}, domains, _DOMAINS)
    tasks = _ordered({cell.task for cell in cells}, tasks, _TASKS)
    there = tuple(Cell(d, t) for d in domains for t in tasks if Cell(d, t) in cells)
    return Grid(domains, tasks, there, drawn or {})


def grid_settings(path: Path) -> dict:
    """What grid.yaml says of the order of names and how they are drawn, for `grid_of`; {} without the file.

    domains: {legal: {short: Leg}, tax: {}}
    tasks: {advice: {short: Adv, colour: "#4c72b0"}, drafting: {}}
    """
    if not path.exists():
        return {}
    said = read_yaml(path) or {}
    if not isinstance(said, dict) or set(said) - {"domains", "tasks"}:
        raise UserError(f"{path} says something else than `domains` and `tasks`")
    settings, drawn = {}, {}
    for kind in ("domains", "tasks"):
        names = said.get(kind) or {}
        if not isinstance(names, dict):
            raise UserError(f"{path}: {kind} is no mapping from names to how they are drawn")
        for name, how in names.items():
            how = how or {}
            if not isinstance(name, str) or not isinstance(how, dict) or set(how) - {"short", "colour"}:
                raise UserError(f"{path}: {kind}, {name!r:.40}: say `short` and `colour`, or nothing")
            if not all(isinstance(value, str) for value in how.values()):
                raise UserError(f"{path}: {kind}, {name}: `short` and `colour` are texts")
            drawn[_NAME_OF.get(name, name)] = how
        settings[kind] = [_NAME_OF.get(name, name) for name in names]
    return settings | {"drawn": drawn}


def _ordered(names: set[str], first: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    order = dict.fromkeys([*first, *known, *sorted(names)])
    return tuple(name for name in order if name in names)


COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")
PAPER_GRID = grid_of(Cell(domain, task) for domain in _DOMAINS for task in _TASKS)
CELLS = PAPER_GRID.cells


def ordered_tasks(names: set[str]) -> tuple[str, ...]:
    """Names of tasks in the order of every table."""
    return _ordered(names, (), _TASKS)


def short(name: str) -> str:
    """A name as the paper draws it, where no grid says otherwise."""
    return PAPER_GRID.short(name)
