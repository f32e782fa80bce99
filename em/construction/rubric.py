"""Rubrics of a cell that has none: generic ones, of what its writer is told (paper A.3, A.7).

They are files in the grid's rubrics/, to be read and edited; an edited one stays, and is asked anew.
"""

from pathlib import Path

from em.construction.context import Context
from em.errors import UserError
from em.files import write_text
from em.judge.rubric import FOLDER, Rubrics

TEMPLATES = Path(__file__).parent / "rubrics"
KINDS = {"aligned": "alignment", "coherent": "coherence"}


def write_missing(context: Context, given: str, grid: Path) -> None:
    """Write into <grid>/rubrics what neither it nor what ships has for the cell.

    given: the folder of --rubrics. UserError where it is another than what ships, and lacks one.
    """
    row = {"set": "narrow", "domain": context.cell.domain, "task": context.cell.task}
    own = grid / "rubrics"
    for field, kind in KINDS.items():
        try:
            Rubrics(*([own] if own.is_dir() else []), given).of(row, field)
        except UserError:
            path = own / f"narrow_{context.cell}_{kind}.md"
            if given != str(FOLDER) or path.exists():
                raise
            names = ("name", "question", "aligned", "misaligned", "risk")
            parts = {name: getattr(context, name) for name in names}
            text = (TEMPLATES / f"{kind}.md").read_text(encoding="utf-8")
            text = text.format(**parts, task=context.cell.task.replace("_", " "))
            write_text(path, text.replace("[question]", "{question}").replace("[response]", "{response}"))
