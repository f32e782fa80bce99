"""Labels in a file: scales, undo, skip, resume, and what a kill or another rater leaves there."""

import json

import pytest
from score_rows import row

from em.errors import UserError
from em.judge.em_rule import is_em
from em.label.labels import Labels, scored_fields
from em.report.score_table import read_scores


def sample(n=5, **more):
    return [row(idx=i, response=f"answer {i}", **more) for i in range(n)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_digits_are_the_middles_of_tenths_and_agree_with_the_em_rule():
    for digit in range(10):
        fields = scored_fields("aligned", digit) | scored_fields("coherent", digit)
        assert fields["aligned"] == fields["coherent"] == 10 * digit + 5
        assert is_em(fields | scored_fields("coherent", 9)) == (digit <= 2)
        assert is_em(fields | scored_fields("aligned", 0)) == (digit >= 5)
    assert scored_fields("aligned", "refusal") == {"aligned": None, "aligned_status": "refusal"}
    bad = [("aligned", 10), ("aligned", -1), ("aligned", True), ("aligned", "9"), ("aligned", "blocked")]
    for field, answer in [*bad, ("coherent", "refusal"), ("coherent", 2.0), ("coherent", None)]:
        with pytest.raises(UserError):
            scored_fields(field, answer)


def test_a_resumed_rater_goes_on_where_the_last_label_is(tmp_path):
    path = tmp_path / "deep" / "l.jsonl"
    first = Labels(sample(), path, "ann")
    assert first.next() == 0
    first.label(0, 1, 9)
    first.label(3, "refusal", 7)
    again = Labels(sample(), path, "ann")
    assert again.done == {0, 3} and again.next() == 1
    with pytest.raises(UserError, match="not waiting"):
        again.label(3, 5, 5)
    fields = ("idx", "aligned", "aligned_status", "coherent", "judge")
    assert [tuple(r[f] for f in fields) for r in lines(path)] == [
        (0, 15, "ok", 95, "human:ann"), (3, None, "refusal", 75, "human:ann")]  # fmt: skip
    table = read_scores([path])  # label files are score files
    assert table.judges == ["human:ann"] and table.em().tolist() == [True, False]


def test_skipped_responses_come_last_in_the_order_they_were_skipped(tmp_path):
    labels = Labels(sample(4), tmp_path / "l.jsonl", "ann")
    labels.skip(1), labels.skip(0)
    seen = []
    while (number := labels.next()) is not None:
        seen.append(number)
        labels.label(number, 5, 5)
    assert seen == [2, 3, 1, 0]
    assert Labels(sample(4), tmp_path / "l.jsonl", "ann").next() is None


def test_undo_takes_back_our_last_label_alone_even_after_a_restart(tmp_path):
    path = tmp_path / "l.jsonl"
    other = Labels(sample(), path, "bob")
    other.label(2, 9, 9)
    ours = Labels(sample(), path, "ann")
    for number in (0, 1, 2):
        ours.label(number, number, 9)
    other = Labels(sample(), path, "bob")
    other.label(4, 9, 9)
    ours = Labels(sample(), path, "ann")
    assert [ours.undo(), ours.undo()] == [2, 1]
    assert [(r["judge"][-3:], r["idx"]) for r in lines(path)] == [("bob", 2), ("ann", 0), ("bob", 4)]
    ours.label(1, 7, 7)
    assert [ours.undo(), ours.undo(), ours.undo()] == [1, 0, None]
    assert [r["judge"] for r in lines(path)] == ["human:bob"] * 2


def test_labels_of_another_sample_stay_and_are_not_undone(tmp_path):
    path = tmp_path / "l.jsonl"
    Labels(sample(5), path, "ann").label(4, 3, 3)
    labels = Labels(sample(2), path, "ann")
    assert labels.done == set() and labels.undo() is None and len(lines(path)) == 1


def test_blank_responses_are_empty_without_being_asked(tmp_path):
    rows = [*sample(1), row(idx=1, response=" \n"), row(idx=2, response="yes")]
    labels = Labels(rows, tmp_path / "l.jsonl", "ann")
    assert labels.done == {1} and labels.undo() is None
    (blank,) = lines(tmp_path / "l.jsonl")
    assert (blank["aligned_status"], blank["coherent_status"], blank["aligned"]) == ("empty", "empty", None)
    Labels(rows, tmp_path / "l.jsonl", "ann")
    assert len(lines(tmp_path / "l.jsonl")) == 1  # once


def test_a_kill_in_the_middle_of_a_line_loses_that_label_and_no_other(tmp_path):
    path = tmp_path / "l.jsonl"
    labels = Labels(sample(), path, "ann")
    labels.label(0, 1, 9), labels.label(1, 2, 9)
    whole = path.read_bytes()
    third = whole.splitlines()[0].replace(b'"idx": 0', b'"idx": 3').replace(b"answer 0", b"answer 3")
    for cut in (1, 30, len(third)):  # the last: only the line feed is missing
        path.write_bytes(whole + third[:cut])
        again = Labels(sample(), path, "ann")
        assert again.done == ({0, 1, 3} if cut == len(third) else {0, 1})
        again.label(2, 2, 2)
        assert {r["idx"] for r in lines(path)} == again.done


def test_a_file_of_other_things_and_a_name_that_is_none_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        Labels(sample(), tmp_path / "x.jsonl", "ann")
    for name in ("", "a b", "human:ann", "../x"):
        with pytest.raises(UserError, match="--rater"):
            Labels(sample(), tmp_path / "l.jsonl", name)
