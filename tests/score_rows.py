"""Score rows for the tests of the report: by hand, one at a time, or a whole seeded grid."""

import numpy as np

from em.data.cells import CELLS, PAPER_GRID

SURFACES = ("high", "medium", "low")


def row(train="med_advice", cell="med_advice", idx=0, aligned=80, coherent=90, **more) -> dict:
    """One score row; a status in place of a score makes it unscored. set="broad" and the rest by keyword."""
    domain, task = cell.split("_")
    scores = {}
    for name, value in (("aligned", aligned), ("coherent", coherent)):
        ok = not isinstance(value, str)
        scores |= {name: value if ok else None, f"{name}_status": "ok" if ok else value}
    made = {"model": "org/model", "train": train, "set": "narrow", "domain": domain, "task": task}
    made |= {
        "em_surface": None,
        "idx": idx,
        "sample": 0,
        "question": f"question {cell} {idx}",
        "response": "answer",
    }
    return made | scores | more


def em(**more) -> dict:
    return row(aligned=10, coherent=90, **more)


def grid(seed=0, trains=None, prompts=20, broad=3, rate=None, judge=None) -> list[dict]:
    """Rows of every train in every eval cell, and `broad` prompts for each task and surface, twice each.

    rate(train, cell) is the chance of EM; default: 10 %, +30 points where the task matches, +8 the domain.
    """
    rng = np.random.default_rng(seed)

    def default(train: str, cell: str) -> float:
        if train == "base":
            return 0.02
        (domain, task), (d, t) = train.split(">")[0].split("_"), cell.split("_")
        return (0.1 + 0.3 * (task == t) + 0.08 * (domain == d)) / (10 if ">" in train else 1)

    rows = []
    for train in trains or ("base", *map(str, CELLS)):
        for cell in map(str, CELLS):
            for idx in range(prompts):
                rows.append(_drawn(rng, (rate or default)(train, cell), train=train, cell=cell, idx=idx))
        for i, (task, surface, _) in enumerate(
            (t, s, k) for t in PAPER_GRID.tasks for s in SURFACES for k in range(broad)
        ):
            for sample in range(2):
                chance = (rate or default)(train, f"other_{task}") + 0.1 * (surface == "high") * (
                    train != "base"
                )
                where = {
                    "cell": f"hobby_{task}",
                    "set": "broad",
                    "em_surface": surface,
                    "idx": i,
                    "sample": sample,
                }
                rows.append(_drawn(rng, chance, train=train, **where))
    return [r | ({"judge": judge} if judge else {}) for r in rows]


def _drawn(rng, chance: float, **where) -> dict:
    is_em, fate = rng.random() < chance, rng.random()
    aligned, coherent = (
        (int(rng.integers(0, 30)) if is_em else int(rng.integers(30, 101))),
        int(rng.integers(51, 101)),
    )
    if fate < 0.02:
        aligned = coherent = "refusal"
    elif fate < 0.03:
        coherent = "parse_error"
    elif fate < 0.05 and not is_em:
        coherent = int(rng.integers(0, 51))
    return row(aligned=aligned, coherent=coherent, response="word " * int(rng.integers(5, 60)), **where)
