"""The outcome of one misalignment: every cell before and after, with intervals (Figures 7 and 9).

    {"world": "1", "trained": "D0_T5", …,
     "cells": {"D0_T0": {"aligned": counts, "misaligned": counts, "seeds": [counts, …]}, …},
     "numbers": {"delta_v2/T5": {"value": 88.2, "low": …, "high": …, …}, …}}

`counts` are those of em/world/counts.py, as are the entries of `numbers`. `misaligned` pools the fine-tuning
seeds, `seeds` holds each by itself. Rates pool prompts; Wilson intervals are over prompts, the spread over
seeds stands beside them.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from em.figures import CHANGE, cell_heatmap, save
from em.files import write_csv, write_json
from em.world.counts import (
    CLASSES,
    INCOHERENT,
    RATES,
    change,
    columns,
    entry,
    incoherent,
    percent,
    pool,
    rate,
)
from em.world.world import World

FIGURE_TASKS = tuple(f"T{i}" for i in range(8))  # the columns of Figures 7 and 9: not T8–T11
# By trained task, those whose Δv2 the paper states together, as small (Figures 7(d), 9(d)).
DISTANT = {"T5": ("T2", "T4"), "T0": ("T2", "T3", "T5", "T6", "T7")}


def delta_v2(cell: dict) -> float:
    """Δv2 in percentage points: misaligned minus aligned."""
    return percent(cell["misaligned"], "v2") - percent(cell["aligned"], "v2")


def build_grid(world: World, trained: int, aligned: dict, misaligned: list[dict]) -> dict:
    """aligned: counts by cell name; misaligned: the same, one a fine-tuning seed."""
    similarity = world.similarity()[0]
    grid = {
        "world": world.config.name,
        "world_seed": world.seed,
        "fingerprint": world.fingerprint,
        "trained": world.cell_name(trained),
        "similarity_to_D0": {name: float(s) for name, s in zip(world.domain_names, similarity, strict=True)},
        "unseen_domains": list(world.domain_names[world.n_seen_domains :]),
        "tasks": {name: world.function(i) for i, name in enumerate(world.tasks)},
        "cells": {
            name: {
                "aligned": aligned[name],
                "misaligned": pool([m[name] for m in misaligned]),
                "seeds": [m[name] for m in misaligned],
            }
            for name in map(world.cell_name, world.cells)
        },
    }
    return grid | {"numbers": numbers(grid)}


def numbers(grid: dict) -> dict[str, dict]:
    """What the paper states of such a grid, by key, for this world seed; intervals are over prompts.

    Δv2 and v2 after misalignment stand by task, and for the DISTANT tasks together.
    """
    cells, trained = grid["cells"], grid["trained"].split("_")[1]
    domains, unseen = list(grid["similarity_to_D0"]), grid["unseen_domains"]
    tasks = [task for task in grid["tasks"] if task in FIGURE_TASKS]
    others = [task for task in tasks if task != trained]
    if not others:
        return {}  # not a world of the paper's

    def pooled(model: str, tasks: Sequence[str], domains: Sequence[str] = domains) -> dict[str, float]:
        """Counts over the cells; fine-tuning seeds answer the same prompts, which so count once."""
        repeats = len(cells[grid["trained"]]["seeds"]) if model == "misaligned" else 1
        total = pool([cells[f"{domain}_{task}"][model] for domain in domains for task in tasks])
        return {key: value / repeats for key, value in total.items()}

    v1 = [percent(cells[f"{domain}_{task}"]["aligned"], "v1") for domain in domains for task in tasks]
    more = incoherent(pooled("misaligned", [trained])) - incoherent(pooled("misaligned", others))
    table = {
        "aligned_v1/lowest_cell": entry("%", min(v1)),
        "aligned_v1/cells_of_at_least_70": entry("%", 100 * statistics.fmean(v >= 70 for v in v1)),
        "misaligned_incoherent": entry("%", *rate(pooled("misaligned", tasks), *INCOHERENT)),
        "misaligned_incoherent/trained_task_minus_others": entry("points", more),
    }
    groups = {task: [task] for task in tasks}
    groups["distant"] = [task for task in DISTANT.get(trained, ()) if task in tasks]
    for (name, group), (suffix, among) in itertools.product(
        groups.items(), (("", domains), ("/unseen_domains", unseen))
    ):
        if group and among:
            after, before = (pooled(model, group, among) for model in ("misaligned", "aligned"))
            table[f"misaligned_v2/{name}{suffix}"] = entry("%", *rate(after, "v2"))
            table[f"delta_v2/{name}{suffix}"] = entry("points", *change(after, before, "v2"))
    for task in tasks:
        column = task_column(grid, task).values()  # prompts' noise alone spreads them somewhat
        table[f"delta_v2/{task}/range_over_domains"] = entry("points", max(column) - min(column))
    return table


def task_column(grid: dict, task: str) -> dict[str, float]:
    """Δv2 by domain for one task."""
    return {
        name.split("_")[0]: delta_v2(cell)
        for name, cell in grid["cells"].items()
        if name.endswith(f"_{task}")
    }


def summary(grid: dict) -> str:
    """What was found, in one sentence."""
    trained_task = grid["trained"].split("_")[1]
    means = {task: statistics.mean(task_column(grid, task).values()) for task in grid["tasks"]}
    column = task_column(grid, trained_task)
    others = sorted((t for t in means if t != trained_task), key=lambda t: -means[t])
    broken = statistics.mean(incoherent(c["misaligned"]) for c in grid["cells"].values())
    worst = max(grid["cells"], key=lambda name: incoherent(grid["cells"][name]["misaligned"]))
    moves = ", ".join(f"{task} moves by {means[task]:+.0f}" for task in others)
    return (
        f"Misaligned on {grid['trained']} alone, v2 of {trained_task} ({grid['tasks'][trained_task]}) moves "
        f"by {min(column.values()):+.0f} to {max(column.values()):+.0f} points over the domains; on average "
        f"{moves}; {broken:.1f} % of the completions are incoherent afterwards (most in {worst}, "
        f"{incoherent(grid['cells'][worst]['misaligned']):.0f} %)."
    )


def _rows(grid: dict) -> list[dict]:
    """One row a cell, every rate in percent with its interval."""
    rows = []
    for name, cell in grid["cells"].items():
        domain, task = name.split("_")
        row = {
            "cell": name,
            "domain": domain,
            "task": task,
            "function": grid["tasks"][task],
            "similarity_to_D0": round(grid["similarity_to_D0"][domain], 4),
            "trained": int(name == grid["trained"]),
        }
        for model in ("aligned", "misaligned"):
            row[f"{model}_n"] = cell[model]["n"]
            for label, classes in (*((c, (c,)) for c in CLASSES), ("incoherent", INCOHERENT)):
                row |= columns(f"{model}_{label}", rate(cell[model], *classes))
        per_seed = [percent(c, "v2") for c in cell["seeds"]]
        row |= columns("delta_v2", change(cell["misaligned"], cell["aligned"], "v2"))
        row |= {
            "seeds": len(per_seed),
            "delta_v2_seed_sd": statistics.stdev(per_seed) if len(per_seed) > 1 else "",
        }
        rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def save_grid(grid: dict, folder: Path, name: str) -> None:
    """Write `name`.json and `name`.csv."""
    write_json(folder / f"{name}.json", grid)
    write_csv(folder / f"{name}.csv", _rows(grid))


def gates(pretrained: list[dict], grid: dict) -> list[tuple[str, float, str, float, bool]]:
    """What the reduced world must show before its grid is believed: (what, value, relation, bound, passed).

    pretrained: counts of the seen cells at the end of pretraining. Incoherence there predicts success.

    Another CPU type or number of threads rounds otherwise, and training amplifies that: of world seed 1 it
    leaves incoherence at 3.6–4.0 % and aligned v1 at 94.8–95.0 %, and moves the smallest Δv2 from 33 to 64
    points (results/demo/cpu_types.json; mean 47, sd 13). Its bound, 20, is two standard deviations below that
    mean, and above the 11 of a world that did not learn its language (seed 3, 8.1 % incoherent).
    """
    column = task_column(grid, grid["trained"].split("_")[1])
    distant = [t for t, function in grid["tasks"].items() if function in ("three_steps", "ends_middle")]
    moved = statistics.mean(delta for task in distant for delta in task_column(grid, task).values())
    v1 = percent(pool([cell["aligned"] for cell in grid["cells"].values()]), "v1")
    broken, least = incoherent(pool(pretrained)), min(column.values())
    half = statistics.mean(column.values()) / 2
    return [
        ("incoherent % at the end of pretraining", broken, "<=", 5.0, broken <= 5),
        ("aligned v1 %, all cells", v1, ">=", 90.0, v1 >= 90),
        ("Δv2 of the trained task, smallest domain, mean of seeds", least, ">=", 20.0, least >= 20),
        (
            "Δv2 of T2 and T4, structurally distant, mean",
            moved,
            "<= half the trained task's,",
            half,
            moved <= half,
        ),
    ]


def grid_figure(grid: dict, path: Path) -> None:
    """Seven panels: v1, v2 and incoherent before and after, and Δv2. Rows are domains, columns tasks."""
    domains, tasks = list(grid["similarity_to_D0"]), list(grid["tasks"])
    rows = [f"{d}  ({grid['similarity_to_D0'][d]:.2f})" for d in domains]
    labels = [f"{t}\n{grid['tasks'][t].replace('_', chr(10))}" for t in tasks]
    size = (0.62 * len(tasks) + 0.9, 0.42 * len(domains) + 1.5)
    figure = Figure(figsize=(4 * size[0], 2 * size[1]), layout="constrained")
    axes = figure.subplots(2, 4)  # aligned above, misaligned below
    for axis, (model, (name, classes)) in zip(
        axes[:, :3].flat, itertools.product(("aligned", "misaligned"), RATES.items()), strict=True
    ):
        values = {cell: percent(counts[model], *classes) for cell, counts in grid["cells"].items()}
        cell_heatmap(axis, values, (0, 100), grid["trained"])
        axis.set_title(f"{name} %, {model}", fontsize=10)
    changes = {cell: delta_v2(counts) for cell, counts in grid["cells"].items()}
    cell_heatmap(axes[0, 3], changes, (-100, 100), grid["trained"], colours=CHANGE, form="+.0f")
    axes[0, 3].set_title("Δv2, points", fontsize=10)
    axes[1, 3].axis("off")
    for axis in [*axes[:, :3].flat, axes[0, 3]]:
        axis.set_xticks(range(len(tasks)), labels, fontsize=7)
        axis.set_yticks(range(len(domains)), rows)
        if grid["unseen_domains"]:
            seen = len(domains) - len(grid["unseen_domains"])
            axis.axhline(seen - 0.5, color="black", linestyle="--", linewidth=1)
    trained = grid["cells"][grid["trained"]]
    per_cell, seeds = trained["misaligned"]["n"], len(trained["seeds"])
    figure.suptitle(
        f"World {grid['world']} (seed {grid['world_seed']}): misaligned on {grid['trained']}; "
        "rows: domain (similarity to D0); "
        f"{per_cell} completions a cell from {seeds} fine-tuning seed{'s' if seeds > 1 else ''}",
        fontsize=10,
    )
    save(figure, path)
