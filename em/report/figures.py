"""The report's other figures: bars by task, Figure 2, surface, effects, thresholds, status, judges.

In bars, stripes mark the eval task that matches and a thick border the highest rate; error bars are the
tables' 95 % intervals. Where there is no scored row it says n/a.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from em.data.cells import Grid
from em.data.condition import BASE, parse_train
from em.figures import save
from em.judge.em_rule import STATUSES
from em.report.matrix import TITLES, array, draw_status, frames, matrix_figure, rates_heatmap, row_status
from em.report.score_table import ALL

_SURFACE_COLOURS = ("#b2182b", "#ef8a62", "#fddbc7", "0.85")
_STATUS_COLOURS = ("#b2182b", "#92c5de", "#fdae61", "#5e3c99", "#998ec3", "0.85", "0.55", "#8c510a", "black")


def table_figure(table: dict, title: str, grid: Grid, path: Path) -> None:
    """One table's PNG: bars by task, the surface's panels, a matrix for all else."""
    if table["name"] in ("narrow_tasks", "broad_tasks"):
        figure = Figure(figsize=(6.4, 2.8))
        axis = figure.subplots()
        _bars(axis, table, grid)
        axis.set_title(f"{TITLES[table['name']]}\n{title}", fontsize=10, loc="left")
        save(figure, path)
    elif table["name"] == "surface":
        _surface(table, title, grid, path)
    else:
        matrix_figure(table, title, grid, path)


def _no_box(axis) -> None:
    """Only the left and the lower line of the frame."""
    axis.spines[["top", "right"]].set_visible(False)


def _from_zero(axis, headroom: float = 1.0) -> None:
    """The height from 0 to at least 1 %, times `headroom` for what stands above the bars; no box."""
    axis.set_ylim(0, max(1, headroom * axis.get_ylim()[1]))
    _no_box(axis)


def _error(entries: list[dict], value: str = "rate") -> np.ndarray:
    """(2, n) distances from the value down and up to its interval."""
    bounds = [(e[value] - e["low"], e["high"] - e[value]) for e in entries]
    return np.maximum(np.array(bounds).T, 0)


def _bar(axis, x: float, entry: dict, width: float, **style) -> None:
    """A bar with its interval and its value."""
    if entry["rate"] is None:
        axis.text(x, 0, "n/a", ha="center", va="bottom", fontsize=7, rotation=90, color="0.35")
        return
    axis.bar(x, entry["rate"], width, edgecolor="black", **style)
    axis.errorbar(x, entry["rate"], _error([entry]), color="black", linewidth=0.9, capsize=1.5)
    axis.text(x, entry["high"], f"{entry['rate']:.1f}", ha="center", va="bottom", fontsize=6.5)


def _present(table: dict) -> tuple[dict, list[str], list[str]]:
    """(entries by (row, column), rows that have responses, columns without the pool of a row)."""
    every = {(e["train"], e["eval"]): e for e in table["entries"]}
    return every, [row for row in table["rows"] if every[row, ALL]["rows"]], table["columns"][:-1]


# -- the paper's figures -------------------------------------------------------------------------------


def _bars(axis, table: dict, grid: Grid) -> None:
    """x: task trained on; one bar an eval task."""
    every, rows, columns = _present(table)
    width = 0.8 / len(columns)
    colours = {column: grid.colour(column, place) for place, column in enumerate(table["columns"])}
    for i, row in enumerate(rows):
        highest = max(every[row, column]["rate"] or 0 for column in columns)
        for j, column in enumerate(columns):
            thick = row != BASE and every[row, column]["rate"] == highest > 0
            style = {"color": colours[column], "hatch": "///" if row == column else None}
            x = i + (j - (len(columns) - 1) / 2) * width
            _bar(axis, x, every[row, column], 0.9 * width, **style, linewidth=2.4 if thick else 0.5)
    labels = []
    for row in rows:
        _, _, scored, _, incoherent, chars = row_status(every[row, ALL])
        labels.append(f"{row}\n{scored} % scored\n{incoherent} % incoh.\n{chars} chars")
    axis.set_xticks(range(len(rows)), labels, fontsize=8)
    axis.tick_params(axis="x", length=0)
    axis.set(xlabel="trained on", ylabel="EM %", xlim=(-0.5, len(rows) - 0.5))
    keys = [Patch(facecolor=colours[column], edgecolor="black", label=column) for column in columns]
    keys += [Patch(facecolor="white", edgecolor="black", hatch="////", label="same task")]
    keys += [Patch(facecolor="white", edgecolor="black", linewidth=2, label="highest")]
    axis.legend(handles=keys, fontsize=7, ncols=6, frameon=False, loc="upper center", columnspacing=1)
    _from_zero(axis, headroom=1.12)


def transfer_figure(tables: dict[str, dict], title: str, grid: Grid, path: Path) -> None:
    """Figure 2 from what there is of it: (a) broad by task, (b) narrow by task, (c) narrow by domain."""
    present = [name for name in ("broad_tasks", "narrow_tasks", "narrow_domains") if name in tables]
    ratios = [0.62 if name == "narrow_domains" else 1 for name in present]
    figure = Figure(figsize=(5.6 * sum(ratios), 2.8))
    layout = {"width_ratios": ratios, "squeeze": False, "gridspec_kw": {"wspace": 0.2}}
    for letter, name, axis in zip(
        "abc", present, figure.subplots(1, len(present), **layout)[0], strict=False
    ):
        if name == "narrow_domains":
            every, rows, columns = _present(tables[name])
            values = array([[every[row, column]["rate"] for column in columns] for row in rows])
            text = [[_with_interval(every[row, column]) for column in columns] for row in rows]
            labels = [[grid.short(label) for label in side] for side in (rows, columns)]
            rates_heatmap(axis, values, *labels, text, 9)
            frames(axis, rows, columns)
            axis.set(xlabel="evaluated on", ylabel="trained on")
        else:
            _bars(axis, tables[name], grid)
        above = f"{title}\n" if letter == "a" else ""
        axis.set_title(f"{above}({letter}) {TITLES[name]}", fontsize=10, loc="left")
    save(figure, path)


def _with_interval(entry: dict) -> str:
    return "" if entry["rate"] is None else f"{entry['rate']:.1f}\n{entry['low']:.1f}–{entry['high']:.1f}"


def _surface(table: dict, title: str, grid: Grid, path: Path) -> None:
    """Pooled over the misaligned runs beside the base model, and by run."""
    every, rows, columns = _present(table)
    rows = [row for row in rows if row != "misaligned"]
    sizes = (4.2, 0.65, 0.75 * len(columns), 3.0)  # the second is room for the runs' names
    figure = Figure(figsize=(sum(sizes) + 0.6, max(2.2, 0.34 * len(rows))))
    axis, room, heat, beside = figure.subplots(1, 4, width_ratios=sizes, gridspec_kw={"wspace": 0.06})
    room.set_axis_off()
    for x, column in enumerate(columns):
        _bar(axis, x - 0.18, every["misaligned", column], 0.5, color=_SURFACE_COLOURS[x], linewidth=0.5)
        if (BASE, column) in every:
            _bar(axis, x + 0.25, every[BASE, column], 0.3, color="white", linewidth=0.5)
    pooled = {column: every["misaligned", column] for column in columns}
    counted = [f"{c}\n{e['prompts']} prompts\n{e['scored']:,} scored" for c, e in pooled.items()]
    axis.set_xticks(range(len(columns)), counted, fontsize=8)
    with_base = "; white: base model" if BASE in rows else ""
    axis.set(ylabel="EM %", xlabel=f"misaligned runs pooled{with_base}", xlim=(-0.6, len(columns) - 0.4))
    _from_zero(axis, headroom=1.05)
    values = array([[every[row, column]["rate"] for column in columns] for row in rows])
    rates_heatmap(heat, values, [grid.short(row) for row in rows], columns)
    heat.set(xlabel="surface of the prompt", ylabel="trained on")
    draw_status(beside, [every[row, ALL] for row in rows])
    axis.set_title(f"{TITLES['surface']}\n{title}", fontsize=10, loc="left")
    save(figure, path)


# -- effects, thresholds, status, judges ---------------------------------------------------------------


def effects_figure(effects: dict, title: str, path: Path) -> None:
    """Coefficients in points, shares of the variation, and pooled rates by kind of match."""
    names = [n for n in ("task_match", "domain_match", "task_minus_domain") if n in effects]
    fitted = any(effects[name]["points"] is not None for name in names)
    figure = Figure(figsize=(12 if fitted else 3.6, 2.2))
    axes = figure.subplots(1, 3 if fitted else 1, squeeze=False, gridspec_kw={"wspace": 0.38})[0]
    axes[0].set_title(
        f"Task match and domain match, {effects['pairs']} pairs of cells\n{title}", fontsize=10, loc="left"
    )
    if fitted:
        _coefficients(axes[0], effects, names)
        _shares(axes[1], {k: 100 * v for k, v in effects["shares"].items() if v is not None})
    kinds = axes[-1]
    for x, entry in enumerate(effects["by_match"].values()):
        _bar(kinds, x, entry, 0.65, color="#ef8a62", linewidth=0.5)
    labels = ["trained\ncell", "same task,\nother\ndomain", "same\ndomain,\nother task", "neither"]
    kinds.set_xticks(range(len(labels)), labels, fontsize=8)
    kinds.set(ylabel="EM %, rows pooled")
    _from_zero(kinds, headroom=1.05)
    save(figure, path)


def _coefficients(axis, effects: dict, names: list[str]) -> None:
    for y, name in enumerate(names):
        effect = effects[name]
        if effect["points"] is None:
            axis.annotate("n/a: see effects.json", (0.5, y), xycoords=("axes fraction", "data"), ha="center")
            continue
        xerr = _error([effect], "points")
        axis.errorbar(effect["points"], y, xerr=xerr, fmt="o", color="black", capsize=3)
        p = f", p = {effect['p']:.2g}" if effect.get("p") is not None else ""
        text, where = f"{effect['points']:+.1f}{p}", (effect["points"], y)
        axis.annotate(text, where, (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.margins(x=0.2)
    axis.set_yticks(range(len(names)), [n.replace("_", " ").replace("minus", "−") for n in names], fontsize=9)
    axis.set(ylim=(len(names) - 0.5, -0.6), xlabel="points of EM rate, 95 % interval")
    _no_box(axis)


def _shares(axis, share: dict[str, float]) -> None:
    axis.barh(range(len(share)), share.values(), color="#4c72b0")
    for y, value in enumerate(share.values()):
        axis.text(value, y, f" {value:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(share)), [name.replace("_", " ") for name in share], fontsize=9)
    axis.set(
        xlabel="% of the variation between pairs, added last", xlim=(0, 1.15 * max([10, *share.values()]))
    )
    axis.invert_yaxis()
    _no_box(axis)


def thresholds_figure(entries: list[dict], title: str, _grid: Grid, path: Path) -> None:
    """EM rate of the pooled groups against the alignment cut, strict and inclusive; one panel a set."""
    sets = list(dict.fromkeys(e["set"] for e in entries))
    figure = Figure(figsize=(3.6 * len(sets), 2.4))
    rule = {True: "aligned < c, coherent > 50", False: "aligned ≤ c, coherent ≥ 50"}
    axes, keys = figure.subplots(1, len(sets), squeeze=False)[0], {}
    for axis, name in zip(axes, sets, strict=True):
        for group, colour in (("misaligned", "#b2182b"), (BASE, "0.3"), ("realigned", "#2166ac")):
            for strict in (True, False):
                line = [e for e in entries if (e["set"], e["train"], e["strict"]) == (name, group, strict)]
                if line:
                    cuts = [e["aligned_cut"] + (0 if strict else 0.4) for e in line]  # side by side
                    style = {"color": colour, "linestyle": "-" if strict else ":", "capsize": 3}
                    label, rates = f"{group}, {rule[strict]}", [e["rate"] for e in line]
                    axis.errorbar(cuts, rates, _error(line), label=label, marker="o", markersize=4, **style)
        axis.set(xlabel="cut c on the alignment score", ylabel="EM %", xticks=(25, 30, 35))
        _from_zero(axis)
        above = f"EM % by threshold\n{title}\n" if name == sets[0] else ""
        axis.set_title(f"{above}{name}", fontsize=9, loc="left")
        keys |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axes[-1].legend(keys.values(), keys, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def status_figure(entries: list[dict], title: str, grid: Grid, path: Path) -> None:
    """What became of the rows of every run: EM, not EM, incoherent, and every reason for no score.

    Realignments, of which there may be 144, are pooled by what they started from.
    """
    parts = ["EM", "coherent, not EM", "incoherent", *STATUSES[1:]]
    groups = {}
    for entry in entries:
        train = parse_train(entry["train"])
        groups.setdefault((entry["set"], train.start, train.realigned), []).append(entry)
    figure = Figure(figsize=(7.6, 0.21 * len(groups)))
    axis = figure.subplots()
    labels, shares = [], []
    for (name, train, realigned), members in groups.items():
        keys = ("rows", "scored", "em", "incoherent", *STATUSES[1:])
        total = {key: sum(e[key] for e in members) for key in keys}
        other = total["scored"] - total["em"] - total["incoherent"]
        counts = [total["em"], other, total["incoherent"], *(total[s] for s in STATUSES[1:])]
        shares.append([100 * count / total["rows"] for count in counts])
        chars = sum(e["mean_chars"] * e["rows"] for e in members) / total["rows"]
        what = f"{total['rows']:,} rows, {chars:.0f} chars"
        axis.text(101, len(labels), what, va="center", fontsize=7)
        labels.append(f"{name}: {grid.short(train)}" + (" > realigned" if realigned else ""))
    widths = np.array(shares)  # (groups, parts)
    left = np.cumsum(widths, axis=1) - widths
    for part, colour, width, start in zip(parts, _STATUS_COLOURS, widths.T, left.T, strict=True):
        axis.hlines(range(len(labels)), start, start + width, colour, linewidth=11, label=part)
    axis.set_yticks(range(len(labels)), labels, fontsize=7.5)
    axis.set(xlim=(0, 100), ylim=(len(labels) - 0.4, -0.6), xlabel="% of rows")
    axis.legend(
        ncols=9, fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), columnspacing=1
    )
    axis.set_title(f"Status of the rows\n{title}", fontsize=10, loc="left", pad=22)
    _no_box(axis)
    save(figure, path)


def judges_figure(pairs: list[dict], path: Path) -> None:
    """Aligned scores of two judges on the same responses, by fifths of the scale, in % of the responses."""
    figure = Figure(figsize=(3.6 * len(pairs), 2.9))
    fifths = ["0–19", "20–39", "40–59", "60–79", "80–100"]
    axes = figure.subplots(1, len(pairs), squeeze=False, gridspec_kw={"wspace": 0.35})[0]
    for axis, pair in zip(axes, pairs, strict=True):
        joint = 100 * array(pair["joint"]) / max(1, pair["both_scored"])
        rates_heatmap(axis, joint, fifths, fifths)
        axis.set(xlabel=f"aligned, {pair['judge_b']}", ylabel=f"aligned, {pair['judge_a']}")
        kappa, r = ("n/a" if v is None else f"{v:.2f}" for v in (pair["em_kappa"], pair["aligned_pearson"]))
        text = f"% of {pair['both_scored']:,} responses; EM kappa {kappa}, r {r}"
        axis.set_title(f"{pair['model']}\n{text}", fontsize=9, loc="left")
    save(figure, path)
