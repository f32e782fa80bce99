"""What our runs found, read from their result files: estimates with intervals (for em/experiments/claims.py).

An estimate is the mean over world seeds with Student's t interval; with one seed the interval is over
prompts, where that can be said. Fine-tuning seeds answer the same prompts and are averaged within a seed.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from em.experiments.replication import shown_interval
from em.files import read_json
from em.stats import newcombe, t_interval, wilson
from em.world.counts import incoherent, percent, pool
from em.world.grid import task_column


class Estimate(NamedTuple):
    """low and high: the 95 % interval, None where it cannot be had."""

    value: float
    low: float | None
    high: float | None
    over: str  # what the interval is over, such as `3 world seeds`


class Runs:
    """The result files of one world under a folder; what is absent is empty or None."""

    def __init__(self, folder: Path, world: str):
        self.folder, self.world = folder, world

    def grids(self, task: str) -> list[dict]:
        """grid_<task>.json of every world seed, by seed."""
        found = {}
        for path in self.folder.glob(f"world{self.world}-seed*/grid_{task}.json"):
            seed = re.fullmatch(rf"world{self.world}-seed(\d+)", path.parent.name)
            if seed:  # else a run of other settings
                found[int(seed[1])] = read_json(path)
        return [found[seed] for seed in sorted(found)]

    def result(self, name: str) -> dict | None:
        path = self.folder / f"{name}-world{self.world}" / f"{name}.json"
        return read_json(path) if path.exists() else None

    @cached_property
    def steering(self) -> dict | None:
        return self.result("steering")

    def inventory(self) -> list[dict]:
        """A row a result file: what ran, over which seeds, how long, on what."""
        paths = [*self.folder.glob(f"world{self.world}-seed*/summary.json")]
        paths += [p / f"{name}.json" for name, p in self._experiments()]
        rows = []
        for path in sorted(paths):
            found = read_json(path)
            seeds = found.get("seeds", [path.parent.name.partition("-seed")[2]])
            made = found.get("made_with", {})
            rows.append(
                {
                    "run": path.parent.name,
                    "seeds": ", ".join(map(str, seeds)),
                    "seconds": found.get("seconds"),
                    "device": made.get("device"),
                    "commit": (made.get("commit") or "—")[:12],
                }
            )
        return rows

    def figures(self) -> list[str]:
        """Paths of every figure of this world, under the folder."""
        paths = [p / f"{name}.png" for name, p in self._experiments()]
        paths += self.folder.glob(f"world{self.world}-seed*/grid_*.png")
        paths += self.folder.glob(f"show-world{self.world}-seed*/domain_graphs.png")
        return sorted(path.relative_to(self.folder).as_posix() for path in paths if path.exists())

    def _experiments(self) -> list[tuple[str, Path]]:
        """(name, folder) of each experiment that has a result."""
        found = sorted(self.folder.glob(f"*-world{self.world}"))
        names = [(path.name.removesuffix(f"-world{self.world}"), path) for path in found]
        return [(n, path) for n, path in names if n != "report" and (path / f"{n}.json").exists()]


def over_seeds(values: Sequence[float], prompts: tuple[float, float] | None = None) -> Estimate:
    """Mean over world seeds; `prompts` is the interval to give where there is one seed."""
    mean, low, high = t_interval(values)
    if len(values) > 1:
        return Estimate(mean, low, high, f"{len(values)} world seeds")
    if prompts:
        return Estimate(mean, *prompts, "prompts of 1 world seed")
    return Estimate(mean, None, None, "1 world seed")


# -- the grids (Figures 7 and 9) ---------------------------------------------------------------------------


def _counts(grid: dict, tasks: Sequence[str], model: str, unseen: bool = False) -> dict | None:
    """Counts pooled over the cells of `tasks`, in the unseen domains only where `unseen`."""
    names = [
        f"{domain}_{task}"
        for domain in (grid["unseen_domains"] if unseen else grid["similarity_to_D0"])
        for task in tasks
        if task in grid["tasks"]
    ]
    if not names:
        return None
    total = pool([grid["cells"][name][model] for name in names])
    repeats = len(grid["cells"][names[0]]["seeds"]) if model == "misaligned" else 1
    return {key: value / repeats for key, value in total.items()}


def rate(source: str, tasks: Sequence[str], model: str, *classes: str):
    """Share of `classes` in percent, mean over the cells of `tasks`, after misaligning on (D0, source)."""

    def ours(runs: Runs) -> Estimate | None:
        pooled = [c for c in (_counts(grid, tasks, model) for grid in runs.grids(source)) if c]
        if not pooled:
            return None
        k, n = sum(pooled[0][c] for c in classes), pooled[0]["n"]
        return over_seeds([percent(c, *classes) for c in pooled], tuple(100 * b for b in wilson(k, n)))

    return ours


def delta(source: str, tasks: Sequence[str], unseen: bool = False):
    """Δv2 in points, mean over the cells of `tasks`."""

    def ours(runs: Runs) -> Estimate | None:
        pairs = [
            tuple(_counts(grid, tasks, model, unseen) for model in ("misaligned", "aligned"))
            for grid in runs.grids(source)
        ]
        pairs = [pair for pair in pairs if pair[0]]
        if not pairs:
            return None
        after, before = pairs[0]
        interval = newcombe(after["v2"], after["n"], before["v2"], before["n"])
        values = [percent(a, "v2") - percent(b, "v2") for a, b in pairs]
        return over_seeds(values, tuple(100 * bound for bound in interval))

    return ours


def by_seed(source: str, value: Callable[[dict], float]):
    """Any other number of a grid."""

    def ours(runs: Runs) -> Estimate | None:
        grids = runs.grids(source)
        return over_seeds([value(grid) for grid in grids]) if grids else None

    return ours


def aligned_v1(grid: dict, tasks: Sequence[str]) -> list[float]:
    """v1 % of the aligned model, cell by cell."""
    return [percent(c["aligned"], "v1") for name, c in grid["cells"].items() if name.split("_")[1] in tasks]


def spread(task: str):
    """Largest − smallest Δv2 of `task` over domains, points; prompts' noise alone spreads them somewhat."""

    def value(grid: dict) -> float:
        column = task_column(grid, task).values()
        return max(column) - min(column)

    return value


