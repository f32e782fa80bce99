"""The difficulty of eval prompts for the base model, and the report of what it leaves of the task match.

A row is a prompt: `{"model", "set", "domain", "task", "idx", "question"}` with `loglik_per_token`, log p per
token of its aligned answer under the base model, in nats, closing token included (no judge needed), and
`coherence_mean`, the mean coherence score of the base model's own `responses`. Either may be null. The
statistics are em/report/task_effect.py's.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.data.cells import Cell, parse_cell
from em.data.condition import BASE, Condition
from em.errors import UserError
from em.figures import save, title_of
from em.files import check, read_json_lines, write_csv, write_json, write_text
from em.report.report import groups_of
from em.report.score_table import ScoreTable, joined
from em.report.task_effect import ADJUSTED, CALIPER, Prompts, task_effects

MEASURES = {"loglik": "loglik_per_token", "coherence": "coherence_mean"}
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
        # A student whose teacher was the base model is `base` in a matrix too, but was trained.
        plain = np.array([c._replace(system=None) == Condition() for c in table.conditions])[table.condition]
        base = table.select(plain & np.array([str(train) == BASE for train in table.trains])[table.train])
        models = [table.models[m] for m in np.unique(base.model)]
        judges = [table.judges[j] for j in np.unique(base.judge)]
        systems = sorted({repr(base.conditions[c].system) for c in np.unique(base.condition)})
        for found, what in ((models, "models"), (judges, "judges"), (systems, "system prompts")):
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
    return [{"model": model} | {name: row[name] for name in _FIELDS} | blank | row for row in rows.values()]


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


# -- the effect, from files to files ----------------------------------------------------------------------


def prompts_of(table: ScoreTable, narrow: bool, keep: Iterable[tuple]) -> tuple[Prompts, list[tuple]]:
    """Counts of the misaligned runs on one set's prompts that are in `keep`; the places of these prompts."""
    misaligned = np.array([train.misaligned for train in table.trains])[table.train]
    table = table.select(misaligned & (table.narrow == narrow))
    keep, kept = set(keep), {}
    for place, own in _prompts(table).items():
        if place in keep:
            kept[place] = own
    places = list(kept)
    rows = np.concatenate(list(kept.values())) if kept else np.zeros(0, int)
    prompt = np.repeat(np.arange(len(kept)), [len(own) for own in kept.values()])
    runs, first, run = np.unique(
        joined(table.train, table.condition)[rows], return_index=True, return_inverse=True
    )
    size = (len(runs), len(kept))
    em, scored = (
        np.bincount(run * size[1] + prompt, flag[rows], size[0] * size[1]).reshape(size)
        for flag in (table.em(), table.scored)
    )
    of_place = [Cell(domain if narrow else "", task) for _, domain, task, _ in places]
    columns = list(dict.fromkeys(of_place))
    column = np.array([columns.index(cell) for cell in of_place], int)
    trains = [parse_cell(table.trains[r].start) for r in table.train[rows][first]]
    return Prompts(em, scored, column, trains, columns), places


def difficulty_report(table: ScoreTable, difficulty: dict[tuple, dict], out: str | Path) -> str:
    """Write difficulty.{json,csv,png} for each model of the report, and difficulty.md, which is returned.

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
    "Intervals are 95 %, for other prompts. A noisy measure, such as the coherence of one response a prompt, "
    "adjusts too little."
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
        f"{_numbers(raw)} raw; {'; '.join(parts)} ({result['scope']})."
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
            for scale in ("logit", "points", "logit_change"):
                if scale in result[way]:
                    row = {"set": kind, "difficulty": measure, "effect": way, "scale": scale}
                    about = {"prompts": result[way]["prompts"], "scope": result["scope"]}
                    rows.append(row | result[way][scale] | about)
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
        axis.set_ylim(len(ways) - 0.5, -0.5)
        kind, measure = name.split("_")
        axis.set_title(f"{kind} prompts, difficulty by {measure}", fontsize=9)
        axis.set_xlabel("task match, logits", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)
