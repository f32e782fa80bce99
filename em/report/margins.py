"""The margins of many runs as one matrix, trained cell × eval cell: the metric that needs no judge.

A margin row is `{"model", "train", "domain", "task", "idx", "before", "after"}`, nats a token: the margin of
one eval row under the model the run started from and under the run. `train` and the optional fields of the
run's condition as in em/report/score_table.py.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from em.data.cells import grid_of, parse_cell, short
from em.data.condition import condition_of, order_of, parse_train, ways_in_words
from em.errors import UserError
from em.figures import CHANGE, heatmap, save, title_of
from em.files import read_json_lines, unique_name, write_csv, write_json
from em.report.matrix import frames
from em.stats import mean_interval

FIELDS = {"model": str, "train": str, "domain": str, "task": str, "idx": int, "before": float, "after": float}
LARGEST = 1e4  # nats a token; the least likely token of a model is some tens away


def read_margins(paths: list[Path]) -> list[dict]:
    """Every margin row of the JSONL files, cells by their names; one that is there twice counts once.

    UserError with file and line where a row is malformed, and with both places where two rows of the same
    model, train, cell and idx differ.
    """
    rows, places = {}, {}
    for path in paths:
        for number, row in read_json_lines(path, FIELDS):
            where = f"{path}, line {number}"
            try:
                train, cell = str(parse_train(row["train"])), parse_cell(f"{row['domain']}_{row['task']}")
                condition = condition_of(row)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            for name in ("before", "after"):
                if abs(row[name]) > LARGEST:
                    raise UserError(f"{where}: {name!r} cannot be {row[name]:g}; it is in nats a token")
            row = {field: row[field] for field in FIELDS}
            row |= {"train": train, "domain": cell.domain, "task": cell.task}
            key = (*tuple(row.values())[:-2], condition)
            row |= {name: value for name, value in condition._asdict().items() if value is not None}
            if rows.setdefault(key, row) != row:
                raise UserError(f"{where} and {places[key]} differ on the same row; leave one out")
            places.setdefault(key, where)
    return list(rows.values())


def margin_report(rows: list[dict], out: Path) -> str:
    """Write `margin_matrix.{json,csv,png}` into `out` for each model and way of training; a sentence each.

    An entry is the mean change over the rows of an eval cell, with its 95 % interval (Student's t).
    """
    lines, used, groups = [], set(), defaultdict(lambda: defaultdict(list))
    for row in rows:
        place = row["train"], f"{row['domain']}_{row['task']}"
        groups[row["model"], condition_of(row).group()][place].append(row["after"] - row["before"])
    words = {}
    for model in {model for model, _ in groups}:
        ways = sorted((way for name, way in groups if name == model), key=str)
        words |= {(model, way): text for way, text in zip(ways, ways_in_words(ways), strict=True)}
    for (model, way), values in sorted(groups.items(), key=str):
        model = f"{model}, {words[model, way]}" if words[model, way] else model
        asked = {parse_cell(column) for _, column in values}
        there = grid_of(
            asked | {parse_cell(name) for train, _ in values for name in parse_train(train).cells}
        )
        trains = sorted({train for train, _ in values}, key=lambda t: order_of(parse_train(t), there))
        columns = [str(cell) for cell in there.cells if cell in asked]
        entries = [
            {"train": t, "eval": c} | mean_interval(values[t, c])
            for t in trains
            for c in columns
            if values.get((t, c))
        ]
        folder = out / unique_name(model.rstrip("/").split("/")[-1].lower(), used)
        write_json(
            folder / "margin_matrix.json",
            {"model": model, "unit": "nats a token, after − before", "entries": entries},
        )
        write_csv(folder / "margin_matrix.csv", entries)
        _figure(model, trains, columns, values, folder / "margin_matrix.png")
        own = [e["mean"] for e in entries if e["train"] == e["eval"]]
        others = [e["mean"] for e in entries if e["train"] != e["eval"]]
        parts = [
            f"{np.mean(v):+.3f} {where}"
            for v, where in ((own, "in the trained cell"), (others, "elsewhere"))
            if v
        ]
        lines.append(
            f"{model}: the margin changed by {' and '.join(parts)} (nats a token, mean of cells; {folder})"
        )
    return "\n".join(lines)


def _figure(model: str, trains: list[str], columns: list[str], values: dict, path: Path) -> None:
    """Mean change of the margin; red is towards the misaligned answer."""
    matrix = np.array(
        [[np.mean(values[t, c]) if values.get((t, c)) else np.nan for c in columns] for t in trains]
    )
    figure = Figure(figsize=(0.72 * len(columns), 0.45 * len(trains)))  # of the matrix; `save` makes room
    axis = figure.subplots()
    limit = max(1e-9, float(np.nanmax(np.abs(matrix))))
    heatmap(axis, matrix, [short(t) for t in trains], [short(c) for c in columns], (-limit, limit),
            colours=CHANGE, form="+.2f")  # fmt: skip
    frames(axis, trains, columns)
    axis.set_xticks(axis.get_xticks(), axis.get_xticklabels(), rotation=45, ha="right")
    axis.set_title(f"{title_of(model)}: change of the margin, nats a token", fontsize=10)
    save(figure, path)
