"""Teacher against data: whose misalignment a student's profile over eval cells follows (paper 4.3.3, E.5).

Students are distilled by every teacher of a set on the data of every author of a set: the paper's Tables 5
and 17–20 have two of each, P1 and P2, misaligned on two cells. A profile is a student's means by eval cell,
raw or minus the base model's, which takes out that some cells are easy for every model.

    same_teacher     mean correlation of the profiles of two students of one teacher on different data
    same_data        of two students on one author's data with different teachers
    follows_teacher, follows_author
                     of students whose teacher and author differ: with the profile of the teacher itself, and
                     with that of the author (misaligned models in the files)
    shares           of the profiles' variation between students, by cell: teacher + data + both together
    teacher, data    main effects: a level's mean over all cells minus the mean of the levels

The unit of a correlation is the eval cell, of which there are few: its interval resamples prompts and says
what other prompts would give in these cells, not what other cells would. The noise of few prompts lowers a
correlation and adds to a share: what resampling adds to the sums of squares and products is taken off them;
`raw` is the correlation before that.
"""

import itertools

import numpy as np

from em.data.condition import BASE, Condition, describe
from em.report.averages import FEW, Averages, rounded
from em.report.outcomes import Outcomes, Trained
from em.stats import percentile_interval, resample_clusters

DRAWS = 1000
LEAST_CELLS = 3  # of which a correlation says something


def factorials_of(outcomes: Outcomes) -> list[dict]:
    """Every two teachers that also wrote each other's data, and, as another, all that was crossed with both.

    {"teachers": names, "sources": names, "students": {(teacher, source): runs}, "channel": words}. A source
    is an author, with the prompts or the filter where one has several. In the second kind `base` is a teacher
    too where the base model taught on both authors' data, and sources are all on which every teacher taught.
    """
    groups: dict[Condition, dict] = {}
    for r, run in enumerate(outcomes.runs):
        made = run.condition
        if run.kind == "student" and made.teacher and made.source:
            way = made._replace(teacher=None, source=None, prompts=None, filtered=None, seed=None)
            groups.setdefault(way, {}).setdefault((made.teacher, _data(run)), []).append(r)
    found = []
    for way, runs in groups.items():
        teachers, data = (list(dict.fromkeys(key[i] for key in runs)) for i in (0, 1))
        for p1, p2 in itertools.combinations([t for t in teachers if t != BASE], 2):
            for kind in {d[1:] for d in data if d[0] == p1}:  # prompts and filter
                authors = [(p1, *kind), (p2, *kind)]
                if not all((t, d) in runs for t in (p1, p2) for d in authors):
                    continue
                levels = [p1, p2] + [BASE] * all((BASE, d) in runs for d in authors)
                further = [d for d in data if d not in authors and all((t, d) in runs for t in levels)]
                found.append(_factorial(way, [p1, p2], authors, runs))
                if further or BASE in levels:
                    found.append(_factorial(way, levels, authors + further, runs))
    ways = {entry["way"] for entry in found}
    differing = [n for n in ("channel", "estimator", "lr", "epoch") if len({getattr(w, n) for w in ways}) > 1]
    for entry in found:
        entry["channel"] = describe(entry.pop("way"), dict.fromkeys(["channel", *differing]))
    return found


def _factorial(way: Condition, teachers: list[str], sources: list[tuple], runs: dict) -> dict:
    names = _source_names(sources)
    students = {(t, names[d]): runs[t, d] for t in teachers for d in sources}
    return {"teachers": teachers, "sources": list(names.values()), "students": students, "way": way}


def _data(run: Trained) -> tuple[str, str | None, bool | None]:
    return run.condition.source, run.condition.prompts, run.condition.filtered


def _source_names(sources: list[tuple]) -> dict[tuple, str]:
    """The author, and what else tells two of its data apart."""
    names = {}
    for source, prompts, filtered in sources:
        alike = [d for d in sources if d[0] == source]
        words = [source]
        if len({d[1] for d in alike}) > 1:
            words.append(f"{prompts} prompts")
        if len({d[2] for d in alike}) > 1:
            words.append("filtered" if filtered else "unfiltered")
        names[source, prompts, filtered] = ", ".join(words)
    return names


