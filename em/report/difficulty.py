"""Is task match the prompts' difficulty in disguise? The effect beside three ways of holding difficulty fixed.

Eval prompts of one task may be easier for the model than those of another, and runs may differ in whether
they misalign on easy prompts or on hard ones. Then a task's runs can stand out on its own prompts without any
transfer along the task. Difficulty is taken from the base model, in two measures:

    loglik      log p per token of the prompt's aligned answer, nats; needs no judge
    coherence   mean coherence score of the base model's own responses

The raw effect is τ of a logistic regression on single prompts (em/report/regression.py),

    logit P(EM) = run + eval cell + τ · [same task] + δ · [same domain]

and beside it stand
    strata      the run's term is one for each quantile stratum of difficulty: τ compares within strata
    slopes      each run has its own slope on difficulty
    matched     the raw model on a subset: sets of one prompt a task, within a domain, whose difficulties
                differ by no more than 0.2 standard deviations

Each is also given in points: by how much the match raises the EM rate of the matching pairs. Broad prompts
have one column a task and no domain. All intervals, and those of adjusted − raw, are of prompts drawn again.
A noisy measure of difficulty adjusts too little: coherence of one response a prompt is one.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from em.data.cells import Cell, parse_cell
from em.errors import UserError
from em.figures import save, title_of
from em.files import check, read_json_lines, write_csv, write_json, write_text
from em.report.regression import Estimate, Regression, interval
from em.report.report import groups_of
from em.report.score_table import ScoreTable

MEASURES = {"loglik": "loglik_per_token", "coherence": "coherence_mean"}
ADJUSTED = ("strata", "slopes", "matched")
CALIPER = 0.2  # standard deviations
_PLACE = ("set", "domain", "task", "idx")
_FIELDS = {"set": str, "domain": str, "task": str, "idx": int, "question": str}
_OPTIONAL = {field: float | None for field in MEASURES.values()}


# -- the difficulty of prompts -----------------------------------------------------------------------------


def difficulty_rows(model: str | None, answers: dict[tuple, dict], table: ScoreTable | None) -> list[dict]:
    """A row a prompt: its place, question and measures, None where one is missing.

    answers: (set, domain, task, idx) → {"question", "loglik_per_token", "tokens"}. table: score rows, of
    which those of the base model count. UserError for none of these, or of several models or judges.
    """
    rows = {place: dict(zip(_PLACE, place, strict=True)) | found for place, found in answers.items()}
    if table is not None:
        base = table.select(np.array([str(train) == "base" for train in table.trains])[table.train])
        models = [table.models[m] for m in np.unique(base.model)]
        judges = [table.judges[j] for j in np.unique(base.judge)]
        for found, what in ((models, "models"), (judges, "judges")):
            if len(found) > 1:
                raise UserError(f"--scores has base rows of several {what} ({', '.join(found)}); name one's")
        if not models:
            raise UserError("--scores has no row of the base model; evaluate.py --model M writes them")
        if model and Path(model).name.lower() != Path(models[0]).name.lower():
            raise UserError(f"--scores has base rows of {models[0]}, and --model is {model}")
        model = model or models[0]
        for place, own in _prompts(base).items():
            scores = base.coherent[own][np.isfinite(base.coherent[own])]
            row = rows.setdefault(
                place, dict(zip(_PLACE, place, strict=True)) | {"question": base.question[own[0]]}
            )
            if row["question"] != base.question[own[0]]:
                raise UserError(f"--scores asks another question than --data at {_place_text(place)}")
            mean = round(float(scores.mean()), 4) if len(scores) else None
            row |= {"coherence_mean": mean, "responses": len(scores), "judge": judges[0]}
    blank = {"loglik_per_token": None, "tokens": None, "coherence_mean": None, "responses": 0, "judge": None}
    return [{"model": model} | blank | row for row in rows.values()]


def _prompts(table: ScoreTable) -> dict[tuple, np.ndarray]:
    """(set, domain, task, idx) → places of its rows, in the order of the table's prompts."""
    order = np.argsort(table.prompt, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(table.prompt[order])) + 1) if len(order) else []
    return {
        (
            "narrow" if table.narrow[i] else "broad",
            table.domains[table.domain[i]],
            table.tasks[table.task[i]],
            int(table.idx[i]),
        ): own
        for own in groups
        for i in own[:1]
    }


def _place_text(place: tuple) -> str:
    kind, domain, task, idx = place
    return f"{kind} {domain} {task}, idx {idx}"


