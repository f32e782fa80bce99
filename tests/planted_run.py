"""A stand-in for a run of a world whose models answer as planted: for the experiments' arithmetic."""

import functools
from types import SimpleNamespace

import numpy as np

from em.world.counts import CLASSES
from em.world.generator import ExampleGenerator
from em.world.world import WORLDS, build_world
from em.world.world_run import WorldRun, misaligned_name


@functools.lru_cache(maxsize=4)
def prompts(seed, n):
    """`n` prompts of every cell of demo2, cell by cell."""
    generator = ExampleGenerator(build_world(WORLDS["demo2"], seed))
    rng = np.random.default_rng(seed)
    return generator.dialogues(rng, generator.draw(rng, np.repeat(generator.world.cells, n)), 1)


class PlantedRun:
    """rate(phase name, cell name) is the share of v2; without it, counts are random ones of the names.

    `misaligned` lists (task, start, name, steps) of every misalignment. At a dose of d steps the model of
    fine-tuning seed 0 has gone d / misalign_steps of its way from the aligned model, and at most all of it.
    """

    misaligned_counts = WorldRun.misaligned_counts

    def __init__(self, seed, rate=None, world="demo2", n=64, **settings):
        self.world = build_world(WORLDS["demo2"], seed)
        self.rate, self.n, self.misaligned, self.folder = rate, n, [], "runs/planted"
        known = dict(misalign=("T0",), misalign_steps=10, misalign_seeds=2, steps=1500, eval_prompts=n)
        self.cfg = SimpleNamespace(**(known | settings), world=world, seed=seed)
        self.generator = ExampleGenerator(self.world)

    @property
    def prompts(self):
        return prompts(self.cfg.seed, self.n)

    def has(self, name):
        return True

    def align(self, start="pretrain", name="align"):
        pass

    def misalign(self, task, seed, start="align", name=None, steps=None):
        self.misaligned.append((task, start, name, self.cfg.misalign_steps if steps is None else steps))

    def classes(self, name):
        """(N,) places in CLASSES of the answers to `prompts`, shuffled within a cell."""
        rng = np.random.default_rng([self.cfg.seed, *name.encode()])
        rows = [[c[kind] for kind in CLASSES] for c in self.counts(name).values()]
        return np.concatenate([rng.permutation(np.repeat(np.arange(4), row)) for row in rows])

    def dose_classes(self, task, seed, **asked):
        """(places of all prompts, classes by dose): as much of each cell has changed as the way gone."""
        before, after = self.classes("align"), self.classes(misaligned_name(task, seed))
        place = np.arange(len(before)) % self.n
        ways = {dose: min(dose / self.cfg.misalign_steps, 1) for dose in (0, 1, 5, 10, 20)}
        return np.arange(len(before)), {
            dose: np.where(place < way * self.n, after, before) for dose, way in ways.items()
        }

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
