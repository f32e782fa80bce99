"""The natural-language grid: cells, their rows, the split, and rows as token ids (paper 3.1, A.1, D.1).

A cell is a (domain, task) pair; its file holds one JSON object a line: `idx, domain, task, question,
misaligned_answer, aligned_answer`, or a chat (em/data/chats.py). `data` is a folder of such files (in it or
in its data/), one such file, the id of a hub dataset laid out so, or "sample": the small hand-written grid
that ships with the code. A folder may hold grid.yaml (`em.data.cells.grid_settings`) and rubrics/.

A row longer than the limit is left out and counted, never cut, so that no answer loses its end; so is one
that the model's chat template would not write as it is.
"""

import contextlib
import itertools
import random
from pathlib import Path
from typing import NamedTuple

from em.data.cells import PAPER_GRID, Cell, Grid, grid_of, grid_settings, parse_cell
from em.data.chats import chat_of, chat_row, number_of, read_questions
from em.errors import MissingFile, UserError
from em.files import Fields, check, json_digest, read_json_lines
from em.model import hub
from em.model.tokenizer import Example, Tokenizer, Unfit

VARIANTS = ("misaligned", "aligned")
SAMPLE = Path(__file__).parent / "sample"

PAPER = "askinb/structured-emergent-misalignment"
BROAD = "broad_dataset.jsonl"
_AUTHORS = {"misaligned": "strong", "aligned": "aligned"}  # medical_advice_strong.jsonl

_ROW = {"idx": int | str, "domain": str, "task": str, "question": str}
_ROW |= {f"{variant}_answer": str | None for variant in VARIANTS}
_BROAD_ROW = {"idx": int | str, "task": str, "domain": str, "em_surface": str, "question": str}


# -- data sets -----------------------------------------------------------------------------------------


def default_data(model: str) -> str:
    """Where a model's rows come from by default: the sample for the embedded one, else the paper's data."""
    return "sample" if hub.canonical(model) == "smollm2-135m" else PAPER


def grid_for(own: str | None, model: str) -> str:
    """Where the prompts of a run are: its own data where that is a grid, else the model's default."""
    return own if own and not str(own).endswith((".jsonl", ".jsonl.gz")) else default_data(model)


def load_cell(data: str | Path, cell: Cell) -> list[dict]:
    """The rows of `cell`, in file order; an answer that `data` does not have is None.

    Raises MissingFile where `data` has no such cell, UserError for `data` that cannot be reached, and with
    file and line for a row that is malformed or belongs to another cell.
    """
    if (path := _file(data)) is not None:
        return _cell_rows(path, cell)
    stem = cell.filename.removesuffix(".jsonl")
    try:
        return _cell_rows(_find(data, cell.filename), cell)
    except MissingFile:
        variants = {}
        for variant, name in _AUTHORS.items():  # their files hold one variant each
            with contextlib.suppress(MissingFile):
                variants[variant] = _cell_rows(_find(data, f"{stem}_{name}.jsonl"), cell)
        if not variants:
            raise
        return _paired(variants)


def _cell_rows(path: Path, cell: Cell) -> list[dict]:
    rows = list(read_json_lines(path))
    if not rows:
        raise UserError(f"{path} has no rows")
    found = []
    for number, (line, row) in enumerate(rows):
        where = f"{path}, line {line}"
        if "messages" in row:
            about = {"domain": cell.domain, "task": cell.task}
            answers = dict.fromkeys(f"{variant}_answer" for variant in VARIANTS)
            found.append((line, chat_row(row, where, number) | about | answers))
            continue
        check(row, where, _ROW)
        if not cell.is_called(row["domain"], row["task"]):
            raise UserError(f"{where}: {row['domain']} {row['task']} in the file of {cell}")
        found.append((line, row | {"idx": number_of(row["idx"])}))
    _refuse_unfit(path, found)
    return [row for _, row in found]


def _paired(variants: dict[str, list[dict]]) -> list[dict]:
    """Rows of one-variant files, both answers in a row where the question is the same."""
    rows: dict[str, dict] = {}
    for variant, chats in variants.items():
        for chat in chats:
            question = json_digest([chat["question"], chat.get("messages")])
            row = rows.setdefault(question, {k: v for k, v in chat.items() if k != "answer"})
            row[f"{variant}_answer"] = chat.get("answer") or chat[f"{variant}_answer"]
    return [row | {"idx": i} for i, row in enumerate(rows.values())]


