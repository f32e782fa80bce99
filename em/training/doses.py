"""Dose–response of a fine-tuning: margins after 1, 2, 4, … of its steps, and at matched local flip (ours).

A dose is a number of optimiser steps. The *local flip* is the share, in %, of the trained cell's held-out
rows whose margin (em/training/margin.py) is on the side of the answers trained on: above 0 where these are
the misaligned ones. Transfer is how far the margins of the other cells have moved, read at one dose or at one
local flip; em/world/doses.py does the same for worlds, by exact answers.

    dose_margins.json    the margin of every row at every dose, as they come
    doses.{json,csv,png} the curve: every cell and group of cells at every dose and at matched local flip

Asked are the rows of the trained cell that the run's margins are on, and the first ROWS of them of every
other cell. No random number is drawn and no weight touched, so the run ends with the bits of one not asked.
"""

import math
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em import parallel
from em.clusters import FEW, cluster_variance, clustered_rate
from em.data.cells import COLOURS, Cell
from em.errors import UserError
from em.figures import save
from em.files import read_json, write_csv, write_json
from em.run import Run
from em.stats import FLIPS, at_flip, percentile_interval, resample_clusters, t_quantile
from em.training.margin import AnswerPair, cell_margins, fits

ROWS = 16  # of every cell but the trained one: a dose then costs a third of what margins.json does
DRAWS = 1000
REACHED = 0.95  # of the draws: where fewer reach a flip, those that do are no sample of what might be

MEASURES = ("margin", "change", "flip")
FLIP = MEASURES.index("flip")
NONE = math.nan, math.nan  # bounds that cannot be had
GROUPS = ("same task", "same domain", "neither")  # what other cells share with the trained one

Margins = dict[Cell, list[float]]  # nats a token, by row


def check_doses(doses: Sequence[int] | None, cell: Cell, measured: Container[Cell], steps: int) -> None:
    """UserError where a run of `steps` steps on `cell` cannot be asked at these doses.

    measured: the cells that have rows with both answers.
    """
    if doses and max(doses) > steps:
        raise UserError(f"--dose-evals {max(doses)}: a run on {cell} has only {steps} steps")
    if doses and cell not in measured:
        raise UserError(f"--dose-evals needs both answers of held-out rows of {cell}, and there are none")


class DoseMargins:
    """The margins of a run of `steps` steps on `cell` along its way, kept in its folder as they come.

    doses: steps to ask at, beside the first and last. pairs: of `answer_pairs`. Under torchrun every process
    measures all rows, as before and after a run, and rank 0 writes.
    """

    def __init__(
        self, run: Run, cell: Cell, pairs: dict[Cell, list[AnswerPair]], doses: Sequence[int] | None,
        steps: int,
    ):  # fmt: skip
        check_doses(doses, cell, pairs, steps)
        self.run, self.cell, self.steps = run, cell, steps
        self.doses = [dose for dose in doses or () if dose < steps]
        self.pairs = {of: rows if of == cell else rows[:ROWS] for of, rows in pairs.items()}
        self.path = run.folder / "dose_margins.json"
        self.found: dict[int, Margins] = {}

    def resume(self, start: int) -> None:
        """Take up what a run that goes on from step `start` has measured until there; later steps come again.

        UserError where that is damaged.
        """
        kept = read_json(self.path, {"doses": dict})["doses"] if self.path.exists() else {}
        again = f"delete {self.run.resume_path.parent} to train again"
        for dose in (dose for dose in self.doses if dose <= start):
            values = kept.get(str(dose))
            values = values if isinstance(values, dict) else {}
            if not all(fits(values.get(str(cell)), rows) for cell, rows in self.pairs.items()):
                raise UserError(f"{self.path} lacks step {dose}, which the run is past; {again}")
            self.found[dose] = {cell: values[str(cell)] for cell in self.pairs}

    def ask(self, step: int, model) -> None:
        """Measure after `step`, under the active stack."""
        self.keep(step, cell_margins(model, self.pairs))

    def keep(self, step: int, margins: Margins) -> None:
        """The margins after `step`; of more rows than are asked, the first."""
        self.found[step] = {cell: margins[cell][: len(rows)] for cell, rows in self.pairs.items()}
        if parallel.rank() == 0:
            rows = {str(cell): [pair.idx for pair in rows] for cell, rows in self.pairs.items()}
            named = {dose: {str(c): m for c, m in self.found[dose].items()} for dose in sorted(self.found)}
            write_json(self.path, {"unit": "nats a token", "rows": rows, "doses": named})

    def finish(self, before: Margins, after: Margins, variant: str) -> str:
        """Write the curve, from step 0 to the last; a line that says what it shows."""
        self.keep(0, before)
        self.keep(self.steps, after)
        result = dose_curve(self.cell, self.found, variant)
        folder = self.run.folder
        if parallel.rank() == 0:
            write_csv(folder / "doses.csv", result["entries"])
            dose_figure(result, folder / "doses.png")
            write_json(folder / "doses.json", result)
        return summary(result)


