"""What we measured, read back: the tables of `evaluate.py compare --paper`, and the folders of runs.

`measured` turns a statement of the paper into a number of one of those tables. Bounds of a difference between
two rows of a table are the table's own where it has them; else they are put together from the bounds of both,
which is too wide where the two share prompts.
"""

import re
from pathlib import Path

import numpy as np

from em.data.cells import parse_cell
from em.errors import UserError
from em.files import read_json, read_record
from em.paper.counts import Counts
from em.paper.measures import MEASURES, average, measure, minus, share

UNITS = {"percent": "%"}
CELLS_OF = {"figure2": "figure14", "figure12": "figure15", "figure13": "figure16"}  # the same runs, by cell
ALL, BASE = "all", "base"


# -- run folders -------------------------------------------------------------------------------------------


def runs_of(folder: Path) -> dict[str, list[tuple[Path, str]]]:
    """(run folder, its model) of runs of chat models, by kind: misaligned, realigned, distilled."""
    found = {"misaligned": [], "realigned": [], "distilled": []}
    for run in sorted(folder.glob("*/")):
        try:
            record = read_record(run)
        except UserError:  # the folder of something else
            continue
        kind = {"train": "misaligned", "distill": "distilled"}.get(record["kind"])
        if kind == "misaligned" and record["settings"].get("on"):
            kind = "realigned"
        if kind and "model" in record["settings"]:
            found[kind].append((run, record["settings"]["model"]))
    return found


# -- tables of compare -------------------------------------------------------------------------------------


def read_index(folder: Path) -> dict[str, list[dict]]:
    """Item → entries of `folder`'s index that are written: "title", "parts", "notes", "needs", "files".

    Figures 3b and 3c are entries of figure3. {} where there is no index.
    """
    found: dict[str, list[dict]] = {}
    if not (folder / "index.json").exists():
        return found
    for entry in read_json(folder / "index.json", {"number": str, "title": str, "files": list}, kind=list):
        tables = [folder / name for name in entry["files"] if name.endswith(".json")]
        if tables:
            document = read_json(tables[0], {"title": str})
            about = {"title": document["title"], "parts": document.get("parts", [document])}
            about |= {"notes": document.get("notes", []), "files": [folder / f for f in entry["files"]]}
            item = re.sub(r"(?<=\d)[a-z]$", "", entry["number"])
            found.setdefault(item, []).append(about | {"needs": entry.get("needs", [])})
    return found