def read_difficulty(path: str | Path) -> dict[tuple, dict]:
    """(set, domain, task, idx) → row. UserError with file and line for a malformed row, or a prompt twice."""
    rows = {}
    for number, row in read_json_lines(path, _FIELDS):
        where = f"{path}, line {number}"
        check(row, where, None, _OPTIONAL)
        try:
            cell = parse_cell(f"{row['domain'] if row['set'] == 'narrow' else 'any'}_{row['task']}")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        domain = cell.domain if row["set"] == "narrow" else row["domain"]
        place = (row["set"], domain, cell.task, row["idx"])
        if place in rows:
            raise UserError(f"{where}: {_place_text(place)} is there twice; leave one out")
        rows[place] = row
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


# -- the effect --------------------------------------------------------------------------------------------


class Prompts(NamedTuple):
    """EM of T misaligned runs on P prompts in C eval columns."""

    em: np.ndarray  # (T, P)
    scored: np.ndarray  # (T, P)
    column: np.ndarray  # (P,)
    trains: list[Cell]
    columns: list[Cell]  # a broad column's domain is ""


def matched_sets(
    difficulty: np.ndarray, column: np.ndarray, columns: list[Cell], caliper: float = CALIPER, seed: int = 0
) -> np.ndarray:
    """(S, ...) as a list of arrays of prompts: one of each task of a domain, all within the caliper.

    difficulty: (P,) in standard deviations. Greedy, without replacement: the prompts of the domain's smallest
    column, in random order, each take the nearest free prompt of every other column. A domain with one
    column has no sets.
    """
    rng, sets = np.random.default_rng(seed), []
    for domain in dict.fromkeys(cell.domain for cell in columns):
        members = [np.flatnonzero(column == c) for c, cell in enumerate(columns) if cell.domain == domain]
        members = sorted((own for own in members if len(own)), key=len)
        if len(members) < 2:
            continue
        free = [np.ones(len(own), bool) for own in members]
        for first in rng.permutation(members[0]):
            chosen, places = [first], []
            for own, is_free in zip(members[1:], free[1:], strict=True):
                distance = np.where(is_free, np.abs(difficulty[own] - difficulty[first]), np.inf)
                places.append(int(distance.argmin()))
                chosen.append(own[places[-1]] if is_free[places[-1]] else -1)
            if -1 not in chosen and np.ptp(difficulty[chosen]) <= caliper:
                sets.append(np.array(chosen))
                for is_free, place in zip(free[1:], places, strict=True):
                    is_free[place] = False
    return sets


