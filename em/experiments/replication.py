"""What every experiment shares: a number over its replications, with intervals, and a result's header.

    {"mean": …, "low": …, "high": …,        over world seeds: Student's t, and of rates one inside [0, 100]
     "by_seed": […], "prompts": [[low, high], …]}        one value a seed, and its interval over prompts

With one world seed there are no bounds over seeds, and the interval shown is the one over prompts.
`shown` is the entry of a result's `numbers` that the report of em/experiments/comparison.py reads.

The world seed is the unit of claims about training, a prompt that of claims about one model. An interval
over prompts is a parametric bootstrap: every rate is drawn again from its Jeffreys posterior
Beta(v2 + ½, rest + ½), shifted to have the observed rate as its mean, cells independent, and the number is
computed anew from the drawn rates. Unshifted, the posterior's pull towards one half would add up over the
many cells of a mean whose rates are near 0. Resampling adds noise, so the interval of a share of variance
leans to the side of less structure.
"""

import math
from collections.abc import Sequence

import numpy as np

from em.stats import percentile_interval
from em.world.counts import entry, over_seeds, pool, tally
from em.world.doses import dose_classes
from em.world.world_run import WorldRun

DRAWS = 2000


def header(experiment: str, run: WorldRun, seeds: Sequence[int], note: str, **more) -> dict:
    """What a result begins with. run: any of its runs; more: what else is common to all of them."""
    names = {"experiment": experiment, "world": run.cfg.world, "seeds": list(seeds)}
    return names | {"fine_tuning_seeds": run.cfg.misalign_seeds, "note": note} | more


def averaged(counts: list[dict[str, dict]]) -> dict[str, dict]:
    """Counts by cell, mean over fine-tuning seeds: they answer the same prompts, which so count once."""
    return {
        name: {key: total / len(counts) for key, total in pool([c[name] for c in counts]).items()}
        for name in counts[0]
    }


def asked_along(
    run: WorldRun, task: str, of: str = "", others: Sequence[int] | None = None
) -> list[tuple[np.ndarray, dict[int, np.ndarray]]]:
    """What `dose_classes` of em/world/doses.py gives, one a fine-tuning seed.

    others: the cells asked beside the trained one, by default all; of: what they are, in the name of a
    curve's folder.
    """
    ends = f"_{of}" if of else ""
    return [
        dose_classes(run, task, seed, name=f"doses_{task}_seed{seed}{ends}", others=others)
        for seed in range(run.cfg.misalign_seeds)
    ]


def counts_along(run: WorldRun, curves: list[tuple[np.ndarray, dict]]) -> dict[int, dict]:
    """Counts by cell at every dose, mean over the fine-tuning seeds of `asked_along`."""
    cells = run.prompts.examples.cell
    by_seed = [
        {dose: tally(run.world, cells[places], of) for dose, of in classes.items()}
        for places, classes in curves
    ]
    return {dose: averaged([counts[dose] for counts in by_seed]) for dose in by_seed[0]}


def v2_draws(counts: list[dict], *seed: int) -> np.ndarray:
    """(cells, DRAWS) v2 in percent around each cell's rate, as far as its count leaves it open.

    seed: numbers that name the model, since draws of one seed go up and down together.
    """
    k = np.array([[c["v2"]] for c in counts], float)
    n = np.array([[c["n"]] for c in counts], float)
    drawn = np.random.default_rng(seed).beta(k + 0.5, n - k + 0.5, (len(counts), DRAWS))
    return 100 * (drawn + k / n - (k + 0.5) / (n + 1))


def over_prompts(draws: np.ndarray) -> list[float | None]:
    """[low, high] of a number's bootstrap draws (DRAWS,); None where no draw is finite."""
    return [bound if np.isfinite(bound) else None for bound in percentile_interval(np.asarray(draws))]


def replicated(
    by_seed: Sequence[float | None], prompts: Sequence[Sequence[float | None]], rate: bool = False
) -> dict:
    """A number over world seeds; a seed where it cannot be had (None) takes no part in the mean.

    rate: it is one in percent, so that no interval leaves [0, 100]: that over prompts is cut there.
    """
    known = [value for value in by_seed if value is not None]
    mean, low, high = over_seeds(known, rate) if known else (None, None, None)
    least, most = (0.0, 100.0) if rate else (-math.inf, math.inf)
    listed = [[b if b is None else min(max(b, least), most) for b in interval] for interval in prompts]
    return {"mean": mean, "low": low, "high": high, "by_seed": list(by_seed), "prompts": listed}


def curve_of(rows: list[dict], x: str, key: str, rate: bool = False) -> list[dict]:
    """A number at each value of column `x`, which stands beside it; in the rows' order, a row a seed.

    rate: as of `replicated`.
    """
    return [
        {x: place} | number_of([row for row in rows if row[x] == place], key, rate)
        for place in dict.fromkeys(row[x] for row in rows)
    ]


def number_of(rows: list[dict], key: str, rate: bool = False) -> dict:
    """A column of rows, one a world seed, as a number, with its `…_low` and `…_high` over prompts."""
    prompts = [(row.get(f"{key}_low"), row.get(f"{key}_high")) for row in rows]
    return replicated([row[key] for row in rows], prompts, rate)


def shown_interval(number: dict) -> tuple[float | None, float | None]:
    """The interval to show: over world seeds, or over prompts where there is one seed."""
    if number["low"] is None and len(number["prompts"]) == 1:
        low, high = number["prompts"][0]
        return low, high
    return number["low"], number["high"]


def shown(unit: str, number: dict) -> dict:
    """A number as an entry of a result's `numbers` (em/world/counts.py), with its values by world seed."""
    made = entry(unit, number["mean"], *shown_interval(number), seeds=len(number["by_seed"]))
    return made | {"by_seed": number["by_seed"]}


def say_number(number: dict, form: str = "+.1f") -> str:
    """`+23.1 [+20.0, +26.2]`, with the interval to show."""
    if number["mean"] is None:
        return "—"
    low, high = shown_interval(number)
    bounds = "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
    return f"{number['mean']:{form}}{bounds}"


def say_unit(seeds: Sequence[int]) -> str:
    """What the shown intervals are over."""
    if len(seeds) == 1:
        return f"95 % over prompts, world seed {seeds[0]}"
    return f"95 % over world seeds {', '.join(map(str, seeds))}"


def line_with_seeds(axis, x: Sequence[float], curve: list[dict], colour: str, label: str, shift=0.0) -> None:
    """A line through the numbers, a bar for each one's interval, and thin lines for several single seeds.

    shift: of the bars along x, to set those of several lines side by side.
    """
    mean, low, high = np.array([(n["mean"], *shown_interval(n)) for n in curve], float).T  # None is nan
    axis.plot(x, mean, "o-", color=colour, label=label, markersize=4)
    axis.vlines(np.asarray(x) + shift, low, high, color=colour, linewidth=1, alpha=0.6)
    by_seed = np.array([n["by_seed"] for n in curve], float).T  # (seeds, points)
    for values in by_seed if len(by_seed) > 1 else ():
        axis.plot(x, values, color=colour, linewidth=0.7, alpha=0.5)