def analyse(averages: Averages, factorial: dict, asked: list[int], draws: int = DRAWS) -> dict:
    """The statistics of this module over the eval columns `asked`, raw and minus base where base is there."""
    o, rng_seed = averages.outcomes, 0
    members = np.isin(o.column, asked)
    weights = np.ones((draws + 1, int(members.sum())), np.float32)  # the first draw is what was seen
    weights[1:] = resample_clusters(o.column[members], draws, rng_seed)

    def profiles(runs: list[int]) -> np.ndarray:  # (C, B + 1)
        rates = []
        for c in asked:
            here = o.column[members] == c
            sums, counts = (
                (v[runs][:, members][:, here] @ weights[:, here].T.astype(float)) for v in (o.total, o.count)
            )
            rates.append(np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0))
        rates = np.stack(rates, axis=1)  # (runs, C, B + 1)
        n = np.isfinite(rates).sum(axis=0)
        return np.divide(np.nansum(rates, axis=0), n, out=np.full(n.shape, np.nan), where=n > 0)

    teachers, sources = factorial["teachers"], factorial["sources"]
    students = np.stack(
        [np.stack([profiles(factorial["students"][t, d]) for d in sources]) for t in teachers]
    )  # (T, D, C, B + 1)
    alone = {
        name: profiles([r for r, run in enumerate(o.runs) if run.kind == "teacher" and run.cell == name])
        for name in {*teachers, *sources}
        if any(run.kind == "teacher" and run.cell == name for run in o.runs)
    }
    base_runs = [r for r, run in enumerate(o.runs) if run.kind == BASE]
    result = {
        "channel": factorial["channel"],
        "teachers": teachers,
        "sources": sources,
        "cells": [o.columns[c] for c in asked],
        "unit": f"eval cell ({len(asked)}); intervals resample prompts within them",
        "prompts": int(np.bincount(o.column[members])[asked].min()),  # of the smallest cell
        "raw": _statistics(students, alone, teachers, sources),
    }
    if base_runs:
        base = profiles(base_runs)
        result["minus_base"] = _statistics(
            students - base, {name: p - base for name, p in alone.items()}, teachers, sources
        )
    result["main_effects"] = _main_effects(students, teachers, sources)
    return result


# -- profiles (…, C, B + 1); the last axis starts with what was seen -----------------------------------------


def _statistics(students: np.ndarray, alone: dict, teachers: list[str], sources: list[str]) -> dict:
    n_teachers, n_sources = students.shape[:2]
    crossed = [(i, j) for i, t in enumerate(teachers) for j, d in enumerate(sources) if t != d]
    with_both = [(i, j) for i, j in crossed if teachers[i] in alone and sources[j] in alone]
    pairs = {
        "same_teacher": [
            (students[i, j], students[i, k])
            for i in range(n_teachers)
            for j, k in itertools.combinations(range(n_sources), 2)
        ],
        "same_data": [
            (students[i, j], students[k, j])
            for j in range(n_sources)
            for i, k in itertools.combinations(range(n_teachers), 2)
        ],
        "follows_teacher": [(students[i, j], alone[teachers[i]]) for i, j in with_both],
        "follows_author": [(students[i, j], alone[sources[j]]) for i, j in with_both],
    }
    means = {name: _mean_correlation(of) for name, of in pairs.items()}
    result = {name: _corrected(mean) for name, mean in means.items()}
    for name, (a, b) in (
        ("teacher_minus_data", ("same_teacher", "same_data")),
        ("teacher_minus_author", ("follows_teacher", "follows_author")),
    ):
        result[name] = _gap(means[a], means[b])
    return result | {"shares": _shares(students)}


def _mean_correlation(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, np.ndarray] | None:
    """(raw, (B + 1,) corrected) mean correlation of pairs of profiles (C, B + 1); None for too few cells."""
    if not pairs or len(pairs[0][0]) < LEAST_CELLS:
        return None
    raw, corrected = [], []
    for x, y in pairs:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
        products = np.stack([(x * y).sum(axis=0), (x * x).sum(axis=0), (y * y).sum(axis=0)])
        raw.append(float(_ratio(products)[0]))
        corrected.append(np.clip(_ratio(_without_noise(products)), -1, 1))
    return float(np.mean(raw)), np.mean(corrected, axis=0)