def task_effects(prompts: Prompts, difficulty: np.ndarray) -> dict:
    """The task-match effect raw and adjusted, each {"logit", "points", "prompts", …}. difficulty: (P,).

    An adjusted one has "change", adjusted − raw on the logit scale, too. A model in which the match cannot be
    told apart has None for its values.
    """
    d = (difficulty - difficulty.mean()) / (difficulty.std() or 1)
    everything, column = np.arange(len(d)), prompts.column
    n_strata = int(np.clip(len(d) // 100, 2, 10))
    edges = np.quantile(d, np.arange(1, n_strata) / n_strata)
    stratum = np.searchsorted(edges, d, side="right")
    sets = matched_sets(d, column, prompts.columns)
    subset = np.sort(np.concatenate(sets)) if sets else np.zeros(0, int)
    base, T = _design(prompts), len(prompts.trains)  # (T, C, K)

    groups, within = np.unique(stratum * len(prompts.columns) + column, return_inverse=True)
    of_group, at_column = np.divmod(groups, len(prompts.columns))
    runs = np.zeros((T, len(groups), T, n_strata))
    runs[np.arange(T)[:, None], np.arange(len(groups)), np.arange(T)[:, None], of_group] = 1
    by_stratum = np.concatenate([base[:, at_column, T:], runs.reshape(T, len(groups), -1)], axis=2)
    slopes = np.eye(T)[:, None, :] * d[:, None]  # (T, P, T)
    by_prompt = np.concatenate([base[:, column], slopes], axis=2)

    match = base[:, :, -1] > 0  # (T, C)
    fits = {
        "raw": _fit(prompts, everything, base, column, -1, match),
        "strata": _fit(
            prompts, everything, by_stratum, within, len(prompts.columns) + 1, match[:, at_column]
        ),
        "slopes": _fit(prompts, everything, by_prompt, everything, base.shape[2] - 1, match[:, column]),
        "matched": _fit(prompts, subset, base, column[subset], -1, match),
    }
    raw, result = fits["raw"][1], {}
    for name, (model, logit, points) in fits.items():
        result[name] = {
            "logit": interval(logit, column),
            "points": interval(points, column, decimals=3),
            "prompts": len(subset) if name == "matched" else len(d),
        }
        if name != "raw":
            change = logit - raw if logit and raw else None
            result[name]["change"] = interval(change, column)
    result["strata"]["strata"] = [
        _stratum(prompts, np.flatnonzero(stratum == s), difficulty, base, match) for s in range(n_strata)
    ]
    model = fits["slopes"][0]
    places = np.eye(by_prompt.shape[2])[base.shape[2] :]
    result["slopes"]["per_sd"] = [
        {"train": str(cell)} | interval(model.estimate(place), column)
        for cell, place in zip(prompts.trains, places, strict=True)
    ]
    result["matched"] |= {"sets": len(sets), "caliper_sd": CALIPER}
    result["matched"]["largest_gap_sd"] = {
        "before": _largest_gap(d, everything, prompts), "after": _largest_gap(d, subset, prompts)
    }  # fmt: skip
    return result


def _design(prompts: Prompts) -> np.ndarray:
    """(T, C, T + C + 2): the run, the eval column, same domain, same task."""
    T, C = len(prompts.trains), len(prompts.columns)
    design = np.zeros((T, C, T + C + 2))
    design[np.arange(T), :, np.arange(T)] = 1
    design[:, np.arange(C), T + np.arange(C)] = 1
    for t, train in enumerate(prompts.trains):
        for c, cell in enumerate(prompts.columns):
            design[t, c, -2:] = train.domain == cell.domain, train.task == cell.task
    return design


def _fit(
    prompts: Prompts, where: np.ndarray, design: np.ndarray, group: np.ndarray, term: int, match: np.ndarray
) -> tuple[Regression, Estimate | None, Estimate | None]:
    """(model, its coefficient `term`, the points this adds to matching pairs), of the prompts `where`.

    The influence of other prompts is 0. match: (T, G).
    """
    if not len(where):
        return None, None, None
    em, scored = prompts.em[:, where], prompts.scored[:, where]
    model = Regression(em, scored, design, group)
    term %= design.shape[2]
    estimates = [model.estimate(np.eye(design.shape[2])[term]), model.part_of_mean(term, match)]
    for i, estimate in enumerate(estimates):
        if estimate is not None:
            influence = np.zeros(prompts.em.shape)
            influence[:, where] = estimate.influence
            estimates[i] = Estimate(estimate.value, influence).scaled(100 if i else 1)
    return model, *estimates


def _stratum(prompts: Prompts, own: np.ndarray, difficulty: np.ndarray, base: np.ndarray, match) -> dict:
    """The raw effect among one stratum's prompts."""
    model, logit, _ = _fit(prompts, own, base, prompts.column[own], -1, match)
    return {
        "from": round(float(difficulty[own].min()), 4) if len(own) else None,
        "to": round(float(difficulty[own].max()), 4) if len(own) else None,
        "prompts": len(own),
    } | {"logit": interval(logit, prompts.column)}  # fmt: skip


def _largest_gap(d: np.ndarray, where: np.ndarray, prompts: Prompts) -> float | None:
    """The largest difference of mean difficulty between tasks, in standard deviations of all prompts."""
    tasks = np.array([cell.task for cell in prompts.columns])[prompts.column[where]]
    means = [d[where][tasks == task].mean() for task in np.unique(tasks)]
    return round(float(np.ptp(means)), 4) if means else None


# -- from files to files -----------------------------------------------------------------------------------


def prompts_of(table: ScoreTable, narrow: bool, keep: Iterable[tuple]) -> tuple[Prompts, list[tuple]]:
    """Counts of the misaligned runs on the prompts of one set that are in `keep`, and these prompts' places."""
    misaligned = np.array([train.misaligned for train in table.trains])[table.train]
    table = table.select(misaligned & (table.narrow == narrow))
    keep, kept = set(keep), {}
    for place, own in _prompts(table).items():
        if place in keep:
            kept[place] = own
    places = list(kept)
    rows = np.concatenate(list(kept.values())) if kept else np.zeros(0, int)
    prompt = np.repeat(np.arange(len(kept)), [len(own) for own in kept.values()])
    runs, run = np.unique(table.train[rows], return_inverse=True)
    size = (len(runs), len(kept))
    em, scored = (
        np.bincount(run * size[1] + prompt, flag[rows], size[0] * size[1]).reshape(size)
        for flag in (table.em(), table.scored)
    )
    of_place = [Cell(domain if narrow else "", task) for _, domain, task, _ in places]
    columns = list(dict.fromkeys(of_place))
    column = np.array([columns.index(cell) for cell in of_place], int)
    return Prompts(em, scored, column, [parse_cell(table.trains[r].start) for r in runs], columns), places


def difficulty_report(table: ScoreTable, difficulty: dict[tuple, dict], out: str | Path) -> str:
    """Write `<model>/difficulty.{json,csv,png}` for each model of the report, and difficulty.md; returns that.

    UserError where there is no misaligned run, or no prompt of a run has a difficulty.
    """
    out, lines = Path(out), []
    for group in groups_of(table):
        rows, results = table.select(group.rows), {}
        for place, own in _prompts(rows).items():
            if place in difficulty and rows.question[own[0]] != difficulty[place]["question"]:
                raise UserError(
                    f"the difficulty is of another question than the scores at {_place_text(place)}"
                )
        for kind in ("narrow", "broad"):
            for measure, field in MEASURES.items():
                keep = [place for place, row in difficulty.items() if row.get(field) is not None]
                prompts, places = prompts_of(rows, kind == "narrow", keep)
                if len(prompts.trains) and prompts.scored.any():
                    values = np.array([difficulty[place][field] for place in places])
                    results[f"{kind}_{measure}"] = task_effects(prompts, values)
        if not results:
            continue
        folder = out / group.folder
        write_json(folder / "difficulty.json", {"model": group.model, "judge": group.judge} | results)
        write_csv(folder / "difficulty.csv", _csv_rows(results))
        _figure(
            results, f"{title_of(group.model)}, judged by {title_of(group.judge)}", folder / "difficulty.png"
        )
        lines += [f"**{group.model}**, judged by {group.judge}", ""]
        lines += [f"- {_sentence(name, result)}" for name, result in results.items()] + [""]
    if not lines:
        raise UserError("no misaligned run in --scores was asked a prompt that --difficulty measures")
    text = "\n".join([*lines, _NOTE])
    write_text(out / "difficulty.md", text + "\n")
    return text


_NOTE = (
    "Intervals are 95 %, of other prompts for these runs. Adjusted for a noisy measure the effect is adjusted "
    "too little: that of one response a prompt is noisy, the log-likelihood is not, but it is of one answer."
)


def _sentence(name: str, result: dict) -> str:
    kind, measure = name.split("_")
    raw, parts = result["raw"], []
    if raw["logit"]["value"] is None:
        return f"{kind} prompts, {measure}: these runs cannot tell the task's match apart."
    words = {
        "strata": f"within {len(result['strata']['strata'])} strata of difficulty",
        "slopes": "with a slope on difficulty for each run",
        "matched": f"on {result['matched']['prompts']:,} prompts matched between tasks "
        f"({result['matched']['sets']:,} sets within {CALIPER} sd)",
    }
    for way, text in words.items():
        parts.append(f"{_numbers(result[way])} {text}")
    return (
        f"{kind} prompts, difficulty by {measure}, {raw['prompts']:,} prompts: matching the task adds "
        f"{_numbers(raw)} raw; {'; '.join(parts)}."
    )


def _numbers(entry: dict) -> str:
    """`+1.23 logits [1.10, 1.36], 24.1 points [22.0, 26.2]`."""
    texts = []
    for scale, unit, form in (("logit", "logits", "+.2f"), ("points", "points", "+.1f")):
        value, low, high = (entry[scale][key] for key in ("value", "low", "high"))
        if value is not None:
            bounds = f" [{low:{form}}, {high:{form}}]" if low is not None else ""
            texts.append(f"{value:{form}} {unit}{bounds}")
    return ", ".join(texts) or "n/a"


def _csv_rows(results: dict) -> list[dict]:
    rows = []
    for name, result in results.items():
        kind, measure = name.split("_")
        for way in ("raw", *ADJUSTED):
            for scale in ("logit", "points", "change"):
                if scale in result[way]:
                    row = {"set": kind, "difficulty": measure, "effect": way, "scale": scale}
                    rows.append(row | result[way][scale] | {"prompts": result[way]["prompts"]})
    return rows


def _figure(results: dict, title: str, path: Path) -> None:
    """A panel a set and measure: the four effects in logits with intervals, and their strata's in grey."""
    figure = Figure(figsize=(3.4 * len(results), 2.6), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False, sharex=True)[0]
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        ways = ("raw", *ADJUSTED)
        for y, way in enumerate(ways):
            for entry in result[way].get("strata", ()):
                if entry["logit"]["value"] is not None:
                    axis.plot(entry["logit"]["value"], y + 0.25, ".", color="0.7", markersize=4)
            value, low, high = (result[way]["logit"][key] for key in ("value", "low", "high"))
            colour = "black" if way == "raw" else "#b2182b"
            if value is not None:
                axis.plot(value, y, "o", color=colour, markersize=5)
            if low is not None:
                axis.plot([low, high], [y, y], color=colour, linewidth=1.4)
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_yticks(
            range(len(ways)), [f"{way}\n({result[way]['prompts']:,})" for way in ways], fontsize=8
        )
        axis.invert_yaxis()
        kind, measure = name.split("_")
        axis.set_title(f"{kind} prompts, difficulty by {measure}", fontsize=9)
        axis.set_xlabel("task match, logits", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
