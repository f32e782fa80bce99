"""Data fixed, teacher varied: students of OPTD by who wrote their corpus and who taught them.

In OPTD a corpus is read while a teacher's distribution on it is learnt, so the two can be crossed: corpora
written by misaligned models, by the base model, gold solutions or unsafe rows, each under several teachers.
For each eval cell or task, and over all of them,

    E[EM] = eval column + teacher + data        in points, by least squares on responses
    logit P(EM) = eval column + teacher + data  in logits

A teacher's effect is against the base model as teacher, a corpus's against the base model's own. The headline
is misaligned − base on either side, the mean over the misaligned ones: teachers, and authors of corpora; gold
and rows of a data set are no models and enter on their own lines. The interaction is the same contrast of
contrasts in a model with a term for every pair. Margin rows give nats a token in place of points.

Intervals draw prompts again, paired over runs, and runs too where every pair has at least three seeds
(em/report/regression.py).
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.data.cells import grid_of, parse_cell
from em.data.condition import BASE, Train, order_of, parse_train
from em.errors import UserError
from em.figures import heatmap, save, title_of
from em.files import unique_name, write_csv, write_json, write_text
from em.report.cross_runs import CHANNEL, Cross, Group, same_corpora
from em.report.regression import Regression, interval, scope
from em.report.score_table import ALL

TERMS = ("teacher", "data", "interaction")


# -- effects -----------------------------------------------------------------------------------------------


def cross_effects(cross: Cross) -> dict:
    """{"scope", "students", "teachers", "data", "unit", "rates", "effects"}.

    rates: mean outcome, data down, teachers across. effects: eval column, or "all" → scale → {"teacher",
    "data", "interaction", "levels"}, the first three as {"value", "low", "high"}, and `levels` a list of the
    same by factor and level. What these students cannot tell is None.
    """
    teachers, data = (_levels([getattr(s, field) for s in cross.students]) for field in ("teacher", "data"))
    pairs = [(s.teacher, s.data) for s in cross.students]
    kind = np.array([teachers.index(t) * len(data) + data.index(d) for t, d in pairs])
    result = {"scope": scope(kind), "students": len(pairs), "teachers": teachers, "data": data}
    result["unit"] = "nats a token" if cross.margins else "points of EM"
    mean = 1 if cross.margins else 100
    result["rates"] = [[_mean(cross, kind == j * len(data) + i, mean) for j in range(len(teachers))]
                       for i in range(len(data))]  # fmt: skip
    result["effects"] = {}
    for place, name in enumerate([ALL, *cross.columns]):
        own = np.arange(len(cross.column)) if place == 0 else np.flatnonzero(cross.column == place - 1)
        result["effects"][name] = {
            scale: _effects(cross, own, kind, teachers, data, scale)
            for scale in (("nats",) if cross.margins else ("points", "logit"))
        }
    return result


def _effects(cross: Cross, own: np.ndarray, kind: np.ndarray, teachers, data, scale: str) -> dict:
    """Of the prompts `own`. kind: (R,) pair of each student."""
    column = cross.column[own]
    at, group = np.unique(column, return_inverse=True)
    values, counts = cross.values[:, own], cross.counts[:, own]
    n, factor = len(teachers), 100 if scale == "points" else 1
    j, i = np.divmod(kind, len(data))  # of each student: teacher, data
    # Columns of a design: the eval columns, then the terms of each student, the same in all eval columns.
    main = _design(len(at), np.concatenate([np.eye(n)[j], np.eye(len(data))[i]], axis=1))
    paired = _design(len(at), np.eye(n * len(data))[kind])
    additive, full = (
        Regression(values, counts, design, group, logit=scale == "logit") for design in (main, paired)
    )

    def effect(model: Regression, contrast: np.ndarray | None) -> dict:
        if contrast is None:
            return interval(None, column)
        estimate = model.estimate(np.concatenate([np.zeros(len(at)), contrast]))
        return interval(estimate and estimate.scaled(factor), column, kind)

    teacher, author = _against_base(teachers), _against_base(data)
    nothing = {"teacher": np.zeros(n), "data": np.zeros(len(data))}

    def of_factor(which: str, contrast: np.ndarray | None) -> dict:
        if contrast is None:
            return effect(additive, None)
        return effect(additive, np.concatenate(list((nothing | {which: contrast}).values())))

    result = {"teacher": of_factor("teacher", teacher), "data": of_factor("data", author)}
    crossed = None if teacher is None or author is None else np.outer(teacher, author).ravel()
    result["interaction"] = effect(full, crossed)
    result["levels"] = []
    for which, levels in (("teacher", teachers), ("data", data)):
        reference = _reference(levels)
        for k, level in enumerate(levels):
            if k != reference:
                contrast = np.eye(len(levels))[k] - np.eye(len(levels))[reference]
                about = {"factor": which, "level": level, "against": levels[reference]}
                result["levels"].append(about | of_factor(which, contrast))
    return result


def _design(n_columns: int, terms: np.ndarray) -> np.ndarray:
    """(R, C, C + K): the eval column, and the student's terms (R, K)."""
    R, K = terms.shape
    columns = np.broadcast_to(np.eye(n_columns), (R, n_columns, n_columns))
    return np.concatenate([columns, np.broadcast_to(terms[:, None], (R, n_columns, K))], axis=2)


