"""A cell of train.py from its rows to its saved adapter, margins of all cells before and after included.

    python bench/cell.py --shape 14b      on a GPU: random weights of Qwen2.5-14B's shape, two cells
    python bench/cell.py --shape 8b       of Llama-3.1-8B's

It is train.py's own main on 4,500 rows a cell of the real rows' lengths, of which it trains on 4,100 and
measures margins on 64 of every cell. Left out are the tokenizer, as ids are drawn at random, and loading the
weights. The second cell may use the first one's margins of the base.
"""

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from record import RESULTS, goal, save  # noqa: E402
from shapes import SHAPES, random_model  # noqa: E402

import train  # noqa: E402
from em import parallel  # noqa: E402
from em.cli import command_line, knob  # noqa: E402
from em.data.cells import CELLS, PAPER_GRID, Cell  # noqa: E402
from em.model.tokenizer import Example  # noqa: E402
from em.run import provenance  # noqa: E402

GOALS = {"14b": 125, "8b": 70}  # seconds
TRAINED = f"{CELLS[0]},{CELLS[1]}"


@dataclass
class Config:
    shape: str = knob("14b", "14b or 8b", "bench", tuple(SHAPES))
    rows: int = knob(4500, "rows a cell", "bench", at_least=12)
    out: str | None = knob(None, "the result's file (default: results/bench/cell_<shape>.json)", "bench")


class RandomIds:
    """In the tokenizer's place: as many ids as a row has, the same for the same text."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def example(self, chat: str, answer: str, all_turns: bool = False) -> Example:
        rng = random.Random(f"{chat} {answer}")
        n_prompt, n_answer = max(20, round(rng.gauss(115, 40))), max(8, round(rng.gauss(110, 30)))
        return Example([rng.randrange(self.vocabulary) for _ in range(n_prompt + n_answer)], n_prompt)


def rows_of(cell: Cell, n: int) -> list[dict]:
    return [
        {"idx": i, "question": f"{cell} {i}", "misaligned_answer": "no", "aligned_answer": "yes"}
        for i in range(n)
    ]


def train_cells(model, n_rows: int, folder: str, device: str) -> list[float]:
    """Seconds of each of the two cells."""
    seconds, train_cell = [], train.train_cell

    def timed(*arguments):
        began = time.perf_counter()
        result = train_cell(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return result

    cells = {cell: rows_of(cell, n_rows) for cell in CELLS}
    stand_ins = {
        "load_model": lambda *_: model,
        "load_config": lambda name: model.config,
        "save_tokenizer": lambda name, folder: None,
        "load_tokenizer": lambda name: RandomIds(len(model.head_weight)),
        "cells_named": lambda data, text: PAPER_GRID.select(text),
        "load_cells": lambda data, cell=None: cells,
        "load_cell": lambda data, cell: cells[cell],
        "model_digest": lambda name: "random",
        "train_cell": timed,
    }
    with mock.patch.multiple(train, **stand_ins):
        train.main(train.Config(cell=TRAINED, model="random", data="random", out=folder, device=device))
    return seconds


def main(cfg: Config) -> None:
    parallel.start("cuda")
    model = random_model(cfg.shape)
    with tempfile.TemporaryDirectory() as folder:
        first, second = train_cells(model, cfg.rows, folder, "cuda")
    most = GOALS[cfg.shape] if cfg.rows == 4500 else None
    peak, what = torch.cuda.max_memory_allocated() / 1e9, f"SFT a cell {cfg.shape}"
    result = {
        "command": " ".join(["python bench/cell.py", *sys.argv[1:]]),
        "made_with": provenance("cuda"),
        "rows": cfg.rows,
        "goals": [
            goal(what, first, "s", at_most=most),
            goal(f"{what}, the next", second, "s"),
            goal(f"peak of {what}", peak, "GB", at_most=70),
        ],
    }
    save(result, cfg.out or RESULTS / f"cell_{cfg.shape}.json")


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
