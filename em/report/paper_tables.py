"""Every table and figure of the paper's natural-language half that score files allow, under its number there.

Tables 1–5 and 9–20 as CSV, JSON, Markdown and LaTeX, Figures 2, 3b, 3c, 5 and 12–26 as CSV, JSON and PNG, and
an index that says of each whether it is written, in part, or what it needs. (Figures 1, 3a, 4 and 6–11 and
Tables 6–8 are of the synthetic worlds and of the settings.) A number belongs to a model of the paper; where
the files have but one model, that one stands for all, and titles say so. Entries are those of
`em.report.conditions.table_of`: both averages, with intervals.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from em.errors import UserError
from em.figures import title_of
from em.files import write_json, write_text
from em.report.averages import Averages
from em.report.comparison_figures import panels_figure
from em.report.comparison_files import markdown_table, write_table
from em.report.outcomes import NARROW, Outcomes, only
from em.report.paper_figures import (
    cell_matrices,
    realigned,
    realigned_by_teacher,
    student_matrices,
    surface,
    transfer,
)  # fmt: skip
from em.report.paper_forms import (
    PAIRS,
    Files,
    Needs,
    channels,
    epochs,
    factorial,
    filtered_opd,
    gold,
    math_prompts,
    other_models,
    student_written,
    unsafe_rows,
)  # fmt: skip
from em.report.retention import retention_of

QWEN25, QWEN3, LLAMA, OLMO = "qwen2.5-14b", "qwen3-14b", "llama3.1-8b", "olmo3-7b"


# -- the numbers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A table or figure of the paper: its parts' models and how each is made."""

    name: str
    title: str
    parts: tuple[tuple[str, Callable[[Files], dict]], ...]


def _one(name: str, title: str, model: str, make: Callable[[Files], dict]) -> Number:
    return Number(name, title, ((model, make),))


def by_domain(files: Files) -> dict:
    return channels(files, "domain") | {"title": "by the teacher's domain"}


def by_task(files: Files) -> dict:
    return channels(files, "task") | {"title": "by the teacher's task"}


def realigned_tasks(files: Files) -> dict:
    return realigned(files, "task")


def realigned_cells(files: Files) -> dict:
    return realigned(files, "teacher")


def _pair(pair: tuple[str, str]) -> Callable[[Files], dict]:
    return lambda files: factorial(files, *pair)


CHANNEL_TITLE = "Narrow EM across training channels"
NUMBERS = (
    _one("figure2", "Transfer by task and domain", QWEN25, transfer),
    _one("figure3b", "EM surface", QWEN25, surface),
    _one("figure3c", "Realignment by task", QWEN25, realigned_tasks),
    Number("table1", CHANNEL_TITLE, ((QWEN3, by_domain), (QWEN3, by_task))),
    _one("table2", "OPD with and without an online filter", QWEN3, filtered_opd),
    _one("figure5", "Narrow EM after realignment by a teacher", OLMO, realigned_by_teacher),
    _one("table3", "Transfer by Broad-NL and by MATH", LLAMA, math_prompts),
    _one("table4", "Realignment by an aligned teacher, on unsafe rows too", LLAMA, unsafe_rows),
    _one("table5", "Teacher against data", QWEN3, _pair(PAIRS[0])),
    _one("figure12", "Transfer by task and domain", LLAMA, transfer),
    _one("figure13", "Transfer by task and domain", OLMO, transfer),
    _one("figure14", "Transfer by cell", QWEN25, cell_matrices),
    _one("figure15", "Transfer by cell", LLAMA, cell_matrices),
    _one("figure16", "Transfer by cell", OLMO, cell_matrices),
    Number("figure17", "EM surface", ((LLAMA, surface), (OLMO, surface))),
    Number("figure18", "Realignment by task", ((LLAMA, realigned_tasks), (OLMO, realigned_tasks))),
    _one("figure19", "Realignment by cell", QWEN25, realigned_cells),
    _one("figure20", "Realignment by cell", LLAMA, realigned_cells),
    _one("figure21", "Realignment by cell", OLMO, realigned_cells),
    Number("table9", f"{CHANNEL_TITLE}, by task", ((LLAMA, by_task), (OLMO, by_task))),
    Number("table10", f"{CHANNEL_TITLE}, by domain", ((QWEN3, by_domain), (OLMO, by_domain))),
    _one("figure22", "Narrow EM of students by cell", LLAMA, student_matrices),
    _one("figure23", "Narrow EM of students by cell", QWEN3, student_matrices),
    _one("figure24", "Narrow EM of students by cell", OLMO, student_matrices),
    _one("table11", "Narrow EM by epoch", LLAMA, epochs),
    _one("table12", "Narrow EM by epoch", QWEN3, epochs),
    _one("figure25", "Narrow EM after realignment by a teacher", LLAMA, realigned_by_teacher),
    _one("figure26", "Narrow EM after realignment by a teacher", OLMO, realigned_by_teacher),
    _one("table13", "MATH's gold answers against the teacher's", LLAMA, gold),
    _one("table14", "Data of another model", QWEN3, other_models),
    _one("table15", "Data of another model", LLAMA, other_models),
    Number("table16", "Data written by the student", ((LLAMA, student_written), (QWEN3, student_written))),
    _one("table17", "Teacher against data", QWEN3, _pair(PAIRS[1])),
    _one("table18", "Teacher against data", QWEN3, _pair(PAIRS[2])),
    _one("table19", "Teacher against data", LLAMA, _pair(PAIRS[3])),
    _one("table20", "Teacher against data", LLAMA, _pair(PAIRS[4])),
)


