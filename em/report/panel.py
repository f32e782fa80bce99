"""Counts of a score table by train and eval column, and the rate of any pool of them with its interval.

A rate is EM / scored rows, pooled (paper A.7). Beside it stands the mean over its (train cell, eval cell)
pairs, as the paper averages: they differ where pairs have unequal numbers of scored rows. Intervals say what
other prompts of the same eval cells or tasks would have given from the same runs, not what another
fine-tuning seed would; all rows of a prompt are one cluster (em/clusters.py). One train run in one eval cell
with one row a prompt has Wilson's.

`draws` are of a bootstrap over prompts, the same ones for every train run. They are for what has no closed
form, and of no use where events are few: a draw cannot find what the rows do not have.
"""

import functools

import numpy as np

from em.clusters import ClusteredRate, clustered_rate, merged, rate_difference
from em.judge.em_rule import COHERENT_ABOVE, STATUSES
from em.report.score_table import SURFACES, ScoreTable
from em.stats import rate_interval, resample_clusters

DRAWS = 2000
_SUMS = ("rows", *STATUSES, "em", "incoherent", "chars", "tokens", "with_tokens", "aligned", "coherent")


class Panel:
    """Counts of one model's rows under one judge, on one set.

    sums (T, C, len(_SUMS)) over rows; em and scored (T, P) by prompt; stratum (P,): prompts are drawn within
    theirs. Of the bootstrap: weights (B, P), draws_em and draws_scored (T, C, B). T trains, C eval columns,
    P prompts, B draws.
    """

    def __init__(
        self, table: ScoreTable, column: np.ndarray, cell_of: np.ndarray, stratum: np.ndarray, draws: int
    ):
        """column, stratum: (n,) of each row; a prompt keeps those of its first row. cell_of: (C,) the
        eval cell that a column belongs to, an integer.
        """
        self.cell_of, self.n_draws, n_columns = cell_of, draws, len(cell_of)
        self.table, self.trains, n_trains = table, table.trains, len(table.trains)
        _, first, self.row_prompt = np.unique(table.prompt, return_index=True, return_inverse=True)
        self.column = column[first]  # (P,)
        n_prompts = len(first)
        em, scored = table.em(), table.scored

        features = np.zeros((len(_SUMS), len(table)))
        features[0] = 1
        features[1 + table.status, np.arange(len(table))] = 1
        features[len(STATUSES) + 1] = em
        features[len(STATUSES) + 2] = scored & (table.coherent <= COHERENT_ABOVE)
        with_tokens = np.isfinite(table.tokens)
        columns = (table.chars, np.nan_to_num(table.tokens), with_tokens)
        columns += (np.where(scored, table.aligned, 0), np.where(scored, table.coherent, 0))
        features[len(STATUSES) + 3 :] = columns
        bins = table.train * n_columns + self.column[self.row_prompt]
        sums = [np.bincount(bins, feature, n_trains * n_columns) for feature in features]
        self.sums = np.stack(sums, axis=-1).reshape(n_trains, n_columns, -1)  # (T*C, F) → (T, C, F)

        bins = table.train * n_prompts + self.row_prompt
        size = (n_trains, n_prompts)
        self.em, self.scored = (
            np.bincount(bins, flag, n_trains * n_prompts).reshape(size).astype(np.float32)
            for flag in (em, scored)
        )
        self.stratum = merged(stratum[first])

    @functools.cached_property
    def weights(self) -> np.ndarray:
        return resample_clusters(self.stratum, self.n_draws, seed=0)

    @functools.cached_property
    def draws_em(self) -> np.ndarray:
        return self._drawn(self.em)

    @functools.cached_property
    def draws_scored(self) -> np.ndarray:
        return self._drawn(self.scored)

    def _drawn(self, counts: np.ndarray) -> np.ndarray:
        """(T, P) → (T, C, B)."""
        drawn = np.zeros((len(self.trains), len(self.cell_of), self.n_draws), np.float32)
        for c in np.unique(self.column):
            members = self.column == c
            drawn[:, c] = counts[:, members] @ self.weights[:, members].T  # (T, P) (P, B)
        return drawn

    def pairs(self, trains: list[int], columns: list[int]) -> np.ndarray:
        """(T, C) bool: every one of `trains` with every one of `columns`."""
        mask = np.zeros(self.sums.shape[:2], bool)
        mask[np.ix_(trains, columns)] = True
        return mask

    def draws(self, mask: np.ndarray) -> np.ndarray:
        """(B,) bootstrap draws of the pooled rate of `mask`, a fraction; nan in a draw without rows."""
        scored = self.draws_scored[mask].sum(axis=0)
        return np.divide(
            self.draws_em[mask].sum(axis=0), scored, out=np.full_like(scored, np.nan), where=scored > 0
        )

    def pool(self, mask: np.ndarray) -> ClusteredRate | None:
        """The pooled rate of `mask`, a fraction, its errors over all P prompts; None without scored rows."""
        em, scored = self._counts(mask)
        return pooled_rate(em.sum(axis=0), scored.sum(axis=0), self.stratum, self._n_pairs(mask) == 1)

    def pair_mean(self, mask: np.ndarray) -> ClusteredRate | None:
        """The mean rate of the (train, eval cell) pairs in `mask` that have scored rows, all alike."""
        cell = self.cell_of[self.column]
        return mean_over_pairs(*self._counts(mask), cell, self.stratum) or self.pool(mask)

    def difference(self, a: np.ndarray, b: np.ndarray) -> dict | None:
        """Pooled rate of mask `a` less that of `b`, {"points", "low", "high"}: the same prompts in both.

        None where either has no scored rows.
        """
        a, b = self.pool(a), self.pool(b)
        if a is None or b is None:
            return None
        return {
            name: round(100 * value, 4)
            for name, value in zip(("points", "low", "high"), rate_difference(a, b), strict=True)
        }

    def _counts(self, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T', P) EM and scored rows by prompt of the trains in `mask`, zero where it leaves prompts out."""
        trains = np.flatnonzero(mask.any(axis=1))
        inside = mask[np.ix_(trains, self.column)]
        return self.em[trains] * inside, self.scored[trains] * inside

    def _n_pairs(self, mask: np.ndarray) -> int:
        """How many (train, eval cell) pairs of `mask` have scored rows."""
        trains, columns = np.nonzero(mask & (self.sums[:, :, _SUMS.index("ok")] > 0))
        return len(np.unique(trains * len(self.cell_of) + self.cell_of[columns]))

    def rate(self, mask: np.ndarray) -> dict:
        """The pool of (train, column) pairs in `mask`: rates and intervals in percent, and its counts.

        rate, low, high, interval: rows pooled. pairs_mean, pairs_low, pairs_high: mean over the `pairs` of
        train and eval cell with scored rows. `ok` rows are scored and add up with the other statuses to
        `rows`; `incoherent` are those scored with coherent ≤ 50; lengths are means over all rows, scores over
        scored ones. None where there is nothing.
        """
        sums = dict(zip(_SUMS, self.sums[mask].sum(axis=0), strict=True))
        counts = {name: int(sums[name]) for name in ("rows", *STATUSES, "em", "incoherent")}
        n, n_pairs = counts["ok"], self._n_pairs(mask)
        em, scored = (values.sum(axis=0) for values in self._counts(mask))
        rate = rate_of(em, scored, self.stratum, n_pairs == 1)
        pairs = {name: rate[name] for name in ("rate", "low", "high")}
        if n_pairs > 1:
            mean_rate = self.pair_mean(mask)
            pairs = {name: round(100 * getattr(mean_rate, name), 4) for name in pairs}

        def mean(name: str, count: float) -> float | None:
            return round(sums[name] / count, 2) if count else None

        return rate | {
            "pairs_mean": pairs["rate"],
            "pairs_low": pairs["low"],
            "pairs_high": pairs["high"],
            "rows": counts["rows"],
            "prompts": int((scored > 0).sum()),
            "pairs": n_pairs,
            **{name: counts[name] for name in STATUSES[1:]},
            "scored_pct": percent_of(n, counts["rows"]),
            "incoherent": counts["incoherent"],
            "incoherent_pct": percent_of(counts["incoherent"], n),
            "mean_chars": mean("chars", counts["rows"]),
            "mean_tokens": mean("tokens", sums["with_tokens"]),
            "mean_aligned": mean("aligned", n),
            "mean_coherent": mean("coherent", n),
        }


def percent_of(k: float, n: float) -> float | None:
    return round(100 * k / n, 4) if n else None


def pooled_rate(
    em: np.ndarray, scored: np.ndarray, stratum: np.ndarray, one_cell: bool = False
) -> ClusteredRate | None:
    """Σ em / Σ scored, all (P,) by prompt, with its interval; None without scored rows.

    one_cell: the rows are of one run in one eval cell, so that single rows of its prompts are independent.
    """
    em, scored = np.asarray(em, float), np.asarray(scored, float)
    k, n = float(em.sum()), float(scored.sum())
    if n == 0:
        return None
    errors = (em - k / n * scored) / n
    if one_cell and n == (scored > 0).sum():
        return ClusteredRate(k / n, *rate_interval(k / n, n), errors, stratum)
    return _interval_over(k / n, errors, em, scored, stratum)


def mean_over_pairs(
    em: np.ndarray, scored: np.ndarray, cell: np.ndarray, stratum: np.ndarray
) -> ClusteredRate | None:
    """The mean of the rates of the (train, eval cell) pairs, with its interval; None of fewer than two.

    em, scored: (T, P) rows by train and prompt; cell, stratum: (P,) of the prompts.
    """
    em, scored = np.asarray(em, float), np.asarray(scored, float)
    bins, size = (np.arange(len(em))[:, None] * (cell.max() + 1) + cell).ravel(), len(em) * (cell.max() + 1)
    k, n = (np.bincount(bins, x.ravel(), size) for x in (em, scored))  # a pair each
    n_pairs = int((n > 0).sum())
    if n_pairs < 2:
        return None
    bins = bins.reshape(em.shape)
    rates = np.divide(k, n, out=np.zeros_like(n), where=n > 0)
    weight = np.divide(1 / n_pairs, n, out=np.zeros_like(n), where=n > 0)[bins]  # (T, P)
    expected = rates[bins]
    together = stratum == -1  # of cells too small to know their own rate's error
    if (scored[:, together] > 0).any():
        shares = (weight * scored)[:, together]
        expected[:, together] = (weight * em)[:, together].sum() / shares.sum()
    errors = ((em - expected * scored) * weight).sum(axis=0)
    rate = float(rates.sum()) / n_pairs
    return _interval_over(rate, errors, em.sum(axis=0), scored.sum(axis=0), stratum)


def _interval_over(rate: float, errors: np.ndarray, em: np.ndarray, scored: np.ndarray, stratum: np.ndarray):
    """The ClusteredRate of a pool, its interval over the prompts with scored rows, its errors over all."""
    asked = scored > 0
    few = int(min((em > 0).sum(), (em < scored).sum()))
    seen = clustered_rate(rate, errors[asked], float(scored.sum()), few, stratum[asked])
    return ClusteredRate(rate, seen.low, seen.high, errors, stratum)


def rate_of(em: np.ndarray, scored: np.ndarray, stratum: np.ndarray, one_cell: bool = False) -> dict:
    """`pooled_rate` in percent, with the kind of its interval and the counts."""
    counts = {"em": int(em.sum()), "scored": int(scored.sum())}
    found = pooled_rate(em, scored, stratum, one_cell)
    if found is None:
        return dict.fromkeys(("rate", "low", "high", "interval")) | counts
    prompts = int((scored > 0).sum())
    kind = "wilson, prompts" if prompts == 1 or found.rate in (0, 1) else "wilson, clustered"
    kind = "wilson" if one_cell and counts["scored"] == prompts else kind
    bounds = {"low": round(100 * found.low, 4), "high": round(100 * found.high, 4), "interval": kind}
    return {"rate": round(100 * found.rate, 4)} | bounds | counts


def narrow_panel(table: ScoreTable, draws: int = DRAWS) -> Panel:
    """Eval column = eval cell, numbered as in the table's grid."""
    table = table.select(table.narrow)
    return Panel(table, table.cell, np.arange(len(table.grid.cells)), table.cell, draws)


def broad_panel(table: ScoreTable, draws: int = DRAWS) -> Panel:
    """Eval column = eval task × surface (task · 4 + surface), eval cell = task; prompts vary within it."""
    table = table.select(~table.narrow)
    n = len(SURFACES)
    return Panel(
        table, table.task * n + table.surface, np.arange(len(table.tasks) * n) // n, table.task, draws
    )
