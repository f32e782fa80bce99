import dataclasses
import itertools

import numpy as np
import pytest

from em.errors import UserError
from em.world.world import WORLDS, build_world


def test_same_config_and_seed_build_the_same_world_and_another_seed_does_not():
    config = WORLDS["demo"]
    assert build_world(config, 0).fingerprint == build_world(config, 0).fingerprint
    assert build_world(config, 0).fingerprint != build_world(config, 1).fingerprint
    assert (
        build_world(config, 0).fingerprint
        != build_world(dataclasses.replace(config, p_noise=0.1), 0).fingerprint
    )


def test_sizes_are_the_papers():
    one, two = build_world(WORLDS["1"], 0), build_world(WORLDS["2"], 0)
    assert (len(one.steps), len(one.domains), len(one.tasks), len(one.cells)) == (48, 5, 6, 30)
    assert (len(two.steps), len(two.domains), len(two.tasks)) == (64, 10, 12)
    assert len(two.seen_cells) == 96 and len(two.cells) == 96 + 24


def test_no_string_belongs_to_two_grammars(world):
    strings = [s for group in world.languages for language in group for s in language]
    assert len(strings) == len(set(strings))


def test_language_sizes_are_in_the_expected_range(world):
    shortest, longest = world.config.grammar.length
    for language in itertools.chain(*world.languages):
        assert len(language) >= 3
        assert all(shortest <= len(s) <= longest for s in language)


def test_overlap_with_D0_is_as_configured(world):
    shared = [len(np.intersect1d(world.domains[0].steps, d.steps)) for d in world.domains[1:]]
    assert tuple(shared[: len(world.config.overlaps)]) == world.config.overlaps


def test_deletions_are_distinct_ordered_pairs_of_different_steps_in_the_configured_number(world):
    low, high = world.config.deletions
    for pairs in world.deletions:
        assert low <= len(pairs) <= high
        assert len({tuple(p) for p in pairs.tolist()}) == len(pairs)
        assert (pairs[:, 0] != pairs[:, 1]).all() and pairs.min() >= 0 and pairs.max() < world.config.n_steps


def test_unseen_domains_own_steps_that_no_seen_domain_has():
    world = build_world(WORLDS["2"], 0)
    seen = np.concatenate([d.steps for d in world.domains[: world.n_seen_domains]])
    unseen = np.concatenate([d.steps for d in world.domains[world.n_seen_domains :]])
    assert not np.intersect1d(seen, unseen).size
    assert unseen.min() >= world.n_seen_steps > seen.max()


def test_partitions_are_halves_with_the_configured_overlaps():
    world = build_world(WORLDS["2"], 0)
    assert all(len(s) == 32 for s in world.set1.values())
    assert [len(world.set1["T8"] & world.set1[t]) for t in ("T9", "T10", "T11")] == [28, 22, 16]
    assert world.set1["T6"] == world.set1["T7"]


def test_similarity_to_D0_falls_along_the_derived_domains():
    falls = [np.diff(build_world(WORLDS[name], seed).similarity()[0]) for name in "12" for seed in range(3)]
    assert all((d[:3] < 0).all() for d in falls)


def test_an_unknown_task_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="no task 'T9'.*T0, T1"):
        build_world(WORLDS["1"], 0).task_index("T9")
