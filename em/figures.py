"""Figures: the worlds' grid (Figures 7 and 9) and domain graphs (Figure 6), the margins of a fine-tune."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, so no display is needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.collections import LineCollection, PolyCollection  # noqa: E402

from em.grid import delta_v2, incoherent, percent  # noqa: E402
from em.run import write_atomic  # noqa: E402
from em.world import World  # noqa: E402


def save_figure(figure, path: Path) -> None:
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=130, bbox_inches="tight"))
    plt.close(figure)


def grid_figure(grid: dict, path: Path) -> None:
    """Seven panels: v1, v2 and incoherent before and after, and Δv2. Rows are domains, columns tasks."""
    domains, tasks = list(grid["similarity_to_D0"]), list(grid["tasks"])
    rows = [f"{d}  ({grid['similarity_to_D0'][d]:.2f})" for d in domains]
    columns = [f"{t}\n{grid['tasks'][t].replace('_', chr(10))}" for t in tasks]

    def panel(value) -> np.ndarray:
        return np.array([[value(grid["cells"][f"{d}_{t}"]) for t in tasks] for d in domains])

    panels = []
    for label, rate in (
        ("v1 %", lambda c: percent(c, "v1")),
        ("v2 %", lambda c: percent(c, "v2")),
        ("incoherent %", incoherent),
    ):
        for model in ("aligned", "misaligned"):
            panels.append(
                (f"{label}, {model}", panel(lambda c, r=rate, m=model: r(c[m])), "viridis", (0, 100))
            )
    panels.append(("Δv2, points", panel(delta_v2), "RdBu_r", (-100, 100)))

    size = (0.62 * len(tasks) + 0.9, 0.42 * len(domains) + 1.5)
    figure, axes = plt.subplots(2, 4, figsize=(4 * size[0], 2 * size[1]), layout="constrained")
    places = [axes[i % 2, i // 2] for i in range(6)] + [axes[0, 3]]
    axes[1, 3].axis("off")
    trained_domain, trained_task = grid["trained"].split("_")
    for axis, (title, values, colours, limits) in zip(places, panels, strict=True):
        axis.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            dark = abs(value) > 60 if colours == "RdBu_r" else value < 55
            text = f"{value:+.0f}" if colours == "RdBu_r" else f"{value:.0f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        box = (tasks.index(trained_task) - 0.5, domains.index(trained_domain) - 0.5)
        axis.add_patch(plt.Rectangle(box, 1, 1, fill=False, edgecolor="black", linewidth=3))
        if grid["unseen_domains"]:
            axis.axhline(
                len(domains) - len(grid["unseen_domains"]) - 0.5, color="black", linestyle="--", linewidth=1
            )
        axis.set_xticks(range(len(tasks)), columns, fontsize=7)
        axis.set_yticks(range(len(domains)), rows, fontsize=8)
        axis.set_title(title, fontsize=10)
    per_cell = sum(
        next(iter(grid["cells"].values()))["misaligned"][c] for c in ("v1", "v2", "other", "unparseable")
    )
    seeds = len(next(iter(grid["cells"].values()))["seeds"])
    figure.suptitle(
        f"World {grid['world']} (seed {grid['world_seed']}): misaligned on {grid['trained']}; "
        "rows: domain (similarity to D0); "
        f"{per_cell} completions a cell from {seeds} fine-tuning seed{'s' if seeds > 1 else ''}",
        fontsize=10,
    )
    save_figure(figure, path)


def graph_figure(world: World, path: Path) -> None:
    """Figure 6: each domain's graph under each task; wide edges are likely, red dashed ones deleted."""
    n_domains, n_tasks, n = len(world.domains), len(world.tasks), world.config.domain_steps
    angle = 2 * np.pi * np.arange(n) / n
    xy = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    figure, axes = plt.subplots(
        n_domains, n_tasks, figsize=(2.4 * n_tasks, 2.4 * n_domains), squeeze=False, layout="constrained"
    )
    for (d, t), axis in np.ndenumerate(axes):
        before, after = world.domains[d].transitions, world.cell_domain(world.cell(d, t)).transitions
        source, target = np.nonzero(before)
        p = after[source, target]
        way = xy[target] - xy[source]
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        tip, tail = xy[target] - 0.09 * way, xy[source] + 0.09 * way  # clear of the nodes
        across = 0.03 * way[:, ::-1] * (1, -1)
        heads = np.stack([tip, tip - 0.08 * way + across, tip - 0.08 * way - across], axis=1)
        kept = np.column_stack([np.full((len(p), 3), 0.3), 0.25 + 0.7 * p])
        colours = np.where(p[:, None] > 0, kept, (1.0, 0.0, 0.0, 0.8))
        lines, widths = np.stack([tail, tip], axis=1), np.where(p > 0, 0.4 + 3 * p, 0.8)
        for style, chosen in (("-", p > 0), ("--", p == 0)):
            drawn = dict(colors=colours[chosen], linewidths=widths[chosen], linestyles=style)
            axis.add_collection(LineCollection(lines[chosen], **drawn))
        axis.add_collection(PolyCollection(heads, facecolors=colours, linewidths=0))
        axis.scatter(*xy.T, s=60, color="tab:blue", zorder=3)
        for i in range(n):
            axis.text(*xy[i], str(i), fontsize=5, color="white", ha="center", va="center", zorder=4)
        axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), xticks=[], yticks=[], aspect="equal")
        if d == 0:
            axis.set_title(f"{world.tasks[t]} {world.function(t)}", fontsize=8)
        if t == 0:
            axis.set_ylabel(f"D{d}", fontsize=9)
    save_figure(figure, path)


def margin_figure(result: dict, path: Path) -> None:
    """Mean margin of every cell before and after a run, and its change; domains down, tasks across."""
    cells = result["cells"]
    domains = list(dict.fromkeys(name.split("_")[0] for name in cells))
    tasks = list(dict.fromkeys(name.split("_")[1] for name in cells))
    figure, axes = plt.subplots(1, 3, figsize=(4 * 3, 0.7 * max(1, len(domains)) + 1.4), layout="constrained")
    for axis, when in zip(axes, ("before", "after", "change"), strict=True):
        values = np.full((len(domains), len(tasks)), np.nan)
        for name, row in cells.items():
            domain, task = name.split("_")
            values[domains.index(domain), tasks.index(task)] = row[when]["mean"]
        limit = np.nanmax(np.abs(values))
        axis.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = abs(value) > 0.6 * limit
                axis.text(
                    j,
                    i,
                    f"{value:+.2f}",
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if dark else "black",
                )
        if result["cell"] in cells:
            domain, task = result["cell"].split("_")
            box = (tasks.index(task) - 0.5, domains.index(domain) - 0.5)
            axis.add_patch(plt.Rectangle(box, 1, 1, fill=False, edgecolor="black", linewidth=3))
        axis.set_xticks(range(len(tasks)), tasks, fontsize=8)
        axis.set_yticks(range(len(domains)), domains, fontsize=8)
        axis.set_title(f"margin {when}", fontsize=10)
    figure.suptitle(
        f"trained on {result['cell']}: log p of misaligned − aligned answer, nats a token", fontsize=10
    )
    save_figure(figure, path)
