"""Planted truths for the referee's two objections, and how often their intervals hold them.

    OMP_NUM_THREADS=1 .venv/bin/python tests/referee.py difficulty 300
    OMP_NUM_THREADS=1 .venv/bin/python tests/referee.py cross 500

prints the tables of LOG.md: bias and coverage of the effects of em/report/difficulty.py, and those of
em/report/cross.py with the size of its tests, over so many data sets.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from em.data.cells import CELLS  # noqa: E402
from em.report.difficulty import Prompts, task_effects  # noqa: E402

WAYS = ("raw", "strata", "slopes", "matched")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def planted_difficulty(
    seed: int, task: float, confounding: float = 1.0, n: int = 100, rate: float = -1.5, noise: float = 0.0
) -> tuple[Prompts, np.ndarray]:
    """The paper's grid, n prompts a cell: tasks differ in mean difficulty, runs in their slope on it.

    A task's runs do well on what its prompts are like: slopes and means rise together over tasks, so that
    the raw effect is biased by about `confounding` times 0.6 logits. task: the true effect, logits. noise:
    standard deviation of the error of the measure, in those of difficulty within a cell.
    """
    rng = np.random.default_rng(seed)
    tasks = np.array([("advice", "summarization", "tutor", "critique").index(cell.task) for cell in CELLS])
    along = np.array([-1.0, -0.3, 0.3, 1.0])[tasks]  # (12,)
    column = np.repeat(np.arange(12), n)
    d = 0.7 * along[column] + rng.normal(size=12 * n)
    slope = confounding * along + rng.normal(0, 0.2, 12)
    same = tasks[:, None] == tasks[column]
    domain = np.array([cell.domain for cell in CELLS])
    linear = rate + rng.normal(0, 0.5, (12, 1)) + rng.normal(0, 0.3, 12)[column] - 0.3 * d
    linear = linear + slope[:, None] * d + task * same + 0.3 * (domain[:, None] == domain[column])
    em = (rng.random((12, 12 * n)) < sigmoid(linear)).astype(float)
    prompts = Prompts(em, np.ones_like(em), column, list(CELLS), list(CELLS))
    return prompts, d + noise * rng.normal(size=12 * n)


def held(entries: list[dict], truth: float) -> tuple[float, float, float]:
    """(mean − truth, share of intervals that hold the truth, share that hold no 0)."""
    values, low, high = (np.array([entry[key] for entry in entries]) for key in ("value", "low", "high"))
    return values.mean() - truth, np.mean((low <= truth) & (truth <= high)), np.mean((low > 0) | (high < 0))


def difficulty_table(sets: int) -> None:
    settings = {
        "no effect, no confounding": dict(task=0.0, confounding=0.0),
        "no effect": dict(task=0.0),
        "effect 0.8": dict(task=0.8),
        "effect 0.8, EM 3 %": dict(task=0.8, rate=-4.5, n=400),
        "no effect, noisy measure (sd 1)": dict(task=0.0, noise=1.0),
    }
    print("setting; then for raw, strata, slopes, matched: bias (logits), coverage of 95 %, rejections of 0")
    for name, setting in settings.items():
        results = [task_effects(*planted_difficulty(seed, **setting)) for seed in range(sets)]
        cells = []
        for way in WAYS:
            bias, coverage, rejected = held([r[way]["logit"] for r in results], setting["task"])
            cells.append(f"{way} {bias:+.3f} {coverage:.3f} {rejected:.3f}")
        print(f"{name} ({sets} sets): " + " | ".join(cells), flush=True)


if __name__ == "__main__":
    {"difficulty": difficulty_table}[sys.argv[1]](int(sys.argv[2]))
