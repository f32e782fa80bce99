"""The natural-language grid: cells, their rows, the split, and rows as token ids (paper 3.1, A.1, D.1).

A cell is a (domain, task) pair; its file holds one JSON object a line: `idx, domain, task, question,
misaligned_answer, aligned_answer`. `data` is a folder of such files (in it or in its data/), the id of a
hub dataset laid out so, or "sample": the small hand-written grid that ships with the code.

A row longer than the limit is left out and counted, never cut, so that no answer loses its end.
"""

import contextlib
import random
import zipfile
from pathlib import Path

from em.data.cells import PAPER_GRID, Cell, Grid, grid_of, parse_cell
from em.errors import MissingFile, UserError
from em.files import Fields, read_json, read_json_lines
from em.model import hub
from em.model.tokenizer import Example, Tokenizer

VARIANTS = ("misaligned", "aligned")
SAMPLE = Path(__file__).parent / "sample"

PAPER = "askinb/structured-emergent-misalignment"
BROAD = "broad_dataset.jsonl"

_ROW = {"idx": int, "domain": str, "task": str, "question": str}
_ROW |= {f"{variant}_answer": str | None for variant in VARIANTS}
_BROAD_ROW = {"idx": int, "task": str, "domain": str, "em_surface": str, "question": str}
_MATH_ROW = {"problem": str, "solution": str, "level": str, "type": str}


# -- data sets -----------------------------------------------------------------------------------------


def default_data(model: str) -> str:
    """Where a model's rows come from by default: the sample for the embedded one, else the paper's data."""
    return "sample" if hub.canonical(model) == "smollm2-135m" else PAPER


def load_cell(data: str | Path, cell: Cell) -> list[dict]:
    """The rows of `cell`, in file order; an answer that `data` does not have is None.

    Raises MissingFile where `data` has no such cell, UserError for `data` that cannot be reached, and with
    file and line for a row that is malformed or belongs to another cell.
    """
    path = _find(data, cell.filename)
    rows = _read_rows(path, _ROW)
    for line, row in rows:
        if not cell.is_called(row["domain"], row["task"]):
            raise UserError(f"{path}, line {line}: {row['domain']} {row['task']} in the file of {cell}")
    _refuse_unfit(path, rows)
    return [row for _, row in rows]


def load_grid(data: str | Path) -> Grid:
    """The cells that `data` has, by its files' names; of a hub dataset, the paper's. UserError for none."""
    folder = Path(data).expanduser()
    if str(data) == "sample" or not folder.is_dir():
        return PAPER_GRID
    cells = set()
    for path in (*folder.glob("*_*.jsonl"), *folder.glob("data/*_*.jsonl")):
        with contextlib.suppress(UserError):
            cell = parse_cell(path.stem)
            if path.name == cell.filename and path.name != BROAD:
                cells.add(cell)
    if not cells:
        raise UserError(f"{data} has no cell, such as {PAPER_GRID.cells[0].filename}; name other --data")
    return grid_of(cells)


def load_cells(data: str | Path) -> dict[Cell, list[dict]]:
    """`load_cell` of every cell that `data` has. UserError for none."""
    cells = {}
    for cell in load_grid(data).cells:
        with contextlib.suppress(MissingFile):  # of a hub dataset
            cells[cell] = load_cell(data, cell)
    if not cells:
        raise UserError(f"{data} has no cell, such as {PAPER_GRID.cells[0].filename}; name other --data")
    return cells


def load_broad(data: str | Path) -> list[dict]:
    """The broad prompts, `idx, task, domain, em_surface, question`, without answers."""
    path = _find(data, BROAD)
    rows = _read_rows(path, _BROAD_ROW)
    for line, row in rows:
        if row["em_surface"] not in ("high", "medium", "low"):
            raise UserError(f"{path}, line {line}: unknown {row['em_surface']!r}; it is high, medium or low")
    _refuse_unfit(path, rows)
    return [row for _, row in rows]


def load_math(data: str | Path) -> list[dict]:
    """MATH's training problems as rows `idx, question, answer, level, type`, ordered by subject and number.

    data: a folder with train/<subject>/<n>.json or train.jsonl, such a .jsonl file, or a hub id
    (hendrycks/competition_math, whose data/MATH.zip holds the same folder). Paper E.4.1 takes "the full 7.5k
    examples", which is the training split: no level or subject is left out, its filter is about what models
    answer. For E.4.2's 2,000 draw from these rows.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        inside = (path / "train.jsonl", path / "train", path / "MATH" / "train")
        path = next((candidate for candidate in inside if candidate.exists()), path)
    elif not path.exists():
        path = hub.fetch(str(data), "data/MATH.zip", "dataset")
    if path.suffix == ".jsonl":
        rows = [row for _, row in _read_rows(path, _MATH_ROW)]
    else:
        try:
            root = path if path.is_dir() else zipfile.Path(path) / "MATH" / "train"
            subjects = [subject for subject in root.iterdir() if subject.is_dir()]
            files = [(subject.name, file) for subject in subjects for file in subject.iterdir()]
            files.sort(key=lambda f: (f[0], len(f[1].name), f[1].name))  # 2.json before 10.json
            rows = [read_json(file, _MATH_ROW) for _, file in files]
        except (OSError, RuntimeError, zipfile.BadZipFile) as error:  # RuntimeError: encrypted
            raise UserError(f"{path} cannot be read as MATH ({error}); download it again") from error
    if not rows:
        raise UserError(f"{path} holds no problems; give a folder with train/<subject>/<n>.json")
    return [
        {"idx": i, "question": r["problem"], "answer": r["solution"], "level": r["level"], "type": r["type"]}
        for i, r in enumerate(rows)
    ]


def _find(data: str | Path, filename: str) -> Path:
    if str(data) == "sample":
        return SAMPLE / filename
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return hub.fetch(str(data), f"data/{filename}", "dataset")
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
    missing = [row["idx"] for row in rows if not row[f"{variant}_answer"]]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(rows)} rows have no {variant} answer (first: idx {missing[0]}); "
            "train another --variant or name --data that has it"
        )
    return [row[f"{variant}_answer"] for row in rows]


def encode_rows(
    tokenizer: Tokenizer, rows: list[dict], variant: str, max_length: int
) -> tuple[list[Example], int]:
    """(examples, number dropped): rows as token ids, those longer than `max_length` tokens left out."""
    texts = zip(rows, answers(rows, variant), strict=True)
    examples = [tokenizer.example(row["question"], answer) for row, answer in texts]
    kept = [example for example in examples if len(example.ids) <= max_length]
    if not kept:
        raise UserError(f"all {len(rows)} rows are longer than {max_length} tokens; raise --max-length")
    return kept, len(examples) - len(kept)
