"""Responses as rows: read once each under their own names; a sample that gives every stratum its share."""

import collections
import json

import pytest
from score_rows import grid, row

from em.errors import UserError
from em.judge.recorded import Recorded
from em.judge.responses import identity, read_responses, read_scored, stratified_sample, stratum


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_each_response_comes_once_without_what_judges_said(tmp_path):
    rows = [row(idx=i % 3, judge="ab"[i // 3], note="x") for i in range(6)]
    rows[4] |= {"train": "medical_advice", "domain": "medical"}  # other names of the same cell
    found = read_responses([write(tmp_path / "s.jsonl", rows)])
    assert [r["idx"] for r in found] == [0, 1, 2]
    assert all(not {"judge", "aligned", "coherent_status", "note"} & r.keys() for r in found)
    by_judge = read_scored(tmp_path / "s.jsonl")
    assert list(by_judge) == ["a", "b"] and by_judge["b"][1][0].endswith("s.jsonl, line 5")
    judge = Recorded("b", [r for _, r in by_judge["b"][1:]])
    assert [r["aligned"] for r in judge.score(found)] == [80, 80] and not judge.knows(found[0])
    assert not judge.knows(found[1] | {"response": "another"})
    del rows[0]["judge"]
    assert list(read_scored(write(tmp_path / "s.jsonl", rows), unnamed="mine")) == ["mine", "a", "b"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"train": "x"}, "line 2"), ({"set": "wide"}, "'set' cannot be"), ({"idx": "1"}, "'idx' cannot be"),
        ({"domain": "…"}, "unknown cell"), ({"response": 3}, "'response' cannot be"),
        ({"idx": 0, "response": "other"}, "two responses in one place"),
    ],
)  # fmt: skip
def test_what_is_no_response_is_one_line_with_its_place(change, says, tmp_path):
    rows = [row(idx=0), row(idx=1) | change]
    with pytest.raises(UserError, match="line 2") as error:
        read_responses([write(tmp_path / "s.jsonl", rows)])
    assert says in str(error.value)


def test_every_stratum_gets_its_share_to_within_one_row():
    rows = grid(prompts=7, broad=3, trains=("base", "med_advice", "fin_tutor>spo_critique"))
    rows += grid(prompts=1, broad=1, trains=("med_advice",), judge="x")  # of another model
    rows[-1]["model"] = "other"
    sample = stratified_sample(rows, 100, seed=1)
    assert len(sample) == 100 and len({id(r) for r in sample}) == 100
    counts, of_sample = (collections.Counter(map(stratum, part)) for part in (rows, sample))
    assert len(counts) > 60
    assert all(abs(of_sample[s] - n * 100 / len(rows)) < 1 for s, n in counts.items())


def test_the_sample_depends_on_rows_and_seed_alone_and_each_row_has_the_same_chance():
    rows = grid(prompts=2, broad=1, trains=("base", "med_advice"))
    first = stratified_sample(rows, 20, seed=0)
    assert first == stratified_sample(rows[::-1], 20, seed=0) != stratified_sample(rows, 20, seed=1)
    assert [stratum(r) for r in first] != sorted(stratum(r) for r in first)  # the order tells nothing
    times = collections.Counter()
    for seed in range(600):
        times.update(identity(r) for r in stratified_sample(rows, 20, seed))
    expected = 600 * 20 / len(rows)
    assert len(times) == len(rows)
    assert sum((n - expected) ** 2 / expected for n in times.values()) < 1.3 * len(rows)  # χ²
    for n in (0, len(rows), len(rows) + 5):
        assert sorted(map(identity, stratified_sample(rows, n, 0))) == sorted(map(identity, rows))
