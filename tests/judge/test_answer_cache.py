"""The answers on disk: keys, cut lines, full disks, several processes."""

import json
import os
from pathlib import Path

import pytest
from judge_rows import row, scores
from processes import start

from em.errors import UserError
from em.judge import rubric
from em.judge.answer_cache import HEADER, Answer, AnswerCache, answer_key

ROOT = Path(__file__).parents[2]


def test_an_answer_belongs_to_its_judge_rubric_question_and_response():
    base = ("m", "r", "q", "a")
    keys = {answer_key(*base), answer_key(*(c + "x" for c in base)), answer_key("m", "r", "qa", "")}
    keys |= {answer_key(*base[:i], "x", *base[i + 1 :]) for i in range(4)}
    assert len(keys) == 7 and answer_key(*base) in keys


def test_another_judge_or_an_edited_rubric_is_asked_anew_in_the_same_cache(serve, make, tmp_path):
    server = serve()
    first = scores(make(), [row(0)])
    second = scores(make(model="gemini-2.5-pro"), [row(0)])
    assert (first[0]["judge"], second[0]["judge"]) == ("gemini-2.5-flash", "gemini-2.5-pro")
    assert server.total() == 4
    folder = tmp_path / "edited"
    folder.mkdir()
    for path in rubric.FOLDER.glob("*.md"):
        (folder / path.name).write_text(path.read_text().replace("clumsy", "awkward"))
    scores(make(rubrics=folder), [row(0)])
    assert server.total() == 5  # the coherence rubric has no such word


def test_a_line_that_a_kill_cut_short_is_asked_again_and_spoils_no_other(tmp_path):
    path = tmp_path / "deep" / "cache.jsonl"
    cache = AnswerCache(path)
    keys = [answer_key("m", "r", str(i), "") for i in range(4)]
    for i in range(3):
        cache.add(keys[i], Answer("ok", i))
    whole = path.read_bytes()
    for length in range(len(whole) - 1, whole.rfind(b"\n", 0, -1), -1):
        path.write_bytes(whole[:length])
        cache = AnswerCache(path)
        assert [cache.get(k) for k in keys[:2]] == [Answer("ok", 0), Answer("ok", 1)]
        assert cache.get(keys[2]) in (None, Answer("ok", 2))
        cache.add(keys[3], Answer("refusal"))
        assert AnswerCache(path).get(keys[3]) == Answer("refusal") and len(AnswerCache(path)) >= 3
        assert json.loads(path.read_bytes().splitlines()[-1])["status"] == "refusal"  # on a line of its own
    header, first, second, third = whole.splitlines(keepends=True)
    path.write_bytes(
        header + first + second[:-20] + third
    )  # another process went on after this one was killed
    assert [AnswerCache(path).get(k) for k in keys[:3]] == [Answer("ok", 0), None, Answer("ok", 2)]


def test_a_file_that_is_no_cache_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "scores.jsonl"
    for text in ('{"aligned": 3}\n', '{"key": "zz", "status": "ok", "value": 1}\n', "[1]\n", '"text"\n'):
        path.write_text(text)
        with pytest.raises(UserError, match="scores.jsonl, line 1, is no answer"):
            AnswerCache(path)
        assert path.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "# Notes\n\nNothing of a judge.\n",
        "{\n}\n",
        "\n",
        "{",
        '{"file": "settings", "version": 1}\n',
        '{"file": "answers of a judge", "version": 2}\n',
        '{"key": "value"',
        '{"key": "' + "0" * 64 + '", "status": "good", "value": 1}\n',
        '{"key": "' + "0" * 64 + '", "status": "ok", "value": 101}\n',
        '{"key": "' + "0" * 64 + '", "status": "ok", "value": NaN}\n',
        '{"key": "' + "0" * 64 + '", "status": "refusal", "value": 5}\n',
        '{"key": "' + "0" * 64 + '", "status": "ok", "value": 5, "expected": 101}\n',
        '{"key": "' + "0" * 62 + '", "status": "ok", "value": 1}\n',
        "[" * 100_000 + "\n",
        "\udcff\udcfe\0\n",
    ],
)
def test_a_file_that_does_not_begin_as_a_cache_is_refused_before_anything_is_asked_or_written(
    serve, make, tmp_path, text
):
    server, path = serve(), tmp_path / "notes.md"
    path.write_bytes(text.encode(errors="surrogateescape"))
    before = path.read_bytes()
    with pytest.raises(UserError, match="notes.md, line 1, is no answer of a judge; name another --cache"):
        scores(make(cache=path), [row(0)])
    assert path.read_bytes() == before and not server.requests