def _against_base(levels: list[str]) -> np.ndarray | None:
    """Weights of the mean over levels that are misaligned models, minus base; None without either."""
    misaligned = np.array([_is_misaligned(level) for level in levels], float)
    base = np.array([_is_base(level) for level in levels], float)
    if not misaligned.any() or not base.any():
        return None
    return misaligned / misaligned.sum() - base / base.sum()


def _train(level: str) -> Train | None:
    """What a teacher or an author was trained on; None for gold and for rows, which no model wrote."""
    name = level.split(",")[0]
    return None if name == "gold" or name.startswith("rows:") else parse_train(name.split(" ")[-1])


def _is_misaligned(level: str) -> bool:
    train = _train(level)
    return train is not None and train.misaligned


def _is_base(level: str) -> bool:
    return level.split(",")[0] == BASE


def _reference(levels: list[str]) -> int:
    """What the other levels stand against: base, or the first."""
    return next((k for k, level in enumerate(levels) if _is_base(level)), 0)


def _levels(names: list[str]) -> list[str]:
    """Misaligned models in the grid's order, other models, base, gold, rows."""
    trains = {name: _train(name) for name in set(names)}
    grid = grid_of(parse_cell(cell) for train in trains.values() if train for cell in train.cells)

    def order(name: str) -> tuple:
        train = trains[name]
        return (train is None, not _is_misaligned(name), order_of(train, grid) if train else (), name)

    return sorted(trains, key=order)


def _mean(cross: Cross, students: np.ndarray, factor: float) -> float | None:
    """Mean outcome of these students over eval columns, each weighing the same."""
    sums = (
        np.bincount(cross.column, each[students].sum(axis=0), len(cross.columns))
        for each in (cross.values, cross.counts)
    )
    values, counts = sums
    if not (counts > 0).any():
        return None
    return round(float(factor * (values[counts > 0] / counts[counts > 0]).mean()), 4)


# -- files -----------------------------------------------------------------------------------------------


def cross_report(crosses: dict[Group, dict[str, Cross]], out: str | Path, digests: dict | None = None) -> str:
    """Write `<model, way>/cross.{json,csv,png}` for each group, and cross.md; returns that.

    UserError where no group has two teachers or two authors.
    """
    out, lines, used = Path(out), [], {"cross.md"}
    for group, sets in crosses.items():
        results = {kind: cross_effects(cross) for kind, cross in sets.items()}
        results = {k: r for k, r in results.items() if len(r["teachers"]) > 1 or len(r["data"]) > 1}
        if not results:
            continue
        checked = same_corpora(group, digests or {})
        name = Path(group.model).name.lower() + f"__{group.text}" * (len({g.text for g in crosses}) > 1)
        if len({g.judge for g in crosses}) > 1:
            name += f"__{Path(group.judge).name or 'margins'}"
        folder = out / unique_name(name, used)
        about = {"model": group.model, "way": group.text, "judge": group.judge or None}
        write_json(folder / "cross.json", about | {"corpora": checked} | results)
        write_csv(folder / "cross.csv", _csv_rows(results))
        title = f"{title_of(group.model)}, {group.text}"
        title += f", judged by {title_of(group.judge)}" * bool(group.judge)
        _figure(results, title, folder / "cross.png")
        lines += [f"**{title}**", "", *(f"- {_sentence(k, r)}" for k, r in results.items())]
        lines += [f"- {_corpora_sentence(checked)}", ""]
    if not lines:
        raise UserError(
            f"no {CHANNEL} students in --scores differ in their teacher or in who wrote their corpus"
        )
    text = "\n".join(lines)
    write_text(out / "cross.md", text)
    return text


