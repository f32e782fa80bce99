"""Two judges' verdicts on the same responses: rates, Cohen's kappa, the re-scaled rate, and their intervals.

A verdict is EM, not EM, or not scored (the EM rule's denominator leaves such a row out). Two judges make a
3×3 table of verdicts, the first judge down.

Intervals are of a Bayesian bootstrap over prompts (Rubin 1981), which weights each prompt's counts by a draw
of the exponential distribution. It cannot see what has not happened, so it is taken twice: as it is, and with
a gamma(1/2) draw added to every entry of a table, as if half a prompt more had been seen there, with as many
rows as a row of any but the most frequent entry has beside it from its prompt, itself included. The interval
holds both intervals and the estimate. Of a rate with one row a prompt it reaches from the 2.5 % quantile of
beta(k, n − k) to the 97.5 % one of beta(k + ½, n − k + ½), the posterior under Jeffreys's prior. Prompts of
all strata are drawn together, which errs on the wide side. How often such intervals hold the truth:
tests/judge_coverage.py.
"""

import numpy as np

from em.judge.em_rule import ALIGNED_BELOW, COHERENT_ABOVE
from em.report.score_table import ScoreTable
from em.stats import percentile_interval

VERDICTS = ("EM", "not EM", "not scored")
DRAWS = 2000


def verdicts(table: ScoreTable, below: float = ALIGNED_BELOW, above: float = COHERENT_ABOVE) -> np.ndarray:
    """(n,) places in VERDICTS."""
    return np.where(table.scored, np.where(table.em(below, above), 0, 1), 2)


def by_prompt(prompt: np.ndarray, entry: np.ndarray, shape: tuple[int, ...], n_prompts: int) -> np.ndarray:
    """(n_prompts, *shape) counts of rows, from the (n,) prompt and flat place in `shape` of each."""
    size = int(np.prod(shape))
    counts = np.bincount(prompt * size + entry, minlength=n_prompts * size)
    return counts.reshape(n_prompts, *shape).astype(float)


class PromptDraws:
    """B draws of the weights of P prompts, shared by all tables of counts over the same prompts."""

    def __init__(self, n_prompts: int, draws: int = DRAWS, seed: int = 0):
        self._rng = np.random.default_rng(seed)
        self.weights = self._rng.standard_exponential((draws, n_prompts), np.float32)  # (B, P)

    def tables(self, counts: np.ndarray) -> np.ndarray:
        """(P, …) counts → (2, B, …) draws of their sum over prompts, without and with what was not seen.

        Up to a factor, which is the same for all tables of a draw.
        """
        flat = counts.reshape(len(counts), -1)  # (P, C)
        rare = np.delete(flat, flat.sum(axis=0).argmax(), axis=1)  # all but the most frequent entry
        rows = rare if rare.any() else flat
        rows_of_prompt = (rows**2).sum() / max(1.0, rows.sum())
        drawn = self.weights @ flat.astype(np.float32)  # (B, C)
        unseen = rows_of_prompt * self._rng.standard_gamma(0.5, drawn.shape)
        return np.stack([drawn, drawn + unseen]).reshape(2, len(drawn), *counts.shape[1:])


def interval(draws: np.ndarray, estimate: float) -> tuple[float, float]:
    """Bounds of (2, B) draws, each side's wider one, that hold the estimate; nan counts for nothing."""
    lows, highs = zip(*map(percentile_interval, draws), strict=True)
    return float(np.fmin.reduce([*lows, estimate])), float(np.fmax.reduce([*highs, estimate]))


def percents(estimate: float, draws: np.ndarray) -> dict:
    """A rate and its interval in percent: rate, low, high; None where there is no rate."""
    if not np.isfinite(estimate):
        return dict.fromkeys(("rate", "low", "high"))
    values = estimate, *interval(draws, estimate)
    return {key: round(100 * float(v), 4) for key, v in zip(("rate", "low", "high"), values, strict=True)}


def rate_entry(counts: np.ndarray, sampler: PromptDraws) -> dict:
    """`percents` of the EM rate of (P, 3) verdicts by prompt."""
    return percents(rate_of_counts(counts.sum(axis=0)), rate_of_counts(sampler.tables(counts)))


# -- functions of tables, of counts or of draws ------------------------------------------------------------


def rate_of_counts(counts: np.ndarray) -> np.ndarray:
    """(…, 3) counts of verdicts → the EM rate, EM / (EM + not EM); nan where nothing is scored."""
    with np.errstate(invalid="ignore"):
        return counts[..., 0] / (counts[..., 0] + counts[..., 1])


def kappa_of_table(table: np.ndarray) -> np.ndarray:
    """(…, 3, 3) or (…, 2, 2) → Cohen's kappa of EM where both scored; nan where chance leaves no room."""
    both = table[..., :2, :2]
    n = both.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        agree = (both[..., 0, 0] + both[..., 1, 1]) / n
        a, b = both.sum(axis=-1) / n[..., None], both.sum(axis=-2) / n[..., None]  # (…, 2) each
        chance = (a * b).sum(axis=-1)
        return np.where(chance < 1, (agree - chance) / (1 - chance), np.nan)


def rescaled_rate(a_counts: np.ndarray, table: np.ndarray) -> np.ndarray:
    """What the rate behind A's verdicts would be under B.

    a_counts: (…, 3) A's verdicts on all its rows. table: (…, 3, 3) A's by B's on the rows both judged. The
    rows of each verdict of A's fall among B's verdicts as they do in the table, and the rate is B's, with
    B's denominator: Σₐ nₐ P(EM | a) / Σₐ nₐ P(scored | a). A verdict that the table does not have falls as
    all its rows do together.
    """
    pooled = table.sum(axis=-2, keepdims=True)
    rows = np.where(table.sum(axis=-1, keepdims=True) > 0, table, pooled)  # (…, 3, 3)
    with np.errstate(invalid="ignore"):
        shares = rows / rows.sum(axis=-1, keepdims=True)
    return rate_of_counts((a_counts[..., :, None] * shares).sum(axis=-2))


def rate_variance(*counts: np.ndarray) -> float:
    """Variance of an EM rate, or of the difference of two, over other prompts; nan for one prompt.

    counts: (P, 3) verdicts by prompt, of one judge or of two. Linearised: with z_p = (EM_p − r · scored_p) /
    scored, or the difference of the two judges' z_p, it is P/(P − 1) Σ_p z_p² over the P prompts that have
    rows.
    """
    residuals = []
    for verdict in counts:
        scored = verdict[:, :2].sum(axis=1)  # (P,)
        with np.errstate(invalid="ignore"):
            residuals.append((verdict[:, 0] - rate_of_counts(verdict.sum(axis=0)) * scored) / scored.sum())
    z = residuals[0] - residuals[1] if len(counts) == 2 else residuals[0]
    n = int((sum(counts).sum(axis=1) > 0).sum())
    return float((z**2).sum()) * n / (n - 1) if n > 1 else np.nan


def variance_between(a: np.ndarray, b: np.ndarray) -> float:
    """An unbiased estimate, which can be negative, of the variance between judges, from two of them.

    a, b: (P, 3) verdicts by prompt on the same responses. Were judges drawn from a population of judges, the
    squared difference of two rates would be expected to be twice the variance between judges plus what chance
    in the prompts adds: σ² = ((r_a − r_b)² − V(r_a − r_b)) / 2, V as `rate_variance`. Rates are fractions.
    """
    difference = rate_of_counts(a.sum(axis=0)) - rate_of_counts(b.sum(axis=0))
    return float(difference**2 - rate_variance(a, b)) / 2
