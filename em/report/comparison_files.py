"""A comparison as CSV, Markdown, LaTeX and JSON: the same figures four times."""

from pathlib import Path

from em.files import write_csv, write_json, write_text
from em.report.outcomes import PERCENT

FIELDS = ("condition", "column", "pooled", "pairs_mean", "low", "high", "rows", "pairs")
_TEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}",
     "→": r"$\rightarrow$", "×": r"$\times$", "−": "$-$", ">": "$>$", "<": "$<$"}
)  # fmt: skip
HOW = (
    "Mean of pairs: the mean over (training cell, eval cell) pairs, as in the paper, with its 95 % interval; "
    "pooled: all scored rows together. They differ where pairs have different numbers of scored rows."
)


def write_table(table: dict, title: str, stem: Path, figure: bool = False) -> list[Path]:
    """Write <stem>.csv, .json and, but for a figure, .md and .tex of a table of `table_of`, or of its parts.

    table: may have "parts", a list of such tables with "part" and "title"; their CSV has a column `part`.
    Further lines for the Markdown are its "notes".
    """
    parts = table.get("parts", [table])
    rows = [
        ({"part": part["part"]} if "parts" in table else {}) | {name: entry[name] for name in FIELDS}
        for part in parts
        for entry in part["entries"]
    ]
    kinds = ("csv", "json") if figure else ("csv", "json", "md", "tex")
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    write_csv(paths[0], rows)
    write_json(paths[1], {"title": title} | table)
    if not figure:
        write_text(paths[2], markdown(table, title))
        write_text(paths[3], latex(table, title))
    return paths


def number(value: float | None, unit: str = PERCENT) -> str:
    return "n/a" if value is None else f"{value:.1f}" if unit == PERCENT else f"{value:+.3f}"


def cell_text(entry: dict, unit: str) -> str:
    """`12.3 [11.0, 13.7]` of the mean of pairs."""
    if entry["pairs_mean"] is None:
        return "n/a"
    text = number(entry["pairs_mean"], unit)
    if entry["low"] is None:
        return text
    return f"{text} [{number(entry['low'], unit)}, {number(entry['high'], unit)}]"


def _grids(table: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(heading, header, rows of text) for either average, or for a table that brings its own text."""
    by_place = {(e["condition"], e["column"]): e for e in table["entries"]}
    conditions, columns, unit = table["conditions"], table["columns"], table["unit"]
    beside = table.get("beside", {})  # a further column: {"name", condition: text}
    further = [beside["name"]] if beside else []

    def grid(heading: str, text) -> tuple:
        rows = [
            [c, *(text(by_place[c, k]) for k in columns), *([beside.get(c, "")] if beside else [])]
            for c in conditions
        ]
        return heading, [table.get("corner", "condition"), *columns, *further], rows

    found = []
    if "triplets" in table:
        texts = {(t["condition"], t["column"]): t["text"] for t in table["triplets"]}
        names = list(dict.fromkeys(t["condition"] for t in table["triplets"]))
        rows = [[name, *(texts.get((name, k), "") for k in columns)] for name in names]
        found.append(("Mean of pairs after epochs 1 / 2 / 3", ["condition", *columns], rows))
    found.append(grid(f"Mean of pairs, {unit}", lambda e: cell_text(e, unit)))
    found.append(grid(f"Pooled rows, {unit}", lambda e: number(e["pooled"], unit)))
    return found


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "| --- " + "| ---: " * (len(header) - 1) + "|", *lines[1:], ""]


def markdown(table: dict, title: str) -> str:
    lines = [f"# {title}", "", HOW, ""]
    for part in table.get("parts", [table]):
        if "parts" in table:
            lines += [f"## ({part['part']}) {part['title']}", ""]
        for heading, header, rows in _grids(part):
            lines += [heading + ":", "", *markdown_table(header, rows)]
    for note in table.get("notes", []):
        lines += [note, ""]
    return "\n".join(lines)


def latex(table: dict, title: str) -> str:
    """A `table` of booktabs-free tabulars; needs no package."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{tex(title)}. {tex(HOW)}}}"]
    for part in table.get("parts", [table]):
        for heading, header, rows in _grids(part):
            above = f"({part['part']}) {part['title']}. {heading}" if "parts" in table else heading
            body = [" & ".join(map(tex, row)) + r" \\" for row in (header, *rows)]
            lines += [rf"{tex(above)} \\", rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\hline"]
            lines += [body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular} \\[1ex]"]
    return "\n".join([*lines, r"\end{table}", ""])


def tex(text: str) -> str:
    return text.translate(_TEX)
