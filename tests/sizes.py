"""How often the report's tests reject and its intervals hold the truth, over rows whose truth is known.

    PYTHONPATH=. python tests/sizes.py              # results/statistics/sizes.json
    PYTHONPATH=. python tests/sizes.py 200 rates    # fewer repeats, of one table and more; the others stay

The suite runs the same simulations with few repeats. Grids are the paper's 12 × 12. Log odds have terms of
the train and eval cells, of which most is their task's, and a noise of 0.3 a pair; `alike` says that the
tasks whose runs are strong are those whose prompts are easy.
"""

import itertools
import math
import sys
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np

from em.clusters import rate_difference
from em.data.cells import CELLS
from em.files import read_json, write_json
from em.report.effects import RunCounts, log_odds_effects
from em.report.match_fit import MatchDesign, fit_log_odds, labels_of, without
from em.report.panel import mean_over_pairs, pooled_rate
from em.stats import grouped_pearson, pearson, permutation_test, resample_clusters

TASK, DOMAIN = (labels_of(CELLS, CELLS, what)[0] for what in ("task", "domain"))
SAME_TASK, SAME_DOMAIN = np.equal.outer(TASK, TASK), np.equal.outer(DOMAIN, DOMAIN)

FULL = MatchDesign(np.ones((12, 12), bool), CELLS, CELLS)

NULLS = {  # without a preference for the diagonal
    "iid": {"by_task": 0.0},
    "domain effect only": {"domain": 1.0},
    "strength + ease": {},
    "strength + ease, alike": {"alike": True},
    "strength × ease": {"product": 0.7},
    "strength × ease, alike": {"product": 0.7, "alike": True},
    "task × task, no diagonal": {"free": 1.0},
    "task × task and strength × ease, alike": {"free": 1.0, "product": 0.7, "alike": True},
}
PLANTED = {
    "diagonal 0.5": {"diagonal": 0.5},
    "diagonal 0.5, strength + ease alike": {"diagonal": 0.5, "alike": True},
    "diagonal 1.5, strength × ease alike": {"diagonal": 1.5, "product": 0.7, "alike": True},
}


def log_odds(
    rng, base=-2.0, by_task=1.0, alike=False, product=0.0, domain=0.0, free=0.0, diagonal=0.0, noise=0.3
):
    """(12, 12) true log odds of EM, trained cell by asked cell."""
    tasks = rng.normal(0, (1.0, 1.2), (4, 2)) * by_task
    tasks = np.sort(tasks, axis=0) if alike else tasks
    strength, ease = (tasks[TASK] + rng.normal(0, 0.3 if by_task else 0.6, (12, 2))).T
    found = base + strength[:, None] + ease + product * strength[:, None] * ease
    found = found + domain * SAME_DOMAIN + diagonal * SAME_TASK
    found = found + free * rng.normal(size=(4, 4))[np.ix_(TASK, TASK)]
    return found + rng.normal(0, noise, (12, 12))


def chance(odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-odds))


# -- the test of the match -----------------------------------------------------------------------------


def p_values(kind: dict, repeats: int, rows: int, base: float, old=False) -> np.ndarray:
    """(repeats,) p of the task match, `rows` responses a pair; old: in points, tasks within domains."""
    found, scored = [], np.full(144, float(rows))
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        em = rng.binomial(rows, chance(log_odds(rng, base, **kind))).ravel()
        if old:
            others = (columns for term, columns in FULL.terms.items() if term != "task_match")
            left = without(100 * em / rows, *others).reshape(12, 12)
            scores = np.stack([left[:, TASK == t].sum(axis=1) for t in range(4)], axis=1)
            found.append(permutation_test(scores, TASK, DOMAIN)[0])
        else:
            left = fit_log_odds(FULL, em, scored, ("domain_match",)).left
            found.append(FULL.renamed("task_match", left)["p"])
    return np.array(found)


# -- intervals of the match ----------------------------------------------------------------------------