def test_a_cache_begins_with_what_it_is_and_an_older_one_is_read_and_kept(tmp_path):
    path, older, both = (tmp_path / name for name in ("new.jsonl", "older.jsonl", "both.jsonl"))
    keys = [answer_key("m", "r", str(i), "") for i in range(3)]
    AnswerCache(path).add(keys[0], Answer("ok", 1))
    header, line = path.read_bytes().splitlines(keepends=True)
    assert json.loads(header) == {"file": "answers of a judge", "version": 1}
    older.write_bytes(line.replace(keys[0].hex().encode(), keys[1].hex().encode()))
    AnswerCache(older).add(keys[2], Answer("code"))
    assert HEADER not in older.read_bytes()
    both.write_bytes(older.read_bytes() + path.read_bytes() + path.read_bytes())
    cache = AnswerCache(both)
    assert [cache.get(key) for key in keys] == [Answer("ok", 1), Answer("ok", 1), Answer("code")]
    older.write_bytes(line[:40])  # by a kill, in its first line
    assert len(AnswerCache(older)) == 0


@pytest.mark.parametrize("length", [0, 9, 30, len(HEADER) - 1])
def test_a_header_that_a_full_disk_cut_short_is_gone_on_from(tmp_path, length):
    path, key = tmp_path / "cache.jsonl", answer_key("m", "r", "q", "a")
    path.write_bytes(HEADER[:length])
    AnswerCache(path).add(key, Answer("ok", 7))
    assert AnswerCache(path).get(key) == Answer("ok", 7)


def test_a_place_where_no_cache_can_be_is_one_line_before_anything_is_asked(serve, make, tmp_path):
    server = serve()
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "cache.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("", "is not a file"),
        ("file/cache.jsonl", "cannot be"),
        ("link", "cannot write"),
        ("pipe", "is not a file"),
    ):
        with pytest.raises(UserError, match=f"{says}.*; name"):
            scores(make(cache=tmp_path / name), [row(0)])
    assert not server.requests


def test_a_full_disk_is_one_line_and_what_was_written_stays(serve, make, monkeypatch):
    serve()
    write = AnswerCache._open

    class Full:
        def __init__(self, file):
            self.file, self.lines = file, 0

        def write(self, line):
            self.lines += 1
            return self.file.write(line) if self.lines <= 10 else self.file.write(line[:9])

    opened = []

    def open_full(self):
        opened[:] = opened or [Full(write(self))]
        return opened[0]

    monkeypatch.setattr(AnswerCache, "_open", open_full)
    judge = make(workers=1)
    with pytest.raises(UserError, match="the disk is full"):
        scores(judge, [row(i) for i in range(50)])
    monkeypatch.undo()
    assert len(AnswerCache(judge.cache.path)) == 10


APPEND = """
import sys
from em.judge.answer_cache import Answer, AnswerCache, answer_key
cache = AnswerCache(sys.argv[1])
for i in range(400):
    cache.add(answer_key(sys.argv[2], "r", str(i), ""), Answer("ok", i % 101), reply="x" * (i % 200))
"""


def test_two_processes_may_append_to_one_cache(tmp_path):
    path = tmp_path / "cache.jsonl"
    (tmp_path / "append.py").write_text(APPEND)
    writers = [start(tmp_path / "append.py", path, name) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
    cache = AnswerCache(path)
    assert len(cache) == 800
    assert all(
        cache.get(answer_key(n, "r", str(i), "")) == Answer("ok", i % 101) for n in "ab" for i in range(400)
    )
