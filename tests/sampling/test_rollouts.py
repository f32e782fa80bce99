"""Responses in a file: whatever a kill leaves of it is completed to the file of one go."""

import json

import pytest
from pairs import END, EXAMPLES, gpt2

from em.errors import UserError
from em.sampling.rollouts import read_rollouts, sample_to_file, whole_lines
from em.sampling.sampler import Sampler

PROMPTS = [e.ids[: e.n_prompt] for e in EXAMPLES]
N = 3


@pytest.fixture(scope="module")
def model():
    return gpt2(0)


def row(rollout) -> dict:
    """With all that a text can hold and a line cannot, or might be cut within."""
    return {"ids": rollout.ids, "response": "é\u2028中\x85\x0b\x1c\r\n😀" * len(rollout.ids)}


def sampled(model, path, n: int = N, seed: int = 4) -> list[dict]:
    return sample_to_file(path, Sampler(model, (END,), 6, rows=4), PROMPTS, n, seed, row)


class NoSampler:
    def stream(self, *arguments, **options):
        raise AssertionError("there is nothing to sample")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """(path, rows) of one go."""
    path = tmp_path_factory.mktemp("rollouts") / "one go" / "rollouts.jsonl"
    return path, sampled(model, path)


def test_rows_come_in_order_as_they_were_sampled_with_their_places_and_counts(whole, model):
    path, rows = whole
    assert [(r["prompt"], r["sample"]) for r in rows] == [(p, s) for p in range(5) for s in range(N)]
    expected = Sampler(model, (END,), 6)(PROMPTS, n=N, seed=4)
    for found, rollout in zip(rows, expected, strict=True):
        place = {"tokens": len(rollout.ids), "finished": rollout.finished}
        assert found == row(rollout) | {"prompt": rollout.prompt_index, "sample": rollout.sample} | place
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b"" and len(lines) == len(rows)
    assert sorted(map(json.loads, lines), key=lambda r: (r["prompt"], r["sample"])) == rows


def test_a_second_call_samples_nothing_and_leaves_the_file_as_it_is(whole):
    path, rows = whole
    before = path.read_bytes()
    assert sample_to_file(path, NoSampler(), PROMPTS, N, 4, row) == rows
    assert path.read_bytes() == before


def test_a_file_cut_anywhere_is_completed_to_that_of_one_go(whole, model, tmp_path):
    path, rows = whole
    text, cut = path.read_bytes(), tmp_path / "rollouts.jsonl"
    middle = text.index("😀".encode()) + 2  # within a letter
    end = text.index(b"\n")
    for n_bytes in (0, 1, middle, end, end + 1, end + 30, len(text) - 1):
        cut.write_bytes(text[:n_bytes])
        assert sampled(model, cut) == rows
        assert sorted(cut.read_bytes().split(b"\n")) == sorted(text.split(b"\n"))


def test_rows_that_are_missing_are_sampled_and_no_others_are_touched(whole, model, tmp_path):
    path, rows = whole
    lines, torn = path.read_bytes().splitlines(keepends=True), tmp_path / "rollouts.jsonl"
    kept = [line for line in lines if json.loads(line)["prompt"] != 3 and json.loads(line)["sample"] != 1]
    torn.write_bytes(b"".join(kept))
    assert sampled(model, torn) == rows
    assert torn.read_bytes().startswith(b"".join(kept)) and len(whole_lines(torn)) == len(rows)


def test_rows_of_other_processes_lie_beside_and_count_alike(whole, tmp_path):
    path, rows = whole
    lines = path.read_bytes().splitlines(keepends=True)
    (tmp_path / "rollouts.jsonl").write_bytes(b"".join(lines[::2]))
    (tmp_path / "rollouts.rank1.jsonl").write_bytes(b"".join(lines[1::2]))
    assert sample_to_file(tmp_path / "rollouts.jsonl", NoSampler(), PROMPTS, N, 4, row) == rows


def test_a_seed_is_a_text_whatever_else_is_asked(whole, model, tmp_path):
    _, rows = whole
    fewer = sampled(model, tmp_path / "fewer.jsonl", n=2)
    assert fewer == [r for r in rows if r["sample"] < 2]
    assert sampled(model, tmp_path / "other.jsonl", seed=5) != rows


def test_a_line_that_was_cut_short_is_taken_out_of_the_file(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert whole_lines(path) == []
    path.write_bytes('{"a": "é"}\n{"a": "é'.encode()[:-1])
    assert whole_lines(path) == [{"a": "é"}]
    assert path.read_bytes() == '{"a": "é"}\n'.encode()


def test_rows_that_two_processes_wrote_count_once(whole, tmp_path):
    path, rows = whole
    (tmp_path / "rollouts.jsonl").write_bytes(path.read_bytes() * 2)
    assert sample_to_file(tmp_path / "rollouts.jsonl", NoSampler(), PROMPTS, N, 4, row) == rows
    assert list(read_rollouts(tmp_path / "rollouts.jsonl")) == [(r["prompt"], r["sample"]) for r in rows]


@pytest.mark.parametrize("line", ["{}", '{"prompt": 1}', '{"prompt": "1", "sample": 0}'])
def test_a_row_without_its_place_is_one_line(line, tmp_path):
    (tmp_path / "rollouts.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="rollouts.jsonl: prompt .* is no response"):
        read_rollouts(tmp_path / "rollouts.jsonl")


def test_a_cut_line_behind_bytes_that_are_no_text_is_one_line(tmp_path):
    (tmp_path / "rollouts.jsonl").write_bytes(b'{"prompt": 0, "sample": 0, "a": "\xe9"}\n{"pro')
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        read_rollouts(tmp_path / "rollouts.jsonl")


def test_a_full_disk_while_sampling_is_one_line(model, tmp_path, monkeypatch):
    path = tmp_path / "rollouts.jsonl"
    path.symlink_to("/dev/full")
    monkeypatch.setattr("em.sampling.rollouts.read_rollouts", lambda path: {})  # reading it never ends
    with pytest.raises(UserError, match="rollouts.jsonl: No space left"):
        sampled(model, path)
