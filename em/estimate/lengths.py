"""How many tokens prompts and answers have: counted where rows and tokenizer are at hand, else from
lengths.json.

No network is asked. Of rows at hand 64 a cell are counted, or 128 prompts.
"""

import random
import re
from pathlib import Path
from typing import NamedTuple

from em.data.cells import PAPER_GRID, Cell, parse_cell
from em.data.chats import chat_of
from em.data.math_problems import load_math
from em.data.rows import PAPER, VARIANTS, load_broad, load_cells, subset
from em.errors import UserError
from em.files import read_json
from em.model import embedded, hub
from em.model.tokenizer import Example, Tokenizer

STATED = Path(__file__).parent / "lengths.json"
COUNTED, PROMPTS = 64, 128  # rows of a cell, prompts


class Lengths(NamedTuple):
    """Of the rows of one cell, or of a set of prompts: how many there are, and quantiles of their tokens."""

    rows: int
    prompt: list[int]
    answers: dict[str, list[int]]  # by variant, or `gold`

    def examples(self, n: int, answer: str) -> list[Example]:
        """`n` examples with these lengths. What their ids are does not matter; a range takes no memory."""
        prompts, answers = spread(self.prompt, n, 0), spread(self.answers[answer], n, 1)
        return [Example(range(p + a), p) for p, a in zip(prompts, answers, strict=True)]

    def prompts(self, n: int) -> list[range]:
        return [range(length) for length in spread(self.prompt, n, 0)]


def quantiles(values: list[int], n: int = 21) -> list[int]:
    """Those at 0, …, 1, evenly spaced, by nearest rank."""
    values = sorted(values)
    return [values[round(i * (len(values) - 1) / (n - 1))] for i in range(n)]


def spread(of: list[int], n: int, seed: int) -> list[int]:
    """`n` values whose quantiles are `of`, in a random order that follows from `seed`."""
    places = [(i + 0.5) / n * (len(of) - 1) for i in range(n)]
    values = [of[int(x)] + (of[int(x) + 1] - of[int(x)]) * (x - int(x)) for x in places]
    values = [max(1, round(value)) for value in values]
    random.Random(seed).shuffle(values)
    return values


def cells_of(data: str, model: str, cell: str | None = None) -> tuple[dict[Cell, Lengths], str]:
    """Lengths of every cell that `data` has, and in words where they are from."""
    tokenizer, folder = _tokenizer(model), _folder(data)
    if tokenizer is None or folder is None:
        stated = read_json(STATED)["sample" if data == "sample" else "paper"]
        cells = {parse_cell(name): _stated(stated["rows"], row) for name, row in stated["cells"].items()}
        return cells, _why(data, tokenizer)
    cells = {}
    for each, rows in load_cells(folder, cell).items():
        some = subset(rows, COUNTED, 0)
        prompt = quantiles([len(tokenizer.prompt_ids(chat_of(row))) for row in some])
        answers = {}
        for variant in VARIANTS:
            texts = [text for row in some if (text := row.get("answer") or row[f"{variant}_answer"])]
            if texts:
                answers[variant] = quantiles([len(tokenizer.encode(text)) + 1 for text in texts])
        cells[each] = Lengths(len(rows), prompt, answers)
    return cells, f"lengths counted in {data}"


def prompts_of(kind: str, data: str, model: str, limit: int = 0) -> tuple[Lengths, str]:
    """Lengths of the broad or math prompts in `data`, `limit` of them at most, and where they are from."""
    tokenizer, folder = _tokenizer(model), _folder(data)
    if tokenizer is None or folder is None:
        stated = read_json(STATED)
        stated = (
            stated["math"] if kind == "math" else stated["sample" if data == "sample" else "paper"]["broad"]
        )
        lengths, source = _stated(stated["rows"], stated), _why(data, tokenizer)
        source = source.replace("the paper's rows", "MATH's problems") if kind == "math" else source
    else:
        rows = load_math(folder) if kind == "math" else load_broad(folder)
        some = subset(rows, PROMPTS, 0)
        gold = [len(tokenizer.encode(row["answer"])) + 1 for row in some if "answer" in row]
        prompt = quantiles([len(tokenizer.prompt_ids(chat_of(row))) for row in some])
        lengths = Lengths(len(rows), prompt, {"gold": quantiles(gold)} if gold else {})
        source = f"lengths counted in {data}"
    return lengths._replace(rows=min(lengths.rows, limit or lengths.rows)), source


def _stated(rows: int, row: dict) -> Lengths:
    answers = {name: row[name] for name in (*VARIANTS, "gold") if name in row}
    if "misaligned" in answers:
        answers.setdefault("aligned", answers["misaligned"])
    return Lengths(rows, row["prompt"], answers)


def _why(data: str, tokenizer: Tokenizer | None) -> str:
    rows = "the sample's rows" if data == "sample" else "the paper's rows"
    missing = "the model's tokenizer" if tokenizer is None else data
    return f"lengths of {rows} as they were counted once: {missing} is not at hand"


def _tokenizer(model: str) -> Tokenizer | None:
    folder = Path(model).expanduser()
    if not folder.is_dir() and model == embedded.NAME and embedded.find():
        folder = embedded.find().with_suffix("")  # where it has been converted
    if not folder.is_dir():
        path = hub.cached(hub.MODELS.get(model, model), "tokenizer.json")
        folder = path.parent if path else folder
    return Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None


def _folder(data: str) -> str | None:
    """Where the files of `data` lie, if they do. UserError for what can be no data."""
    if data == "sample" or Path(data).expanduser().exists():
        return data
    if "://" in data:
        return None  # an address of MATH's, and a dry run asks no network
    if not re.fullmatch(r"[\w.-]*\w/\w[\w.-]*", data):
        raise UserError(f"{data!r} is neither a folder here nor a hub id such as {PAPER}")
    path = hub.cached(data, "data/" + PAPER_GRID.cells[0].filename, "dataset") or hub.cached(
        data, "data/MATH.zip", "dataset"
    )
    return str(path.parent if path and path.suffix == ".jsonl" else path) if path else None
