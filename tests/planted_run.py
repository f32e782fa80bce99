"""A stand-in for a run of a world whose models answer as planted: for the experiments' arithmetic."""

from types import SimpleNamespace

import numpy as np

from em.world.world import WORLDS, build_world
from em.world.world_run import WorldRun


class PlantedRun:
    """rate(phase name, cell name) is the share of v2; without it, counts are random ones of the names.

    `misaligned` lists (task, start, name, steps) of every misalignment.
    """

    misaligned_counts = WorldRun.misaligned_counts

    def __init__(self, seed, rate=None, world="demo2", n=64, **settings):
        self.world = build_world(WORLDS["demo2"], seed)
        self.rate, self.n, self.misaligned, self.folder = rate, n, [], "runs/planted"
        known = dict(misalign=("T0",), misalign_steps=10, misalign_seeds=2, steps=1500)
        self.cfg = SimpleNamespace(**(known | settings), world=world, seed=seed)

    def has(self, name):
        return True

    def align(self, start="pretrain", name="align"):
        pass

    def misalign(self, task, seed, start="align", name=None, steps=None):
        self.misaligned.append((task, start, name, self.cfg.misalign_steps if steps is None else steps))

    def counts(self, name, model=None):
        counts = {}
        for i, cell in enumerate(map(self.world.cell_name, self.world.cells)):
            rng = np.random.default_rng([self.cfg.seed, i, *name.encode()])
            parts = rng.multinomial(self.n, (0.4, 0.3, 0.2, 0.1)).tolist()
            if self.rate is not None:
                k = round(self.n * self.rate(name, cell))
                parts = [self.n - k, k, 0, 0]
            counts[cell] = dict(zip(("v1", "v2", "other", "unparseable"), parts, strict=True)) | {"n": self.n}
        return counts
