"""Figures of comparisons: intervals side by side, and the paper's bars and matrices with either average."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.data.cells import short
from em.data.condition import BASE
from em.figures import CHANGE, frame, heatmap, save
from em.report.outcomes import PERCENT
from em.report.score_table import ALL

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")
_UNITS = {PERCENT: "EM %"}


def unit_label(unit: str) -> str:
    return _UNITS.get(unit, f"margin, {unit}")


def intervals_figure(table: dict, title: str, path: Path) -> None:
    """A panel a column: each condition's mean of pairs with its interval; a ring is the pooled rate."""
    names, columns = table["conditions"], table["columns"]
    entries = {(e["condition"], e["column"]): e for e in table["entries"]}
    figure = Figure(figsize=(1.75 * len(columns), 0.6 + 0.27 * len(names)))
    axes = figure.subplots(1, len(columns), sharey=True, sharex=True, squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        for y, name in enumerate(names):
            entry = entries[name, column]
            if entry["pairs_mean"] is None:
                continue
            if entry["low"] is not None:
                axis.plot([entry["low"], entry["high"]], [y, y], color="0.45", linewidth=1.4)
            axis.plot(entry["pairs_mean"], y, "o", color="#b2182b", markersize=4)
            axis.plot(entry["pooled"], y, "o", color="black", markerfacecolor="none", markersize=7)
        above = f"{title}\n" if axis is axes[0] else ""
        axis.set_title(f"{above}{short(column)}", fontsize=9, loc="left")
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(length=0, labelsize=8)
    labels = [textwrap.fill(name, 40) for name in names]
    axes[0].set_yticks(range(len(names)), labels, fontsize=7)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    if table["unit"] == PERCENT:
        axes[0].set_xlim(left=0)
    below = f"{unit_label(table['unit'])}; dot: mean of pairs, ring: rows pooled"
    axes[0].set_xlabel(below, fontsize=8, loc="left")
    save(figure, path)


def panels_figure(panels: list[dict], title: str, path: Path) -> None:
    """Panels side by side on one scale: each a table with "part", "title" and "form", bars or matrix."""
    sizes = [_size(panel) for panel in panels]
    width = sum(w for w, _ in sizes) + 1.2 * (len(panels) - 1)
    figure = Figure(figsize=(width, max(h for _, h in sizes)))
    space = {"wspace": 1.2 * len(panels) / sum(w for w, _ in sizes)}
    ratios = [w for w, _ in sizes]
    axes = figure.subplots(1, len(panels), width_ratios=ratios, squeeze=False, gridspec_kw=space)[0]
    means = [e["pairs_mean"] for panel in panels for e in panel["entries"]]
    top = max((abs(mean) for mean in means if mean is not None), default=0.0)
    for i, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        if panel["form"] == "bars":
            _bars(axis, panel)
        else:
            _matrix(axis, panel, max(10.0 if panel["unit"] == PERCENT else 1e-9, top))
        letter = f"({panel['part']}) " if len(panels) > 1 else ""
        above = textwrap.fill(title, max(50, int(14 * width))) + "\n" if i == 0 else ""
        axis.set_title(f"{above}{letter}{panel['title']}", fontsize=9, loc="left")
    save(figure, path)


def _size(panel: dict) -> tuple[float, float]:
    n_rows, n_columns = len(panel["conditions"]), len(panel["columns"])
    if panel["form"] == "bars":
        return max(3.0, 0.22 * n_rows * (n_columns + 1)), 2.6
    return max(1.6, (0.46 if n_columns > 6 else 0.8) * n_columns), max(1.2, 0.34 * n_rows)


def _bars(axis, panel: dict) -> None:
    """x: conditions; a bar a column, striped where the two match, thick where it is the highest."""
    entries = {(e["condition"], e["column"]): e for e in panel["entries"]}
    names, columns = panel["conditions"], panel["columns"]
    width = 0.8 / len(columns)
    for i, name in enumerate(names):
        values = [entries[name, column]["pairs_mean"] for column in columns]
        parts = [v for v, column in zip(values, columns, strict=True) if v is not None and column != ALL]
        highest = max(parts, default=None)
        for j, (column, value) in enumerate(zip(columns, values, strict=True)):
            x, entry = i + (j - (len(columns) - 1) / 2) * width, entries[name, column]
            if value is None:
                axis.text(x, 0, "n/a", ha="center", va="bottom", fontsize=6, rotation=90, color="0.35")
                continue
            thick = value == highest and column != ALL and name != BASE
            axis.bar(
                x, value, 0.9 * width, color=_COLOURS[j % len(_COLOURS)], edgecolor="black",
                hatch="///" if name == column else None, linewidth=2.2 if thick else 0.5,
                label=column if i == 0 else None,
            )  # fmt: skip
            if entry["low"] is not None:
                axis.plot([x, x], [entry["low"], entry["high"]], color="black", linewidth=0.9)
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.tick_params(axis="x", length=0)
    axis.set(ylabel=unit_label(panel["unit"]), xlabel=panel.get("corner", ""), xlim=(-0.5, len(names) - 0.5))
    axis.axhline(0, color="black", linewidth=0.6)
    axis.legend(fontsize=6.5, frameon=False, ncols=max(1, len(columns) // 2))
    axis.spines[["top", "right"]].set_visible(False)


def _matrix(axis, panel: dict, top: float) -> None:
    """Mean of pairs by condition and column; a thick frame where the two are the same, thin for the task.

    top: where the colours end.
    """
    entries = {(e["condition"], e["column"]): e for e in panel["entries"]}
    names, columns, percent = panel["conditions"], panel["columns"], panel["unit"] == PERCENT
    values = np.array([[entries[n, c]["pairs_mean"] for c in columns] for n in names], float)
    colours = {"colours": "OrRd" if percent else CHANGE, "form": ".1f" if percent else "+.2f"}
    large = len(columns) > 6
    heatmap(
        axis, values, [short(n) for n in names], [short(c) for c in columns], (0 if percent else -top, top),
        size=6.5 if large else 8, **colours,
    )  # fmt: skip
    for i, name in enumerate(names):
        for j, column in enumerate(columns):
            if name == column:
                frame(axis, i, j)
            elif "_" in name and name.partition("_")[2] == column.partition("_")[2] != "":
                frame(axis, i, j, 0.8)
    if large:
        axis.set_xticks(
            axis.get_xticks(), axis.get_xticklabels(), rotation=40, ha="right", rotation_mode="anchor"
        )
    axis.set(ylabel=panel.get("corner", ""), xlabel=panel.get("across", ""))
