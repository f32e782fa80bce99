"""What comparisons claim, against what was planted: coverage of their intervals, the bias of a maximum.

    .venv/bin/python tests/comparison_sizes.py [worlds]     a minute with 400; it prints and tests nothing

Every prompt has its own inclination to EM, which all runs share, so rows are not independent.
"""

import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from made_outcomes import outcomes, trained  # noqa: E402

from em.data.cells import CELLS  # noqa: E402
from em.report.averages import Averages, Pool  # noqa: E402
from em.report.conditions import columns_by  # noqa: E402
from em.report.factorial import analyse, factorials_of  # noqa: E402
from em.report.selection import selections  # noqa: E402

NAMES = list(map(str, CELLS))


def chance(x):
    return 1 / (1 + np.exp(-x))


def mean_for(rate: float, spread: float, rng) -> float:
    """The mean of a normal inclination whose chance of EM is `rate` on average."""
    draws, low, high = spread * rng.normal(size=200_000), -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle + draws).mean() < rate else (low, middle)
    return middle


def rates(worlds: int, prompts: int, cells: int, runs: int, spread=1.5) -> None:
    rng, column = np.random.default_rng(1), np.repeat(np.arange(cells), prompts)
    for rate in (0.003, 0.01, 0.05, 0.3, 0.6, 0.9):
        mean, hits = mean_for(rate, spread, rng), np.zeros(3)
        for _ in range(worlds):
            p = chance(mean + spread * rng.normal(size=len(column)))
            em, scored = (rng.random((2, runs, len(column))) < np.stack([p, 0 * p + 0.97])[:, None]).astype(
                float
            )
            made = Averages(outcomes([trained(NAMES[r]) for r in range(runs)], em * scored, column,
                                     NAMES[:cells], scored))  # fmt: skip
            e = made.entry(Pool.of({NAMES[r]: [r] for r in range(runs)}), list(range(cells)))
            gap = made.difference(Pool.of({None: [0]}), Pool.of({None: [1]}), list(range(cells)))
            truths = ((e["low"], rate, e["high"]), (e["pooled_low"], rate, e["pooled_high"]))
            hits[:2] += [low <= 100 * truth <= high for low, truth, high in truths]
            hits[2] += gap["low"] <= 0 <= gap["high"]
        text = "pairs {:.3f}, pooled {:.3f}, difference of two runs {:.3f}".format(*hits / worlds)
        print(f"{runs} runs, {cells} cells of {prompts} prompts, rate {100 * rate:.1f} %: {text}")


def seeds(worlds: int, n_seeds: int, between: float) -> None:
    rng, cells = np.random.default_rng(n_seeds), NAMES[:2]
    truth = 100 * chance(-1 + np.hypot(1, between) * rng.normal(size=1_000_000)).mean()
    runs, hits = [trained(cell, seed=s) for cell in cells for s in range(n_seeds)], 0
    for _ in range(worlds):
        level = -1 + rng.normal(size=100) + between * rng.normal(size=(len(runs), 1))
        made = Averages(outcomes(runs, rng.random(level.shape) < chance(level), np.arange(100) % 2))
        pool = {cell: list(range(i * n_seeds, (i + 1) * n_seeds)) for i, cell in enumerate(cells)}
        e = made.entry(Pool.of(pool), [0, 1])
        hits += e["low"] <= truth <= e["high"]
    print(f"{n_seeds} seeds, sd of a run's level {between} logits: {hits / worlds:.3f} ({e['scope']})")


def maximum(worlds: int, spread: float) -> None:
    """Six rates of 20 % ± spread, 100 prompts: what the largest is above the truth of what was chosen."""
    rng, naive, held_out = np.random.default_rng(0), [], []
    runs = [
        trained("med_advice", channel="sft", teacher="med_advice", lr=10.0**-k, epoch=1) for k in range(6)
    ]
    for _ in range(worlds):
        truth = np.clip(0.2 + spread * rng.normal(size=6), 0.02, 0.9)
        made = outcomes(runs, rng.random((6, 100)) < truth[:, None], np.arange(100) % 2)
        (found,) = selections(Averages(made), "task", columns_by(made, "task")[-1])
        chosen = 100 * truth[round(-np.log10(found["highest_lr"]))]
        naive.append(found["highest"] - chosen)
        held_out.append(found["held_out"] - chosen)
    error = np.std(held_out) / np.sqrt(worlds)
    print(f"six rates of 20 ± {100 * spread:g} %: the highest is too high by {np.mean(naive):+.2f} points, "
          f"read off the other half by {np.mean(held_out):+.2f} ± {error:.2f}")  # fmt: skip


def profiles(worlds: int, prompts: int, teacher: float, data: float) -> None:
    rng, pair, column = np.random.default_rng(0), NAMES[:2], np.repeat(np.arange(12), prompts)
    ease, own = rng.normal(size=12), rng.normal(size=(2, 12))
    level = [ease + teacher * own[t] + data * own[d] - 1 for t in (0, 1) for d in (0, 1)]
    runs = [trained(t, channel="optd", teacher=t, source=d) for t in pair for d in pair]
    true = chance(np.stack(level))
    truth = {"same_teacher": ((0, 1), (2, 3)), "same_data": ((0, 2), (1, 3))}
    truth = {
        name: np.mean([np.corrcoef(true[i], true[j])[0, 1] for i, j in of]) for name, of in truth.items()
    }
    hits, raw, corrected = dict.fromkeys(truth, 0), [], []
    for _ in range(worlds):
        made = outcomes(runs, rng.random((4, len(column))) < true[:, column], column, NAMES)
        found = analyse(Averages(made), factorials_of(made)[0], list(range(12)), 300)["raw"]
        for name, value in truth.items():
            hits[name] += found[name]["low"] <= value <= found[name]["high"]
        raw.append(found["same_teacher"]["raw"])
        corrected.append(found["same_teacher"]["correlation"])
    text = ", ".join(f"{name} {hits[name] / worlds:.3f} (r = {value:.2f})" for name, value in truth.items())
    print(f"profiles, {prompts} prompts a cell, teacher {teacher}, data {data}: {text}; raw r of one teacher "
          f"{np.mean(raw):.3f}, corrected {np.mean(corrected):.3f}")  # fmt: skip


if __name__ == "__main__":
    worlds = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    rates(worlds, 400, 1, 3)
    rates(worlds, 25, 4, 3)
    for n_seeds, between in ((1, 0.5), (3, 0.5), (5, 0.5), (3, 0.0)):
        seeds(worlds, n_seeds, between)
    for spread in (0.0, 0.02, 0.1):
        maximum(worlds, spread)
    for prompts in (40, 400):
        for teacher, data in ((1.0, 0.2), (0.5, 0.5)):
            profiles(worlds // 4, prompts, teacher, data)