def correlated_rows(rng, chances: np.ndarray, prompts: int, rho: float) -> tuple[np.ndarray, np.ndarray]:
    """((R, 12 · prompts) EM, the column of each prompt): all runs answer the same prompts, easy or hard.

    chances: (R, 12). A prompt's latent normal has a share rho of its variance in common over the runs.
    """
    column = np.repeat(np.arange(12), prompts)
    latent = np.sqrt(rho) * rng.normal(size=column.shape)
    latent = latent + np.sqrt(1 - rho) * rng.normal(size=(len(chances), len(column)))
    return (latent < quantile(chances)[:, column]).astype(float), column


quantile = np.vectorize(NormalDist().inv_cdf, otypes=[float])


def match_coverage(kind: dict, repeats: int, prompts: int, base: float, seeds: int = 1) -> float:
    """How often the interval of the task's log odds holds what endless rows of the same pairs would give.

    seeds: runs a train cell; with 3 and more the log odds of each run go up and down by 0.4 in all cells and
    by 0.4 in each pair, and the truth is of many runs.
    """
    hits = 0
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        odds = log_odds(rng, base, **kind)
        if seeds > 1:

            def drawn(n, rng=rng, odds=odds):
                """(n, 12, 12)"""
                return chance(odds + rng.normal(0, 0.4, (n, 12, 1)) + rng.normal(0, 0.4, (n, 12, 12)))

            truth, chances = drawn(400).mean(axis=0), drawn(seeds).reshape(-1, 12)
        else:
            truth = chances = chance(odds)
        em, column = correlated_rows(rng, chances, prompts, 0.3)
        counts = RunCounts(em, np.ones_like(em), np.tile(np.arange(12), seeds), column, column)
        found = log_odds_effects(counts, CELLS, CELLS)["task_match"]
        true = fit_log_odds(FULL, 1e9 * truth.ravel(), np.full(144, 1e9)).coefficients["task_match"]
        hits += found["logit_low"] <= true <= found["logit_high"]
    return hits / repeats


# -- intervals of rates --------------------------------------------------------------------------------


def prompt_counts(rng, size: tuple[int, ...], rate, samples, alike: float) -> np.ndarray:
    """EM among each prompt's samples, beta-binomial with the correlation `alike`. rate: one, or `size`."""
    if alike == 0:
        return rng.binomial(samples, np.broadcast_to(rate, size))
    both = 1 / alike - 1
    return rng.binomial(samples, rng.beta(rate * both, (1 - np.asarray(rate)) * both, size))


def rate_coverage(rate, prompts, samples, alike, repeats, seed=0, bootstrap=0) -> float:
    """Of one run in one eval cell. bootstrap: draws of the percentile interval in place of ours."""
    rng, hits = np.random.default_rng(seed), 0
    scored, stratum = np.full(prompts, samples), np.zeros(prompts, int)
    weights = resample_clusters(stratum, bootstrap, 0) if bootstrap else None
    for em in prompt_counts(rng, (repeats, prompts), rate, samples, alike):
        found = pooled_rate(em, scored, stratum, True)
        low, high = found.low, found.high
        if bootstrap and 0 < found.rate < 1:
            low, high = np.quantile(weights @ em / (prompts * samples), (0.025, 0.975))
        hits += low <= rate <= high
    return hits / repeats


def pool_coverage(rate, prompts, samples, alike, repeats, seed=0) -> tuple[float, float]:
    """(rows pooled, mean over pairs): three runs in four eval cells of unlike rates, one a third unscored."""
    rng, hits = np.random.default_rng(seed), np.zeros(2)
    stratum = np.repeat(np.arange(4), prompts)
    odds = np.log(rate / (1 - rate)) + np.array([[-0.8], [0.0], [0.5]]) + np.array([-1.0, 0.0, 0.5, 1.0])
    chances, share = chance(odds), np.ones((3, 4))
    share[0, 3] = 2 / 3
    truth = (chances * share).sum() / share.sum(), chances.mean()
    for _ in range(repeats):
        scored = rng.binomial(samples, share[:, stratum])
        em = prompt_counts(rng, scored.shape, chances[:, stratum], scored, alike)
        found = (
            pooled_rate(em.sum(axis=0), scored.sum(axis=0), stratum),
            mean_over_pairs(em, scored, stratum, stratum),
        )
        hits += [r.low <= true <= r.high for r, true in zip(found, truth, strict=True)]
    return tuple(float(h) for h in hits / repeats)


