"""Transfer against local flip: an effect along the doses, over world seeds (ours; em/world/doses.py).

A *curve* is one world seed's list of (local flip %, effect) by dose, rising from dose 0, the aligned model:

    row |= dose_columns(flips, cross=effects)                  columns `flip_16`, `cross_16`, …, `cross@60`
    curve = curve_in(row, "cross")                             what they say, again
    numbers = at_flips([curve, …])                             {30.0: number, 60.0: …, 90.0: …}
    entries |= flip_entries("T0/delta_v2", "points", numbers)  `T0/delta_v2@30`, …@60, …@90
    transfer_curve(axis, {"T0": [curve, …], "T7": …})          a line a name, its band over world seeds

A seed whose trained cell never reaches a level takes no part there, so a number at 90 % may be of fewer
seeds than one at 30 %: the entry says how many.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from em.experiments.replication import replicated
from em.stats import FLIPS, at_flip, t_interval
from em.world.counts import entry

T = TypeVar("T")
Curve = Sequence[tuple[float, float | None]]
GRID = np.arange(0.0, 100.5, 2.0)  # flips at which a line is drawn


def effect_at(curve: Curve, level: float) -> float | None:
    """The effect where the flip first reaches `level`; None where it does not, or has no effect there."""
    flips, effects = zip(*((flip, math.nan if of is None else of) for flip, of in curve), strict=True)
    value = at_flip(flips, effects, level)
    return value if math.isfinite(value) else None


def dose_columns(flips: dict[int, float], **effects: dict[int, float]) -> dict[str, float | None]:
    """Columns of a row: `flip_<dose>`, `<effect>_<dose>`, and `<effect>@<level>` at each of FLIPS.

    flips, effects: by dose, rising from 0.
    """
    row = {f"flip_{dose}": flip for dose, flip in flips.items()}
    for name, of in effects.items():
        curve = list(zip(flips.values(), of.values(), strict=True))
        row |= {f"{name}_{dose}": value for dose, value in of.items()}
        row |= {f"{name}@{level:.0f}": effect_at(curve, level) for level in FLIPS}
    return row


def curve_in(row: dict, effect: str) -> Curve:
    """The curve of `effect` in a row with the columns of `dose_columns`."""
    doses = sorted(int(key.removeprefix("flip_")) for key in row if key.startswith("flip_"))
    return [(row[f"flip_{dose}"], row[f"{effect}_{dose}"]) for dose in doses]


def at_levels(effect: Callable[[T, float], float | None], worlds: Sequence[T]) -> dict[float, dict]:
    """{level: number over world seeds} at each of FLIPS (em/experiments/replication.py).

    effect: (what is known of a world, level) → its effect there; None where it does not reach the level.
    """
    nothing = [[None, None]] * len(worlds)  # over prompts: the flip has noise of its own
    return {level: replicated([effect(world, level) for world in worlds], nothing) for level in FLIPS}


def at_flips(curves: Sequence[Curve]) -> dict[float, dict]:
    """`at_levels` of the effect of curves, one a world seed."""
    return at_levels(effect_at, curves)


def flip_entries(key: str, unit: str, numbers: dict[float, dict]) -> dict[str, dict]:
    """Entries `<key>@30`, … of a result's `numbers`, each over the world seeds that reach that flip."""
    return {
        f"{key}@{level:.0f}": entry(
            unit, of["mean"], of["low"], of["high"], sum(v is not None for v in of["by_seed"])
        )
        for level, of in numbers.items()
    }


def transfer_curve(
    axis,
    curves: dict[str, Sequence[Curve]],
    label: str = "Δv2, points",
    place: int | None = None,
    colours: Sequence[str] | None = None,
) -> None:
    """A line a name: the mean effect over world seeds at each local flip; band: Student's 95 % over them.

    curves: by name, a curve a world seed. label: of the effect. place: of one dose in the curves, marked
    where its mean flip and mean effect are. A line ends where fewer than half of the seeds go on, a band
    where fewer than three do; two have intervals that would dwarf the rest.
    """
    means = [0.0]
    for i, (name, of) in enumerate(curves.items()):
        colour = f"C{i}" if colours is None else colours[i]
        at = np.array([[effect_at(curve, level) for level in GRID] for curve in of], float)  # None is nan
        reached = np.isfinite(at).sum(0)
        x, reached = GRID[2 * reached >= max(len(of), 1)], at[:, 2 * reached >= max(len(of), 1)].T
        known = [t_interval([float(v) for v in values if np.isfinite(v)]) for values in reached]
        if not known:
            axis.plot([], [], color=colour, label=name)
            continue
        mean, low, high = np.array(known, float).T
        axis.plot(x, mean, color=colour, label=name, linewidth=1.8)
        several = np.isfinite(reached).sum(1) >= 3
        axis.fill_between(x, low, high, several, color=colour, alpha=0.13, linewidth=0)
        means += mean.tolist()
        if place is not None:
            there = np.array([curve[place] for curve in of if curve[place][1] is not None], float)
            if len(there):
                axis.plot(*there.mean(0), "o", color=colour, markersize=6, markeredgecolor="white")
    for level in FLIPS:
        axis.axvline(level, color="0.75", linewidth=0.8, linestyle=":", zorder=0)
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    margin = 0.3 * (max(means) - min(means)) or 1.0
    axis.set(xlabel="local flip: v2 of the trained cell, %", ylabel=label, xlim=(0, 100))
    axis.set_ylim(min(means) - margin, max(means) + margin)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
