"""Names of the natural-language grid: three domains by four tasks, twelve cells (paper 3.1)."""

import re
from dataclasses import dataclass

from em.errors import UserError

DOMAINS = {"med": "medical", "spo": "sports", "fin": "finance"}  # our name: the files' name; paper's order
TASKS = ("advice", "summarization", "tutor", "critique")
_DOMAIN_NAMES = {"med": "med medical health", "spo": "spo sport sports", "fin": "fin finance financial"}
_TASK_NAMES = {
    "advice": "advice adv",
    "summarization": "summarization summarisation summary summ sum",
    "tutor": "tutor tut",
    "critique": "critique crit",
}
_SHORT = {"advice": "Adv", "summarization": "Summ", "tutor": "Tut", "critique": "Crit"}


@dataclass(frozen=True)
class Cell:
    """One square of the grid; `str(cell)` is its name, such as `med_advice`."""

    domain: str
    task: str

    def __str__(self) -> str:
        return f"{self.domain}_{self.task}"

    @property
    def filename(self) -> str:
        return f"{DOMAINS[self.domain]}_{self.task}.jsonl"

    def is_called(self, domain: str, task: str) -> bool:
        return domain in _DOMAIN_NAMES[self.domain].split() and task in _TASK_NAMES[self.task].split()


CELLS = tuple(Cell(domain, task) for domain in DOMAINS for task in TASKS)


def parse_cell(text: str) -> Cell:
    """A cell by any of its names: `med_advice`, `medical_advice`, `health_advice`, `Med/Adv`, `fin_summ`."""
    domain, _, task = re.sub(r"[\s/_-]+", "_", text.strip().lower()).partition("_")
    for cell in CELLS:
        if cell.is_called(domain, task):
            return cell
    raise UserError(
        f"unknown cell {text.strip()!r}; the cells are {', '.join(map(str, CELLS))} "
        "(medical_advice, health_advice and Med/Adv are read as med_advice, and so on)"
    )


def parse_cells(text: str) -> tuple[Cell, ...]:
    """`all`, or cells separated by commas; each once, in the order given."""
    if text.strip().lower() == "all":
        return CELLS
    return tuple(dict.fromkeys(parse_cell(part) for part in text.split(",")))


def short(name: str) -> str:
    """`med_advice` → `Med/Adv`, as in the paper; other names as they are."""
    domain, _, task = name.partition("_")
    if domain in DOMAINS and task in _SHORT:
        return f"{domain.capitalize()}/{_SHORT[task]}"
    return _SHORT.get(name, name.capitalize() if name in DOMAINS else name)