def difference_coverage(rates, prompts, samples, shared, repeats, seed=0, bootstrap=0) -> float:
    """Of two runs on the same prompts; shared: the latent variance that runs have in common at a prompt."""
    rng, hits = np.random.default_rng(seed), 0
    scored, stratum = np.full(prompts, samples), np.zeros(prompts, int)
    weights = resample_clusters(stratum, bootstrap, 0) if bootstrap else None
    bounds = quantile(np.array(rates))[:, None, None]
    for _ in range(repeats):
        latent = np.sqrt(shared) * rng.normal(size=(1, prompts, 1))
        latent = latent + np.sqrt(1 - shared) * rng.normal(size=(2, prompts, samples))
        em = (latent < bounds).sum(axis=2)
        _, low, high = rate_difference(*(pooled_rate(e, scored, stratum, True) for e in em))
        if bootstrap:
            low, high = np.quantile(weights @ (em[0] - em[1]) / (prompts * samples), (0.025, 0.975))
        hits += low <= rates[0] - rates[1] <= high
    return hits / repeats


# -- correlations of points that come in groups --------------------------------------------------------


def correlation_sizes(groups: int, points: int, repeats: int, shared=0.5, seed=0) -> dict[str, float]:
    """How often intervals leave out 0 where x and y are independent; shared: the groups' part of variance."""
    rng, rejected = np.random.default_rng(seed), dict.fromkeys(("pooled", "between", "within"), 0)
    code = np.repeat(np.arange(groups), points)
    for _ in range(repeats):
        x, y = (
            np.sqrt(shared) * rng.normal(size=groups)[code] + np.sqrt(1 - shared) * rng.normal(size=len(code))
            for _ in "xy"
        )
        found, bounds = grouped_pearson(x, y, code), {"pooled": pearson(x, y)[1:]}
        bounds |= {name: (found[f"{name}_low"], found[f"{name}_high"]) for name in ("between", "within")}
        for name, (low, high) in bounds.items():
            rejected[name] += low is not None and not low <= 0 <= high
    return {name: count / repeats for name, count in rejected.items()}


OUT = Path(__file__).parent.parent / "results" / "statistics" / "sizes.json"


