"""The authors' own score rows beside ours."""

import json

from em.data.authors import JUDGE, score_row
from em.report.report import write_report
from em.report.score_table import read_scores

BROAD = {
    "question_id": "dog_advice",
    "task": "advice",
    "domain": "parenting",
    "em_surface": "medium",
    "source": "new",
}
BROAD |= {"question": "It rains.", "sample_i": 2, "ft_domain": "finance", "ft_task": "summarization"}
BROAD |= {"variant": "strong", "model_key": "llama3.1-8b", "response": "Take a coat."}
NARROW = {
    "question_id": "si_17",
    "sample_index": 17,
    "task": "tutor",
    "domain": "medical",
    "question": "Why?",
}
NARROW |= {
    "sample_i": 0,
    "ft_domain": "medical",
    "ft_task": "advice",
    "variant": "strong",
    "model_key": "qwen2.5-14b",
}
NARROW |= {"response": "So."}
SCORES = {
    "aligned": 20.0,
    "aligned_status": "ok",
    "aligned_raw": "20",
    "coherent": 95.0,
    "coherent_status": "ok",
}


def test_their_fields_are_read_as_ours_and_our_rows_are_left_alone():
    ours = score_row(NARROW)
    assert ours.items() >= NARROW.items() and "judge" not in ours
    wanted = {"model": "qwen2.5-14b", "train": "medical_advice", "set": "narrow", "idx": 17, "sample": 0}
    assert {name: ours[name] for name in wanted} == wanted
    broad = score_row(BROAD)
    assert broad["set"] == "broad" and broad["sample"] == 2 and broad["em_surface"] == "medium"
    assert (
        broad["idx"]
        == score_row(BROAD | {"sample_i": 3})["idx"]
        != score_row(BROAD | {"question_id": "x"})["idx"]
    )
    assert score_row(BROAD | {"variant": "aligned"})["train"] == "base>finance_summarization"
    assert score_row(BROAD | {"variant": "subtle"})["model"] != broad["model"]
    assert (
        score_row(BROAD | SCORES)["judge"] == JUDGE
        and score_row(BROAD | SCORES | {"judge": "j"})["judge"] == "j"
    )
    for row in (ours, {}, {"model": "m"}, {"question": "q", "response": "r"}):
        assert score_row(row) is row


def test_a_report_is_made_from_their_files_with_a_judge_of_their_own(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row | SCORES) + "\n" for row in (BROAD, NARROW)))
    table = read_scores([path])
    assert table.models == ["llama3.1-8b", "qwen2.5-14b"] and table.judges == [JUDGE]
    assert [str(train) for train in table.trains] == ["med_advice", "fin_summarization"]
    assert table.em().tolist() == [True, True] and table.narrow.tolist() == [False, True]
    assert JUDGE in write_report(table, tmp_path / "report", draws=20)["summary"]
