import numpy as np
import pytest

from em.world.domain import Domain, derived_domain, is_acceptable, random_domain, similarity

POOL = np.arange(48)


@pytest.fixture
def base(rng):
    return random_domain(rng, POOL, 16, 0.3)


def test_rows_sum_to_one_without_self_loops_and_with_an_exit_each(rng):
    for _ in range(50):
        domain = random_domain(rng, POOL, 16, 0.3)
        assert len(set(domain.steps.tolist())) == 16
        np.testing.assert_allclose(domain.transitions.sum(1), 1)
        assert (np.diag(domain.transitions) == 0).all()
        assert is_acceptable(domain.transitions)


def test_edges_appear_with_the_configured_probability(rng):
    edges = [random_domain(rng, POOL, 16, 0.3).n_edges for _ in range(200)]
    assert abs(np.mean(edges) / 240 - 0.3) < 0.01


@pytest.mark.parametrize(
    "edges, acceptable",
    [
        ([(0, 1), (1, 2), (2, 3)], False),  # a path
        ([(0, 1), (1, 2), (2, 3), (3, 0)], False),  # a cycle is a chain that closes
        ([(0, 1), (1, 0), (2, 3), (3, 2), (0, 1)], False),  # two components
        ([(i, j) for i in range(4) for j in range(4) if i != j], False),  # complete
        ([(0, 1), (2, 1), (1, 3), (3, 0)], True),  # weakly connected only
    ],
)
def test_disconnected_chain_and_complete_graphs_are_rejected(edges, acceptable):
    transitions = np.zeros((4, 4))
    transitions[tuple(zip(*edges, strict=True))] = 1
    assert is_acceptable(transitions) is acceptable


def test_similarity_is_one_to_itself_zero_to_a_disjoint_domain_symmetric_and_in_range(rng, base):
    assert similarity(base, base, 48) == pytest.approx(1)
    far = Domain(np.setdiff1d(POOL, base.steps)[:16], base.transitions)
    assert similarity(base, far, 48) == pytest.approx(0)
    for k in (4, 7, 10, 13):
        other = derived_domain(rng, base, k, POOL, 0.3)
        s = similarity(base, other, 48)
        assert 0 <= s <= 1 and s == pytest.approx(similarity(other, base, 48))


def test_similarity_equals_a_hand_computed_case():
    a = Domain(np.array([0, 1]), np.array([[0, 1.0], [1.0, 0]]))
    b = Domain(np.array([1, 2]), np.array([[0, 1.0], [1.0, 0]]))
    c = Domain(np.array([0, 1, 2]), np.array([[0, 0.5, 0.5], [1, 0, 0], [1, 0, 0]]))
    assert similarity(a, b, 3) == 0  # they share a step but no edge
    assert similarity(a, c, 3) == pytest.approx(1 - (0.5 + 0.5 + 1) / (2 + 3))


def test_similarity_grows_with_the_number_of_shared_steps(rng):
    means = [
        np.mean(
            [
                similarity(b, derived_domain(rng, b, k, POOL, 0.3), 48)
                for b in [random_domain(rng, POOL, 16, 0.3)] * 10
            ]
        )
        for k in (4, 8, 12, 15)
    ]
    assert (np.diff(means) > 0.03).all()


def test_a_derived_domain_keeps_exactly_the_overlap_and_the_edges_among_it(rng, base):
    for k in (13, 10, 7):
        derived = derived_domain(rng, base, k, POOL, 0.3)
        shared = np.intersect1d(base.steps, derived.steps)
        assert len(shared) == k and len(set(derived.steps.tolist())) == 16
        place = (
            {int(s): i for i, s in enumerate(base.steps)},
            {int(s): i for i, s in enumerate(derived.steps)},
        )
        for a in shared:
            for b in shared:
                was = base.transitions[place[0][a], place[0][b]] > 0
                assert (derived.transitions[place[1][a], place[1][b]] > 0) == was
        np.testing.assert_allclose(derived.transitions.sum(1), 1)


def test_deleted_edges_are_gone_others_stay_and_rows_still_sum_to_one(rng, base):
    pairs = np.array([(i, j) for i in range(48) for j in range(48) if i != j])
    deletions = pairs[rng.choice(len(pairs), 400, replace=False)]
    kept = base.without(deletions)
    np.testing.assert_allclose(kept.transitions.sum(1), 1)
    deleted = {tuple(p) for p in deletions.tolist()}
    for i, a in enumerate(base.steps):
        left = [
            j
            for j, b in enumerate(base.steps)
            if base.transitions[i, j] > 0 and (int(a), int(b)) not in deleted
        ]
        if left:  # a step that loses every exit keeps its own
            assert np.flatnonzero(kept.transitions[i]).tolist() == left
            ratio = kept.transitions[i, left] / base.transitions[i, left]
            np.testing.assert_allclose(ratio, ratio[0])


def test_a_step_that_would_lose_every_exit_keeps_its_original_ones():
    domain = Domain(np.array([5, 7, 9]), np.array([[0, 0.3, 0.7], [1, 0, 0], [0.5, 0.5, 0]]))
    kept = domain.without(np.array([[5, 7], [5, 9], [9, 5], [1, 2]]))
    np.testing.assert_allclose(kept.transitions, [[0, 0.3, 0.7], [1, 0, 0], [0, 1, 0]])