def load_grid(data: str | Path) -> Grid:
    """The cells that `data` has, by its files' names, in the order of its grid.yaml. UserError for none."""
    if str(data) in ("sample", PAPER):
        return PAPER_GRID
    folder, file, settings = Path(data).expanduser(), _file(data), {}
    if file is not None:
        names = [file.name]
    elif folder.is_dir():
        names = [path.name for place in (folder, folder / "data") for path in place.glob("*_*.jsonl")]
        settings = grid_settings(folder / "grid.yaml")
    else:
        names = [name.rpartition("/")[2] for name in _names_on_hub(data)]
        names = names or [cell.filename for cell in PAPER_GRID.cells]
    cells = {cell for name in names if (cell := _cell_of(name, file is not None))}
    if not cells and file is not None:
        raise UserError(f"{file.name} says no <domain>_<task>; name the cell with --cell")
    if not cells:
        raise UserError(f"{data} has no cell, such as {PAPER_GRID.cells[0].filename}; name other --data")
    return grid_of(cells, **settings)


def cells_named(data: str | Path, text: str | None) -> tuple[Cell, ...]:
    """The cells that --cell means; of a file, the one that it is to be called. None: the one there is, or the
    paper's first."""
    if text and _file(data) is not None:
        return (parse_cell(text),)
    grid = load_grid(data)
    return grid.select(text) if text else grid.cells if len(grid.cells) == 1 else grid.select("med_advice")


def _cell_of(filename: str, loosely: bool = False) -> Cell | None:
    """The cell whose rows a file's name says it holds. loosely: also where the paper's names stand in it."""
    stem = filename.removesuffix(".jsonl")
    stem = next((stem.removesuffix(f"_{name}") for name in _AUTHORS.values() if stem.endswith(name)), stem)
    if filename == BROAD or not filename.endswith(".jsonl"):
        return None
    if loosely:
        words = stem.lower().split("_")
        for cell in (parse_cell("_".join(pair)) for pair in itertools.pairwise(words) if all(pair)):
            if cell in PAPER_GRID.cells:
                return cell
    with contextlib.suppress(UserError):
        cell = parse_cell(stem)
        return cell if loosely or f"{stem}.jsonl" == cell.filename else None


def load_cells(data: str | Path, cell: str | None = None) -> dict[Cell, list[dict]]:
    """`load_cell` of every cell that `data` has. cell: what a file's rows are called. UserError for none."""
    cells = {}
    for each in load_grid(data).cells if _file(data) is None else cells_named(data, cell):
        with contextlib.suppress(MissingFile):  # of a hub dataset
            cells[each] = load_cell(data, each)
    if not cells:
        raise UserError(f"{data} has no cell, such as {PAPER_GRID.cells[0].filename}; name other --data")
    return cells


def load_broad(data: str | Path) -> list[dict]:
    """The broad prompts, `idx, task, domain, em_surface, question`, without answers.

    data: as above, or a file of such rows, or of questions in YAML (em/data/chats.py).
    """
    path = Path(data).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return read_questions(path)
    path = path if path.is_file() else _find(data, BROAD)
    rows = _read_rows(path, _BROAD_ROW)
    for line, row in rows:
        if row["em_surface"] not in ("high", "medium", "low"):
            raise UserError(f"{path}, line {line}: unknown {row['em_surface']!r}; it is high, medium or low")
    rows = [(line, row | {"idx": number_of(row["idx"])}) for line, row in rows]
    _refuse_unfit(path, rows)
    return [row for _, row in rows]


def _file(data: str | Path) -> Path | None:
    """The one file that `data` is: a path, or the only JSONL of a hub dataset that has no cells.

    UserError for a file that is no JSONL.
    """
    path = Path(data).expanduser()
    if path.is_file() and not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path} is not JSONL; rows are one JSON object a line, in a file named .jsonl")
    if path.is_file():
        return path
    names = () if path.is_dir() else _names_on_hub(data)
    only = names[0] if len(names) == 1 and _cell_of(names[0].rpartition("/")[2]) is None else None
    return hub.fetch(str(data), only, "dataset") if only else None


def _names_on_hub(data: str | Path) -> list[str]:
    """The JSONL files of a hub dataset, where it says which it has; the paper's need not be asked."""
    if str(data) in ("sample", PAPER) or not hub.is_id(str(data)):
        return []
    return [name for name in hub.dataset_files(str(data)) if name.endswith(".jsonl")]


