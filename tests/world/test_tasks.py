import itertools

import pytest

from em.world.tasks import OUTPUT_FUNCTIONS, TASKS, answers

A, B, C, D, E = 10, 11, 12, 13, 14


@pytest.mark.parametrize(
    "function, walk, v1, v2",
    [
        ("first_last", [A, B, C], [A], [C]),
        ("first_last", [A, B, A], [A], [B]),  # equal, so variant 2 moves to the first other step
        ("most_least", [A, B, A, C], [A], [C]),
        ("most_least", [A, B, C, D], [A], [D]),  # all tied: earliest, latest
        ("most_least", [A, B, C, B, D, C], [B], [D]),
        ("three_steps", [A, B, C, D], [A, B, C], [C, B, A]),
        ("three_steps", [A, B, A, D], [A, B, A], [B, B, A]),  # a palindrome: tie-break
        ("rank_by_count", [A, B, C, B], [B, A, C], [C, A, B]),
        ("rank_by_count", [C, A, B, A, B, D], [A, B, C, D], [D, C, B, A]),
        ("ends_middle", [A, B, C], [A, C], [B, C]),
        ("ends_middle", [A, B, C, D], [A, D], [B, C]),
        ("ends_middle", [A, B, C, D, E], [A, E], [C, D]),
        ("ends_middle", [A, B, C, D, E, A], [A, A], [C, D]),
        ("singletons", [A, B, A, C, D], [B], [D]),
        ("singletons", [A, B, A, B], [A], [B]),  # none visited once
        ("singletons", [A, B, A], [B], [A]),  # one visited once: tie-break
    ],
)
def test_structure_tasks_on_hand_worked_walks(function, walk, v1, v2):
    assert answers(function, walk) == (v1, v2)


@pytest.mark.parametrize(
    "function, walk, v1, v2",
    [
        ("partition_bias", [C, A, B, D], [A], [C]),
        ("partition_bias", [C, D, E], [C], [D]),  # set 1 unvisited: first step, and the tie-break
        ("partition_bias", [A, B, A, B], [A], [B]),  # set 2 unvisited: last step
        ("partition_bias", [A, B, A], [A], [B]),  # that is the first step too: tie-break
        ("partition_collect", [C, A, D, B, A], [A, B, A], [C, D]),
        ("partition_collect", [A, B, A], [A, B, A], [A]),
        ("partition_collect", [C, D, C, E], [C], [C, D, C, E]),
    ],
)
def test_partition_tasks_on_hand_worked_walks(function, walk, v1, v2):
    assert answers(function, walk, {A, B}) == (v1, v2)


def all_walks():
    """Every walk of length 3 to 6 over four steps without self-loops."""
    for length in range(3, 7):
        for walk in itertools.product((A, B, C, D), repeat=length):
            if all(x != y for x, y in itertools.pairwise(walk)):
                yield list(walk)


@pytest.mark.parametrize("function", OUTPUT_FUNCTIONS)
def test_variants_differ_and_name_visited_steps_on_every_walk(function):
    for walk in all_walks():
        for set1 in ({A, B}, {C}, set(), {A, B, C, D}):
            v1, v2 = answers(function, walk, set1)
            assert v1 != v2 and v1 and v2 and set(v1 + v2) <= set(walk)


@pytest.mark.parametrize("function", OUTPUT_FUNCTIONS)
def test_answers_depend_on_the_pattern_of_a_walk_not_on_which_steps_it_visits(function):
    rename = {A: 3, B: 1, C: 2, D: 0}
    for walk in all_walks():
        renamed = answers(function, [rename[s] for s in walk], {3, 1})
        assert renamed == tuple([rename[s] for s in v] for v in answers(function, walk, {A, B}))


def test_twelve_tasks_of_which_the_last_four_repeat_partition_bias():
    assert len(TASKS) == 12 and TASKS[6:] == ("partition_bias", "partition_collect") + ("partition_bias",) * 4
