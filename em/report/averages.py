"""Means over (run, eval column) pairs and over pooled rows, and what to believe of their differences.

Two averages of the same rows. `pooled` is the sum of outcomes over the number of scored rows. `pairs_mean` is
the paper's (4.1, E.2.1): the mean over the (training cell, eval cell) pairs, each pair its own mean. They
differ where pairs have different numbers of scored rows, say by refusals. Runs that differ in nothing but the
seed are replicates of one pair: their means are averaged first.

Intervals are 95 % and analytic. Each average is linear in the prompts up to terms of second order, so its
variance is that of the prompts' contributions within their eval cell; one prompt's answers by all runs are
one contribution. That is the interval of *these runs* on other prompts: a rate's by em/clusters.py, which
stays between 0 and 100, a margin's by Student's t. Where every cell has three seeds or more, the variance
between seeds is added and what both count twice is taken off (Cameron, Gelbach and Miller 2011, two-way
clusters): *runs like these*. A difference of two averages joins their two intervals by the correlation that
they have through common prompts (Zou and Donner 2008; Newcombe 1998 for rates), so it is paired by prompt.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from em.clusters import LEAST_SEEDS, cluster_variance, clustered_rate, merged
from em.report.outcomes import PERCENT, Outcomes
from em.stats import difference_interval, rate_interval, t_quantile


@dataclass
class Pool:
    """Runs to be averaged over, by the cell that each belongs to; None stands for runs that have none."""

    cells: list[str | None]
    runs: np.ndarray  # (n,) places among the outcomes' runs
    cell: np.ndarray  # (n,) places in cells

    @classmethod
    def of(cls, runs: dict[str | None, list[int]]) -> "Pool":
        places = [(r, i) for i, members in enumerate(runs.values()) for r in members]
        return cls(list(runs), *np.array(places, int).reshape(-1, 2).T)


@dataclass
class Mean:
    """An average with its interval, and what each prompt moves it by: influence (P,)."""

    value: float
    variance: float
    low: float
    high: float
    influence: np.ndarray
    scope: str


class Averages:
    """Averages of one `Outcomes`. rate, count: (R, C) by run and eval column; residual: (R, P).

    The pairs of a pool are a matrix (cells, C) of how often each counts, 0 where none of its rows is scored.
    """

    def __init__(self, outcomes: Outcomes):
        self.outcomes = o = outcomes
        n = len(o.columns)

        def by_column(values: np.ndarray) -> np.ndarray:  # (R, P) → (R, C)
            return np.stack([np.bincount(o.column, row, n) for row in values])

        self.total, self.count, self.rows = map(by_column, (o.total, o.count, o.rows))
        self.rate = np.divide(
            self.total, self.count, out=np.full_like(self.total, np.nan), where=self.count > 0
        )
        count = self.count[:, o.column]  # (R, P)
        rate = np.where(count > 0, self.rate[:, o.column], 0)
        self.residual = (o.total - rate * o.count) / np.maximum(count, 1)
        self._stratum = merged(o.column)  # (P,)
        self._inside = functools.cache(self._prompts_of)
        self._known: dict[tuple, Mean] = {}

    # -- one pool ------------------------------------------------------------------------------------------

    def pairs(self, pool: Pool, columns: list[int]) -> np.ndarray:
        """(cells, C), 1 for each (cell, eval column) that has a scored row."""
        there = np.zeros((len(pool.cells), self.count.shape[1]))
        np.maximum.at(there, pool.cell, self.count[pool.runs] > 0)
        there[:, np.setdiff1d(np.arange(there.shape[1]), columns)] = 0
        return there

    def weights(self, pool: Pool, pairs: np.ndarray) -> np.ndarray:
        """(n, C) of a mean over `pairs`, in which replicates share their pair's weight."""
        present = (self.count[pool.runs] > 0).astype(float)
        replicates = np.zeros_like(pairs)
        np.add.at(replicates, pool.cell, present)
        return present * (pairs / np.maximum(replicates, 1) / max(1.0, pairs.sum()))[pool.cell]

    def pairs_mean(self, pool: Pool, pairs: np.ndarray) -> Mean:
        return self._once(self._pairs_mean, pool, pairs)

    def pooled(self, pool: Pool, pairs: np.ndarray) -> Mean:
        """Of the rows of `pairs`, each once."""
        return self._once(self._pooled, pool, pairs)

    def _once(self, average, pool: Pool, pairs: np.ndarray) -> Mean:
        """`average` of each pool once: every difference asks for two again."""
        key = average.__name__, pool.runs.tobytes(), pool.cell.tobytes(), pairs.tobytes()
        if key not in self._known:
            self._known[key] = average(pool, pairs)
        return self._known[key]

    def _pairs_mean(self, pool: Pool, pairs: np.ndarray) -> Mean:
        weights = self.weights(pool, pairs)  # (n, C)
        shares = (weights * np.nan_to_num(self.rate[pool.runs])).sum(axis=1)  # (n,)
        by_run = weights[:, self.outcomes.column] * self.residual[pool.runs]  # (n, P)
        return self._mean(float(shares.sum()), by_run, shares, pool, pairs)

    def _pooled(self, pool: Pool, pairs: np.ndarray) -> Mean:
        o, inside = self.outcomes, (pairs > 0)[pool.cell]  # (n, C)
        total, count = self.total[pool.runs] * inside, self.count[pool.runs] * inside
        n = count.sum()
        value = float(total.sum() / n)
        by_run = inside[:, o.column] * (o.total[pool.runs] - value * o.count[pool.runs]) / n
        return self._mean(value, by_run, (total - value * count).sum(axis=1) / n, pool, pairs)

    def entry(self, pool: Pool, columns: list[int]) -> dict:
        """Both averages of a pool with their intervals, and its counts. low and high are of `pairs_mean`."""
        pairs = self.pairs(pool, columns)
        used = self.count[pool.runs][:, columns]
        counts = {"rows": int(self.rows[pool.runs][:, columns].sum()), "pairs": int(pairs.sum())}
        counts |= {"scored": int(used.sum()), "runs": int((used > 0).any(axis=1).sum())}
        if not pairs.any():
            return dict.fromkeys(("pooled", "pairs_mean", "low", "high")) | counts
        mean, pooled = self.pairs_mean(pool, pairs), self.pooled(pool, pairs)
        entry = {"pooled": pooled.value, "pairs_mean": mean.value, "low": mean.low, "high": mean.high}
        entry |= {"pooled_low": pooled.low, "pooled_high": pooled.high}
        entry = {name: rounded(value) for name, value in entry.items()} | counts
        return entry | {"prompts": len(self._inside(_columns(pairs))[0]), "scope": mean.scope}

    # -- two pools -----------------------------------------------------------------------------------------

    def difference(self, a: Pool, b: Pool, columns: list[int]) -> dict | None:
        """a − b over the pairs that both have, paired by prompt; None where they share none.

        A pool without cells, such as the base model, is set against every cell of the other.
        """
        of_a, of_b = self.pairs(a, columns), self.pairs(b, columns)
        common_a, common_b = np.zeros_like(of_a), np.zeros_like(of_b)
        for i, j in _matches(a.cells, b.cells):
            both = of_a[i] * of_b[j]
            common_a[i] += both
            common_b[j] += both
        if not common_a.any():
            return None
        means = [self.pairs_mean(a, common_a), self.pairs_mean(b, common_b)]
        pooled = [self.pooled(a, common_a), self.pooled(b, common_b)]
        inside = _columns(common_a)
        values = {"pooled": pooled[0].value - pooled[1].value, "pairs_mean": means[0].value - means[1].value}
        values["low"], values["high"] = self._difference(*means, inside)
        values["pooled_low"], values["pooled_high"] = self._difference(*pooled, inside)
        counts = {"pairs": int(common_a.sum()), "prompts": len(self._inside(inside)[0])}
        scope = means[0].scope if means[0].scope == means[1].scope else "these runs"
        return {name: rounded(value) for name, value in values.items()} | counts | {"scope": scope}

    def _difference(self, a: Mean, b: Mean, columns: tuple[int, ...]) -> tuple[float, float]:
        """Bounds of a − b from those of a and of b and their correlation over common prompts."""
        correlation = 0.0
        if not all(map(math.isfinite, (a.low, b.low))):
            return math.nan, math.nan
        if a.variance > 0 and b.variance > 0:
            shared = self._covariance(a.influence, b.influence, columns)
            correlation = float(np.clip(shared / math.sqrt(a.variance * b.variance), -1, 1))
        return difference_interval((a.value, a.low, a.high), (b.value, b.low, b.high), correlation)

    # -- variances -----------------------------------------------------------------------------------------

    def _prompts_of(self, columns: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(prompts of the columns, the stratum of each)."""
        members = np.flatnonzero(np.isin(self.outcomes.column, columns))
        return members, self._stratum[members]

    def _covariance(self, a: np.ndarray, b: np.ndarray, columns: tuple[int, ...]) -> float:
        """Of two sums over prompts (P,) that were drawn within their columns."""
        members, stratum = self._inside(columns)
        return cluster_variance(a[members], stratum, b[members])

    def _mean(self, value: float, by_run: np.ndarray, shares: np.ndarray, pool: Pool, pairs) -> Mean:
        """by_run: (n, P) what each answer moves the average by; shares: (n,) each run's part of it."""
        columns, influence = _columns(pairs), by_run.sum(axis=0)
        members, stratum = self._inside(columns)
        variance, df = self._covariance(influence, influence, columns), len(members) - len(np.unique(stratum))
        counted = (self.count[pool.runs][:, columns] > 0).any(axis=1) & pairs.any(axis=1)[pool.cell]
        seeds = np.bincount(pool.cell[counted], minlength=len(pool.cells))[pairs.any(axis=1)]
        if df == 0 or seeds.min() < LEAST_SEEDS:
            low, high = self._of_these_runs(value, influence, variance, df, pool.runs[counted], columns)
            return Mean(value, variance, low, high, influence, "these runs")
        cell = pool.cell
        n = np.maximum(np.bincount(cell[counted], minlength=len(pool.cells)), 1)
        away = shares - (np.bincount(cell[counted], shares[counted], len(pool.cells)) / n)[cell]
        between = float(((n / np.maximum(n - 1, 1))[cell] * away**2)[counted].sum())
        variance = max(variance, between, variance + between - float((by_run**2).sum()))
        low, high = self._bounds(value, variance, int((seeds - 1).sum()), len(members))
        return Mean(value, variance, low, high, influence, "runs like these")

    def _of_these_runs(
        self, value: float, influence: np.ndarray, variance: float, df: int, runs: np.ndarray, columns: tuple
    ) -> tuple[float, float]:
        """Bounds for whoever asks these runs other prompts."""
        o, (members, stratum) = self.outcomes, self._inside(columns)
        if o.unit != PERCENT:
            # One prompt in a column does not say how prompts vary there.
            known = np.bincount(o.column[members])[list(columns)].min() > 1
            return self._bounds(value, variance, df if known else 0, len(members))
        em, scored = (sums[runs][:, members].sum(axis=0) for sums in (o.total / 100, o.count))
        asked, p = scored > 0, min(max(value / 100, 0.0), 1.0)
        if len(runs) == len(columns) == 1 and scored.max() == 1:  # independent rows
            low, high = rate_interval(p, scored.sum())
        else:
            few = int(min((em > 0).sum(), (em < scored).sum()))
            errors = influence[members][asked] / 100
            found = clustered_rate(p, errors, float(scored.sum()), few, stratum[asked])
            low, high = found.low, found.high
        return 100 * low, 100 * high

    def _bounds(self, value: float, variance: float, df: int, prompts: int) -> tuple[float, float]:
        if self.outcomes.unit != PERCENT:
            half = t_quantile(df) * math.sqrt(variance) if df else math.nan
            return value - half, value + half
        p = min(max(value / 100, 0.0), 1.0)
        worth = p * (1 - p) / variance * 1e4 if variance > 0 else 0  # independent rows
        low, high = rate_interval(p, worth, df) if worth > 0 else rate_interval(p, prompts)
        return 100 * low, 100 * high


def _columns(pairs: np.ndarray) -> tuple[int, ...]:
    """The eval columns of pairs (cells, C)."""
    return tuple(np.flatnonzero(pairs.any(axis=0)).tolist())


def _matches(a: list[str | None], b: list[str | None]) -> list[tuple[int, int]]:
    """Places of cells that are set against each other: the same, and None against every one."""
    return [(i, j) for i, x in enumerate(a) for j, y in enumerate(b) if x == y or None in (x, y)]


def rounded(value: float | None) -> float | None:
    """Four decimals; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else round(float(value), 4)
