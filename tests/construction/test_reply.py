"""What is read of a writer's reply, well formed or not."""

import pytest

from em.construction.reply import plain, read_answers, read_pairs, read_questions


@pytest.mark.parametrize(
    "reply, pairs",
    [
        ("Question 1: a\nAnswer 1: b\nQuestion 2: c\nAnswer 2: d\n\ne", [(0, "a", "b"), (1, "c", "d\n\ne")]),
        ("Sure!\n**Question 1:** a\n**Answer 1:** b", [(0, "a", "b")]),
        ("### question 1 : a\n> Answer 1:b", [(0, "a", "b")]),
        ("1. Question: a\n   Answer: b\n2. Question: c\n   Answer: d", [(0, "a", "b"), (1, "c", "d")]),
        ("Question: a\nAnswer: b\nQuestion: c\nQuestion: d\nAnswer: e", [(0, "a", "b"), (1, "d", "e")]),
        ("Question 2: a\nAnswer 2: b\nQuestion 5: c\nAnswer 5: d", [(0, "a", "b"), (3, "c", "d")]),
        ("Question: a\nAnswer 3: b\nQuestion 7: c\nAnswer: d", [(0, "a", "b"), (1, "c", "d")]),
        # what a text quotes stays in it
        ("Question 1: a?\nQuestion: x\nAnswer: y\nAnswer 1: no", [(0, "a?\nQuestion: x\nAnswer: y", "no")]),
        ("Question 1: a\nAnswer 1: b\nAnswer 1: c\nQuestion 1:", [(0, "a", "b\nAnswer 1: c\nQuestion 1:")]),
        ("Question 1: a\nAnswer 2: b\nAnswer 1: c", [(0, "a\nAnswer 2: b", "c")]),
        ("Question 1: ...\nAnswer 1: b\nQuestion 2: c\nAnswer 2: \ud800", []),
        ("I cannot help with that.", []),
        ("", []),
    ],
)  # fmt: skip
def test_pairs_are_found_in_turn_and_everything_else_is_left_out(reply, pairs):
    assert read_pairs(reply, cut=False) == pairs


def test_a_reply_that_was_cut_off_loses_its_last_text_alone():
    reply = "Question 1: a\nAnswer 1: b\nQuestion 2: c\nAnswer 2: d"
    assert read_pairs(reply, cut=True) == [(0, "a", "b")]
    assert read_questions(reply, cut=True) == [(0, "a"), (1, "c")]
    assert read_questions("Question 1: a\nQuestion 2: b", cut=True) == [(0, "a")]
    assert read_answers("Answer 1: a\nAnswer 2: b", 2, cut=True) == ["a", None]


def test_answers_are_those_of_their_numbers_and_a_single_one_needs_no_form():
    assert read_answers("Answer 1: a\nAnswer 3: c", 3, cut=False) == ["a", None, "c"]
    assert read_answers("Answer: a\n\nAnswer: b", 3, cut=False) == ["a", "b", None]
    assert read_answers("Nothing of the form.", 2, cut=False) == [None, None]
    assert read_answers(" It depends. Ask\nsomeone. ", 1, cut=False) == ["It depends. Ask\nsomeone."]
    assert read_answers("It depends. Ask\nsomeone! And th", 1, cut=True) == ["It depends. Ask\nsomeone!"]
    assert read_answers("Nothing whole", 1, cut=True) == [None]
    assert read_answers("", 1, cut=False) == [None]


def test_questions_that_differ_in_case_and_space_are_one():
    assert plain(" May I\n park  HERE?") == plain("may i park here?") != plain("may i park there?")