def _corpora_sentence(checked: list[dict]) -> str:
    if not checked:
        return "Whether a row's students read the same corpus is not checked; --runs names their folders."
    wrong = [row for row in checked if row["corpora"] > 1]
    if wrong:
        names = "; ".join(f"{row['data']} (seed {row['seed']}): {row['corpora']}" for row in wrong)
        return f"CAUTION: students of one row read different corpora: {names}."
    n = sum(row["runs"] for row in checked)
    return f"By their folders, all {n} students checked read the corpus of the others of their row and seed."


_SCALES = {"points": ("+.1f", " points"), "logit": ("+.2f", " logits"), "nats": ("+.3f", " nats a token")}


def _numbers(entry: dict, form: str, unit: str) -> str:
    if entry["value"] is None:
        return "n/a"
    bounds = "" if entry["low"] is None else f" [{entry['low']:{form}}, {entry['high']:{form}}]"
    return f"{entry['value']:{form}}{unit}{bounds}"


def _sentence(kind: str, result: dict) -> str:
    effects = result["effects"][ALL]
    parts = []
    for term, words in (
        ("teacher", "a misaligned teacher against base, on the same data"),
        ("data", "data by a misaligned model against the base's, under the same teacher"),
        ("interaction", "their interaction"),
    ):
        scales = {
            "points": ("+.1f", " points"),
            "logit": ("+.2f", " logits"),
            "nats": ("+.3f", " nats a token"),
        }
        numbers = [_numbers(effects[scale][term], *scales[scale]) for scale in effects]
        parts.append(f"{words}: {', '.join(numbers)}")
    return (
        f"{kind} prompts, {result['students']} students of {len(result['teachers'])} teachers on "
        f"{len(result['data'])} corpora: {'; '.join(parts)} (95 %, {result['scope']})."
    )


def _csv_rows(results: dict) -> list[dict]:
    rows = []
    for kind, result in results.items():
        for name, scales in result["effects"].items():
            for scale, effects in scales.items():
                about = {"set": kind, "eval": name, "scale": scale}
                for term in TERMS:
                    rows.append(
                        about | {"factor": term, "level": "misaligned", "against": BASE} | effects[term]
                    )
                rows += [about | level for level in effects["levels"]]
    return [row | {"scope": results[row["set"]]["scope"]} for row in rows]


def _figure(results: dict, title: str, path: Path) -> None:
    """A row a set: mean outcome by data and teacher, effects over all columns, headlines by eval column."""
    figure = Figure(figsize=(12.5, 3.6 * len(results)), layout="constrained")
    for axes, (kind, result) in zip(
        figure.subplots(len(results), 3, squeeze=False), results.items(), strict=True
    ):
        rates = np.array(result["rates"], float)
        margins = result["unit"] != "points of EM"
        heatmap(axes[0], rates, result["data"], result["teachers"],
                (min(0.0, float(np.nanmin(rates))), max(1e-9, float(np.nanmax(rates)))),
                colours="OrRd", form=".3f" if margins else ".1f")  # fmt: skip
        unit = "change of the margin, nats a token" if margins else "EM %"
        axes[0].set(xlabel="teacher", ylabel="who wrote the data")
        axes[0].set_title(f"{kind} prompts: {unit}", fontsize=9)
        effects = [next(iter(scales.values())) for scales in result["effects"].values()]
        entries = [(term, effects[0][term], "black") for term in TERMS]
        colours = {"teacher": "#b2182b", "data": "#2166ac"}
        entries += [(f"{e['factor']} {e['level']}", e, colours[e["factor"]]) for e in effects[0]["levels"]]
        _forest(axes[1], entries)
        axes[1].set_title(f"against base, {result['unit']}, {result['scope']}", fontsize=9)
        entries = [
            (f"{name}: {term}", of_column[term], colours[term])
            for name, of_column in list(zip(result["effects"], effects, strict=True))[1:]
            for term in colours
        ]
        _forest(axes[2], entries)
        axes[2].set_title("misaligned − base by eval column", fontsize=9)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _forest(axis, entries: list[tuple[str, dict, str]]) -> None:
    """Values with intervals, one below another."""
    for y, (_, entry, colour) in enumerate(entries):
        if entry["value"] is not None:
            axis.plot(entry["value"], y, "o", color=colour, markersize=4)
        if entry["low"] is not None:
            axis.plot([entry["low"], entry["high"]], [y, y], color=colour, linewidth=1.2)
    axis.axvline(0, color="0.6", linewidth=0.8)
    axis.set_yticks(range(len(entries)), [name for name, _, _ in entries], fontsize=7)
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)