def _ratio(products: np.ndarray) -> np.ndarray:
    """xy / √(xx · yy) of products (3, B + 1); nan where a profile does not vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(
            (products[1:] > 0).all(axis=0), products[0] / np.sqrt(products[1] * products[2]), np.nan
        )


def _without_noise(sums: np.ndarray) -> np.ndarray:
    """Sums of squares or products (…, B + 1), less what the noise of the prompts adds to them.

    Resampling adds that noise once more to what was seen, so a draw holds it twice.
    """
    noise = sums[..., 1:].mean(axis=-1, keepdims=True) - sums[..., :1]
    return sums - noise * np.r_[1, np.full(sums.shape[-1] - 1, 2)]


def _corrected(mean: tuple[float, np.ndarray] | None) -> dict:
    if mean is None:
        return dict.fromkeys(("correlation", "low", "high", "raw"))
    raw, values = mean
    low, high = percentile_interval(values[1:])
    named = {"correlation": values[0], "low": low, "high": high, "raw": raw}
    return {name: rounded(value) for name, value in named.items()}


def _gap(a: tuple[float, np.ndarray] | None, b: tuple[float, np.ndarray] | None) -> dict:
    """The difference of two corrected correlations."""
    if a is None or b is None:
        return dict.fromkeys(("difference", "low", "high"))
    gap = a[1] - b[1]
    low, high = percentile_interval(gap[1:])
    return {name: rounded(v) for name, v in {"difference": gap[0], "low": low, "high": high}.items()}


def _shares(students: np.ndarray) -> dict:
    """Of the sum of squares of students about the mean student, by cell: teacher, data, both together."""
    mean = students.mean(axis=(0, 1), keepdims=True)
    teacher = students.mean(axis=1, keepdims=True) - mean
    data = students.mean(axis=0, keepdims=True) - mean
    rest = students - mean - teacher - data
    squares = np.stack(
        [(np.broadcast_to(p, students.shape) ** 2).sum(axis=(0, 1, 2)) for p in (teacher, data, rest)]
    )
    kept = np.maximum(_without_noise(squares), 0)
    total = kept.sum(axis=0)
    shares = np.divide(kept, total, out=np.full_like(kept, np.nan), where=total > 0)
    result = {}
    for name, values in zip(("teacher", "data", "both"), shares, strict=True):
        low, high = percentile_interval(values[1:])
        result[name] = {"share": rounded(values[0]), "low": rounded(low), "high": rounded(high)}
    return result


def _main_effects(students: np.ndarray, teachers: list[str], sources: list[str]) -> list[dict]:
    """Each level's mean over the other factor and the cells, minus the mean over levels; recentred draws."""
    means, found = students.mean(axis=2), []  # (T, D, B + 1)
    for factor, names, axis in (("teacher", teachers, 1), ("data", sources, 0)):
        effects = means.mean(axis=axis) - means.mean(axis=(0, 1))
        for name, values in zip(names, effects, strict=True):
            low, high = percentile_interval(values[1:])
            effect = {"effect": values[0], "low": low, "high": high}
            found.append({"factor": factor, "level": name} | {k: rounded(v) for k, v in effect.items()})
    return found


def flat(result: dict) -> list[dict]:
    """`analyse` as rows of a CSV: profile, what, value, low, high."""
    about = {"channel": result["channel"], "teachers": " | ".join(result["teachers"])}
    about |= {"sources": " | ".join(result["sources"]), "cells": len(result["cells"])}
    rows = []
    for kind in ("raw", "minus_base"):
        for name, entry in result.get(kind, {}).items():
            parts = {f"share of {n}": e for n, e in entry.items()} if name == "shares" else {name: entry}
            for what, values in parts.items():
                value = next(v for k, v in values.items() if k in ("correlation", "difference", "share"))
                bounds = {k: values[k] for k in ("low", "high")}
                rows.append(about | {"profile": kind, "what": what, "value": value} | bounds)
    for e in result["main_effects"]:
        what = f"effect of {e['factor']} {e['level']}"
        rows.append(
            about | {"profile": "raw", "what": what, "value": e["effect"], "low": e["low"], "high": e["high"]}
        )
    return rows


def sentence(result: dict) -> str:
    """The finding in one line."""
    kind = "minus_base" if "minus_base" in result else "raw"
    entry, shares = result[kind], result[kind]["shares"]

    def text(values: dict, name: str = "correlation") -> str:
        if values[name] is None:
            return "n/a"
        return f"{values[name]:.2f} [{values['low']:.2f}, {values['high']:.2f}]"

    effects = ", ".join(
        f"{e['factor']} {e['level']} {e['effect']:+.2f} [{e['low']:.2f}, {e['high']:.2f}]"
        for e in result["main_effects"]
        if e["effect"] is not None
    )
    where = f"{len(result['cells'])} eval cells{' minus base' if kind == 'minus_base' else ''}"
    return (
        f"{result['channel']}, teachers {', '.join(result['teachers'])} × data of "
        f"{', '.join(result['sources'])}, {where}: profiles of one teacher's students correlate by "
        f"{text(entry['same_teacher'])}, on one author's data by {text(entry['same_data'])}; the teacher "
        f"makes {text(shares['teacher'], 'share')} of the variation between students, the data "
        f"{text(shares['data'], 'share')}. Main effects on the mean of the cells: {effects}."
        + (" With so few prompts a cell these intervals are too narrow." if result["prompts"] < FEW else "")
    )
