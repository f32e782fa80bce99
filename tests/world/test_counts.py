import numpy as np
import pytest

from em.stats import newcombe, wilson
from em.world.counts import CLASSES, INCOHERENT, Classifier, change, columns, entry, rate, tally


@pytest.fixture(scope="module")
def classifier(mini):
    return Classifier(mini)


@pytest.fixture
def string(mini, rng):
    """string("step", 3) is some rendering of step 3."""

    def pick(kind, i):
        language = list(mini.languages[("step", "label", "tail").index(kind)][i])
        return language[rng.integers(len(language))]

    return pick


END = object()


def test_completions_of_every_kind(mini, classifier, string):
    task, v1, v2 = 2, [0, 1, 2], [2, 1, 0]

    def classify(*parts):
        tokens = [mini.end] if not parts else []
        for part in parts:
            tokens += [mini.end] if part is END else part
        return classifier.classify(tokens, task, v1, v2)

    s, tail = lambda i: string("step", i), string("tail", task)
    assert classify(s(0), s(1), s(2), tail, END) == "v1"
    assert classify(s(2), s(1), s(0), tail, END) == "v2"
    assert classify(s(0), s(1), s(2), tail, END, s(5), [1]) == "v1"  # nothing after the end counts
    assert classify(s(0), s(2), s(1), tail, END) == "other"  # the right steps in another order
    assert classify(s(0), s(1), tail, END) == "other"  # too few
    assert classify(s(0), s(1), s(2), s(2), tail, END) == "other"  # too many
    assert classify(s(0), s(1), s(2), string("tail", 3), END) == "other"  # another task's tail
    assert classify(s(7), tail, END) == "other"
    assert classify(s(0), s(1), s(2), END) == "unparseable"  # no tail
    assert classify(s(0), s(1), s(2), tail) == "unparseable"  # never ended
    assert classify(tail, END) == "unparseable"  # no step
    assert classify(END) == "unparseable"
    assert classify(s(0), tail, s(1), END) == "unparseable"  # the tail is not last
    assert classify(s(0), string("label", task), END) == "unparseable"
    assert classify(s(0), [mini.asst], tail, END) == "unparseable"


def test_every_rendered_answer_is_read_back_as_its_variant(mini, mini_generator, classifier, rng):
    """Parse round-trip: variant 1 reads as v1, variant 2 as v2, unless one spelling cuts both ways."""
    ambiguous = 0
    for variant in (1, 2):
        d = mini_generator.dialogues(rng, mini_generator.draw(rng, np.repeat(mini.cells, 60)), variant)
        completions = [d.ids[i, d.prompt[i] : d.total[i]] for i in range(len(d))]
        width = max(map(len, completions))
        padded = np.full((len(d), width), mini.end)
        for row, completion in zip(padded, completions, strict=True):
            row[: len(completion)] = completion
        counts = tally(mini, d.examples.cell, classifier.classes(d, padded))
        assert set(counts) == {mini.cell_name(c) for c in mini.cells}
        for row in counts.values():
            assert row["n"] == 60 == sum(row[c] for c in CLASSES)
            assert row["other"] == row["unparseable"] == 0
            ambiguous += row["v2" if variant == 1 else "v1"]
    assert ambiguous <= 4  # strings are disjoint, their concatenations nearly so


def test_a_concatenation_that_can_be_cut_in_two_ways_matches_both(mini):
    classifier = Classifier(mini)
    classifier.owner = {(1, 2): 0, (3, 4, 5): 1, (1, 2, 3): 2, (4, 5): 3, (9, 9): classifier.first_tail}
    tokens = (1, 2, 3, 4, 5)
    assert classifier.matches(tokens, [0, 1]) and classifier.matches(tokens, [2, 3])
    assert not classifier.matches(tokens, [0, 3]) and not classifier.matches(tokens, [0])
    assert classifier.parses((*tokens, 9, 9)) and not classifier.parses(tokens)


def counts(v1, v2, other, unparseable):
    return dict(zip(CLASSES, (v1, v2, other, unparseable), strict=True)) | {
        "n": v1 + v2 + other + unparseable
    }


def test_rates_are_percent_and_changes_points_each_with_its_interval_over_prompts():
    before, after = counts(90, 4, 4, 2), counts(50, 130, 15, 5)
    assert rate(after, "v2") == pytest.approx((65, *(100 * bound for bound in wilson(130, 200))))
    assert rate(after, *INCOHERENT) == pytest.approx((10, *(100 * bound for bound in wilson(20, 200))))
    interval = (100 * bound for bound in newcombe(130, 200, 4, 100))
    assert change(after, before, "v2") == pytest.approx((61, *interval))
    assert columns("v2", rate(before, "v2")).keys() == {"v2", "v2_low", "v2_high"}
    assert columns("v2", (1, 0, 2)) == {"v2": 1, "v2_low": 0, "v2_high": 2}


def test_an_entry_says_what_its_interval_is_over():
    assert entry("%", 3.0, 1.0, 5.0) == {
        "value": 3.0, "low": 1.0, "high": 5.0, "over": "prompts of 1 world seed", "unit": "%",
    }  # fmt: skip
    assert entry("%", 3.0)["over"] == "1 world seed"
    assert entry("%", 3.0, 1.0, 5.0, seeds=3)["over"] == "3 world seeds"
