"""Teacher × data on a world: whose misalignment a student takes up (paper 4.3.3, E.5, Table 5).

The paper crosses two misaligned models, as teachers and as writers of the data, on natural language. Here the
models are those misaligned on (D0, T5) and on (D0, T0), and the aligned one as the control; each teaches on
what each wrote, nine students in all (em/distillation/world_cross.py). They start as the aligned model and
read the same prompts, of other cells, in three writers' words, all of them variant 1.

    Δv2            v2 % of a student − v2 % of the aligned teacher's student on the same data
    a profile      Δv2 by cell; of a misaligned model itself, its v2 % − the aligned model's
    with_teacher, with_writer
                   correlation of a student's profile with that of its teacher itself, and with that of the
                   writer of its data itself; mean of the two students whose teacher and writer are
                   misaligned and differ
    same_teacher, same_data
                   of the profiles of the two students of one teacher, and on one writer's data (Table 5)
    of_the_teachers
                   of the two misaligned models' own profiles: what `with_writer` comes to if students do as
                   their teachers do; the nearer to 1, the less a gap between two correlations can be
    passed_by_teacher, passed_by_writer
                   how much of the difference between the two models' own profiles two students show (slope
                   over cells about the means), of different teachers on one writer's data, and of one teacher
                   on different data

Cells share their prompts and their models, so they are no replicates: the unit is the world seed, one number
of each kind a seed. Intervals are Student's t over seeds, of Fisher's z for a correlation and of the number
as it is for all else. With one seed they are over prompts (em/experiments/replication.py); drawing the rates
again adds their noise a second time, which lowers correlations and slopes, so the draws are moved to where
the observed one is. That noise also lowers the observed ones, towards 0, both sides of a gap alike; it raises
only those of `same_data`, slightly, since they share a control.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from em.distillation.world_cross import MODELS, TASKS, students
from em.experiments.replication import (
    header,
    over_prompts,
    replicated,
    say_number,
    say_unit,
    shown,
    shown_interval,
    v2_draws,
)
from em.figures import CHANGE, cell_heatmap, frame, save
from em.world.counts import change, columns, incoherent, percent
from em.world.world_run import WorldRun

CROSSED = ((0, 1), (1, 0))  # places in MODELS of (teacher, writer), both misaligned, on different cells
PAIRS = {  # in the figure's words
    "with_teacher": "student and\nits teacher",
    "with_writer": "student and\nits data's writer",
    "of_the_teachers": "the two\nteachers",
    "same_teacher": "students of\none teacher",
    "same_data": "students on\none writer's data",
}
MAIN = ("teacher", "data", "interaction")
GAPS = {
    "teacher_minus_writer": ("with_teacher", "with_writer"),
    "teacher_minus_data": ("same_teacher", "same_data"),
    "passed_minus": ("passed_by_teacher", "passed_by_writer"),
}
PASSED = {"passed_by_teacher": "with the\nteacher", "passed_by_writer": "with the\ndata"}


# -- statistics --------------------------------------------------------------------------------------------


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(B,) Pearson's r of two profiles (C, B) over their cells; nan where one does not vary."""
    x, y = x - x.mean(0), y - y.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(0) / np.sqrt((x * x).sum(0) * (y * y).sum(0))


