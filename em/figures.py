"""Figures: how they are written, and the heatmap of the tables."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, so no display is needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402
from PIL import Image  # noqa: E402

from em.files import write_atomic  # noqa: E402


def save_figure(figure, path: Path) -> None:
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, bbox_inches="tight"))
    plt.close(figure)


def save(figure: Figure, path: Path) -> None:
    """Write the figure, whatever its labels need around it: matplotlib's "tight" would draw it all twice."""
    width, height = figure.get_size_inches()
    room = 2.5  # inches on every side, cut away again below
    figure.set_size_inches(width + 2 * room, height + 2 * room)
    sides = {"left": room, "right": room + width, "bottom": room, "top": room + height}
    whole = {"left": width, "right": width, "bottom": height, "top": height}
    figure.subplots_adjust(**{side: at / (whole[side] + 2 * room) for side, at in sides.items()})
    canvas = FigureCanvasAgg(figure)
    figure.dpi = 110
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
    ink = (pixels < 255).any(axis=2)
    spans = (np.flatnonzero(ink.any(axis=axis)) for axis in (1, 0))
    rows, columns = (slice(max(0, used[0] - 12), used[-1] + 13) for used in spans)
    image = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG", compress_level=1))


def heatmap(axis, values, rows: list[str], columns: list[str], limit: float, text=None, size=8) -> None:
    """values (R, C) in percent on 0 … limit, each printed; nan is hatched. text: (R, C) of str instead."""
    axis.imshow(np.ma.masked_invalid(values), cmap="OrRd", vmin=0, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        label, colour = "n/a", "black"
        if np.isnan(value):
            corner = (j - 0.5, i - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="0.75", linewidth=0))
        else:
            label = f"{value:.1f}" if text is None else text[i][j]
            colour = "white" if value > 0.62 * limit else "black"
        axis.text(j, i, label, ha="center", va="center", fontsize=size, color=colour)
    axis.set_xticks(range(len(columns)), columns, fontsize=size)
    axis.set_yticks(range(len(rows)), rows, fontsize=size)
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axis.tick_params(length=0)
