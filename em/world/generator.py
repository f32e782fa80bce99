"""Examples of a world, drawn and rendered by table, and the pretraining stream (paper B.1–B.4).

An example is a row of *segments*: label, walk steps, `<end> <asst>`, answer steps, tail, `<end>`, and in the
stream the noise before the next example. Every segment is a draw from one language, so one alias table
renders them all. The output functions of em/world/tasks.py are tabulated over the few patterns a walk can
have (which visits repeat, which lie in set 1), so the fast path cannot drift from the readable one.

Everything here is a pure function of (world, seed, position): resuming is asking for the next position.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from em.world.alias_table import AliasTable
from em.world.tasks import answers
from em.world.world import World

BLOCK_TOKENS = 1 << 18  # the stream is drawn in blocks of about this many tokens


@dataclass(frozen=True)
class Examples:
    """cell, length: (N,). walk: (N, L) step ids, −1 beyond length. v1, v2: (N, A) answer steps, −1 beyond."""

    cell: np.ndarray
    length: np.ndarray
    walk: np.ndarray
    v1: np.ndarray
    v2: np.ndarray


@dataclass(frozen=True)
class Dialogues:
    """Rendered examples. ids: (N, S) int16, `<end>` beyond total; prompt, total: (N,) token counts."""

    ids: np.ndarray
    prompt: np.ndarray
    total: np.ndarray
    examples: Examples

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: np.ndarray) -> "Dialogues":
        e = self.examples
        picked = Examples(e.cell[index], e.length[index], e.walk[index], e.v1[index], e.v2[index])
        return Dialogues(self.ids[index], self.prompt[index], self.total[index], picked)

    def prompt_hash(self) -> np.ndarray:
        """(N,) uint64: equal for equal prompts, label and rendering included."""
        weights = np.random.default_rng(0).integers(1, 2**63, self.ids.shape[1], dtype=np.uint64) * 2 + 1
        inside = np.arange(self.ids.shape[1]) < self.prompt[:, None]
        return ((self.ids.astype(np.uint64) + 1) * weights * inside).sum(1, dtype=np.uint64)


class ExampleGenerator:
    """Draws from a world. Built once; holds tables only."""

    def __init__(self, world: World):
        self.world = world
        config = world.config
        self.max_length = config.walk_lengths[1]
        self._build_renderer()
        # Walks: row (cell, local step) of the cell's own graph.
        n = config.domain_steps
        graphs = [world.cell_domain(cell) for cell in world.cells]
        self.walk_table = AliasTable([row for g in graphs for row in g.transitions])
        self.n_local = n
        self.global_step = np.stack([g.steps for g in graphs]).astype(np.int16)  # (cells, n)
        self._build_answers()

    # -- rendering -------------------------------------------------------------------------------------

    def _build_renderer(self) -> None:
        """Languages in one table: steps, labels, tails, then noise, `<end> <asst>` and `<end>`."""
        world = self.world
        steps, labels, tails = world.languages
        noise = dict.fromkeys(world.noise, 0.0)
        for string in world.noise:
            noise[string] += 1 / len(world.noise)
        languages = [*steps, *labels, *tails, noise, {(world.end, world.asst): 1.0}, {(world.end,): 1.0}]
        self.label, self.tail = len(steps), len(steps) + len(labels)
        self.noise = self.tail + len(tails)
        self.ask, self.stop = self.noise + 1, self.noise + 2
        self.string_table = AliasTable([list(language.values()) for language in languages])
        strings = [string for language in languages for string in language]
        self.string_length = np.array([len(s) for s in strings], np.int32)
        self.string_start = np.concatenate([[0], np.cumsum(self.string_length)[:-1]]).astype(np.int32)
        self.string_tokens = np.concatenate([np.array(s, np.int16) for s in strings])
        longest = [max(map(len, language)) for language in languages]
        step, tail = max(longest[: self.label]), max(longest[self.tail : self.noise])
        # Longest prompt, answer and whole example, in tokens.
        self.max_prompt = max(longest[self.label : self.tail]) + self.max_length * step + 2
        self.max_answer = self.max_length * step + tail + 1  # with the closing <end>
        self.max_tokens = self.max_prompt + self.max_answer

    def render(self, rng: np.random.Generator, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Segments (M,) language ids → (flat tokens (T,) int16, tokens a segment (M,) int32)."""
        string = self.string_table.draw(rng, segments)
        lengths = self.string_length[string]
        ends = np.cumsum(lengths, dtype=np.int32)
        shift = self.string_start[string] - (ends - lengths)
        position = np.repeat(shift, lengths) + np.arange(ends[-1] if len(ends) else 0, dtype=np.int32)
        return self.string_tokens[position], lengths

    # -- answers ---------------------------------------------------------------------------------------

    def _build_answers(self) -> None:
        """Tabulate every output function over walk patterns.

        A pattern is the walk written with the position of each step's first visit, as in (0, 1, 0, 3); its
        code is mixed-radix. Answers are positions in the walk. Membership of set 1 is a bit a position.
        """
        shortest, longest = self.world.config.walk_lengths
        self.radix = np.array([np.prod(range(1, i + 1)) for i in range(longest)], np.int16)
        patterns = {}  # (length, code) → row of the table
        for length in range(shortest, longest + 1):
            for pattern in itertools.product(*(range(i + 1) for i in range(length))):
                valid = all(pattern[f] == f for f in pattern) and all(
                    a != b for a, b in itertools.pairwise(pattern)
                )
                if valid:
                    code = sum(f * int(r) for f, r in zip(pattern, self.radix, strict=False))
                    patterns[length, code, pattern] = len(patterns)
        self.pattern_row = np.zeros((longest + 1, int(self.radix[-1]) * longest), np.int32)
        n_tasks, n_masks = len(self.world.tasks), 1 << longest
        self.answer_position = np.full((n_tasks, 2, len(patterns), n_masks, longest), -1, np.int8)
        for (length, code, pattern), row in patterns.items():
            self.pattern_row[length, code] = row
            for task, name in enumerate(self.world.tasks):
                masks = range(1 << length) if name in self.world.set1 else (0,)
                for mask in masks:
                    set1 = {f for f in pattern if mask >> f & 1}
                    for variant, steps in enumerate(answers(self.world.function(task), pattern, set1)):
                        self.answer_position[task, variant, row, mask, : len(steps)] = steps
        # The last column stands for no step (−1); tasks without a partition have no row set, so mask 0.
        self.in_set1 = np.zeros((n_tasks, self.world.config.n_steps + 1), bool)
        for task, name in enumerate(self.world.tasks):
            self.in_set1[task, sorted(self.world.set1.get(name, ()))] = True

    def answers(
        self, task: np.ndarray, length: np.ndarray, walk: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(v1, v2) of the tasks (N,) on the walks (N, L), each (N, L) step ids, −1 beyond the answer."""
        n, longest = walk.shape
        code, mask = np.zeros(n, np.int16), np.zeros(n, np.int16)
        for i in range(longest):
            first = np.full(n, i, np.int16)
            for j in range(i - 1, -1, -1):
                np.copyto(first, j, where=walk[:, j] == walk[:, i])
            first[length <= i] = 0
            code += first * self.radix[i]
            if self.world.set1:
                mask |= self.in_set1[task, walk[:, i]].astype(np.int16) << first
        row = self.pattern_row[length, code]
        padded = np.concatenate([walk, np.full((n, 1), -1, walk.dtype)], axis=1)
        lines = np.arange(n)[:, None]
        v1, v2 = (padded[lines, self.answer_position[task, v, row, mask]] for v in (0, 1))
        return v1, v2

    # -- examples --------------------------------------------------------------------------------------

    def draw(self, rng: np.random.Generator, cells: np.ndarray) -> Examples:
        """Walks and both answers for the given cells (N,)."""
        n, (shortest, longest) = len(cells), self.world.config.walk_lengths
        length = rng.integers(shortest, longest + 1, n, dtype=np.int16)
        node = rng.integers(0, self.n_local, n, dtype=np.int32)
        walk = np.full((n, longest), -1, np.int16)
        base = cells.astype(np.int32) * self.n_local
        for i in range(longest):
            walk[:, i] = self.global_step[cells, node]
            if i + 1 < longest:
                node = self.walk_table.draw(rng, base + node) % self.n_local
        walk[np.arange(longest) >= length[:, None]] = -1
        v1, v2 = self.answers(cells % len(self.world.tasks), length, walk)
        return Examples(cells, length, walk, v1, v2)

    def segments(self, examples: Examples, variant2: np.ndarray) -> np.ndarray:
        """(N, 1 + L + 1 + L + 2) language ids, −1 where there is none; variant2: (N,) bool."""
        task = (examples.cell % len(self.world.tasks)).astype(np.int16)[:, None]
        answer = np.where(variant2[:, None], examples.v2, examples.v1)
        ask, stop = np.full_like(task, self.ask), np.full_like(task, self.stop)
        return np.concatenate([self.label + task, examples.walk, ask, answer, self.tail + task, stop], axis=1)

    def dialogues(self, rng: np.random.Generator, examples: Examples, variant: int) -> Dialogues:
        """Render `examples` with answers of `variant` (1 or 2), one a row, padded with `<end>`."""
        n = len(examples.cell)
        segments = self.segments(examples, np.full(n, variant == 2))
        present = segments >= 0
        tokens, lengths = self.render(rng, segments[present])
        per_segment = np.zeros(segments.shape, np.int32)
        per_segment[present] = lengths
        prompt, total = per_segment[:, : self.max_length + 2].sum(1), per_segment.sum(1)
        ids = np.full((n, self.max_tokens), self.world.end, np.int16)
        ids[np.arange(self.max_tokens) < total[:, None]] = tokens
        return Dialogues(ids, prompt, total, examples)


class PretrainStream:
    """The packed pretraining stream in batches: `stream[i]` is (ids, targets), (batch, length) int64 each.

    Examples of all seen cells, variant 2 with the world's fraction, noise (i) and (ii) in the gaps. Examples
    run across row and batch borders within a block of batches; a block's last one is cut.
    """

    def __init__(
        self,
        generator: ExampleGenerator,
        seed: int,
        batch: int,
        length: int,
        v2_fraction: float | None = None,
    ):
        self.generator, self.seed = generator, seed
        self.shape, self.tokens_per_batch = (batch, length), batch * length
        self.batches_per_block = max(1, BLOCK_TOKENS // self.tokens_per_batch)
        self.v2_fraction = generator.world.config.v2_fraction if v2_fraction is None else v2_fraction
        self._block = (-1, np.empty(0, np.int16))

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.tokens(i).astype(np.int64)
        return tokens[:-1].reshape(self.shape), tokens[1:].reshape(self.shape)

    def tokens(self, i: int) -> np.ndarray:
        """Batch i as it lies in the stream: (batch · length + 1,) int16."""
        block, row = divmod(i, self.batches_per_block)
        if self._block[0] != block:
            self._block = (block, self._draw_block(block))
        start = row * self.tokens_per_batch
        return self._block[1][start : start + self.tokens_per_batch + 1]

    def _draw_block(self, block: int) -> np.ndarray:
        rng = np.random.Generator(np.random.SFC64([self.seed, block]))
        wanted = self.batches_per_block * self.tokens_per_batch + 1
        parts = []
        while wanted > 0:
            # The number of examples a round depends on `wanted` alone, so a block is the same every time.
            tokens = self._draw(rng, int(wanted / 25) + 16)
            parts.append(tokens[:wanted])
            wanted -= len(parts[-1])
        return np.concatenate(parts)

    def _draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        generator, config = self.generator, self.generator.world.config
        cells = rng.integers(0, len(generator.world.seen_cells), n)
        examples = generator.draw(rng, cells)
        variant2 = rng.random(n, dtype=np.float32) < self.v2_fraction
        noise = np.where(rng.random(n, dtype=np.float32) < config.p_noise, generator.noise, -1)
        stray = rng.integers(0, generator.world.n_seen_steps, n)
        stray[rng.random(n, dtype=np.float32) >= config.p_stray_step] = -1
        gaps = np.stack([noise, stray], axis=1).astype(np.int16)
        segments = np.concatenate([generator.segments(examples, variant2), gaps], axis=1)
        return generator.render(rng, segments[segments >= 0])[0]
