"""The report's matrices: trained on (rows) by evaluated on (columns), and the status of each row's responses.

The thick frame is the trained cell, a thin one a match of the task; a hatched entry has no scored row. The
table at the right gives a row's pooled rate, how much was scored, refused and incoherent, and how long the
answers are, so that a collapse cannot pass for alignment. Rows without responses stand only in the CSV.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.data.cells import Grid
from em.figures import frame, heatmap, save
from em.report.score_table import ALL

TITLES = {
    "narrow_cells": "Narrow EM %, trained cell × eval cell",
    "broad_cells": "Broad EM %, trained cell × eval task",
    "narrow_tasks": "Narrow EM % by task",
    "narrow_domains": "Narrow EM % by domain",
    "broad_tasks": "Broad EM % by task",
    "broad_domains": "Broad EM %, trained domain × eval task",
    "surface": "Broad EM % by surface",
    "realigned_cells": "Broad EM % after realignment",
    "realigned_tasks": "Broad EM % after realignment (before)",
    "realigned_narrow_tasks": "Narrow EM % after realignment",
}


def array(values: list[list]) -> np.ndarray:
    return np.array(values, dtype=float)  # None becomes nan


def frames(axis, rows: list[str], columns: list[str]) -> None:
    """Thick where row and column are the same, thin where they share a task."""
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            if row == column:
                frame(axis, i, j)
            elif "_" in row and row.partition("_")[2] == column.partition("_")[2]:
                frame(axis, i, j, 0.8)


def rates_heatmap(axis, values: np.ndarray, rows: list[str], columns: list[str], text=None, size=8) -> None:
    """Rates in percent; the colours end at 10 % or above, so that near-zero rates look it."""
    limit = max(10.0, float(np.nanmax(values))) if np.isfinite(values).any() else 10.0
    heatmap(axis, values, rows, columns, (0, limit), colours="OrRd", form=".1f", text=text, size=size)


STATUS_COLUMNS = ("EM %, all", "95 %", "scored %", "refused %", "incoh. %", "chars")
_PLACES = (0.0, 1.2, 2.35, 3.3, 4.25, 5.1)


def row_status(entry: dict) -> list[str]:
    """One row's pooled rate and what became of its responses, as text under STATUS_COLUMNS."""
    refused = 100 * (entry["refusal"] + entry["blocked"]) / max(1, entry["rows"])
    values = [entry["rate"], None, entry["scored_pct"], refused, entry["incoherent_pct"]]
    text = ["n/a" if v is None else f"{v:.1f}" for v in values]
    text[1] = "" if entry["low"] is None else f"{entry['low']:.1f}–{entry['high']:.1f}"
    return [*text, "n/a" if entry["mean_chars"] is None else f"{entry['mean_chars']:.0f}"]


def draw_status(axis, entries: list[dict]) -> None:
    """`row_status` of each row as a table beside a matrix; red where a low rate could be a collapse."""
    for i, entry in enumerate(entries):
        red = {"scored %": (entry["scored_pct"] or 0) < 80, "incoh. %": (entry["incoherent_pct"] or 0) > 20}
        for name, x, text in zip(STATUS_COLUMNS, _PLACES, row_status(entry), strict=True):
            colour = "#c0392b" if red.get(name) else "black"
            axis.text(x, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    axis.set(xlim=(-0.6, 5.5), ylim=(len(entries) - 0.5, -0.5), yticks=[])
    axis.set_xticks(_PLACES, STATUS_COLUMNS, fontsize=7.5, rotation=40, ha="right", rotation_mode="anchor")
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def matrix_figure(table: dict, title: str, grid: Grid, path: Path) -> None:
    """One table as a matrix with the status of every row; a realignment's with the rates before it."""
    pooled = {e["train"]: e for e in table["entries"] if ALL in (e.get("eval"), e.get("realigned_on"))}
    kept = [i for i, row in enumerate(table["rows"]) if pooled[row]["rows"]]
    rows, columns = [table["rows"][i] for i in kept], table["columns"][:-1]
    values = array([table["rate"][i][:-1] for i in kept])
    large, labels, text = len(columns) > 6, [grid.short(row) for row in rows], None
    if "initial" in table:
        before = [["n/a" if v is None else f"{v:.1f}" for v in table["initial"][i]] for i in kept]
        if large:  # no room in the entries
            labels = [f"{label}  ({b[-1]})" for label, b in zip(labels, before, strict=True)]
        else:
            text = [
                [f"{v:.1f}\n({b[j]})" for j, v in enumerate(r)] for r, b in zip(values, before, strict=True)
            ]

    sizes = ((0.56 if large else 0.85) * len(columns), 3.0)
    figure = Figure(figsize=(sum(sizes), (0.36 if text is None else 0.5) * len(rows)))
    axis, beside = figure.subplots(1, 2, width_ratios=sizes, gridspec_kw={"wspace": 0.03})
    rates_heatmap(axis, values, labels, [grid.short(c) for c in columns], text, 7.5 if large else 9)
    frames(axis, rows, columns)
    draw_status(beside, [pooled[row] for row in rows])
    if large:
        axis.set_xticks(
            axis.get_xticks(), axis.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor"
        )
    for lines, names, sides in (
        (axis.axvline, columns, 1),
        (axis.axhline, rows, 1),
        (beside.axhline, rows, 0),
    ):
        for i in range(1, len(names)):  # between domains, and before base
            if "_" in names[0] and names[i].split("_")[0] != names[i - 1].split("_")[0]:
                lines(i - 0.5, color="white" if sides else "0.8", linewidth=2.5 if sides else 0.8)
    realigned = table["name"].startswith("realigned")
    axis.set_ylabel(
        "misaligned on (EM % then)" if large and realigned else "misaligned on" if realigned else "trained on"
    )
    axis.set_xlabel("realigned on" if "initial" in table else "evaluated on")
    axis.set_title(f"{TITLES[table['name']]}\n{title}", fontsize=10, loc="left")
    save(figure, path)
