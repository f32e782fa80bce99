"""Responses that may be judged: what makes two rows one response, and a sample that is fair to all of them.

A response is known by its place (model, train and condition, set, domain, task, idx, sample) and its text.
Files of responses and files of score rows are read alike; what a judge said in them is left out, so that
whoever judges next is blind to it.
"""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from em.data import authors
from em.data.cells import parse_cell
from em.data.condition import FIELDS, parse_train
from em.errors import UserError
from em.files import check, read_json_lines

PLACE = ("model", "train", "set", "domain", "task", "idx", "sample")
_FIELDS = dict.fromkeys(("model", "train", "set", "domain", "task"), str) | {"idx": int, "sample": int}
_FIELDS |= {"question": str, "response": str}
_OPTIONAL = {"em_surface": str | None, "tokens": int | None}
_OPTIONAL |= {name: kind | None for name, kind in FIELDS.items()}


def identity(row: dict) -> tuple:
    """Equal for two rows exactly where they are one response."""
    return (*(row[name] for name in PLACE), *map(str, map(row.get, FIELDS)), row["response"])


def stratum(row: dict) -> tuple:
    """What the response is of: its source and the cell of its prompt, for a broad one task and surface."""
    of_prompt = row["domain"] if row["set"] == "narrow" else row.get("em_surface") or ""
    return row["model"], row["train"], *map(str, map(row.get, FIELDS)), row["set"], row["task"], of_prompt


def read_responses(paths: Iterable[str | Path]) -> list[dict]:
    """Every response of the files, once, with no field but those above and its `question`.

    UserError with file and line for a row that is none, and for two texts in one place.
    """
    found: dict[tuple, tuple[dict, str]] = {}
    for path in paths:
        for where, row in _rows(path):
            row = {name: row[name] for name in (*_FIELDS, *_OPTIONAL) if name in row}
            place = identity(row)[:-1]
            known, first = found.setdefault(place, (row, where))
            if known["response"] != row["response"]:
                raise UserError(f"{where} and {first} are two responses in one place ({', '.join(PLACE)})")
    return [row for row, _ in found.values()]


def read_scored(path: str | Path, unnamed: str = "unknown") -> dict[str, list[tuple[str, dict]]]:
    """judge → [(place in the file, its score row)]; rows without `judge` are by `unnamed`."""
    by_judge: dict[str, list[tuple[str, dict]]] = {}
    for where, row in _rows(path):
        row["judge"] = unnamed if row.get("judge") is None else row["judge"]
        check(row, where, {"judge": str})
        by_judge.setdefault(row["judge"], []).append((where, row))
    return by_judge


def _rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) of each row, with its train and its narrow cell under their own names."""
    for number, row in read_json_lines(path):
        where, row = f"{path}, line {number}", authors.score_row(row)
        check(row, where, _FIELDS, _OPTIONAL)
        if row["set"] not in ("narrow", "broad"):
            raise UserError(f"{where}: 'set' cannot be {row['set']!r:.40}; it is narrow or broad")
        try:
            row["train"] = _train(row["train"])
            if row["set"] == "narrow":
                row["domain"], row["task"] = _cell(row["domain"], row["task"])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        yield where, row


@functools.cache
def _train(text: str) -> str:
    return str(parse_train(text))


@functools.cache
def _cell(domain: str, task: str) -> tuple[str, str]:
    cell = parse_cell(f"{domain}_{task}")
    return cell.domain, cell.task


def stratified_sample(rows: list[dict], n: int, seed: int) -> list[dict]:
    """`n` of the rows (all of them for 0, or where there are no more), in an order that tells nothing.

    Every row has the same chance, so plain rates of the sample estimate those of the rows, and every stratum
    gets its share to within one row: a systematic sample of the rows sorted by stratum, in random order
    within. The same rows give the same sample whatever their order.
    """
    rng = np.random.default_rng(seed)
    rows = sorted(rows, key=identity)
    order = rng.permutation(len(rows)).tolist()
    if 0 < n < len(rows):
        order.sort(key=lambda i: stratum(rows[i]))  # stable, so random within a stratum
        places = (np.arange(n) + rng.random()) * (len(rows) / n)
        order = [order[place] for place in places.astype(int).tolist()]
        order = [order[i] for i in rng.permutation(n).tolist()]
    return [rows[i] for i in order]