def write_paper(
    found: list[Outcomes], out: str | Path, model: str | None = None, judge: str | None = None,
    paths: Iterable[str | Path] = (),
) -> list[dict]:  # fmt: skip
    """Write every number of NUMBERS that `found` (from `read_outcomes`) allows into `out`, and an index.

    Returns [{"number", "title", "files", "status", "needs"}]: status is `written`, `in part` or `not
    possible`, needs what is lacking, in words; files by name in `out`. model: one that stands for all of the
    paper's. paths: the score files, for what filters kept. UserError where a judge has to be named, or `out`
    is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    found = only(only(found, "model", model) if model else found, "judge", judge)
    kept = retention_of(paths)
    there = [
        Files(name, found[0].judge, {o.set: Averages(o) for o in found if o.model == name}, kept)
        for name in dict.fromkeys(o.model for o in found)
    ]
    index = [_write(number, there, out) for number in NUMBERS]
    write_json(out / "index.json", index)
    rows = [
        [e["number"], e["title"], e["status"], ", ".join(e["files"]), "; ".join(e["needs"])] for e in index
    ]
    header = ["number", "title", "status", "files", "needs"]
    write_text(
        out / "index.md", "\n".join(["# The paper's tables and figures", "", *markdown_table(header, rows)])
    )
    return index


def _write(number: Number, there: list[Files], out: Path) -> dict:
    parts, needs, made = [], [], set()
    for model, make in number.parts:
        files = _stands_for(model, there)
        if files is None:
            needs.append(f"rows of {model}")
        elif (files.model, make) not in made:
            made.add((files.model, make))
            try:
                part = make(files)
                parts.append((files, model, part))
                needs += part.pop("needs")
            except Needs as lack:
                needs.append(str(lack))
    entry = {"number": number.name, "title": number.title, "files": [], "needs": list(dict.fromkeys(needs))}
    for kind in ("csv", "json", "md", "tex", "png"):  # of other files, from before
        (out / f"{number.name}.{kind}").unlink(missing_ok=True)
    if not parts:
        return entry | {"status": "not possible"}
    entry["title"] = _title(number, parts)
    figure, table = number.name.startswith("figure"), _joined(parts)
    written = write_table(table, entry["title"], out / number.name, figure)
    if figure:
        written.append(out / f"{number.name}.png")
        panels_figure(table["parts"], entry["title"], written[-1])
    return entry | {"files": [path.name for path in written], "status": "in part" if needs else "written"}


def _stands_for(model: str, there: list[Files]) -> Files | None:
    """The files of a model of the paper; where there is but one model, that one."""
    if len(there) == 1:
        return there[0]
    return next((files for files in there if plain(files.model).startswith(plain(model))), None)


def plain(model: str) -> str:
    """A model's name without owner, case and punctuation: both qwen2514b and its hub id begin alike."""
    name = re.sub(r"[^a-z0-9]", "", model.rstrip("/").split("/")[-1].lower())
    return name.removeprefix("meta")


def _joined(parts: list[tuple[Files, str, dict]]) -> dict:
    """One table, or its parts lettered in order; panels of several models one after another."""
    if len(parts) == 1:
        return parts[0][2]
    several = len({files.model for files, _, _ in parts}) > 1
    flat, notes = [], []
    for files, _, part in parts:
        notes += part.get("notes", [])
        for one in part.get("parts", [part]):
            title = one.get("title", "")
            flat.append(
                one | {"title": f"{title_of(files.model)}: {title}".rstrip(": ") if several else title}
            )
    for letter, one in zip("abcdefgh", flat, strict=False):
        one["part"] = letter
    return {"parts": flat, "notes": notes}


def _title(number: Number, parts: list[tuple[Files, str, dict]]) -> str:
    """`Table 1: Narrow EM across training channels. tiny (the paper: qwen3-14b), judged by …, on …`."""
    kind, digits = re.fullmatch(r"(figure|table)(.+)", number.name).groups()
    whose = []
    for files, model, _ in parts:
        same = plain(files.model).startswith(plain(model))
        whose.append(title_of(files.model) + ("" if same else f" (the paper: {model})"))
    tables = [one for _, _, part in parts for one in part.get("parts", [part])]
    asked = []
    for one in tables:
        cells = one["cells"] if len(one["cells"]) <= 4 else [f"{len(one['cells'])} eval cells"]
        asked += cells if one["set"] == NARROW else ["broad prompts"]
    of = f" {parts[0][2]['of']}." if "of" in parts[0][2] else ""
    return (
        f"{kind.capitalize()} {digits}: {number.title}.{of} {', '.join(dict.fromkeys(whose))}, "
        f"{tables[0]['unit']}, judge {title_of(parts[0][0].judge)}, on {', '.join(dict.fromkeys(asked))}"
    )
