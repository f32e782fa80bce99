"""Teacher against data: whose misalignment a student's profile over eval cells follows (paper 4.3.3, E.5).

Two models that were misaligned on two cells, P1 and P2, each teach on what each of them wrote: the four
students of Tables 5 and 17–20. A profile is a student's means by eval cell, raw or minus the base model's,
which takes out that some cells are easy for every model. (How high a teacher or an author moves the mean is
em/report/cross.py's question.)

    same_teacher     mean correlation of the profiles of the two students of one teacher
    same_data        of the two students on one author's data
    follows_teacher, follows_author
                     of students whose teacher and author differ: with the profile of the teacher itself, and
                     with that of the author (misaligned models in the files)
    shares           of the profiles' variation between students, by cell: teacher + data + both together

The unit of a correlation is the eval cell, of which there are few: its interval resamples prompts and says
what other prompts would give in these cells, not what other cells would. The noise of few prompts lowers a
correlation and adds to a share: what resampling adds to the sums of squares and products is taken off them;
`raw` is the correlation before that.
"""

import itertools

import numpy as np

from em.clusters import FEW
from em.data.condition import BASE, Condition, describe
from em.report.averages import Averages, rounded
from em.report.outcomes import Outcomes
from em.stats import percentile_interval, resample_clusters

DRAWS = 1000
LEAST_CELLS = 3  # of which a correlation says something


def factorials_of(outcomes: Outcomes) -> list[dict]:
    """Every two misaligned teachers that also taught on each other's data.

    {"teachers": names, "students": {(teacher, author): runs}, "channel": words}.
    """
    groups: dict[Condition, dict] = {}
    for r, run in enumerate(outcomes.runs):
        made = run.condition
        if run.kind == "student" and run.cell and made.teacher and made.source:
            way = made._replace(teacher=None, source=None, seed=None)
            groups.setdefault(way, {}).setdefault((made.teacher, made.source), []).append(r)
    found = []
    for way, runs in groups.items():
        for pair in itertools.combinations(dict.fromkeys(teacher for teacher, _ in runs), 2):
            crossed = list(itertools.product(pair, pair))
            if all(both in runs for both in crossed):
                students = {both: runs[both] for both in crossed}
                found.append({"teachers": list(pair), "students": students, "way": way})
    ways = {entry["way"] for entry in found}
    differing = [name for name in Condition._fields if len({getattr(way, name) for way in ways}) > 1]
    for entry in found:
        entry["channel"] = describe(entry.pop("way"), dict.fromkeys(["channel", *differing]))
    return found


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

    pair = factorial["teachers"]
    students = np.stack(
        [np.stack([profiles(factorial["students"][t, d]) for d in pair]) for t in pair]
    )  # (2, 2, C, B + 1): teacher, author
    alone = {
        name: profiles(runs)
        for name in pair
        if (runs := [r for r, run in enumerate(o.runs) if run.kind == "teacher" and run.cell == name])
    }
    result = {
        "channel": factorial["channel"],
        "teachers": pair,
        "cells": [o.columns[c] for c in asked],
        "unit": f"eval cell ({len(asked)}); intervals resample prompts within them",
        "prompts": int(np.bincount(o.column[members])[asked].min()),  # of the smallest cell
        "raw": _statistics(students, [alone.get(name) for name in pair]),
    }
    if base_runs := [r for r, run in enumerate(o.runs) if run.kind == BASE]:
        base = profiles(base_runs)
        over = [alone[name] - base if name in alone else None for name in pair]
        result["minus_base"] = _statistics(students - base, over)
    return result


# -- profiles (…, C, B + 1); the last axis starts with what was seen -----------------------------------------


def _statistics(students: np.ndarray, alone: list[np.ndarray | None]) -> dict:
    """students: (2, 2, C, B + 1) by teacher and author; alone: the two misaligned models' own, or None."""
    pairs = {
        "same_teacher": [(students[i, 0], students[i, 1]) for i in (0, 1)],
        "same_data": [(students[0, j], students[1, j]) for j in (0, 1)],
        "follows_teacher": [(students[i, 1 - i], alone[i]) for i in (0, 1)],
        "follows_author": [(students[i, 1 - i], alone[1 - i]) for i in (0, 1)],
    }
    if any(profile is None for profile in alone):
        pairs |= {"follows_teacher": [], "follows_author": []}
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


def flat(result: dict) -> list[dict]:
    """`analyse` as rows of a CSV: channel, teachers, cells, profile, what, value, low, high."""
    about = {"channel": result["channel"], "teachers": " | ".join(result["teachers"])}
    about["cells"] = len(result["cells"])
    rows = []
    for kind in ("raw", "minus_base"):
        for name, entry in result.get(kind, {}).items():
            parts = {f"share of {n}": e for n, e in entry.items()} if name == "shares" else {name: entry}
            for what, values in parts.items():
                value = next(v for k, v in values.items() if k in ("correlation", "difference", "share"))
                bounds = {k: values[k] for k in ("low", "high")}
                rows.append(about | {"profile": kind, "what": what, "value": value} | bounds)
    return rows


def sentence(result: dict) -> str:
    """The finding in one line."""
    kind = "minus_base" if "minus_base" in result else "raw"
    entry, shares = result[kind], result[kind]["shares"]

    def text(values: dict, name: str = "correlation") -> str:
        if values[name] is None:
            return "n/a"
        return f"{values[name]:.2f} [{values['low']:.2f}, {values['high']:.2f}]"

    where = f"{len(result['cells'])} eval cells{' minus base' if kind == 'minus_base' else ''}"
    few = " With so few prompts a cell these intervals are too narrow." if result["prompts"] < FEW else ""
    return (
        f"{result['channel']}, {' and '.join(result['teachers'])} as teachers and as authors of the data, "
        f"{where}: profiles of one teacher's students correlate by {text(entry['same_teacher'])}, on one "
        f"author's data by {text(entry['same_data'])}; the teacher makes {text(shares['teacher'], 'share')} "
        f"of the variation between students, the data {text(shares['data'], 'share')}.{few}"
    )