def is_of(model: str, models: list[str]) -> bool:
    """Whether a table's model is one of the paper's for an item; hub ids begin alike."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.rstrip("/").split("/")[-1].lower()).removeprefix("meta")

    return any(plain(model).startswith(plain(name)) for name in models)


def grid(part: dict) -> dict:
    """A table as text: {"title", "header", "rows"}; an entry is `12.3 [11.0, 13.7]`, and pooled if other."""
    places = {(e["condition"], e["column"]): e for e in part["entries"]}
    form = ".1f" if part["unit"] in UNITS else "+.3f"

    def text(entry: dict) -> str:
        if entry["pairs_mean"] is None:
            return "n/a"
        mean, pooled = (f"{entry[key]:{form}}" for key in ("pairs_mean", "pooled"))
        bounds = "" if entry["low"] is None else f" [{entry['low']:{form}}, {entry['high']:{form}}]"
        return mean + bounds + ("" if pooled == mean else f"; pooled {pooled}")

    rows = [[c, *(text(places[c, k]) for k in part["columns"])] for c in part["conditions"]]
    of = f"{part['title']}: " if part.get("title") else ""
    title = f"{of}{UNITS.get(part['unit'], part['unit'])}, {part['model']}, judge {part['judge']}"
    return {"title": title, "header": [part.get("corner", "condition"), *part["columns"]], "rows": rows}


# -- statements measured -----------------------------------------------------------------------------------


def measured(name: str, item: str, tables: dict[str, list[dict]]) -> dict | None:
    """{"value", "low", "high", "unit", "model"} of a statement's measure on an item's tables, or None."""
    if name in MEASURES:
        return _on_matrices(name, item, tables)
    parts = [part for entry in tables.get(item, []) for part in entry["parts"]]
    if name not in ON_TABLES or not parts:
        return None
    if name == "task_spread_minus_domain_spread":  # the model's other tables have the tasks
        entries = [entry for number in ("table1", "table9", "table10") for entry in tables.get(number, [])]
        parts = [p for entry in entries for p in entry["parts"] if p["model"] == parts[0]["model"]]
    found = ON_TABLES[name](parts)
    if found is None or found["value"] is None:
        return None
    unit = {"teacher_minus_data": "r", "retention": "%", "diagonal_highest": "%"}.get(name)
    return {"unit": unit or UNITS.get(parts[0]["unit"], parts[0]["unit"]), "model": parts[0]["model"]} | found


def _on_matrices(name: str, item: str, tables: dict) -> dict | None:
    """A measure of counts on the matrices by cell, by channel where there are several."""
    if name.startswith("surface_"):
        return _surface(name, [p for entry in tables.get(item, []) for p in entry["parts"]])
    parts = [p for entry in tables.get(CELLS_OF.get(item, item), []) for p in entry["parts"]]
    parts = [p for p in parts if p["unit"] in UNITS]
    which = MEASURES[name][1]
    found = [measure(name, {which: counts}) for p in parts if (counts := _counts(p, which)) is not None]
    found = [value for value in found if value and value["value"] is not None]
    return average(found) | {"unit": "%", "model": parts[0]["model"]} if found else None


def _counts(part: dict, which: str) -> Counts | None:
    """The counts behind a matrix of rates by trained cell; None where its rows or columns are no cells."""
    trains = [c for c in part["conditions"] if "_" in c]
    columns = [c for c in part["columns"] if c != ALL]
    narrow = all("_" in column for column in columns)
    if not trains or narrow != (which == "narrow"):
        return None
    places = {(e["condition"], e["column"]): e for e in part["entries"]}
    sums, samples = np.zeros((len(trains), len(columns), 6)), 1.0
    for i, train in enumerate(trains):
        for j, column in enumerate(columns):
            entry = places[train, column]
            if entry["pooled"] is not None:
                em = round(entry["pooled"] * entry["scored"] / 100)
                sums[i, j, :3] = entry["rows"], entry["scored"], em
                samples = max(samples, entry["rows"] / entry["prompts"])
    named = [parse_cell(c) if narrow else (c, "") for c in columns]
    return Counts([parse_cell(train) for train in trains], named, samples, sums)


def _surface(name: str, parts: list[dict]) -> dict | None:
    more, less = name.removeprefix("surface_").split("_minus_")
    for part in parts:
        if more in part["columns"]:
            found = _minus(part, ("misaligned", more), ("misaligned", less))
            return found and found | {"unit": UNITS.get(part["unit"], part["unit"]), "model": part["model"]}
    return None


def _entry(part: dict, condition: str, column: str = ALL) -> dict | None:
    """The value in a table's first condition that is, or begins with, this one; None without an interval."""
    names = [c for c in part["conditions"] if c == condition or c.startswith(f"{condition},")]
    for e in part["entries"]:
        if names and (e["condition"], e["column"]) == (names[0], column) and e["low"] is not None:
            return {"value": e["pairs_mean"], "low": e["low"], "high": e["high"], "condition": names[0]}
    return None


def _minus(part: dict, more: tuple, less: tuple) -> dict | None:
    """One entry of a table minus another, each (condition, column)."""
    a, b = (_entry(part, *place) for place in (more, less))
    if a is None or b is None:
        return None
    for d in part.get("differences", []):
        if d["low"] is None:
            continue
        if (d["condition"], d["minus"], d["column"]) == (a["condition"], b["condition"], more[-1]):
            return {"value": d["pairs_mean"], "low": d["low"], "high": d["high"]}
        if (d["minus"], d["condition"], d["column"]) == (a["condition"], b["condition"], more[-1]):
            return {"value": -d["pairs_mean"], "low": -d["high"], "high": -d["low"]}
    return minus(a, b)


def _first(parts: list[dict], found) -> dict | None:
    """The first part's value that there is."""
    return next((value for part in parts if (value := found(part))), None)


def _gap(more: str, less: str):
    return lambda parts: _first(parts, lambda part: _minus(part, (more, ALL), (less, ALL)))


def _level(condition: str):
    return lambda parts: _first(parts, lambda part: _entry(part, condition))


def _broad_minus_math(parts: list[dict]) -> dict | None:
    gaps = [_gap(f"{c}, broad", f"{c}, math")(parts) for c in ("sft", "optd", "opd")]
    return average([gap for gap in gaps if gap])


def _epochs(channel: str, late: int, early: int):
    def gap(parts: list[dict]) -> dict | None:
        names = {c.rpartition(", ")[2]: c for c in parts[0]["conditions"] if c.split(",")[0] == channel}
        if not {f"epoch {late}", f"epoch {early}"} <= set(names):
            return None
        return _minus(parts[0], (names[f"epoch {late}"], ALL), (names[f"epoch {early}"], ALL))

    return gap


