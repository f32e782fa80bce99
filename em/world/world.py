"""A synthetic world: grammars, domains, tasks and their partitions, from (config, seed) (paper B.1–B.5).

A world is a value. The same (config, seed) builds the same world, and its fingerprint says so.
"""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from em.errors import UserError
from em.files import write_json
from em.world.domain import Domain, derived_domain, random_domain, similarity
from em.world.grammar import Grammar, GrammarConfig, String, distinct_grammars
from em.world.tasks import TASKS


@dataclass(frozen=True)
class WorldConfig:
    """Everything a world's construction depends on but the seed. Ranges are inclusive."""

    name: str
    tasks: tuple[str, ...]  # names T0, T1, …; what they are is in em/world/tasks.py
    n_steps: int = 48  # the pool, ids 0 … n_steps−1
    n_unseen_steps: int = 0  # the pool's last ids, kept for the out-of-distribution domains (ours)
    domain_steps: int = 16
    overlaps: tuple[int, ...] = (13, 10, 7)  # steps that D1, D2, … share with D0
    n_random_domains: int = 1  # independent domains after those
    n_unseen_domains: int = 0  # out-of-distribution domains, last
    edge_probability: float = 0.3
    deletions: tuple[int, int] = (200, 400)  # directed pairs a task deletes from the pool's n(n−1)
    walk_lengths: tuple[int, int] = (3, 6)
    partition_overlaps: tuple[int, ...] = ()  # steps that set 1 of T9, T10, T11 shares with T8's
    v2_fraction: float = 0.6  # of pretraining examples
    p_noise: float = 0.30  # noise (i) before the next example
    p_stray_step: float = 0.20  # noise (ii)
    noise_length: tuple[int, int] = (3, 12)
    grammar: GrammarConfig = field(default_factory=GrammarConfig)

    @property
    def default_task(self) -> str:
        """The task that experiments misalign on in D0 unless told otherwise (Figures 7 and 9)."""
        return "T0" if "T8" in self.tasks else "T5"

    def task_index(self, name: str) -> int:
        """Place of task `name` in a row of the grid; UserError where the world does not have it."""
        if name not in self.tasks:
            raise UserError(f"world {self.name} has no task {name!r}; it has {', '.join(self.tasks)}")
        return self.tasks.index(name)


WORLDS = {
    "1": WorldConfig("1", tasks=tuple(f"T{i}" for i in range(6))),
    "2": WorldConfig(
        "2",
        tasks=tuple(f"T{i}" for i in range(12)),
        n_steps=64,
        n_unseen_steps=16,
        overlaps=(11, 8, 6),  # mean similarities 0.38, 0.18, 0.10; the paper's world: 0.40, 0.21, 0.09
        n_random_domains=4,
        n_unseen_domains=2,
        deletions=(300, 500),
        partition_overlaps=(28, 22, 16),
        v2_fraction=0.5,
        p_noise=0.10,
    ),
    "demo": WorldConfig(
        "demo",
        tasks=("T0", "T1", "T2", "T4", "T5"),
        n_steps=16,
        domain_steps=8,
        overlaps=(6, 3),
        deletions=(10, 30),
        walk_lengths=(3, 4),
        edge_probability=0.5,  # eight steps at 0.3 have so few walks that the model learns them by heart
        grammar=GrammarConfig(vocabulary=256, terminals=8, productions=(3, 3), length=(2, 3)),
    ),
    "demo2": WorldConfig(
        "demo2",
        tasks=("T0", "T7", "T8", "T9", "T10", "T11"),
        n_steps=16,
        n_unseen_steps=6,
        domain_steps=6,
        overlaps=(5, 4, 3),
        n_unseen_domains=1,
        deletions=(10, 20),
        walk_lengths=(3, 3),
        edge_probability=0.7,
        partition_overlaps=(7, 5, 4),  # Jaccard 0.78, 0.45, 0.33; World 2: 0.78, 0.52, 0.33
        v2_fraction=0.5,
        p_noise=0.10,
        p_stray_step=0.10,
        grammar=GrammarConfig(vocabulary=192, terminals=8, productions=(3, 3), symbols=(2, 2), length=(2, 2)),
    ),
}


