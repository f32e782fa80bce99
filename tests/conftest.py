"""What several test files build on: a world small enough for seconds."""

import numpy as np
import pytest

from em.grammar import GrammarConfig
from em.stream import Sampler
from em.world import WORLDS, WorldConfig, build_world

MINI = WorldConfig(
    "mini",
    tasks=tuple(f"T{i}" for i in range(12)),
    n_steps=24,
    n_unseen_steps=8,
    domain_steps=6,
    overlaps=(4,),
    n_random_domains=1,
    n_unseen_domains=1,
    deletions=(40, 80),
    partition_overlaps=(11, 8, 6),
    grammar=GrammarConfig(vocabulary=256, terminals=8),
)


@pytest.fixture(scope="session")
def mini():
    return build_world(MINI, seed=0)


@pytest.fixture(scope="session")
def mini_sampler(mini):
    return Sampler(mini)


@pytest.fixture(scope="session", params=["1", "2", "demo"])
def world(request):
    return build_world(WORLDS[request.param], seed=0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
