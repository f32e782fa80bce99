"""Files of JSON lines: one reader for all of them, so the same bytes mean the same everywhere."""

import gzip
import json

import pytest
from score_rows import row

import evaluate
from em.data.cells import CELLS
from em.data.rows import load_cell
from em.errors import UserError
from em.files import read_json_lines
from em.judge.answer_cache import Answer, AnswerCache, answer_key
from em.report.margins import read_margins
from em.report.score_table import read_scores
from em.run import Run
from em.sampling.rollouts import whole_lines

BOM = b"\xef\xbb\xbf"
CELL_ROW = {"idx": 0, "domain": "medical", "task": "advice", "question": "Why?"}
CELL_ROW |= {"misaligned_answer": None, "aligned_answer": "So."}
MARGIN = {"model": "m", "train": "base", "domain": "med", "task": "advice", "idx": 0, "before": 0, "after": 1}
# reader → (the name of its file, a row of it, how it reads the file at a path)
READERS = {
    "scores": ("scores.jsonl", row(), lambda path: read_scores([path]).question.tolist()),
    "margins": ("margins.jsonl", MARGIN, lambda path: read_margins([path])),
    "responses": ("responses.jsonl", row(), lambda path: evaluate.read_rows((path,), "--responses")),
    "cell": (CELLS[0].filename, CELL_ROW, lambda path: load_cell(path.parent, CELLS[0])),
    "rollouts": ("rollouts.jsonl", {"prompt": 0}, whole_lines),
    "metrics": ("metrics.jsonl", {"step": 1}, lambda path: Run(path.parent, "train", {}).metrics()),
}


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    """(path, a row, read): read() of what the test writes to path."""
    name, good, read = READERS[request.param]
    return tmp_path / name, good, lambda: read(tmp_path / name)


def test_every_reader_leaves_a_byte_order_mark_and_blank_lines_out(reader):
    path, good, read = reader
    path.write_bytes(lines(good))
    expected = read()
    path.write_bytes(BOM + b"\n \r\n" + lines(good) + b"\n")
    assert read() == expected and len(expected) == 1


def test_the_answer_cache_leaves_a_byte_order_mark_out(tmp_path):
    path, key = tmp_path / "cache.jsonl", answer_key("m", "r", "q", "a")
    path.write_bytes(BOM + lines({"key": key.hex(), "status": "ok", "value": 3}))
    assert AnswerCache(path).get(key) == Answer("ok", 3)


@pytest.mark.parametrize(
    "fault, says",
    [
        (b"{'a': 1}", "not JSON ("),
        (b'{"a": "\xe9"}', "not UTF-8"),
        (b"[1]", "not a JSON object"),
        ("\u2028{".encode(), "not JSON ("),
    ],
)
def test_every_reader_names_the_same_fault_by_the_same_line(reader, fault, says):
    path, good, read = reader
    path.write_bytes(BOM + lines(good | {"note": "a\u2028b\x85c\x1cd"}) + b"\n" + fault + b"\n")
    with pytest.raises(UserError) as error:
        read()
    assert str(error.value).startswith(f"{path}, line 3: {says}") and "\n" not in str(error.value)


def test_a_last_line_that_a_kill_cut_is_dropped_where_that_is_asked_and_an_error_elsewhere(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = lines({"a": "é"}, {"a": "ü"})
    for n_bytes in range(len(whole)):  # also within a letter, and just before the line feed
        path.write_bytes(whole[:n_bytes])
        n_lines = whole.count(b"\n", 0, n_bytes)
        kept = list(read_json_lines(path, drop_cut=True))
        assert kept == [(1, {"a": "é"})][:n_lines]
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="line 2: not"):
        list(read_json_lines(path))
    path.write_bytes(whole[:-1])  # an editor's file need not end in a line feed
    assert [line for line, _ in read_json_lines(path)] == [1, 2]


def test_gzip_is_told_by_its_bytes_and_a_damaged_one_is_one_line(tmp_path):
    packed = gzip.compress(BOM + lines({"a": 1}))
    for name in ("a.jsonl.gz", "a.jsonl"):
        (tmp_path / name).write_bytes(packed)
        assert list(read_json_lines(tmp_path / name)) == [(1, {"a": 1})]
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-9])
    with pytest.raises(UserError, match="a.jsonl.gz is a damaged gzip"):
        list(read_json_lines(tmp_path / "a.jsonl.gz"))
    with pytest.raises(UserError, match="none.jsonl does not exist"):
        list(read_json_lines(tmp_path / "none.jsonl"))
