"""Counts of a score table by train and eval column, and the rate of any pool of them with its interval.

A rate is EM / scored rows, pooled (paper A.7). Its interval is Wilson's where the pool is one train run in
one eval cell with one row a prompt, else a bootstrap that resamples eval prompts within their eval cell or
task, the same prompts for every train run, so that comparisons between runs are paired. It is conditional on
the runs: it says what other prompts would have given, not what another fine-tuning seed would.

A bootstrap cannot leave 0 or 100 %, so a pool that sits there, or has but one prompt, gets the
Wilson interval of as many rows as it has prompts. Cells of fewer than five prompts are resampled together,
since among so few a bootstrap sees too little variation, and none in a single one.
"""

import numpy as np

from em.judge.em_rule import COHERENT_ABOVE, STATUSES
from em.report.score_table import SURFACES, ScoreTable
from em.stats import percentile_interval, resample_clusters, wilson

DRAWS = 2000
_SUMS = ("rows", *STATUSES, "em", "incoherent", "chars", "tokens", "with_tokens", "aligned", "coherent")


class Panel:
    """Counts of one model's rows under one judge, on one set.

    sums (T, C, len(_SUMS)) over rows; em and scored (T, P) by prompt; weights (B, P), draws_em and
    draws_scored (T, C, B) of the bootstrap. T trains, C eval columns, P prompts, B draws.
    """

    def __init__(
        self, table: ScoreTable, column: np.ndarray, stratum: np.ndarray, n_columns: int, draws: int
    ):
        """column, stratum: (n,) of each row; a prompt keeps those of its first row."""
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
        stratum = stratum[first]
        stratum = np.where(np.bincount(stratum)[stratum] < 5, -1, stratum)
        self.weights = resample_clusters(stratum, draws, seed=0)
        self.draws_em, self.draws_scored = (np.zeros((n_trains, n_columns, draws), np.float32) for _ in "12")
        for c in np.unique(self.column):
            members = self.column == c
            self.draws_em[:, c] = self.em[:, members] @ self.weights[:, members].T  # (T, P) (P, B)
            self.draws_scored[:, c] = self.scored[:, members] @ self.weights[:, members].T

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

    def rate(self, mask: np.ndarray) -> dict:
        """The pool of (train, column) pairs in `mask`: rate and interval in percent, and its counts.

        `ok` rows are scored and add up with the other statuses to `rows`; `incoherent` are those scored with
        coherent ≤ 50; lengths are means over all rows, scores over scored ones. None where there is nothing.
        """
        sums = dict(zip(_SUMS, self.sums[mask].sum(axis=0), strict=True))
        counts = {name: int(sums[name]) for name in ("rows", *STATUSES, "em", "incoherent")}
        k, n = counts["em"], counts["ok"]
        prompts = int(((self.scored > 0) & mask[:, self.column]).any(axis=0).sum())
        n_pairs = int((self.sums[mask][:, 0] > 0).sum())

        def mean(name: str, count: float) -> float | None:
            return round(sums[name] / count, 2) if count else None

        return rate_of(k, n, prompts, n_pairs == 1, lambda: self.draws(mask)) | {
            "rows": counts["rows"],
            "prompts": prompts,
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


def rate_of(k: int, n: int, prompts: int, one_cell: bool, draws) -> dict:
    """k/n in percent with its interval. draws: called for the bootstrap draws where those are wanted."""
    counts = {"em": k, "scored": n}
    if n == 0:
        return dict.fromkeys(("rate", "low", "high", "interval")) | counts
    if one_cell and n == prompts:
        low, high, kind = *wilson(k, n), "wilson"
    elif k in (0, n) or prompts == 1:
        low, high, kind = *wilson(prompts * k / n, prompts), "wilson, prompts"
    else:
        low, high, kind = *percentile_interval(draws()), "bootstrap"
    bounds = {"low": round(100 * low, 4), "high": round(100 * high, 4), "interval": kind}
    return {"rate": percent_of(k, n)} | bounds | counts


def narrow_panel(table: ScoreTable, draws: int = DRAWS) -> Panel:
    """Eval column = eval cell, numbered as in the table's grid."""
    table = table.select(table.narrow)
    return Panel(table, table.cell, table.cell, len(table.grid.cells), draws)


def broad_panel(table: ScoreTable, draws: int = DRAWS) -> Panel:
    """Eval column = eval task × surface (task · 4 + surface); prompts are resampled within their task."""
    table = table.select(~table.narrow)
    return Panel(
        table, table.task * len(SURFACES) + table.surface, table.task, len(table.tasks) * len(SURFACES), draws
    )
