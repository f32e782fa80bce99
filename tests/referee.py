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
from em.report.cross import cross_effects  # noqa: E402
from em.report.cross_runs import Cross, Student  # noqa: E402
from em.report.task_effect import Prompts, task_effects  # noqa: E402

EASE = np.array([-0.5, 0.5])  # of the eval columns of `planted_cross`, logits
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


def planted_cross(
    seed: int, teacher: float, data: float, interaction: float = 0.0, spread: float = 0.0, seeds: int = 1,
    n: int = 120, rate: float = -1.5,
) -> Cross:  # fmt: skip
    """Corpora of {P1, P2, base, gold, rows} under teachers {P1, P2, base}; two cells of n prompts.

    teacher, data, interaction: the true effects of misaligned against base, logits. spread: standard
    deviation between seeds of one student, logits. Prompts differ by one logit, the same for all students.
    """
    rng = np.random.default_rng(seed)
    authors = {"med_advice": data, "fin_tutor": data, "base": 0.0, "gold": -0.2, "rows:med_advice": 0.5}
    students, linear = [], []
    for author, effect in authors.items():
        for guide in ("med_advice", "fin_tutor", "base"):
            misaligned = guide != "base"
            both = misaligned and author in ("med_advice", "fin_tutor")
            for k in range(seeds):
                students.append(Student(guide, author, k))
                linear.append(effect + teacher * misaligned + interaction * both + spread * rng.normal())
    column = np.repeat(np.arange(2), n)
    prompts = rate + EASE[column] + rng.normal(size=2 * n)
    values = rng.random((len(students), 2 * n)) < sigmoid(np.array(linear)[:, None] + prompts)
    columns = ["med_advice", "fin_tutor"]
    return Cross(students, values.astype(float), np.ones(values.shape), column, columns, False)


def true_points(teacher: float, data: float, rate: float = -1.5, spread: float = 0.0) -> dict[str, float]:
    """What `planted_cross` without an interaction comes to in points, by least squares on the exact rates."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    weights = weights / weights.sum()
    linear = rate + EASE[:, None] + (1 + spread**2) ** 0.5 * nodes  # (2, nodes)
    authors = np.array([data, data, 0.0, -0.2, 0.5])[:, None, None, None]
    guides = np.array([teacher, teacher, 0.0])[:, None, None]
    exact = (sigmoid(linear + authors + guides) @ weights).mean(axis=-1)  # (5, 3)
    by_author, by_guide = 100 * exact.mean(axis=1), 100 * exact.mean(axis=0)
    return {"data": by_author[:2].mean() - by_author[2], "teacher": by_guide[:2].mean() - by_guide[2]}


def cross_table(sets: int) -> None:
    settings = {
        "teacher 1.5, data 0": dict(teacher=1.5, data=0.0),
        "teacher 1.5, data 0.5": dict(teacher=1.5, data=0.5),
        "teacher 0, data 0, EM 3 %": dict(teacher=0.0, data=0.0, rate=-4.0),
        "teacher 1.5, data 0, runs differ (sd 0.3), 1 seed": dict(teacher=1.5, data=0.0, spread=0.3),
        "the same, 3 seeds": dict(teacher=1.5, data=0.0, spread=0.3, seeds=3),
        "teacher 0, data 0, 3 seeds, runs alike": dict(teacher=0.0, data=0.0, seeds=3),
    }
    print("setting; then the mean, the coverage of 95 % (points) and the rejections of 0 (points, logits)")
    for name, setting in settings.items():
        results = [cross_effects(planted_cross(seed, **setting))["effects"]["all"] for seed in range(sets)]
        truth = true_points(
            **{k: v for k, v in setting.items() if k in ("teacher", "data", "rate", "spread")}
        )
        cells = []
        for term in ("teacher", "data"):
            bias, coverage, rejected = held([r["points"][term] for r in results], truth[term])
            by_logit = held([r["logit"][term] for r in results], 0)[2]
            cells.append(
                f"{term} {bias + truth[term]:+.2f} of {truth[term]:+.2f} points, {coverage:.3f}, "
                f"{rejected:.3f}, {by_logit:.3f}"
            )
        rejected = [held([r[scale]["interaction"] for r in results], 0)[2] for scale in ("points", "logit")]
        print(f"{name} ({sets} sets): {' | '.join(cells)} | interaction {rejected[0]:.3f}, {rejected[1]:.3f}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    {"difficulty": difficulty_table, "cross": cross_table}[sys.argv[1]](int(sys.argv[2]))