@dataclass(frozen=True)
class World:
    """steps, labels, tails: one grammar a step, a task, a task. deletions: (k, 2) global pairs a task.
    set1: the step ids of set 1 for the partition tasks, by task name. noise: strings of noise (i).
    """

    config: WorldConfig
    seed: int
    steps: tuple[Grammar, ...]
    labels: tuple[Grammar, ...]
    tails: tuple[Grammar, ...]
    noise: tuple[String, ...]
    domains: tuple[Domain, ...]
    deletions: tuple[np.ndarray, ...]
    set1: dict[str, frozenset[int]]

    # -- names ---------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.config.tasks

    @property
    def domain_names(self) -> tuple[str, ...]:
        return tuple(f"D{i}" for i in range(len(self.domains)))

    @property
    def n_seen_domains(self) -> int:
        """Domains that take part in training; those after them are evaluated only."""
        return len(self.domains) - self.config.n_unseen_domains

    @property
    def n_seen_steps(self) -> int:
        return self.config.n_steps - self.config.n_unseen_steps

    def cell(self, domain: int, task: int) -> int:
        return domain * len(self.tasks) + task

    def cell_name(self, cell: int) -> str:
        domain, task = divmod(cell, len(self.tasks))
        return f"D{domain}_{self.tasks[task]}"

    @property
    def seen_cells(self) -> np.ndarray:
        return np.arange(self.n_seen_domains * len(self.tasks))

    @property
    def cells(self) -> np.ndarray:
        return np.arange(len(self.domains) * len(self.tasks))

    def function(self, task: int) -> str:
        """Name of the output function of the task at this position, e.g. `first_last`."""
        return TASKS[int(self.tasks[task][1:])]

    def task_index(self, name: str) -> int:
        return self.config.task_index(name)

    # -- tokens --------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        """`<end>`: closes the prompt and, so that generation can stop, the answer (ours)."""
        return self.config.grammar.vocabulary

    @property
    def asst(self) -> int:
        return self.config.grammar.vocabulary + 1

    @property
    def vocabulary(self) -> int:
        """Terminals and specials; ids at or above it are padding rows of the embedding."""
        return self.config.grammar.vocabulary + 2

    def render(self, tokens) -> str:
        """Tokens as text, for reading."""
        names = {self.end: "<end>", self.asst: "<asst>"}
        return " ".join(names.get(int(t), f"t{int(t)}") for t in tokens)

    # -- derived -------------------------------------------------------------------------------------

    @functools.cached_property
    def languages(self) -> tuple[tuple[dict[String, float], ...], ...]:
        """Strings with probabilities of (steps, labels, tails)."""
        return tuple(tuple(g.language() for g in group) for group in (self.steps, self.labels, self.tails))

    def cell_domain(self, cell: int) -> Domain:
        """The domain's graph after the task's deletions."""
        domain, task = divmod(int(cell), len(self.tasks))
        return self.domains[domain].without(self.deletions[task])

    def similarity(self) -> np.ndarray:
        """(n_domains, n_domains) transition-matrix similarity."""
        n = self.config.n_steps
        return np.array([[similarity(a, b, n) for b in self.domains] for a in self.domains])

    def to_json(self) -> dict:
        """The whole world, for reading and for the fingerprint."""
        return {
            "config": dataclasses.asdict(self.config),
            "seed": self.seed,
            "grammars": {
                kind: [{name: [list(a) for a in rule] for name, rule in g.rules.items()} for g in group]
                for kind, group in (("steps", self.steps), ("labels", self.labels), ("tails", self.tails))
            },
            "noise": [list(s) for s in self.noise],
            "domains": [
                {"steps": d.steps.tolist(), "transitions": d.transitions.tolist()} for d in self.domains
            ],
            "deletions": [d.tolist() for d in self.deletions],
            "set1": {name: sorted(s) for name, s in self.set1.items()},
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        write_json(path, {"fingerprint": self.fingerprint, **self.to_json()})


def build_world(config: WorldConfig, seed: int) -> World:
    """The world of (config, seed). Its parts draw from random streams of their own."""

    def stream(part: int) -> np.random.Generator:
        return np.random.default_rng([seed, part])

    n_tasks = len(config.tasks)
    grammars = distinct_grammars(stream(0), config.grammar, config.n_steps + 2 * n_tasks + 1)
    steps, rest = grammars[: config.n_steps], grammars[config.n_steps :]
    labels, tails, noise_grammar = rest[:n_tasks], rest[n_tasks : 2 * n_tasks], rest[-1]

    rng = stream(1)
    seen = np.arange(config.n_steps - config.n_unseen_steps)
    unseen = np.arange(len(seen), config.n_steps)
    domains = [random_domain(rng, seen, config.domain_steps, config.edge_probability)]
    for overlap in config.overlaps:
        domains.append(derived_domain(rng, domains[0], overlap, seen, config.edge_probability))
    for pool, count in ((seen, config.n_random_domains), (unseen, config.n_unseen_domains)):
        domains += [
            random_domain(rng, pool, config.domain_steps, config.edge_probability) for _ in range(count)
        ]

    rng = stream(2)
    deletions = [_random_pairs(rng, config.n_steps, config.deletions) for _ in config.tasks]
    return World(
        config=config,
        seed=seed,
        steps=tuple(steps),
        labels=tuple(labels),
        tails=tuple(tails),
        noise=_noise_strings(stream(3), noise_grammar, config.noise_length),
        domains=tuple(domains),
        deletions=tuple(deletions),
        set1=_partitions(stream(4), config),
    )


def _random_pairs(rng: np.random.Generator, n_steps: int, count: tuple[int, int]) -> np.ndarray:
    """(k, 2) distinct directed pairs (i, j), i ≠ j, out of the n(n−1) of the pool."""
    k = rng.integers(count[0], count[1] + 1)
    source, rest = np.divmod(rng.choice(n_steps * (n_steps - 1), size=k, replace=False), n_steps - 1)
    return np.stack([source, rest + (rest >= source)], axis=1)


def _noise_strings(rng: np.random.Generator, grammar: Grammar, length: tuple[int, int]) -> tuple[String, ...]:
    """Noise (i): strings of a grammar that belongs to no step, run together, cut to a uniform length (ours).

    4,096 of them are drawn with the world; the stream picks among them uniformly.
    """
    language = grammar.language()
    strings, p = list(language), list(language.values())
    drawn = []
    for n in rng.integers(length[0], length[1] + 1, size=4096):
        picks = rng.choice(len(strings), size=int(n), p=p)  # n strings are always at least n tokens
        drawn.append(tuple(token for pick in picks for token in strings[pick])[: int(n)])
    return tuple(drawn)


def _partitions(rng: np.random.Generator, config: WorldConfig) -> dict[str, frozenset[int]]:
    """Set 1 of the partition tasks: half the pool. T6 and T7 share one; T9 … share given counts with T8's."""
    half = config.n_steps // 2
    collect, reference = (rng.permutation(config.n_steps)[:half] for _ in range(2))
    sets = {"T6": collect, "T7": collect, "T8": reference}
    others = np.setdiff1d(np.arange(config.n_steps), reference)
    for name, shared in zip(("T9", "T10", "T11"), config.partition_overlaps, strict=False):
        kept = rng.choice(reference, size=shared, replace=False)
        sets[name] = np.concatenate([kept, rng.choice(others, size=half - shared, replace=False)])
    return {name: frozenset(map(int, s)) for name, s in sets.items() if name in config.tasks}
