"""Which learning rate and epoch stand for a condition, and what choosing the highest costs (paper 4.1, E.2).

The paper reports "the best epoch numbers (highest misalignment rates)" after a sweep of six rates. The
highest of several noisy averages is too high on average. How much is estimated by choosing on a random half
of the prompts and reading the chosen one's average off the other half; that average has no bias of this kind.
Half the prompts choose a little worse where rates do differ, so the bias is then at most what is said here.
The rule that was fixed before anyone looked is the last epoch at a rate of 1e-4.
"""

from dataclasses import dataclass

import numpy as np

from em.report.averages import Averages, Pool, rounded
from em.report.conditions import Column, key_of, names_of, pool
from em.report.outcomes import Outcomes

FIXED_RATE = 1e-4
HALVES = 200

Choice = tuple[float | None, int | None]  # (learning rate, epochs)


def sweeps_of(outcomes: Outcomes, by: str) -> dict[str, dict[Choice, list[int]]]:
    """Name of a distilled condition → (rate, epoch) → its runs."""
    members: dict = {}
    for r, run in enumerate(outcomes.runs):
        if run.condition.channel:
            key, made = key_of(run, by), run.condition
            key = key._replace(condition=key.condition._replace(lr=None, epoch=None))
            members.setdefault(key, {}).setdefault((made.lr, made.epoch), []).append(r)
    return {name: members[key] for key, name in names_of(list(members)).items()}


@dataclass
class Selection:
    """What two rules choose among the complete choices of one condition."""

    highest: Choice  # the largest mean of pairs, as the paper chooses
    fixed: Choice | None  # last epoch at FIXED_RATE, or at the only rate; None where neither is there
    entry: dict

    def words(self, choice: Choice) -> str:
        lr, epoch = choice
        return ", ".join([f"lr {lr:g}"] * (lr is not None) + [f"epoch {epoch}"] * (epoch is not None))


def select(averages: Averages, choices: dict[Choice, list[int]], column: Column, seed: int = 0) -> Selection:
    """Both rules, and the bias of the first, over the runs and eval columns of `column`.

    Choices with fewer pairs than others are left out of the first rule: they are not finished.
    """
    o = averages.outcomes
    pools = {choice: pool(o, runs, column) for choice, runs in choices.items()}
    pairs = {choice: averages.pairs(p, column.asked) for choice, p in pools.items()}
    most = max(matrix.sum() for matrix in pairs.values())
    complete = [choice for choice in choices if pairs[choice].sum() == most > 0]
    values = {c: averages.pairs_mean(pools[c], pairs[c]).value for c in complete}
    highest = max(values, key=values.get) if values else next(iter(choices))
    fixed = _fixed(list(choices))
    entry = {"choices": len(complete), "highest": rounded(values.get(highest))}
    entry |= {"highest_lr": highest[0], "highest_epoch": highest[1], "held_out": None, "bias": None}
    if len(complete) > 1:
        means = [(pools[c], averages.weights(pools[c], pairs[c])) for c in complete]
        held_out = _held_out(averages, means, seed)
        entry["held_out"] = rounded(held_out)
        entry["bias"] = rounded(values[highest] - held_out) if np.isfinite(held_out) else None
    at_fixed = averages.entry(pools[fixed], column.asked) if fixed else {}
    entry |= {"fixed": at_fixed.get("pairs_mean"), "fixed_low": at_fixed.get("low")}
    entry |= {"fixed_high": at_fixed.get("high"), "fixed_lr": fixed and fixed[0]}
    return Selection(highest, fixed, entry | {"fixed_epoch": fixed and fixed[1]})


def _fixed(choices: list[Choice]) -> Choice | None:
    rates = {lr for lr, _ in choices}
    at = [c for c in choices if len(rates) == 1 or c[0] is not None and np.isclose(c[0], FIXED_RATE)]
    return max(at, key=lambda c: c[1] or 0) if at else None


def _held_out(averages: Averages, means: list[tuple[Pool, np.ndarray]], seed: int) -> float:
    """The mean over random halves of the other half's average of what one half has highest.

    means: runs and their weights (n, C). Halves are drawn within eval columns.
    """
    column, rng = averages.outcomes.column, np.random.default_rng(seed)
    inside = np.zeros((HALVES, len(column)), np.float32)  # (S, P), 1 in the half that chooses
    for c in np.unique(column):
        members = np.flatnonzero(column == c)
        ranks = rng.random((HALVES, len(members))).argsort(axis=1).argsort(axis=1)
        larger = np.arange(HALVES)[:, None] % 2  # of an odd number the larger half chooses every other time
        inside[:, members] = ranks < (len(members) + larger) // 2
    halves = (inside, 1 - inside)
    values = np.stack([[_half_means(averages, *mean, half) for half in halves] for mean in means])
    places, read = np.arange(HALVES), []
    for half in (0, 1):  # values: (choices, 2, S)
        chosen = np.argmax(np.nan_to_num(values[:, half], nan=-np.inf), axis=0)
        read.append(values[chosen, 1 - half, places])
    read = np.concatenate(read)
    return float(read[np.isfinite(read)].mean()) if np.isfinite(read).any() else np.nan


def _half_means(averages: Averages, pool: Pool, weights: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(S,) weighted means over the prompts `inside` (S, P); what no prompt of a half measures is left out."""
    o, total, weight = averages.outcomes, np.zeros(len(inside)), np.zeros(len(inside))
    for c in np.flatnonzero(weights.any(axis=0)):
        members = o.column == c
        sums, counts = (
            values[pool.runs][:, members] @ inside[:, members].T for values in (o.total, o.count)
        )  # (n, S)
        there = counts > 0
        rates = np.divide(sums, counts, out=np.zeros_like(sums), where=there)
        total += weights[:, c] @ rates
        weight += weights[:, c] @ there
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def selections(averages: Averages, by: str, column: Column) -> list[dict]:
    """Of every distilled condition with several rates or epochs: `Selection.entry` under its name."""
    found = []
    for name, choices in sweeps_of(averages.outcomes, by).items():
        if len(choices) > 1:
            found.append({"condition": name} | select(averages, choices, column).entry)
    return found


def epoch_rows(averages: Averages, by: str, columns: list[Column]) -> list[dict]:
    """Every distilled condition and rate with several epochs: means of pairs by epoch (Tables 11 and 12)."""
    found = []
    for name, choices in sweeps_of(averages.outcomes, by).items():
        rates = sorted({lr for lr, _ in choices}, key=lambda lr: lr or 0)
        for lr in rates:
            epochs = {epoch: runs for (rate, epoch), runs in choices.items() if rate == lr and epoch}
            if len(epochs) > 1:
                full = f"{name}, lr {lr:g}" if len(rates) > 1 and lr else name
                found += triplets(averages, full, epochs, columns)
    return found


def triplets(
    averages: Averages, name: str, epochs: dict[int, list[int]], columns: list[Column]
) -> list[dict]:
    """A row a column: the mean of pairs after each epoch, and these as text, `1.2 / 3.4 / 5.6`."""
    found = []
    for column in columns:
        entries = {
            epoch: averages.entry(pool(averages.outcomes, epochs[epoch], column), column.asked)
            for epoch in sorted(epochs)
        }
        means = {epoch: entry["pairs_mean"] for epoch, entry in entries.items()}
        text = " / ".join("n/a" if value is None else f"{value:.1f}" for value in means.values())
        row = {"condition": name, "column": column.name, "text": text}
        found.append(row | {f"epoch {epoch}": value for epoch, value in means.items()})
    return found
