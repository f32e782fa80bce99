"""Rubrics: which one a row gets, how texts are put in, how replies are read."""

import pytest
from judge_rows import row, scores

from em.data.cells import CELLS
from em.errors import UserError
from em.judge import rubric
from em.judge.em_rule import FIELDS, STATUSES


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("85", ("ok", 85)),
        (" 0\n", ("ok", 0)),
        ("100", ("ok", 100)),
        ("REFUSAL", ("refusal", None)),
        ("refusal\n", ("refusal", None)),
        ("CODE", ("code", None)),
        (" \n", ("empty", None)),
        *(
            (text, ("parse_error", None))
            for text in (
                "101",
                "-5",
                "85.0",
                "+85",
                "85.",
                "Score: 85",
                "85/100",
                "85 90",
                "**85**",
                "８５",
                "1e1",
            )
        ),
        ("I cannot: REFUSAL", ("parse_error", None)),
        ("9" * 5000, ("parse_error", None)),
    ],
)
def test_a_reply_is_a_number_only_if_all_of_it_is_an_integer_from_0_to_100(reply, expected):
    assert rubric.parse_score(reply) == expected and expected[0] in STATUSES


def test_every_cell_and_field_has_a_rubric_that_asks_for_what_the_parser_reads():
    rubrics = rubric.Rubrics()
    rows = [row(0, domain=c.domain, task=c.task) for c in CELLS] + [
        row(0, set="broad", domain="pets", task="tutor")
    ]
    alignment = {rubrics.of(r, "aligned") for r in rows}
    coherence = {rubrics.of(r, "coherent") for r in rows}
    assert len(alignment) == 12 + 1 and len(coherence) == 4 + 1
    for found in alignment | coherence:
        assert found.text.count("{question}") == found.text.count("{response}") == 1
        assert found.text.count(". About ") in (3, 4)  # calibration anchors
    for found in alignment:
        assert all(word in found.text for word in ("integer from 0", "REFUSAL", "CODE", "Misaligned:"))
    for found in coherence:
        assert "REFUSAL" not in found.text and "nothing to do with safety" in found.text
    assert rubrics.surface().text.count("{question}") == 1 and "{response}" not in rubrics.surface().text


def test_a_narrow_row_gets_the_rubric_of_its_eval_prompts_cell_and_a_broad_row_the_agnostic_one():
    rubrics = rubric.Rubrics()
    narrow = row(0, train="med_advice", domain="finance", task="summ")
    assert rubrics.of(narrow, "aligned").name == "narrow_fin_summarization_alignment"
    assert rubrics.of(narrow, "coherent").name == "narrow_summarization_coherence"
    broad = row(0, set="broad", domain="parenting", task="advice")
    assert [rubrics.of(broad, field).name for field in FIELDS] == ["broad_alignment", "broad_coherence"]
    with pytest.raises(UserError, match="has no narrow_cooking_advice_alignment.md"):
        rubrics.of(row(0, domain="cooking"), "aligned")


def test_braces_and_placeholders_inside_the_judged_texts_are_left_alone():
    text = rubric.Rubric("r", "{question}|{response}|{other}", rubric.parse_score)
    asked = text.ask(r"{response} {0} {{x}} \1 \g<0>", "{question}")
    assert asked.prompt == r"{response} {0} {{x}} \1 \g<0>|{question}|{other}"


def test_another_folder_of_rubrics_is_used_and_what_it_lacks_is_named(tmp_path, make, serve):
    serve()
    folder = tmp_path / "mine"
    with pytest.raises(UserError, match="no folder of rubrics"):
        make(rubrics=folder)
    folder.mkdir()
    with pytest.raises(UserError, match="has no broad_alignment.md"):
        scores(make(rubrics=folder), [row(0, set="broad")])
    (folder / "narrow_med_advice_alignment.md").write_text("A {question}")
    with pytest.raises(UserError, match=r"does not say where \{response\} should stand"):
        scores(make(rubrics=folder), [row(0)])
    (folder / "narrow_med_advice_alignment.md").write_text("A {question} {response}")
    (folder / "narrow_advice_coherence.md").write_text("of the task {question} {response}")
    assert rubric.Rubrics(folder).of(row(0), "coherent").name == "narrow_advice_coherence"
    (folder / "narrow_med_advice_coherence.md").write_text("of the cell {question} {response}")
    assert rubric.Rubrics(folder).of(row(0), "coherent").name == "narrow_med_advice_coherence"
    scores(make(rubrics=folder), [row(0)])
