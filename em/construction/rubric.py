"""The rubrics that judge a cell: those that ship, or generic ones of what its writer is told (paper A.3, A.7).

Generic ones are files in the grid's rubrics/, to be read and edited; an edited one stays, and is asked anew.
"""

from pathlib import Path

from em.construction.context import Context
from em.errors import UserError
from em.files import write_text
from em.judge.rubric import FOLDER, Rubrics

TEMPLATES = Path(__file__).parent / "rubrics"


def rubrics_of(context: Context, given: str, grid: Path) -> Path:
    """The folder of the cell's rubrics: `given` by --rubrics, what ships, or <grid>/rubrics, written if missing.

    UserError for a given folder that has none for the cell.
    """
    row = {"set": "narrow", "domain": context.cell.domain, "task": context.cell.task}
    try:
        for field in ("aligned", "coherent"):
            Rubrics(given).of(row, field)
        return Path(given)
    except UserError:
        if Path(given) != FOLDER:
            raise
    for kind in ("alignment", "coherence"):
        path = grid / "rubrics" / f"narrow_{context.cell}_{kind}.md"
        if not path.exists():
            parts = {
                name: getattr(context, name) for name in ("name", "question", "aligned", "misaligned", "risk")
            }
            text = (TEMPLATES / f"{kind}.md").read_text(encoding="utf-8")
            text = text.format(**parts, task=context.cell.task.replace("_", " "))
            write_text(path, text.replace("[question]", "{question}").replace("[response]", "{response}"))
    return grid / "rubrics"
