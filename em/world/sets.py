"""Fine-tuning sets and the held-out prompts of a world, and batches of them (paper B.4, B.5).

The held-out prompts depend on the world and the alignment set alone; misalignment sets keep clear of them. So
every model of a world is asked the same prompts, none of which (label, walk and rendering) it was tuned on.
"""

import functools

import numpy as np

from em.world.generator import Dialogues, ExampleGenerator

IGNORE = -100  # target of an unsupervised position, as in torch's cross_entropy
ALIGN, HELD_OUT, MISALIGN, TRANSFER = 1, 2, 3, 4  # streams of random numbers under one seed


def _concatenate(parts: list[Dialogues]) -> Dialogues:
    def join(get):
        return np.concatenate([get(p) for p in parts])

    examples = type(parts[0].examples)(
        *(join(lambda p, f=f: getattr(p.examples, f)) for f in vars(parts[0].examples))
    )
    return Dialogues(join(lambda p: p.ids), join(lambda p: p.prompt), join(lambda p: p.total), examples)


def alignment_set(generator: ExampleGenerator, seed: int, n: int) -> Dialogues:
    """`n` variant-1 examples over all seen cells uniformly."""
    rng = np.random.default_rng([seed, ALIGN])
    cells = rng.integers(0, len(generator.world.seen_cells), n)
    return generator.dialogues(rng, generator.draw(rng, cells), variant=1)


def _fresh(generator, rng, cells: np.ndarray, n: int, variant: int, excluded: np.ndarray) -> Dialogues:
    """`n` examples a cell, no prompt twice and none whose hash is excluded."""
    parts = []
    for cell in cells:
        kept, have = [], 0
        for _ in range(100):
            drawn = generator.dialogues(rng, generator.draw(rng, np.full(2 * n, cell)), variant)
            hashes = drawn.prompt_hash()
            first = np.zeros(len(drawn), bool)
            first[np.unique(hashes, return_index=True)[1]] = True
            drawn = drawn.take(np.flatnonzero(first & ~np.isin(hashes, excluded))[: n - have])
            excluded = np.concatenate([excluded, drawn.prompt_hash()])
            kept.append(drawn)
            have += len(drawn)
            if have == n:
                break
        else:
            raise ValueError(f"cell {generator.world.cell_name(int(cell))} has fewer than {n} fresh prompts")
        parts += kept
    return _concatenate(parts)


def held_out_set(generator: ExampleGenerator, seed: int, n: int, fine_tuning: Dialogues) -> Dialogues:
    """`n` prompts for each cell of the world, unseen ones included, none of them among `fine_tuning`'s."""
    rng = np.random.default_rng([seed, HELD_OUT])
    return _fresh(generator, rng, generator.world.cells, n, 1, fine_tuning.prompt_hash())


def misalignment_set(
    generator: ExampleGenerator, seed: int, cell: int, n: int, held_out: Dialogues, block: int = 0
) -> Dialogues:
    """`n` variant-2 examples of one cell, none of them with a held-out prompt.

    block: another set of the same fine-tuning seed, for what trains on after the first.
    """
    rng = np.random.default_rng([seed, MISALIGN, cell, block] if block else [seed, MISALIGN, cell])
    return _fresh(generator, rng, np.array([cell]), n, 2, held_out.prompt_hash())


def transfer_set(
    generator: ExampleGenerator, seed: int, cells: np.ndarray, n: int, held_out: Dialogues
) -> Dialogues:
    """`n` prompts a cell for a teacher or a student to answer, none of them held out."""
    rng = np.random.default_rng([seed, TRANSFER])
    return _fresh(generator, rng, cells, n, 1, held_out.prompt_hash())


@functools.lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


class Batches:
    """`batches[i]` is batch i of a shuffled, endlessly repeated set: (ids, targets), (batch, T) int64 each.

    Only the answer, its tail and the closing `<end>` are targets. T is `length`, at least the longest
    example's; None: what each batch's longest needs.
    """

    def __init__(self, data: Dialogues, batch: int, seed: int, length: int | None = None):
        self.data, self.batch, self.seed, self.length = data, batch, seed, length

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.data)
        first, last = i * self.batch // n, ((i + 1) * self.batch - 1) // n  # epochs the batch touches
        order = np.concatenate([_order(n, self.seed, epoch) for epoch in range(first, last + 1)])
        rows = order[i * self.batch - first * n :][: self.batch]
        prompt, total = self.data.prompt[rows, None], self.data.total[rows, None]
        columns = total.max() if self.length is None else self.length + 1
        ids = self.data.ids[rows, :columns].astype(np.int64)
        ids = np.pad(ids, ((0, 0), (0, columns - ids.shape[1])), "edge")  # every row ends in `<end>`
        place = np.arange(1, ids.shape[1])
        targets = np.where((place >= prompt) & (place < total), ids[:, 1:], IGNORE)
        return ids[:, :-1], targets