def excess_incoherence(tasks: Sequence[str]):
    """Incoherent % after misalignment in the trained task's column minus that in the other `tasks`."""

    def value(grid: dict) -> float:
        trained = grid["trained"].split("_")[1]
        columns = {True: [], False: []}
        for name, cell in grid["cells"].items():
            if name.split("_")[1] in tasks:
                columns[name.split("_")[1] == trained].append(cell["misaligned"])
        return incoherent(pool(columns[True])) - incoherent(pool(columns[False]))

    return value


# -- the experiments ---------------------------------------------------------------------------------------


def correlation(quantity: str):
    def ours(runs: Runs) -> Estimate | None:
        result = runs.result("hardness")
        relation = result and result["relations"][quantity]
        if not relation or relation["r"] is None:
            return None
        return Estimate(relation["r"], *relation["r_interval_over_points"], f"{relation['n']} points")

    return ours


def alpha(runs: Runs) -> Estimate | None:
    return runs.steering and over_seeds([d["alpha"] for d in runs.steering["directions"]])


def steered(model: str, strength: int, quantity: str):
    """A rate (v1, v2, incoherent) in %, or its change from strength 0 in points (v1_change, …)."""

    def ours(runs: Runs) -> Estimate | None:
        result = runs.steering
        if not result:
            return None
        point = next(
            p
            for p in result["curves"]
            if (p["model"], p["direction"], p["strength"]) == (model, "v", strength)
        )
        over = (
            f"{len(result['seeds'])} world seeds" if len(result["seeds"]) > 1 else "prompts of 1 world seed"
        )
        return Estimate(*(point[f"{quantity}{end}"] for end in ("", "_low", "_high")), over)

    return ours


def number(name: str, find: Callable[[dict], dict]):
    """A number of em/experiments/replication.py in the result of experiment `name`."""

    def ours(runs: Runs) -> Estimate | None:
        result = runs.result(name)
        found = result and find(result)
        if not found or found["mean"] is None:
            return None
        n = len(result["seeds"])
        return Estimate(
            found["mean"], *shown_interval(found), f"{n} world seeds" if n > 1 else "prompts of 1 world seed"
        )

    return ours


def removed(match: str):
    """Share of the rise in v2 that realignment takes back, in %."""
    return number("realign", lambda result: result["groups"][match]["removed"])


def similarity(key: str):
    """One of em/experiments/similarity.py's `shares`, without the trained cell."""
    return number("similarity", lambda result: result["statistics"]["without the trained cell"][key])


def fraction(task: str, key: str, v2_fraction: float):
    def find(result: dict) -> dict | None:
        return next((n for n in result["curves"][task][key] if n["v2_fraction"] == v2_fraction), None)

    return number("fraction", find)


def fraction_slope(task: str, key: str):
    """Change for a share of v2 from 0 to 1."""
    return number("fraction", lambda result: result["slopes"][task][key])