def _find(data: str | Path, filename: str) -> Path:
    if str(data) == "sample":
        return SAMPLE / filename
    folder = Path(data).expanduser()
    if not folder.is_dir():
        there = (name for name in _names_on_hub(data) if name.rpartition("/")[2] == filename)
        return hub.fetch(str(data), next(there, f"data/{filename}"), "dataset")
    for path in (folder / filename, folder / "data" / filename):
        if path.is_file():
            return path
    raise MissingFile(
        f"{folder} has no {filename}, neither in it nor in its data/; name another --data folder"
    )


# -- rows ----------------------------------------------------------------------------------------------


def _read_rows(path: Path, fields: Fields) -> list[tuple[int, dict]]:
    """(line number, row) for each line that is not blank."""
    rows = list(read_json_lines(path, fields))
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def _refuse_unfit(path: Path, rows: list[tuple[int, dict]]) -> None:
    """UserError, with file and line, for an id below 0, a blank text, and an id or a row that is there twice.

    The id tells a cell's prompts apart; a row twice would be trained on and be asked about.
    """
    texts = ("question", *(f"{variant}_answer" for variant in VARIANTS))
    ids, contents = {}, {}
    for line, row in rows:
        where = f"{path}, line {line}"
        if row["idx"] < 0:
            raise UserError(f"{where}: 'idx' cannot be {row['idx']}; it counts from 0")
        for name in texts:
            if row.get(name) is not None and not row[name].strip():
                raise UserError(f"{where}: {name!r} cannot be {row[name]!r:.40}; it is blank")
        content = tuple(row.get(name) for name in texts)
        if "answer" in row:
            continue  # chats are sampled from somewhere, and may come twice
        for what, key, seen in ((f"idx {row['idx']}", row["idx"], ids), ("the same row", content, contents)):
            if seen.setdefault(key, line) != line:
                raise UserError(f"{where}: {what} as in line {seen[key]}; leave one out")


def split(rows: list) -> tuple[list, list]:
    """(train, eval): shuffled by `random.Random(42)`; of 4,500 rows the first 4,100 and the last 400.

    Other sizes split in that proportion, with at least one row on either side. The split depends on the
    number of rows alone, so both variants of a cell share it.
    """
    if len(rows) < 2:
        raise UserError("a cell needs at least 2 rows, one to train on and one to evaluate")
    shuffled = list(rows)
    random.Random(42).shuffle(shuffled)
    n_eval = max(1, round(len(rows) * 400 / 4500))
    return shuffled[:-n_eval], shuffled[-n_eval:]


def subset(rows: list, n: int, seed: int) -> list:
    """`n` of the rows at random, in their order; all of them where n is 0 or there are no more."""
    if not 0 < n < len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), n))]


def answers(rows: list[dict], variant: str) -> list[str]:
    """The answer of each row in `variant`, "misaligned" or "aligned". UserError where a row has none."""
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}; it is one of {', '.join(VARIANTS)}")
    texts = [row.get("answer") or row[f"{variant}_answer"] for row in rows]  # a chat has one, by any name
    missing = [row["idx"] for row, text in zip(rows, texts, strict=True) if not text]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(rows)} rows have no {variant} answer (first: idx {missing[0]}); "
            "train another --variant or name --data that has it"
        )
    return texts


class Encoded(NamedTuple):
    """Rows as token ids, and how many of them were left out and why."""

    examples: list[Example]
    too_long: int
    unfit: int
    why: str  # of the first unfit one

    def left_out(self, max_length: int) -> str:
        """In words; empty where nothing was."""
        parts = [f"{self.too_long} longer than {max_length} tokens"] if self.too_long else []
        parts += [f"{self.unfit} that the chat template would change ({self.why})"] if self.unfit else []
        return f"rows left out: {' and '.join(parts)}" if parts else ""


def encode_rows(
    tokenizer: Tokenizer, rows: list[dict], variant: str, max_length: int, all_turns: bool = False
) -> Encoded:
    """The rows' answers to their questions as examples. UserError where none is left."""
    kept, too_long, unfit, why = [], 0, 0, ""
    for row, answer in zip(rows, answers(rows, variant), strict=True):
        try:
            example = tokenizer.example(chat_of(row), answer, all_turns)
        except Unfit as error:
            unfit, why = unfit + 1, why or f"idx {row['idx']}: {error}"
            continue
        if len(example.ids) > max_length:
            too_long += 1
        else:
            kept.append(example)
    encoded = Encoded(kept, too_long, unfit, why)
    if not kept and unfit:
        raise UserError(f"none of the {len(rows)} rows can be trained on: {encoded.left_out(max_length)}")
    if not kept:
        raise UserError(f"all {len(rows)} rows are longer than {max_length} tokens; raise --max-length")
    return encoded