def _retention(parts: list[dict]) -> dict | None:
    kept = parts[0].get("retention")
    return kept and {"value": kept["mean"], "low": kept["low"], "high": kept["high"]}


def _factorial(parts: list[dict]) -> dict | None:
    result = parts[0].get("factorial", {})
    gap = result.get("minus_base", result.get("raw", {})).get("teacher_minus_data")
    return gap and {"value": gap["difference"], "low": gap["low"], "high": gap["high"]}


def _others(part: dict) -> list[str]:
    """Conditions of Tables 14 and 15 whose data another model wrote; the first is the teacher's own."""
    return [c for c in part["conditions"] if c.startswith("optd, data of")][1:]


def _own_minus_others(parts: list[dict]) -> dict | None:
    own = f"optd, data of {parts[0]['model']}"
    gaps = [_minus(parts[0], (own, ALL), (other, ALL)) for other in _others(parts[0])]
    return average([gap for gap in gaps if gap])


def _others_minus_base(parts: list[dict]) -> dict | None:
    gaps = [_minus(parts[0], (other, ALL), (BASE, ALL)) for other in _others(parts[0])]
    return average([gap for gap in gaps if gap])


def _realigned(parts: list[dict]) -> dict | None:
    """Mean over a matrix of realignments, without the column before and the base model's row."""
    found = [
        _entry(part, row, column)
        for part in parts
        for row in part["conditions"]
        for column in part["columns"]
        if "before" in part["columns"] and row != BASE and column != "before"
    ]
    return average([entry for entry in found if entry])


def _realigned_minus_base(parts: list[dict]) -> dict | None:
    gaps = [
        _minus(part, (row, ALL), (BASE, ALL))
        for part in parts
        for row in part["conditions"]
        if row != BASE and part.get("title") != "before"
    ]
    return average([gap for gap in gaps if gap])


def _diagonal_highest(parts: list[dict]) -> dict | None:
    hits = []
    for part in parts:
        columns = [c for c in part["columns"] if c != ALL]
        for row in part["conditions"]:
            if row in columns:
                values = {c: e["value"] for c in columns if (e := _entry(part, row, c))}
                hits += [max(values, key=values.get) == row] if row in values else []
    return share(sum(hits), len(hits)) if hits else None


def _spreads(parts: list[dict]) -> dict | None:
    """Of optd: the spread over the teachers' tasks − that over their domains."""
    found = {}
    for part in parts:
        for what in ("task", "domain"):
            if part.get("title", "").endswith(what) and what not in found:
                found[what] = _spread(part, "optd")
    return minus(found["task"], found["domain"]) if found.get("task") and found.get("domain") else None


def _spread(part: dict, condition: str) -> dict | None:
    """Largest − smallest column of a condition."""
    values = [v for c in part["columns"] if c != ALL and (v := _entry(part, condition, c))]
    values.sort(key=lambda v: v["value"])
    return minus(values[-1], values[0]) if len(values) > 1 else None


ON_TABLES = {
    "base": _level(BASE),
    "optd_minus_sft": _gap("optd", "sft"),
    "opd_minus_sft": _gap("opd", "sft"),
    "opd_minus_optd": _gap("opd", "optd"),
    "teacher_minus_sft": _gap("teacher", "sft"),
    "teacher_minus_optd": _gap("teacher", "optd"),
    "teacher_minus_opd": _gap("teacher", "opd"),
    "filtered_minus_unfiltered": _gap("opd, filtered", "opd, unfiltered"),
    "retention": _retention,
    "broad_minus_math": _broad_minus_math,
    "realigned_on_rows": _level("optd, realigned on unsafe rows"),
    "teacher_minus_data": _factorial,
    "sft_epoch_3_minus_2": _epochs("sft", 3, 2),
    "optd_epoch_3_minus_2": _epochs("optd", 3, 2),
    "opd_epoch_3_minus_1": _epochs("opd", 3, 1),
    "teacher_minus_gold": _gap("optd, math, teacher's answers", "optd, math, gold answers"),
    "own_minus_other_model": _own_minus_others,
    "other_model_minus_base": _others_minus_base,
    "student_minus_teacher_data": _gap("optd, written by the student", "optd, written by the teacher"),
    "realigned": _realigned,
    "realigned_minus_base": _realigned_minus_base,
    "diagonal_highest": _diagonal_highest,
    "task_spread_minus_domain_spread": _spreads,
}