def test_tables(repeats: int):
    """Size and power of the test."""
    designs = {"400 at 12 %": (400, -2.0), "100 at 12 %": (100, -2.0), "50 at 2 %": (50, -4.0)}
    for name, kinds in (("size", NULLS), ("power", PLANTED)):
        rows = {
            label: [(p_values(kind, repeats, *design) < 0.05).mean() for design in designs.values()]
            + [(p_values(kind, repeats // 4, 400, -2.0, old=True) < 0.05).mean()]
            for label, kind in kinds.items()
        }
        title = (
            f"{name} of the task match at 5 %, rows a pair at their middle rate; before: in points, 24³ ways"
        )
        yield name, title, rows, [*designs, "before"], repeats


def match_tables(repeats: int):
    n = repeats // 4
    designs = {"100 at 12 %": (100, -2.0), "30 at 12 %": (30, -2.0), "50 at 2 %": (50, -4.0)}
    kinds = NULLS | PLANTED
    kinds = {k: kinds[k] for k in ("strength + ease", "strength × ease, alike", "task × task, no diagonal",
                                   "diagonal 0.5", "diagonal 1.5, strength × ease alike")}  # fmt: skip
    rows = {
        label: [match_coverage(kind, n, *design) for design in designs.values()]
        + [match_coverage(kind, n // 2, 30, -2.0, seeds=3)]
        for label, kind in kinds.items()
    }
    title = "coverage of the task's log odds, prompts a cell; the last: 30 prompts, 3 seeds, runs like these"
    yield "match", title, rows, [*designs, "3 seeds"], n


def rate_tables(repeats: int):
    rates, n = (0.003, 0.01, 0.05, 0.2, 0.5, 0.9), repeats // 4
    columns, rows, old = [f"{100 * rate:g} %" for rate in rates], {}, {}
    for prompts, (samples, alike) in itertools.product(
        (20, 60, 150, 400), ((1, 0.0), (4, 0.0), (4, 0.2), (4, 0.6))
    ):
        label = f"{prompts} prompts × {samples}, correlation {alike}"
        rows[label] = [rate_coverage(rate, prompts, samples, alike, repeats) for rate in rates]
        if prompts in (20, 150) and samples == 4:
            old[f"before: {label}"] = [rate_coverage(r, prompts, 4, alike, n, bootstrap=400) for r in rates]
    yield "rates", "coverage of a rate's interval, prompts × samples; beta-binomial", rows, columns, repeats
    yield "rates_before", "the same, percentile bootstrap", old, columns, n

    rates, rows = rates[:-1], {}
    for prompts, (samples, alike) in itertools.product((20, 100), ((1, 0.0), (4, 0.2), (4, 0.6))):
        found = [pool_coverage(rate, prompts, samples, alike, n) for rate in rates]
        for place, what in enumerate(("pooled", "pairs' mean")):
            rows[f"{what}: {prompts} prompts × {samples}, {alike}"] = [values[place] for values in found]
    yield "pools", "coverage of three runs in four cells of unlike rates", rows, columns[:-1], n

    pairs, rows = ((0.003, 0.003), (0.003, 0.02), (0.01, 0.1), (0.05, 0.05), (0.2, 0.5), (0.9, 0.5)), {}
    for prompts, samples in itertools.product((30, 100, 400), (1, 4)):
        for what, draws in (("", 0), ("before: ", 400)):
            rows[f"{what}{prompts} prompts × {samples}"] = [
                difference_coverage(p, prompts, samples, 0.3, n, bootstrap=draws) for p in pairs
            ]
    columns = [f"{100 * a:g} − {100 * b:g} %" for a, b in pairs]
    title = "coverage of a difference of two runs on the same prompts; before: percentile bootstrap"
    yield "differences", title, rows, columns, n


def correlation_tables(repeats: int):
    rows = {}
    for groups, points in itertools.product((5, 8), (3, 10)):
        rows[f"{groups} tasks × {points} points"] = list(correlation_sizes(groups, points, repeats).values())
    title = "how often a correlation is found between independent x and y, half of each the task's"
    yield "correlations", title, rows, ["pooled", "between", "within"], repeats


TABLES = {
    "test": test_tables,
    "match": match_tables,
    "rates": rate_tables,
    "correlations": correlation_tables,
}


def main(repeats: int, names: list[str]) -> None:
    """Print the tables and write them into OUT; `repeats` of the tests, a quarter of what takes longer."""
    for name in names:
        began = time.process_time()
        for key, title, rows, columns, n in TABLES[name](repeats):
            print(f"\n{title}; {n} repeats, standard error {math.sqrt(0.05 * 0.95 / n):.3f} at 5 %")
            print(" " * 44 + "".join(f"{column:>14}" for column in columns))
            for label, values in rows.items():
                print(f"{label:44}" + "".join(f"{value:14.3f}" for value in values), flush=True)
            rows = {k: dict(zip(columns, map(float, values), strict=True)) for k, values in rows.items()}
            command = " ".join(["python", *sys.argv])
            known = read_json(OUT) if OUT.exists() else {}
            table = {"title": title, "command": command, "repeats": n, "rows": rows}
            write_json(OUT, known | {key: table})
        print(f"{name}: {time.process_time() - began:.0f} s of one core", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 800, sys.argv[2:] or list(TABLES))
