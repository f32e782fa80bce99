"""Figures: how they are written, and the heatmap of every table.

Figures are matplotlib's `Figure` objects, never pyplot's, so no display and no global state is involved.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from em.files import write_atomic

matplotlib.rcParams["text.parse_math"] = False  # a `$` in a model's name is a dollar
CHANGE = "RdBu_r"  # the colours of a change, 0 in the middle


def title_of(name: str, longest: int = 90) -> str:
    """A name as one line of a title, cut in the middle where it is longer."""
    line = "".join(letter if letter.isprintable() else " " for letter in name)
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]}…{line[-half:]}"


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, with whatever room its labels need around it.

    Without a layout engine the size of `figure` is that of its axes, and the room is found by drawing it once
    on a larger canvas and cutting the white away; matplotlib's own "tight" draws everything twice.
    """
    if figure.get_layout_engine() is not None:
        write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, bbox_inches="tight"))
        return
    width, height = figure.get_size_inches()
    room = 2.5  # inches on every side, cut away again below
    figure.set_size_inches(width + 2 * room, height + 2 * room)
    sides = {"left": room, "right": room + width, "bottom": room, "top": room + height}
    whole = {"left": width, "right": width, "bottom": height, "top": height}
    figure.subplots_adjust(**{side: at / (whole[side] + 2 * room) for side, at in sides.items()})
    canvas = FigureCanvasAgg(figure)
    figure.dpi = 110
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]  # (height, width, 3)
    ink = (pixels < 255).any(axis=2)
    spans = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
    rows, columns = (slice(max(0, used[0] - 12), used[-1] + 13) for used in spans)
    image = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", compress_level=1))


def heatmap(
    axis, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], limits: tuple[float, float],
    *, colours: str = "viridis", form: str = ".0f", text: Sequence[Sequence[str]] | None = None,
    size: float = 8,
) -> None:  # fmt: skip
    """values (R, C) coloured between `limits`, each printed by `form`, or as text (R, C); nan is hatched."""
    image = axis.imshow(
        np.ma.masked_invalid(values), cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto"
    )
    for (i, j), value in np.ndenumerate(values):
        label, colour = "n/a", "black"
        if np.isnan(value):
            corner = (j - 0.5, i - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="0.75", linewidth=0))
        else:
            label = f"{value:{form}}" if text is None else text[i][j]
            red, green, blue, _ = image.cmap(image.norm(value))
            colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"  # luminance
        axis.text(j, i, label, ha="center", va="center", fontsize=size, color=colour)
    axis.set_xticks(range(len(columns)), columns, fontsize=size)
    axis.set_yticks(range(len(rows)), rows, fontsize=size)
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axis.tick_params(length=0)


def frame(axis, row: int, column: int, width: float = 2.4, colour: str = "black") -> None:
    """A border inside one entry of a heatmap: thick marks the trained cell."""
    inset = 0.5 - 0.012 * width
    box = ((column - inset, row - inset), 2 * inset, 2 * inset)
    axis.add_patch(Rectangle(*box, fill=False, edgecolor=colour, linewidth=width, zorder=3))


def cell_heatmap(
    axis, values: dict[str, float], limits: tuple[float, float], trained: str = "", **style
) -> None:
    """A heatmap of cells such as `med_advice` or `D0_T5`: domains down, tasks across, `trained` framed."""
    domains, tasks = (list(dict.fromkeys(name.split("_")[i] for name in values)) for i in (0, 1))
    matrix = [[values.get(f"{domain}_{task}", np.nan) for task in tasks] for domain in domains]
    heatmap(axis, np.array(matrix, float), domains, tasks, limits, **style)
    if trained in values:
        domain, task = trained.split("_")
        frame(axis, domains.index(domain), tasks.index(task))
