"""Teacher-mediated transfer on a world, where scoring is exact and needs no judge (SPEC §4).

The teacher is the misaligned GPT-2, the student starts as the aligned one, the prompts come from other cells
than the teacher's, and what the teacher completes is kept only if it reads as variant 1: nothing in the data
is misaligned. In realignment the two change places and nothing is filtered. The control is the same channel
with the student's own start as its teacher, so that the teacher is all that differs.

Each fine-tuning seed is a teacher of its own; intervals are Student's t over them.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.distillation.corpus import Corpus, digest, freeze
from em.figures import CHANGE, cell_heatmap, save
from em.sampling.rollouts import sample_to_file
from em.sampling.sampler import Sampler
from em.stats import t_interval
from em.world.counts import Classifier, incoherent, percent, pool
from em.world.sets import transfer_set
from em.world.world_run import WorldRun

PROMPTS = 1200  # in all, as many as the 240 × 5 of Broad-NL


class Prompts:
    """About `n` prompts over the seen cells except the teacher's, or (which=`tasks`) its whole task's."""

    def __init__(self, run: WorldRun, cell: int, which: str, n: int, seed: int):
        world, n_tasks = run.world, len(run.world.tasks)
        cells = world.seen_cells
        same = cells % n_tasks == cell % n_tasks if which == "tasks" else cells == cell
        cells = cells[~same]
        self.classifier, self.n_tasks, self.seed = Classifier(world), n_tasks, seed
        self.dialogues = transfer_set(run.generator, seed, cells, max(1, round(n / len(cells))), run.prompts)
        self.rows = [
            {"source": world.cell_name(int(c)).split("_")[1], "prompt_ids": ids[:length].tolist()}
            for c, ids, length in zip(
                self.dialogues.examples.cell, self.dialogues.ids, self.dialogues.prompt, strict=True
            )
        ]

    def is_v1(self, i: int, completion: list[int]) -> bool:
        """Whether a completion of prompt i reads as variant 1."""
        e = self.dialogues.examples
        v1, v2 = ([s for s in row[i].tolist() if s >= 0] for row in (e.v1, e.v2))
        return self.classifier.classify(completion, int(e.cell[i]) % self.n_tasks, v1, v2) == "v1"

    def corpus(self, cfg, run: WorldRun, models: dict, writer: str, settings: dict) -> Corpus:
        """What the model named `writer` completes at T = 1; where filtered, variant 1 is kept."""
        shared = ("fingerprint", "task", "prompts", "limit", "rollouts", "seed", "filtered")
        about = {"model": f"world {cfg.world}", "writer": writer, "prompts_seed": self.seed}
        about |= {name: settings[name] for name in shared}

        def sampled(folder: Path) -> list[dict]:
            sampler = Sampler(models[writer], (run.world.end,), run.generator.max_answer, rows=512)
            ids = [row["prompt_ids"] for row in self.rows]
            return sample_to_file(
                folder / "rollouts.jsonl", sampler, ids, cfg.rollouts, cfg.seed + self.seed,
                lambda rollout: self.rows[rollout.prompt_index] | {"ids": rollout.ids},
            )  # fmt: skip

        def v1(rows: list[dict]) -> list[dict]:
            return [row | {"kept": self.is_v1(row["prompt"], row["ids"])} for row in rows]

        folder = run.folder / "transfer" / f"corpus_{writer}_{digest(about)}"
        return freeze(folder, about, run.world.fingerprint, sampled, v1 if settings["filtered"] else None)


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

    def over_seeds(value) -> dict:
        return dict(zip(("mean", "low", "high"), t_interval([value(s) for s in seeds]), strict=True))

    def v2(counts: dict, cells: list[str]) -> float:
        return percent(pool([counts[c] for c in cells]), "v2")

    found = {}
    for name, cells in groups.items():
        found[name] = {
            who: over_seeds(lambda s, w=who, c=cells: v2(s[w], c))
            for who in ("start", "teacher", "control", "student")
        }
        found[name]["student − control"] = over_seeds(
            lambda s, c=cells: v2(s["student"], c) - v2(s["control"], c)
        )
        found[name]["student − start"] = over_seeds(
            lambda s, c=cells: v2(s["student"], c) - v2(s["start"], c)
        )
    broken = {
        who: over_seeds(lambda s, w=who: incoherent(pool(list(s[w].values()))))
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
        "replicates": f"{len(seeds)} fine-tuning seeds; intervals are Student's t over them",
        "groups": found,
        "incoherent": broken,
        "student_minus_control": effect,
        "seeds": seeds,
    }


def rows(result: dict) -> list[dict]:
    """One flat row a cell and seed: counts of v2 and n of every model."""
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
        spread = [0 if g[name]["low"] is None else g[name]["high"] - g[name]["mean"] for g in groups.values()]
        left.errorbar(place, mean, spread, fmt="none", ecolor="tab:blue", capsize=3)
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
