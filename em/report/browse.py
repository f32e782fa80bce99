"""One self-contained HTML page to read judged responses by cell, score, status and free text.

`em/report/browse.html` is the page; here its data are put in: numbers as columns, texts once each (two judges
of one response share it), JSON, gzip, base64, in blocks that the browser unpacks one after the other. The
page needs no network and forbids itself any, draws only the rows in sight, and sets every text as text, never
as HTML.

Above `MAX_ROWS` it holds a random sample, as many rows of every (model, judge, train, eval cell) as
fit, all of the small ones; the page says so.
"""

import base64
import json
import zlib
from pathlib import Path

import numpy as np

from em.data.condition import describe
from em.files import write_atomic
from em.judge.em_rule import ALIGNED_BELOW, COHERENT_ABOVE, STATUSES
from em.report.score_table import SURFACES, ScoreTable, joined

MAX_ROWS = 150_000
BLOCK = 8_000_000  # characters of text in a block, small beside the browser's limit on one string
TEMPLATE = Path(__file__).parent / "browse.html"
MARK = b"<!-- data -->"


def write_page(table: ScoreTable, path: Path, max_rows: int = MAX_ROWS) -> int:
    """Write the page of `table` to `path`; returns how many of its rows the page holds."""
    shown = table.select(sample_rows(table, max_rows))
    head, tail = TEMPLATE.read_bytes().split(MARK)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(head)
            for block in _blocks(shown, len(table)):
                text = json.dumps(block, separators=(",", ":")).encode("ascii")
                packer = zlib.compressobj(1, wbits=31)  # 31: with gzip's header
                packed = base64.b64encode(packer.compress(text) + packer.flush())
                file.write(b'<script type="application/octet-stream">' + packed + b"</script>\n")
            file.write(tail)

    write_atomic(path, write)
    return len(shown)


def sample_rows(table: ScoreTable, max_rows: int) -> np.ndarray:
    """(n,) bool: all rows, or the same number from every cell where there are more than `max_rows`."""
    if len(table) <= max_rows:
        return np.ones(len(table), bool)
    cell = joined(
        table.model, table.judge, table.train, table.condition, table.narrow, table.domain, table.task
    )
    order = np.lexsort((np.random.default_rng(0).random(len(table)), cell))
    counts = np.bincount(cell)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.empty(len(table), np.int64)
    place[order] = np.arange(len(table)) - np.repeat(starts, counts)  # random rank of a row in its cell
    quota = np.searchsorted(
        [np.minimum(counts, q).sum() for q in range(counts.max() + 1)], max_rows, side="right"
    )
    return place < quota - 1


def _blocks(table: ScoreTable, n_all: int):
    """The columns, then the texts: questions and responses, each text once."""
    texts = {}
    question, response = (
        [texts.setdefault(text, len(texts)) for text in column] for column in (table.question, table.response)
    )
    made = np.stack([table.model, table.condition], axis=1)
    made, model = np.unique(made, axis=0, return_inverse=True)
    columns = {name: getattr(table, name) for name in ("judge", "train", "domain", "task", "surface")}
    columns |= {"model": model.reshape(-1)}  # with the condition, whose words are few
    columns |= {
        name: getattr(table, name)
        for name in ("idx", "sample", "prompt", "aligned_status", "coherent_status")
    }
    columns |= {"narrow": table.narrow.astype(int), "em": table.em().astype(int)}
    scores = {
        name: np.where(np.isnan(v), -1, v)
        for name, v in (("aligned", table.aligned), ("coherent", table.coherent))
    }
    yield {
        "all": n_all,
        "rule": f"EM: aligned < {ALIGNED_BELOW} and coherent > {COHERENT_ABOVE}, both strict",
        "models": [
            ", ".join(filter(None, (table.models[m], describe(table.conditions[c])))) for m, c in made
        ],
        "judges": table.judges,
        "trains": list(map(str, table.trains)),
        "domains": table.domains,
        "tasks": table.tasks,
        "surfaces": SURFACES,
        "statuses": STATUSES,
        "columns": {name: column.tolist() for name, column in (columns | scores).items()}
        | {"question": question, "response": response},
    }
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size > BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block