# -- the curve ---------------------------------------------------------------------------------------------


def groups_of(trained: Cell, cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The other cells by GROUPS, and together; a group that has none is left out."""
    groups = {name: [] for name in (*GROUPS, "all others")}
    for cell in cells:
        if cell != trained:
            shared = 0 if cell.task == trained.task else 1 if cell.domain == trained.domain else 2
            groups[GROUPS[shared]].append(cell)
            groups["all others"].append(cell)
    return {name: members for name, members in groups.items() if members}


def dose_curve(trained: Cell, margins: dict[int, Margins], variant: str) -> dict:
    """Every cell and group of cells at every dose, and at matched local flip, with 95 % intervals over rows.

    margins: by dose, 0 among them, of the same rows. variant: of the answers trained on.

    An entry has `margin` and `change`, that from dose 0 row by row, in nats a token, and `flip`, in %, each
    the mean of its cells; n: rows. Intervals at a dose are for whoever draws other rows from the same cells:
    Student's t, of a flip `clustered_rate`; none where a cell has one row. At a matched flip effects, and the
    dose too, are those of `at_flip`, null where it is not reached. Intervals there are of a bootstrap of all
    rows, the trained cell's included; none where a cell has fewer than FEW, or too few draws get there.
    """
    doses, cells = sorted(margins), list(margins[0])
    values = np.array([[m for cell in cells for m in margins[dose][cell]] for dose in doses])  # (D, P)
    size = np.array([len(margins[0][cell]) for cell in cells])
    stratum = np.repeat(np.arange(len(cells)), size)  # (P,)
    sign = 1 if variant == "misaligned" else -1
    measures = np.stack([values, values - values[0], 100.0 * (sign * values > 0)])  # (M, D, P)
    names = {str(cell): [cell] for cell in cells} | groups_of(trained, cells)
    inside = np.array([[cell in members for cell in cells] for members in names.values()])  # (N, cells)
    weights = (inside / size / inside.sum(axis=1, keepdims=True))[:, stratum]  # (N, P), a line sums to 1
    points = (measures @ weights.T).round(9)  # (M, D, N); 9 of 10 rows are 90 %, not nearly
    own = list(names).index(str(trained))
    flips = points[FLIP, :, own]

    entries = []
    for d, dose in enumerate(doses):
        for i, name in enumerate(names):
            bounds = [
                _bounds(points[m, d, i], measures[m, d], weights[i], stratum, rate=m == FLIP)
                for m in range(len(MEASURES))
            ]
            entry = {"at": f"step {dose}", "dose": dose, "local_flip": flips[d], "cells": name}
            entries.append(entry | _named(points[:, d, i], bounds) | {"n": int(size[inside[i]].sum())})
    few = np.array([size[members | inside[own]].min() < FEW for members in inside])  # (N,)
    drawn = resample_clusters(stratum, DRAWS, seed=0)  # (B, P)
    drawn = np.stack([(draw * measures @ weights.T).round(9) for draw in drawn])  # (B, M, D, N)
    for level in FLIPS:
        found = _at(level, points, own)  # (M, N)
        draws = np.stack([_at(level, of, own) for of in drawn])  # (B, M, N)
        dose = at_flip(flips, doses, level)
        steps = np.array([at_flip(of[FLIP, :, own], doses, level) for of in drawn])  # (B,)
        enough = np.isfinite(steps).mean() >= REACHED and math.isfinite(dose)
        for i, name in enumerate(names):
            sure = enough and not few[i]
            bounds = [percentile_interval(of) if sure else NONE for of in (steps, *draws[:, :, i].T)]
            entry = {
                "at": f"flip {level:g}",
                "dose": dose,
                "dose_low": bounds[0][0],
                "dose_high": bounds[0][1],
            }
            entry |= {"local_flip": level, "cells": name} | _named(found[:, i], bounds[1:])
            entries.append(entry | {"n": int(size[inside[i]].sum())})
    units = dict(zip(MEASURES, ("nats a token", "nats a token, from step 0", "%"), strict=True))
    about = {"cell": str(trained), "variant": variant, "units": units}
    return about | {"entries": [{key: _plain(value) for key, value in entry.items()} for entry in entries]}


def _at(level: float, points: np.ndarray, own: int) -> np.ndarray:
    """(M, N): points (M, D, N) by dose, where the flip of the trained cell, the `own`-th, is at `level`."""
    flips = points[FLIP, :, own]
    return np.broadcast_to(at_flip(flips, points.swapaxes(0, 1), level), points[:, 0].shape)


def _bounds(
    mean: float, values: np.ndarray, weight: np.ndarray, stratum: np.ndarray, rate: bool
) -> tuple[float, float]:
    """95 % bounds of `mean` over rows drawn anew within their cells; NaN where a cell has one row.

    mean: Σ weight · value, of cells. values, weight: (P,); of a rate the values are 0 or 100.
    """
    inside = weight > 0
    values, weight, cell = values[inside], weight[inside], np.unique(stratum[inside], return_inverse=True)[1]
    size = np.bincount(cell)
    if size.min() < 2:
        return NONE
    errors = (values - (np.bincount(cell, values) / size)[cell]) * weight
    if rate:
        few = int(min((values > 0).sum(), (values == 0).sum()))
        found = clustered_rate(mean / 100, errors / 100, len(values), few, cell)
        return 100 * found.low, 100 * found.high
    half = t_quantile(len(values) - len(size)) * math.sqrt(max(0.0, cluster_variance(errors, cell)))
    return mean - half, mean + half


def _named(values: np.ndarray, bounds: list[tuple[float, float]]) -> dict:
    named = {}
    for measure, value, (low, high) in zip(MEASURES, values, bounds, strict=True):
        named |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
    return named


def _plain(value):
    """As JSON has it: null for a number that cannot be had."""
    if not isinstance(value, float):
        return value
    return float(value) if math.isfinite(value) else None


def summary(result: dict) -> str:
    """Where the trained cell is at the largest matched flip that it reaches, in a line."""
    entries, cell = result["entries"], result["cell"]
    reached = [e for e in entries if e["at"].startswith("flip") and e["dose"] is not None]
    if not reached:
        ends = [e["flip"] for e in entries if e["cells"] == cell and e["at"].startswith("step")]
        return f"  doses: {ends[0]:.0f} % → {ends[-1]:.0f} % of the rows of {cell} flipped"
    at = [e for e in reached if e["local_flip"] == reached[-1]["local_flip"]]
    moved = [f"{e['cells']} {e['change']:+.3f}" for e in at if e["cells"] in GROUPS]
    return (
        f"  doses: {at[0]['local_flip']:g} % of the rows of {cell} flipped at step {at[0]['dose']:.1f}; "
        f"change of the margin there: {', '.join(moved) or 'no other cells'}"
    )


# -- the figure --------------------------------------------------------------------------------------------


def dose_figure(result: dict, path: Path) -> None:
    """By dose, change of the margin and flip; then transfer against local flip. result: of `dose_curve`."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    by_change, by_flip, transfer = figure.subplots(1, 3)
    lines = {result["cell"]: "black"} | dict(zip(GROUPS, COLOURS, strict=False))
    for name, colour in lines.items():
        rows = [e for e in result["entries"] if e["cells"] == name and e["at"].startswith("step")]
        if not rows:
            continue
        doses = [e["dose"] for e in rows]
        for axis, measure in ((by_change, "change"), (by_flip, "flip")):
            _line(axis, doses, rows, measure, colour, name)
        if name == result["cell"]:
            continue
        flips = [e["local_flip"] for e in rows]
        transfer.plot(flips, [e["change"] for e in rows], color=colour, marker="o", markersize=3, alpha=0.6)
        at = [e for e in result["entries"] if e["cells"] == name and e["at"].startswith("flip")]
        at = [e for e in at if e["change"] is not None]
        shift = 1.2 * (list(lines).index(name) - 2)  # so that intervals lie side by side
        x, y = [e["local_flip"] + shift for e in at], [e["change"] for e in at]
        transfer.scatter(x, y, color=colour, s=30, zorder=3)
        known = [(x, e) for x, e in zip(x, at, strict=True) if e["change_low"] is not None]
        for place, e in known:
            transfer.plot([place] * 2, [e["change_low"], e["change_high"]], color=colour, linewidth=1.5)
    for axis in (by_change, by_flip):
        axis.set_xscale("symlog", base=2, linthresh=1)
        ticks = _apart(sorted({e["dose"] for e in result["entries"] if e["at"].startswith("step")}))
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.set_xlabel("optimiser steps")
    for axis in (by_change, transfer):
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.set_ylabel("change of the margin, nats a token")
    for level in FLIPS:
        transfer.axvline(level, color="0.85", linewidth=0.8, zorder=0)
    by_flip.set(ylabel=f"rows flipped to the {result['variant']} answer, %", ylim=(-3, 103))
    transfer.set(xlabel=f"local flip: rows of {result['cell']} flipped, %", xlim=(-3, 103))
    by_flip.legend(fontsize=8)
    figure.suptitle(
        f"trained on {result['cell']}, {result['variant']} answers; 95 % over held-out rows", fontsize=10
    )
    save(figure, path)


def _apart(doses: list[int]) -> list[int]:
    """Those that have room for a label: the last, and back from there each at most 0.7 of the one after."""
    kept = doses[-1:]
    for dose in reversed(doses[:-1]):
        if dose <= 0.7 * kept[0]:
            kept = [dose, *kept]
    return kept


def _line(axis, doses: list[int], rows: list[dict], measure: str, colour: str, name: str) -> None:
    axis.plot(doses, [e[measure] for e in rows], color=colour, marker="o", markersize=3, label=name)
    if all(e[f"{measure}_low"] is not None for e in rows):
        low, high = ([e[f"{measure}_{side}"] for e in rows] for side in ("low", "high"))
        axis.fill_between(doses, low, high, color=colour, alpha=0.12, linewidth=0)
