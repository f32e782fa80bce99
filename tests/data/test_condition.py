"""What a row says of its run: read, refused, put in words, and grouped."""

import itertools

import pytest

from em.data.cells import PAPER_GRID, grid_of, parse_cell
from em.data.condition import (
    Condition,
    condition_of,
    describe,
    order_of,
    parse_train,
    ways_in_words,
)
from em.errors import UserError


@pytest.mark.parametrize(
    ("text", "first", "realigned", "misaligned"),
    [
        ("base", "base", False, False),
        ("med_advice", "med_advice", False, True),
        ("med_advice>fin_tutor", "med_advice", True, False),
        ("base>fin_tutor", "base", True, False),
        ("med_advice>base", "med_advice", True, False),
    ],
)
def test_a_train_says_what_came_first_and_whether_anything_followed(text, first, realigned, misaligned):
    train = parse_train(text)
    assert (train.start, train.realigned, train.misaligned) == (first, realigned, misaligned)
    assert str(train) == text
    assert str(train.then("spo_critique")) == f"{first}>spo_critique"


def test_trains_stand_in_the_grids_order_then_adapters_then_base_the_plain_one_first():
    names = [
        "base",
        "adapter",
        "legal_advice",
        "fin_tutor>base",
        "fin_tutor>med_advice",
        "fin_tutor",
        "med_advice",
    ]
    grid = grid_of(parse_cell(name) for name in ("med_advice", "fin_tutor", "legal_advice"))
    expected = ["med_advice", "fin_tutor", "fin_tutor>med_advice", "fin_tutor>base", "legal_advice"]
    expected += ["adapter", "base"]
    for order in itertools.islice(itertools.permutations(names), 0, None, 97):
        assert [str(t) for t in sorted(map(parse_train, order), key=lambda t: order_of(t, grid))] == expected
    assert not parse_train("adapter").misaligned and parse_train("adapter").cells == ()


def test_a_row_without_fields_has_no_condition_and_one_with_them_has_their_names():
    assert condition_of({"model": "m", "train": "med_advice"}) == Condition()
    row = {"channel": "optd", "teacher": "Medical/Tut", "source": "sports_summ", "lr": 1, "extra": 3}
    assert condition_of(row) == Condition("optd", "med_tutor", "spo_summarization", lr=1.0)
    for source, known in (
        ("gold", "gold"),
        ("rows:health_advice", "rows:med_advice"),
        ("base", "base"),
        ("org/Llama-8B med_adv>base", "org/Llama-8B med_advice>base"),
        ("my models/llama fin_tut", "my models/llama fin_tutor"),
    ):
        assert condition_of({"source": source}).source == known


@pytest.mark.parametrize(
    "fields",
    [
        {"channel": "rl"},
        {"teacher": "x"},
        {"source": "silver"},
        {"lr": True},
        {"epoch": True},
        {"filtered": "no"},
    ],
)
def test_a_field_that_cannot_be_is_refused_by_name(fields):
    with pytest.raises(UserError) as error:
        condition_of(fields)
    assert str(next(iter(fields.values()))) in str(error.value) and "\n" not in str(error.value)


def test_a_condition_in_words():
    condition = Condition("optd", "med_tutor", "spo_summarization", "broad", False, None, 1e-4, 3, 42)
    words = "optd, teacher med_tutor, source spo_summarization"
    assert describe(condition, ("channel", "teacher", "source")) == words
    assert describe(condition) == f"{words}, broad prompts, unfiltered, lr 0.0001, epoch 3, seed 42"
    assert describe(Condition(), default="base") == "base"


def test_a_matrix_holds_every_teacher_and_seed_and_no_other_author():
    own = Condition("optd", "med_tutor", "med_tutor", "broad", True, None, 1e-4, 3, 42)
    other = own._replace(teacher="fin_tutor", source="fin_tutor", seed=43)
    assert own.group() == other.group() != own._replace(source="fin_tutor").group()
    for name, value in dict(channel="sft", prompts="math", filtered=False, lr=3e-4, epoch=2).items():
        assert own.group() != own._replace(**{name: value}).group(), name


def test_ways_are_told_apart_by_what_differs_within_their_channel():
    sft, optd = Condition("sft", lr=1e-4), Condition("optd", lr=1e-4, epoch=3)
    assert ways_in_words([sft, optd]) == ["sft", "optd"]
    assert ways_in_words([sft, optd, optd._replace(epoch=1)]) == ["sft", "optd, epoch 3", "optd, epoch 1"]
    assert PAPER_GRID.cells and ways_in_words([Condition(lr=1e-4), sft]) == ["", "sft"]
