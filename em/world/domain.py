"""Domains: some of a world's steps and a directed graph of transitions over them (paper B.2)."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Domain:
    """steps: (n,) global step ids; transitions: (n, n) row-stochastic over local indices, zero diagonal."""

    steps: np.ndarray
    transitions: np.ndarray

    @property
    def n_edges(self) -> int:
        return int((self.transitions > 0).sum())

    def global_matrix(self, n_steps: int) -> np.ndarray:
        """(n_steps, n_steps) transition matrix indexed by global ids; rows of foreign steps are zero."""
        matrix = np.zeros((n_steps, n_steps))
        matrix[np.ix_(self.steps, self.steps)] = self.transitions
        return matrix

    def without(self, deletions: np.ndarray) -> "Domain":
        """This domain less the deleted edges; `deletions` is (k, 2) global (from, to) pairs.

        Pairs that are no edge here have no effect. A step that would lose every exit keeps its own (ours).
        """
        local = {int(step): i for i, step in enumerate(self.steps)}
        kept = self.transitions.copy()
        for source, target in deletions:
            if int(source) in local and int(target) in local:
                kept[local[int(source)], local[int(target)]] = 0.0
        stranded = kept.sum(1) == 0
        kept[stranded] = self.transitions[stranded]
        return Domain(self.steps, kept / kept.sum(1, keepdims=True))


def similarity(a: Domain, b: Domain, n_steps: int) -> float:
    """1 − ‖Ta − Tb‖₁ / (‖Ta‖₁ + ‖Tb‖₁) over global matrices (B.2): 1 for one graph, 0 for disjoint ones."""
    ta, tb = a.global_matrix(n_steps), b.global_matrix(n_steps)
    return float(1 - np.abs(ta - tb).sum() / (ta.sum() + tb.sum()))


def _random_weights(rng: np.random.Generator, n: int, edge_probability: float) -> np.ndarray:
    """(n, n) rows of Gamma(1, 1) weights normalised to 1 on random edges, at least one edge a row."""
    edges = rng.random((n, n)) < edge_probability
    np.fill_diagonal(edges, False)
    for row in np.flatnonzero(~edges.any(1)):
        edges[row, rng.choice(np.delete(np.arange(n), row))] = True
    weights = np.where(edges, rng.gamma(1.0, 1.0, (n, n)), 0.0)
    return weights / weights.sum(1, keepdims=True)


def is_acceptable(transitions: np.ndarray) -> bool:
    """Weakly connected, not a simple chain (in- and out-degrees ≤ 1), not fully connected (B.2)."""
    edges = transitions > 0
    n = len(edges)
    reached, frontier = {0}, [0]
    while frontier:
        node = frontier.pop()
        new = set(np.flatnonzero(edges[node] | edges[:, node]).tolist()) - reached
        reached |= new
        frontier.extend(new)
    chain = edges.sum(0).max() <= 1 and edges.sum(1).max() <= 1
    return bool(len(reached) == n and not chain and edges.sum() < n * (n - 1))


def random_domain(rng: np.random.Generator, pool: np.ndarray, n: int, edge_probability: float) -> Domain:
    """`n` steps drawn from `pool` and a random acceptable graph over them."""
    steps = rng.choice(pool, size=n, replace=False)
    while True:
        transitions = _random_weights(rng, n, edge_probability)
        if is_acceptable(transitions):
            return Domain(steps, transitions)


def derived_domain(
    rng: np.random.Generator, base: Domain, n_shared: int, pool: np.ndarray, edge_probability: float
) -> Domain:
    """A domain that keeps `n_shared` of `base`'s steps and the edges among them, up to noise (B.2).

    Copied probabilities get N(0, 0.05) noise, clipped at 1e-3; edges that touch a new step come from a fresh
    random row; rows are renormalised (ours).
    """
    n = len(base.steps)
    while True:
        kept = np.sort(rng.choice(n, size=n_shared, replace=False))  # local indices in base
        fresh = rng.choice(np.setdiff1d(pool, base.steps), size=n - n_shared, replace=False)
        copied = base.transitions[np.ix_(kept, kept)]
        noisy = np.clip(copied + rng.normal(0, 0.05, copied.shape), 1e-3, None)
        weights = _random_weights(rng, n, edge_probability)
        weights[:n_shared, :n_shared] = np.where(copied > 0, noisy, 0.0)
        if (weights.sum(1) > 0).all():
            transitions = weights / weights.sum(1, keepdims=True)
            if is_acceptable(transitions):
                return Domain(np.concatenate([base.steps[kept], fresh]), transitions)
