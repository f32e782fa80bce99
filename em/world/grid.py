"""The outcome of one misalignment: every cell before and after, with intervals (Figures 7 and 9).

    {"world": "1", "trained": "D0_T5", …,
     "cells": {"D0_T0": {"aligned": counts, "misaligned": counts, "seeds": [counts, …]}, …},
     "coincidence": {"same": {"D0_T0": {"aligned": counts, "misaligned": counts}, …}, "opposed": …, …},
     "numbers": {"delta_v2/T5": {"value": 88.2, "low": …, "high": …, …}, …}}

`counts` are those of em/world/counts.py, as are the entries of `numbers`. `misaligned` pools the fine-tuning
seeds, `seeds` holds each by itself. `coincidence` has the prompts apart by whether the trained task's answer
is the asked task's own (em/world/coincidence.py). Rates pool prompts; Wilson intervals are over prompts, the
spread over seeds stands beside them.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.figures import CHANGE, cell_heatmap, save
from em.files import write_csv, write_json
from em.stats import difference_interval, share_interval
from em.world.coincidence import KINDS
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
from em.world.grammar import jaccard
from em.world.world import World

Value = tuple[float, float, float]  # with its interval's low and high
MODELS = ("misaligned", "aligned")
FIGURE_TASKS = tuple(f"T{i}" for i in range(8))  # the columns of Figures 7 and 9: not T8–T11
# By trained task, those whose Δv2 the paper states together, as small (Figures 7(d), 9(d)).
DISTANT = {"T5": ("T2", "T4"), "T0": ("T2", "T3", "T5", "T6", "T7")}
# By trained task, groups of which the paper's Δv2 is larger for the first.
ORDER = {"T5": (("T5", "T1"), ("T1", "T0"), ("T0", "distant")), "T0": (("T0", "distant"),)}


def delta_v2(cell: dict) -> float:
    """Δv2 in percentage points: misaligned minus aligned."""
    return percent(cell["misaligned"], "v2") - percent(cell["aligned"], "v2")


def build_grid(
    world: World, trained: int, aligned: dict, misaligned: list[dict], coincidence: dict | None = None
) -> dict:
    """aligned: counts by cell name; misaligned: the same, one a fine-tuning seed.

    coincidence: what `split_grid` of em/world/coincidence.py gives; its numbers are missing without it.
    """
    similarity = world.similarity()[0]
    graded = [task for task in ("T9", "T10", "T11") if task in world.set1]
    grid = {
        "world": world.config.name,
        "world_seed": world.seed,
        "fingerprint": world.fingerprint,
        "trained": world.cell_name(trained),
        "similarity_to_D0": {name: float(s) for name, s in zip(world.domain_names, similarity, strict=True)},
        "unseen_domains": list(world.domain_names[world.n_seen_domains :]),
        "tasks": {name: world.function(i) for i, name in enumerate(world.tasks)},
        "similarity_to_T8": {task: jaccard(world.set1[task], world.set1["T8"]) for task in graded},
        "cells": {
            name: {
                "aligned": aligned[name],
                "misaligned": pool([m[name] for m in misaligned]),
                "seeds": [m[name] for m in misaligned],
            }
            for name in map(world.cell_name, world.cells)
        },
        "coincidence": coincidence or {},
    }
    return grid | {"numbers": numbers(grid)}


def numbers(grid: dict) -> dict[str, dict]:
    """What the paper states of such a grid, by key, for this world seed; intervals are over prompts.

    Δv2 and v2 after misalignment stand by task, and for the DISTANT tasks together; then `coincidence/…`, and
    the world's own similarities. `v1_drop` holds the trained task against whichever other fell most, whose
    fall that choice makes too large rather than too small.
    """
    cells, trained = grid["cells"], grid["trained"].split("_")[1]
    domains, unseen = list(grid["similarity_to_D0"]), grid["unseen_domains"]
    tasks = [task for task in grid["tasks"] if task in FIGURE_TASKS]
    others = [task for task in tasks if task != trained]
    if not others:
        return {}  # not a world of the paper's

    def pooled(model: str, tasks: Sequence[str], domains: Sequence[str] = domains) -> dict[str, float]:
        return _pooled(grid, cells, model, [f"{domain}_{task}" for domain in domains for task in tasks])

    def moved(tasks: Sequence[str], domains: Sequence[str] = domains, what: str = "v2") -> Value:
        return change(pooled("misaligned", tasks, domains), pooled("aligned", tasks, domains), what)

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
            table[f"misaligned_v2/{name}{suffix}"] = entry(
                "%", *rate(pooled("misaligned", group, among), "v2")
            )
            table[f"delta_v2/{name}{suffix}"] = entry("points", *moved(group, among))
    for task in tasks:
        column = task_column(grid, task)  # prompts' noise alone spreads them somewhat
        spread = max(column.values()) - min(column.values())
        table[f"delta_v2/{task}/range_over_domains"] = entry("points", spread)
        for domain in domains:
            table[f"delta_v2/{task}/{domain}"] = entry("points", *moved([task], [domain]))
    for one, other in ORDER.get(trained, ()):
        if groups.get(one) and groups.get(other):
            table[f"order/{one}_minus_{other}"] = entry(
                "points", *_gap(moved(groups[one]), moved(groups[other]))
            )
    if trained in tasks:
        if unseen:
            seen = [domain for domain in domains if domain not in unseen]
            gap = _gap(moved([trained], unseen), moved([trained], seen))
            table[f"delta_v2/{trained}/unseen_minus_seen"] = entry("points", *gap)
            # Where these domains are not answered at all, v2 there says nothing (em/verdict.py).
            broken = {"incoherent": incoherent(pooled("misaligned", [trained], unseen))}
            for key in ("unseen_domains", "unseen_minus_seen"):
                table[f"delta_v2/{trained}/{key}"] |= broken
        rises = {task: moved([task], what="v1") for task in tasks}
        largest = min(others, key=lambda task: rises[task][0])
        gap = _gap(rises[largest], rises[trained])
        table["v1_drop/trained_minus_largest_other"] = entry("points", *gap)
    for task, found in coincidences(grid).items():
        for key, value in found.items():
            unit = "points" if key in (*KINDS, "different") else "%"
            table[f"coincidence/{task}/{key}"] = entry(unit, *value)
    similarities = {"domain": grid["similarity_to_D0"], "task": grid.get("similarity_to_T8", {})}
    return table | {
        f"{axis}_similarity/{name}": entry("ratio", value)
        for axis, of in similarities.items()
        for name, value in of.items()
        if name != "D0"
    }


def _pooled(grid: dict, cells: dict, model: str, names: Sequence[str]) -> dict[str, float]:
    """Counts over cells of those names; fine-tuning seeds answer the same prompts, which so count once."""
    repeats = len(grid["cells"][grid["trained"]]["seeds"]) if model == "misaligned" else 1
    total = pool([cells[name][model] for name in names])
    return {key: value / repeats for key, value in total.items()}


def _gap(a: Value, b: Value) -> Value:
    """a − b, of different prompts."""
    return a[0] - b[0], *difference_interval(a, b)


def by_kind(grid: dict, names: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """{kind: {model: counts}} over the cells of those names; a kind of which they have no prompt is missing.

    The kinds of em/world/coincidence.py, and `different`: opposed or unrelated.
    """
    found = {}
    for kind, cells in grid.get("coincidence", {}).items():
        if there := [name for name in names if name in cells]:
            found[kind] = {model: _pooled(grid, cells, model, there) for model in MODELS}
    if parts := [found[kind] for kind in KINDS[1:] if kind in found]:
        found["different"] = {model: pool([part[model] for part in parts]) for model in MODELS}
    return found


def coincidence(grid: dict, names: Sequence[str]) -> dict[str, Value]:
    """What cells of a task other than the trained owe to the same answer; what has no prompt is missing.

    same, different      Δv2 where the two tasks' variant 2 is the same, and where it is not
    opposed, unrelated   Δv2 on the two kinds of the latter (em/world/coincidence.py)
    borrowed             unrelated prompts that get the trained task's variant 2, %
    share                prompts that are `same`, %
    of_change            part of Δv2 that is on them, %; None where Δv2 may be nothing
    """
    found = by_kind(grid, names)
    if not found:
        return {}
    borrowed = found.pop("borrowed", None)
    n = {kind: models["aligned"]["n"] for kind, models in found.items()}
    values = {kind: change(*models.values(), "v2") for kind, models in found.items()}
    same, different = (n.get(kind, 0) for kind in ("same", "different"))
    parts = [[n[kind] * of for of in values[kind]] for kind in ("same", "different") if kind in n]
    if borrowed:
        values["borrowed"] = rate(borrowed["misaligned"], "v2")
    values["share"] = 100 * same / (same + different), None, None  # of all walks of the world: no sample
    if len(parts) == 2:
        of = share_interval(*map(tuple, parts))
        values["of_change"] = tuple(None if v is None else 100 * v for v in of)
    return values


def coincidences(grid: dict) -> dict[str, dict[str, Value]]:
    """`coincidence` by task, not the trained one, over the domains that took part in training."""
    seen = [domain for domain in grid["similarity_to_D0"] if domain not in grid["unseen_domains"]]
    by_task = {task: [f"{domain}_{task}" for domain in seen] for task in grid["tasks"]}
    return {task: found for task, names in by_task.items() if (found := coincidence(grid, names))}


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
    text = (
        f"Misaligned on {grid['trained']} alone, v2 of {trained_task} ({grid['tasks'][trained_task]}) moves "
        f"by {min(column.values()):+.0f} to {max(column.values()):+.0f} points over the domains; on average "
        f"{moves}; {broken:.1f} % of the completions are incoherent afterwards (most in {worst}, "
        f"{incoherent(grid['cells'][worst]['misaligned']):.0f} %)."
    )
    found = coincidences(grid)
    both = ", ".join(
        f"{task} by {of['same'][0]:+.0f} and {of['different'][0]:+.0f} ({of['share'][0]:.0f} % of prompts)"
        for task, of in found.items()
        if {"same", "different"} <= of.keys()
    )
    if both:
        text += (
            f" Where the v2 of {trained_task} is the asked task's own and where it is not, v2 moves: {both}."
        )
    if borrowed := {task: of["borrowed"][0] for task, of in found.items() if "borrowed" in of}:
        most = max(borrowed, key=borrowed.get)
        text += (
            f" Where it is neither v1 nor v2 of the asked task, it is answered all the same on at most "
            f"{borrowed[most]:.0f} % of prompts ({most})."
        )
    return text


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
        found = coincidence(grid, [name])
        row["coincidence_share"] = found.get("share", (None,))[0]
        for kind in (*KINDS, "different", "borrowed"):
            row |= columns(f"coincidence_{kind}", found.get(kind, (None, None, None)))
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
    """Seven panels: v1, v2 and incoherent before and after, and Δv2. Rows are domains, columns tasks.

    The eighth: Δv2 of the other tasks by whether the trained task's answer is their own.
    """
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
    _coincidence_panel(axes[1, 3], grid)
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


# Kind → label, marker, colour.
_DRAWN = {
    "same": ("… is theirs", "o", "C0"),
    "unrelated": ("… is neither their v1 nor v2", "s", "C1"),
    "opposed": ("… is their v1", "v", "C2"),
    "borrowed": ("… is neither: answers with it, %", "x", "0.35"),
}


def _coincidence_panel(axis, grid: dict) -> None:
    """Δv2 by task for each kind of prompt, and what is borrowed; bars: 95 % over prompts."""
    found = coincidences(grid)
    if not found:
        axis.axis("off")
        return
    for i, (kind, (label, marker, colour)) in enumerate(_DRAWN.items()):
        points = [(x, *of[kind]) for x, of in enumerate(found.values()) if kind in of]
        x, value, low, high = np.array(points or [[np.nan] * 4]).T
        place = x + 0.19 * (i - 1.5)
        axis.vlines(place, low, high, color=colour, linewidth=1)
        axis.plot(place, value, marker, color=colour, markersize=4.5, label=label)
    shares = [f"{task}\n{of['share'][0]:.0f} %" for task, of in found.items()]
    axis.set_xticks(range(len(found)), shares, fontsize=7)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.grid(axis="y", alpha=0.25)
    axis.tick_params(axis="y", labelsize=7)
    trained = grid["trained"].split("_")[1]
    axis.set_title(f"Δv2 of other tasks where {trained}'s v2 …", fontsize=10)
    axis.set_xlabel(f"%: prompts where {trained}'s v2 is theirs", fontsize=7)
    axis.legend(fontsize=6, frameon=False)