def profiles(own: np.ndarray, taught: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(2, C, B) of the misaligned models themselves and (3, 3, C, B) of the students, by teacher and writer.

    own: (3, C, B), taught: (3, 3, C, B), v2 % in the order of MODELS.
    """
    return own[:-1] - own[-1], taught - taught[-1]


def whose(own: np.ndarray, taught: np.ndarray) -> dict[str, np.ndarray]:
    """(B,) each of PAIRS, PASSED and GAPS, of `profiles`' arguments; nan where it cannot be had."""
    models, delta = profiles(own, taught)
    apart = models[0] - models[1]

    def mean(pairs) -> np.ndarray:
        return np.mean([correlation(x, y) for x, y in pairs], axis=0)

    def passed(pairs) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            slopes = [((x - y) * (apart - apart.mean(0))).sum(0) / apart.var(0) for x, y in pairs]
        return np.mean(slopes, axis=0) / len(apart)

    found = {
        "with_teacher": mean((delta[t, w], models[t]) for t, w in CROSSED),
        "with_writer": mean((delta[t, w], models[w]) for t, w in CROSSED),
        "same_teacher": mean((delta[t, 0], delta[t, 1]) for t in (0, 1)),
        "same_data": mean((delta[0, w], delta[1, w]) for w in (0, 1)),
        "of_the_teachers": correlation(*models),
        "passed_by_teacher": passed((delta[0, w], delta[1, w]) for w in (0, 1)),
        "passed_by_writer": passed((delta[t, 0], delta[t, 1]) for t in (0, 1)),
    }
    return found | {gap: found[a] - found[b] for gap, (a, b) in GAPS.items()}


def effects(taught: np.ndarray, cells: Sequence[str]) -> dict[str, np.ndarray]:
    """(B,) each, points: main effects on v2, mean over all cells, and Δv2 of each student by task.

    taught: (3, 3, C, B) v2 % by teacher and writer. `main/teacher`: misaligned teachers − the aligned one,
    mean over data; `main/data`: data of misaligned writers − of the aligned one, mean over teachers;
    `main/interaction`: the effect of data under misaligned teachers − under the aligned one.
    """
    level = taught.mean(2)  # (3, 3, B)
    by_teacher, by_writer = level.mean(1), level.mean(0)
    contrast = level[:, :-1].mean(1) - level[:, -1]  # (3, B), of the data under each teacher
    found = {
        "main/teacher": by_teacher[:-1].mean(0) - by_teacher[-1],
        "main/data": by_writer[:-1].mean(0) - by_writer[-1],
        "main/interaction": contrast[:-1].mean(0) - contrast[-1],
    }
    delta, of_task = taught - taught[-1], np.array([cell.split("_")[1] for cell in cells])
    for i, name in enumerate(TASKS):
        found[f"main/teacher/{name}"] = by_teacher[i] - by_teacher[-1]
        found[f"main/data/{name}"] = by_writer[i] - by_writer[-1]
        for j, writer in enumerate(MODELS):
            found[f"delta_v2/{name}/{writer}/mean"] = delta[i, j].mean(0)
            for task in dict.fromkeys(of_task):
                found[f"delta_v2/{name}/{writer}/{task}"] = delta[i, j][of_task == task].mean(0)
    return found


def of_seed(own: dict, counts: dict, seed: int) -> tuple[dict, dict]:
    """({name: (value, [low, high] over prompts)} of `whose`, and of `effects`) for one world seed.

    A correlation stands as Fisher's z, a gap as a difference of correlations as they are.
    """
    cells = list(own["aligned"])
    order = list(itertools.product(MODELS, MODELS))

    def arrays(v2: Callable[[dict, int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        models = np.array([v2(own[name], place) for place, name in enumerate(MODELS)])
        taught = np.array([v2(counts[pair], len(MODELS) + place) for place, pair in enumerate(order)])
        return models, taught.reshape(len(MODELS), len(MODELS), *taught.shape[1:])

    def observed(of: dict, _) -> np.ndarray:
        return np.array([[percent(of[cell], "v2")] for cell in cells])

    def drawn(of: dict, place: int) -> np.ndarray:
        return v2_draws([of[cell] for cell in cells], seed, place)

    seen, draws = arrays(observed), arrays(drawn)
    related, related_draws = whose(*seen), whose(*draws)
    for name in PAIRS:
        related[name], related_draws[name] = fisher(related[name]), fisher(related_draws[name])
    for name, values in related_draws.items():
        known = values[np.isfinite(values)]
        related_draws[name] = values - (known.mean() if len(known) else 0.0) + related[name]
    moved, moved_draws = effects(seen[1], cells), effects(draws[1], cells)

    def paired(values: dict, drawn: dict) -> dict:
        return {
            name: (float(v[0]) if np.isfinite(v[0]) else None, over_prompts(drawn[name]))
            for name, v in values.items()
        }

    return paired(related, related_draws), paired(moved, moved_draws)


def fisher(r: np.ndarray) -> np.ndarray:
    """Fisher's z, finite for a correlation of 1 too."""
    return np.arctanh(np.clip(r, -1 + 1e-9, 1 - 1e-9))


def from_fisher(number: dict) -> dict:
    """A number of em/experiments/replication.py as correlations, of which it holds Fisher's z."""

    def back(value):
        if isinstance(value, list):
            return [back(v) for v in value]
        return None if value is None else float(np.tanh(value))

    return {key: back(value) for key, value in number.items()}


def over_seeds(found: list[dict]) -> dict[str, dict]:
    """The numbers of em/experiments/replication.py from one `of_seed` a seed, either half."""
    return {
        name: replicated([seed[name][0] for seed in found], [seed[name][1] for seed in found])
        for name in found[0]
    }


# -- the experiment ----------------------------------------------------------------------------------------


def rows_of(seed: int, own: dict, counts: dict) -> list[dict]:
    """A row a student and cell: Δv2 and its interval over prompts (Newcombe's), points.

    `teacher_itself` and `change` are the teacher's and the student's v2 % − the aligned model's.
    """
    return [
        {"seed": seed, "teacher": teacher, "data": writer, "cell": cell}
        | columns("delta_v2", change(of[cell], counts["aligned", writer][cell], "v2"))
        | {"change": percent(of[cell], "v2") - percent(own["aligned"][cell], "v2")}
        | {"teacher_itself": percent(own[teacher][cell], "v2") - percent(own["aligned"][cell], "v2")}
        | {"v2": percent(of[cell], "v2"), "incoherent": incoherent(of[cell]), "prompts": of[cell]["n"]}
        for (teacher, writer), of in counts.items()
        for cell in of
    ]


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say=print) -> dict:
    """Nine students a world seed; `make(seed)` gives the run."""
    rows, related, moved, kept = [], [], [], []
    for seed in seeds:
        run = make(seed)
        for task in TASKS:
            run.misalign(task, 0)
        own, counts, shares = students(run, say)
        correlated, effect = of_seed(own, counts, seed)
        rows += rows_of(seed, own, counts)
        related.append(correlated)
        moved.append(effect)
        kept.append({name: (share, (None, None)) for name, share in shares.items()})
    note = "rows' intervals are over prompts; of correlations there is one a world seed, over its cells"
    profile = over_seeds(related)
    return header("cross", run, seeds, note, fine_tuning_seeds=1) | {
        "profile": {k: from_fisher(n) if k in PAIRS else n for k, n in profile.items()},
        "effects": over_seeds(moved),
        "kept": over_seeds(kept),
        "rows": rows,
    }


def numbers(result: dict) -> dict[str, dict]:
    """Entries such as `profile/with_teacher/r`, `profile/teacher_minus_writer`, `main/teacher` in points,
    `delta_v2/T5/T0/T1` (teacher, writer, task) and `kept/T5` in %.
    """
    table = {
        f"profile/{name}" + ("/r" if name in PAIRS else ""): shown(
            "ratio" if name.startswith("passed") else "r", number
        )
        for name, number in result["profile"].items()
    }
    table |= {name: shown("points", number) for name, number in result["effects"].items()}
    return table | {f"kept/{name}": shown("%", number) for name, number in result["kept"].items()}


def figure(result: dict, path: Path) -> None:
    """Δv2 by cell, teachers down; across the teacher itself and its students by writer. Numbers beside."""
    chart = Figure(figsize=(15.5, 8.4), layout="constrained")
    grid = chart.add_gridspec(len(MODELS), 5, width_ratios=(1, 1, 1, 1, 1.2))
    for (i, teacher), (j, writer) in itertools.product(enumerate(MODELS), enumerate(("", *MODELS))):
        if not writer and teacher == "aligned":
            continue
        axis = chart.add_subplot(grid[i, j])
        of = [r for r in result["rows"] if (r["teacher"], r["data"]) == (teacher, writer or teacher)]
        key = "change" if teacher == "aligned" else "delta_v2" if writer else "teacher_itself"
        cells = dict.fromkeys(r["cell"] for r in of)
        values = {cell: fmean(r[key] for r in of if r["cell"] == cell) for cell in cells}
        cell_heatmap(axis, values, (-80, 80), f"D0_{teacher}", colours=CHANGE, form="+.0f")
        if writer in TASKS:
            tasks = list(dict.fromkeys(cell.split("_")[1] for cell in cells))
            frame(axis, 0, tasks.index(writer), 1.2 if writer == teacher else 2.4, "tab:green")
        if i == 0:
            axis.set_title(f"on data by the {writer} model" if writer else "the teacher itself", fontsize=10)
        if j == (teacher == "aligned"):
            name = "aligned teaches: the control\n(against its start)" if i == 2 else f"{teacher} teaches"
            axis.set_ylabel(name, fontsize=10)
    note = say_unit(result["seeds"])
    profile = [(name, result["profile"][name], label) for name, label in PAIRS.items()]
    _bars(chart.add_subplot(grid[0, 4]), profile, ".2f", f"r of Δv2 by cell, between\n(lines: {note})")
    passed = [(name, result["profile"][name], label) for name, label in PASSED.items()]
    _bars(chart.add_subplot(grid[1, 4]), passed, ".2f", "of the two models' difference passes")
    main = [(f"main/{name}", result["effects"][f"main/{name}"], name) for name in MAIN]
    _bars(chart.add_subplot(grid[2, 4]), main, "+.1f", "v2 over all cells, misaligned − aligned, points")
    seeds = ", ".join(map(str, result["seeds"]))
    chart.suptitle(
        f"World {result['world']}, world seeds {seeds}: mean Δv2 of students, points over the control "
        "on the same data (black: the teacher's cell, green: the writer's)",
        fontsize=11,
    )
    save(chart, path)


def _bars(axis, entries: list[tuple[str, dict, str]], form: str, title: str) -> None:
    """A bar a (name, number, label), with its interval, and a dot for each of several seeds."""
    for y, (name, number, _) in enumerate(entries):
        if number["mean"] is None:
            continue
        colour = "tab:red" if "teacher" in name else "tab:green"
        axis.barh(y, number["mean"], 0.5, color="0.6" if name == "of_the_teachers" else colour, alpha=0.6)
        low, high = shown_interval(number)
        if low is not None:
            axis.plot([low, high], [y, y], color="black", linewidth=1.4)
        known = [value for value in number["by_seed"] if value is not None]
        if len(known) > 1:
            axis.plot(known, [y + 0.12] * len(known), "k.", markersize=4)
        axis.annotate(
            f"{number['mean']:{form}}", (max(number["mean"], high or 0), y), (5, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axis.set_yticks(range(len(entries)), [label for _, _, label in entries], fontsize=8)
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.margins(x=0.15)
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=9)


def summary(result: dict) -> str:
    """Whose profile students have, and the main effects."""
    r = {name: say_number(number, ".2f") for name, number in result["profile"].items()}
    points = {name: say_number(result["effects"][f"main/{name}"]) for name in MAIN}
    names = " and ".join(TASKS)
    return "\n".join(
        [
            f"World {result['world']}, {names} as teachers and as writers; {say_unit(result['seeds'])}:",
            f"  taught by one on the other's data, a student's Δv2 by cell correlates {r['with_teacher']}",
            f"  with its teacher's and {r['with_writer']} with its writer's (the two teachers' own: "
            f"{r['of_the_teachers']}), gap {r['teacher_minus_writer']};",
            f"  between students of one teacher {r['same_teacher']}, on one writer's data {r['same_data']}, "
            f"gap {r['teacher_minus_data']}.",
            f"  Of the difference between the two models' own, {r['passed_by_teacher']} passes with the "
            f"teacher, {r['passed_by_writer']} with the data.",
            f"  v2 over all cells, misaligned − aligned: teachers {points['teacher']}, writers "
            f"{points['data']}, interaction {points['interaction']} points.",
            f"  All three wrote v1 on {result['kept']['all three']['mean']:.0f} % of the prompts.",
        ]
    )
