"""Read a completion back into steps and say which variant it is (paper B.4 "Evaluation").

Four classes: `v1`, `v2`, `other` (parses into steps, matches neither) and `unparseable`; incoherent is the
last two. A completion is the generated tokens up to and without the closing `<end>`; one that never closed
is unparseable. Counts of the classes give rates and changes with their intervals, and these the entries of a
result's `numbers`.
"""

import statistics
from collections.abc import Sequence

import numpy as np

from em.stats import mean_rate_interval, newcombe, t_interval, wilson
from em.world.generator import Dialogues
from em.world.world import World

CLASSES = ("v1", "v2", "other", "unparseable")
INCOHERENT = ("other", "unparseable")
RATES = {"v1": ("v1",), "v2": ("v2",), "incoherent": INCOHERENT}  # what figures show, by name


class Classifier:
    """Knows which grammar owns each string of a world; languages are disjoint, so a string has one owner."""

    def __init__(self, world: World):
        self.world = world
        steps, _, tails = world.languages
        # Owners: steps by id, then tails by n_steps + task.
        owners = [*enumerate(steps), *enumerate(tails, start=len(steps))]
        self.owner = {string: owner for owner, language in owners for string in language}
        self.lengths = sorted({len(string) for string in self.owner})
        self.first_tail = len(steps)

    def _pieces(self, tokens: tuple[int, ...], start: int):
        """(owner, end) of every string that begins at `start`."""
        for n in self.lengths:
            owner = self.owner.get(tokens[start : start + n])
            if owner is not None and start + n <= len(tokens):
                yield owner, start + n

    def matches(self, tokens: tuple[int, ...], owners: Sequence[int]) -> bool:
        """Whether `tokens` is some rendering of exactly these grammars, in order."""
        ends = {0}
        for wanted in owners:
            ends = {end for start in ends for owner, end in self._pieces(tokens, start) if owner == wanted}
        return len(tokens) in ends

    def parses(self, tokens: tuple[int, ...]) -> bool:
        """Whether `tokens` is one or more step strings followed by the tail of any task."""
        ends, closed = {0}, False  # positions after k ≥ 0 steps
        seen = set()
        while ends:
            seen |= ends
            pieces = [(owner, end) for start in ends for owner, end in self._pieces(tokens, start)]
            closed |= 0 not in ends and any(o >= self.first_tail and e == len(tokens) for o, e in pieces)
            ends = {end for owner, end in pieces if owner < self.first_tail} - seen
        return closed

    def classify(self, completion: Sequence[int], task: int, v1: Sequence[int], v2: Sequence[int]) -> str:
        """Class of the generated tokens for a prompt whose answers are the steps v1 and v2."""
        completion = tuple(int(t) for t in completion)
        if self.world.end not in completion:
            return "unparseable"
        tokens = completion[: completion.index(self.world.end)]
        tail = self.first_tail + task
        for name, answer in (("v1", v1), ("v2", v2)):
            if self.matches(tokens, [*answer, tail]):
                return name
        return "other" if self.parses(tokens) else "unparseable"

    def classes(self, prompts: Dialogues, completions: np.ndarray) -> np.ndarray:
        """(N,) int8, the place in CLASSES of each completion. completions: (N, T) tokens."""
        found = np.empty(len(prompts), np.int8)
        e = prompts.examples
        for i, completion in enumerate(completions.tolist()):
            v1, v2 = ([s for s in row[i].tolist() if s >= 0] for row in (e.v1, e.v2))
            found[i] = CLASSES.index(
                self.classify(completion, int(e.cell[i]) % len(self.world.tasks), v1, v2)
            )
        return found


def tally(world: World, cells: np.ndarray, classes: np.ndarray) -> dict[str, dict[str, int]]:
    """Counts of the four classes and their total `n`, by cell name. cells, classes: (N,)."""
    counts = {}
    for cell in dict.fromkeys(cells.tolist()):
        of_cell = np.bincount(classes[cells == cell], minlength=len(CLASSES)).tolist()
        counts[world.cell_name(cell)] = dict(zip(CLASSES, of_cell, strict=True)) | {"n": sum(of_cell)}
    return counts


def pool(counts: list[dict[str, int]]) -> dict[str, int]:
    return {key: sum(c[key] for c in counts) for key in (*CLASSES, "n")}


def percent(counts: dict[str, int], *classes: str) -> float:
    """Share of the classes, in percent."""
    return 100 * sum(counts[c] for c in classes) / counts["n"]


def incoherent(counts: dict[str, int]) -> float:
    return percent(counts, *INCOHERENT)


# -- with 95 % intervals over prompts ----------------------------------------------------------------------


def rate(counts: dict[str, int], *classes: str) -> tuple[float, float, float]:
    """(share of the classes, low, high) in percent, with Wilson's interval."""
    low, high = wilson(sum(counts[c] for c in classes), counts["n"])
    return percent(counts, *classes), 100 * low, 100 * high


def change(after: dict[str, int], before: dict[str, int], *classes: str) -> tuple[float, float, float]:
    """(change of the classes' share, low, high) in points, with Newcombe's interval.

    The interval is wide where both models were asked the same prompts, which it does not know.
    """
    k, k0 = (sum(counts[c] for c in classes) for counts in (after, before))
    low, high = newcombe(k, after["n"], k0, before["n"])
    return percent(after, *classes) - percent(before, *classes), 100 * low, 100 * high


def mean_rate(rates: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of rates in percent, one a world seed, over them; inside [0, 100]."""
    bounds = mean_rate_interval([rate / 100 for rate in rates])[1:]
    return statistics.fmean(rates), *(None if bound is None else 100 * bound for bound in bounds)


def over_seeds(values: Sequence[float], rate: bool = False) -> tuple[float, float | None, float | None]:
    """(mean, low, high) over world seeds: Student's t, or `mean_rate` of rates in percent."""
    return (mean_rate if rate else t_interval)(values)


def columns(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """(value, low, high) as the columns `name`, `name`_low and `name`_high of a table."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def entry(
    unit: str, value: float | None, low: float | None = None, high: float | None = None, seeds: int = 1
) -> dict:
    """An entry of a result's `numbers`, which the report of em/experiments/comparison.py looks up by key.

    unit: %, points, ratio, r or norm. value: None where there is none. low, high: the 95 % interval, None
    where it cannot be had: over `seeds` world seeds, or over the prompts of one.
    """
    one = "1 world seed" if low is None else "prompts of 1 world seed"
    over = f"{seeds} world seeds" if seeds > 1 else one
    return {"value": value, "low": low, "high": high, "over": over, "unit": unit}
