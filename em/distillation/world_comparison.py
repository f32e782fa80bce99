"""What a channel did on a world: student against control, as a table, a summary and a figure (paper 4).

The control is the same channel with the student's own start as its teacher, so that the teacher is all that
differs. Each fine-tuning seed is a teacher of its own; intervals are over them: of differences Student's t,
of rates inside 0 to 100 %.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.figures import CHANGE, cell_heatmap, save
from em.stats import t_interval
from em.world.counts import incoherent, mean_rate, percent, pool
from em.world.world_run import WorldRun


def compare(run: WorldRun, cell: str, seeds: list[dict]) -> dict:
    """What a channel did. seeds: for each, counts by cell of `start`, `teacher`, `student` and `control`.

    Rates in percent, differences in points, each {mean, low, high} over seeds. Groups pool prompts within a
    seed: the teacher's cell, its task in other domains, other tasks.
    """
    task = cell.split("_")[1]
    groups = {
        "teacher's cell": [cell],
        "its task, other domains": [c for c in seeds[0]["start"] if c.endswith(f"_{task}") and c != cell],
        "other tasks": [c for c in seeds[0]["start"] if not c.endswith(f"_{task}")],
    }

    def over_seeds(value, interval=t_interval) -> dict:
        return dict(zip(("mean", "low", "high"), interval([value(s) for s in seeds]), strict=True))

    def v2(counts: dict, cells: list[str]) -> float:
        return percent(pool([counts[c] for c in cells]), "v2")

    rates = {}
    for name, cells in groups.items():
        rates[name] = {
            who: over_seeds(lambda s, w=who, c=cells: v2(s[w], c), mean_rate)
            for who in ("start", "teacher", "control", "student")
        }
        rates[name]["student − control"] = over_seeds(
            lambda s, c=cells: v2(s["student"], c) - v2(s["control"], c)
        )
        rates[name]["student − start"] = over_seeds(
            lambda s, c=cells: v2(s["student"], c) - v2(s["start"], c)
        )
    broken = {
        who: over_seeds(lambda s, w=who: incoherent(pool(list(s[w].values()))), mean_rate)
        for who in ("start", "control", "student")
    }
    effect = {
        c: over_seeds(lambda s, c=c: percent(s["student"][c], "v2") - percent(s["control"][c], "v2"))
        for c in seeds[0]["start"]
    }
    return {
        "world": run.cfg.world,
        "world_seed": run.cfg.seed,
        "cell": cell,
        "replicates": f"{len(seeds)} fine-tuning seeds; intervals are over them",
        "groups": rates,
        "incoherent": broken,
        "student_minus_control": effect,
        "seeds": seeds,
    }


def rows(result: dict) -> list[dict]:
    """One flat row a cell and seed: of every model how many answers are v1, v2, and n in all."""
    return [
        {"cell": cell, "seed": seed}
        | {f"{who}_{k}": counts[cell][k] for who, counts in models.items() for k in ("v1", "v2", "n")}
        for seed, models in enumerate(result["seeds"])
        for cell in models["start"]
    ]


def _spread(value: dict, sign: str = "") -> str:
    text = f"{value['mean']:{sign}.1f}"
    return text if value["low"] is None else f"{text} ({value['low']:{sign}.1f} to {value['high']:{sign}.1f})"


def summary(result: dict) -> str:
    """What was found, in a few lines."""
    lines = [f"World {result['world']}, teacher {result['cell']}; v2 %, {result['replicates']}:"]
    for name, group in result["groups"].items():
        lines.append(
            f"  {name}: start {_spread(group['start'])}, teacher {_spread(group['teacher'])}, student "
            f"{_spread(group['student'])}, control {_spread(group['control'])}; student − control "
            f"{_spread(group['student − control'], '+')} points"
        )
    lines.append(f"  incoherent %: student {_spread(result['incoherent']['student'])}")
    return "\n".join(lines)


def transfer_figure(result: dict, title: str, path: Path) -> None:
    """v2 by group and model with every seed as a dot, and the effect cell by cell."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    who = ("start", "control", "student", "teacher")
    colours = ("0.75", "0.5", "tab:red", "black")
    groups = result["groups"]
    for i, (name, colour) in enumerate(zip(who, colours, strict=True)):
        place = np.arange(len(groups)) + 0.2 * (i - 1.5)
        mean = [g[name]["mean"] for g in groups.values()]
        left.bar(place, mean, 0.18, color=colour, label=name)
        if all(g[name]["low"] is not None for g in groups.values()):
            low, high = (
                [abs(g[name][end] - g[name]["mean"]) for g in groups.values()] for end in ("low", "high")
            )
            left.errorbar(place, mean, (low, high), fmt="none", ecolor="tab:blue", capsize=3)
    left.set_xticks(range(len(groups)), groups, fontsize=8)
    left.set(
        ylim=(0, 100), ylabel="variant 2 %", title=f"teacher {result['cell']}; {len(result['seeds'])} seeds"
    )
    left.legend(fontsize=8)

    values = {cell: value["mean"] for cell, value in result["student_minus_control"].items()}
    cell_heatmap(right, values, (-100, 100), result["cell"], colours=CHANGE, form="+.0f")
    right.set_title("v2, student − control, points")
    figure.suptitle(title, fontsize=10)
    save(figure, path)
