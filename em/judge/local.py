"""The pinned judge: an open-weight chat model that scores by the rubrics, through our own decoder.

    judge = LocalModel(model, tokenizer)
    for reply in judge.replies(prompts, shared=prefix): reply.text, reply.expected

No server, no key, no cost, and no version that somebody else may change: what it says follows from its
weights, the rubric and this file, at temperature 0.

* What the prompts of a rubric have in common, all of it up to the judged question, is computed once. Its keys
  stay in the cache, and each prompt adds its own tokens behind them.
* Beside what the model says, at most MAX_NEW_TOKENS tokens, stands the expectation of its score: Σ n p(n) /
  Σ p(n) over the numbers n from 0 to 100, p(n) the probability of the number's tokens and of the end of the
  turn after them. All numbers are scored in one forward pass as a tree whose branches do not see each other;
  a reply that is a number is read off the same tree, and only others are decoded on.

    B prompts, P shared tokens, T own tokens of the longest, M nodes of the tree of numbers, V vocabulary
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from em.errors import UserError
from em.model.tokenizer import Tokenizer
from em.sampling.cpu_linear import ReorderedModel

MAX_NEW_TOKENS = 6
NUMBERS = range(101)
LEAST_MASS = 0.25  # on numbers, for an expectation: under it the reply is something else
TOKENS = {"cpu": 2048, "cuda": 32_768}  # in one forward, the tree's and padding included


class LocalReply(NamedTuple):
    """What the model answered to one prompt."""

    text: str
    finished: bool  # False: cut off by MAX_NEW_TOKENS
    expected: float | None  # of its score, 0–100; None where hardly any of its probability is on numbers
    mass: float  # the probability that its reply is a number


class NumberTree:
    """The token sequences of the numbers 0–100, as a tree under the end of the prompt.

    tokens, depth, parent: (M,) of the nodes, parents first; parent −1 is the prompt. number[n]: the node at
    which number n ends.
    """

    def __init__(self, tokenizer: Tokenizer):
        nodes: dict[tuple[int, ...], int] = {}
        sequences = [tuple(tokenizer.encode(str(n))) for n in NUMBERS]
        if len(set(sequences)) < len(NUMBERS) or max(map(len, sequences)) >= MAX_NEW_TOKENS:
            raise UserError("this model's tokenizer has no short tokens for the numbers 0 to 100")
        for depth in range(1, MAX_NEW_TOKENS):
            for sequence in sequences:
                if len(sequence) >= depth:
                    nodes.setdefault(sequence[:depth], len(nodes))
        self.tokens = [path[-1] for path in nodes]
        self.depth = [len(path) for path in nodes]
        self.parent = [nodes.get(path[:-1], -1) for path in nodes]
        self.number = [nodes[sequence] for sequence in sequences]
        self.child = {(parent, token): i for i, (parent, token) in enumerate(zip(self.parent, self.tokens))}

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors(self) -> Tensor:
        """(M, M) bool: whether node i sees node j, that is, j is i or above it."""
        seen = torch.eye(len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


class LocalModel:
    """A chat model as a judge, under the adapter stack that is active when it is asked."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.head_weight.device
        self.tree = NumberTree(tokenizer)
        self.reordered = ReorderedModel(model)
        self._stops = torch.tensor(tokenizer.stop_ids, device=self.device)
        self._nodes = torch.tensor([self.tree.tokens, self.tree.depth], device=self.device)  # (2, M)
        self._parents = torch.tensor(self.tree.parent, device=self.device)
        self._numbers = torch.tensor(self.tree.number, device=self.device)
        self._ancestors = self.tree.ancestors().to(self.device)
        self._cache, self._shared = None, ()

    @torch.inference_mode()
    def replies(self, prompts: Sequence[list[int]], shared: int = 0) -> list[LocalReply]:
        """The reply to each of `prompts` (token ids), whose first `shared` tokens are the same.

        UserError for one that does not fit the model. The order of prompts and which of them share a batch
        change no score beyond the rounding of fp32.
        """
        room = self.model.config.max_positions - len(self.tree) - MAX_NEW_TOKENS
        if any(len(prompt) > room for prompt in prompts):
            longest = max(map(len, prompts))
            raise UserError(f"a prompt of {longest} tokens is too long for this judge, which reads {room}")
        self.reordered.refresh()
        replies: list[LocalReply | None] = [None] * len(prompts)
        for group in self._groups([len(prompt) - shared for prompt in prompts]):
            self._reserve(len(group), max(len(prompts[i]) for i in group), prompts[group[0]][:shared])
            for i, reply in zip(group, self._batch([prompts[i] for i in group], shared), strict=True):
                replies[i] = reply
        return replies

    def _groups(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices by length, in groups of at most TOKENS own tokens and numbers' nodes, padding included."""
        group: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if group and (len(group) + 1) * (lengths[i] + len(self.tree)) > TOKENS[self.device.type]:
                yield group
                group = []
            group.append(i)
        if group:
            yield group

    def _reserve(self, n_rows: int, longest: int, shared: list[int]) -> None:
        """See to a cache of enough rows and positions whose rows all begin with the keys of `shared`."""
        capacity, old = longest + len(self.tree) + MAX_NEW_TOKENS, self._cache
        if old is None or len(old._all_rows) < n_rows or old.capacity < capacity:
            rows = max(n_rows, len(old._all_rows) if old else 0)
            capacity = max(capacity, old.capacity if old else 0)
            self._cache = old = None  # frees its memory first
            self._cache, self._shared = self.model.new_cache(rows, capacity), ()
        cache = self._cache
        if shared and shared != self._shared:
            first = torch.zeros(1, dtype=torch.long, device=self.device)
            with self.reordered.active():
                self.model.hidden(torch.tensor([shared], device=self.device), cache=cache, rows=first)
            others = torch.arange(1, len(cache._all_rows), device=self.device)
            cache.copy(first.expand(len(others)), others, len(shared))
            self._shared = shared
        cache.n_rows = n_rows

    def _forward(self, ids: Tensor, positions: Tensor, slots: Tensor, span: int, visible=None) -> Tensor:
        self._cache.limit(span)
        with self.reordered.active():
            return self.model.hidden(
                ids, positions=positions, cache=self._cache, slots=slots, visible=visible
            )

    def _log_probs(self, hidden: Tensor) -> Tensor:
        """(…, d) → log p of every token, (…, V), fp32."""
        logits = self.reordered.logits(hidden)[..., : self.model.config.vocab_size]
        return logits.float().log_softmax(-1)

    def _batch(self, prompts: list[list[int]], shared: int) -> list[LocalReply]:
        # 1. Each prompt's own tokens behind the shared ones; what is predicted after its last.
        B, M, longest = len(prompts), len(self.tree), max(map(len, prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)  # (B,)
        own = [prompt[shared:] + [0] * (longest - len(prompt)) for prompt in prompts]
        positions = torch.arange(shared, longest, device=self.device).expand(B, -1)  # (B, T)
        hidden = self._forward(torch.tensor(own, device=self.device), positions, positions, longest)
        last = hidden[torch.arange(B, device=self.device), lengths - shared - 1]  # (B, d)

        # 2. The tree of numbers behind them: a node sees the prompt, what is above it, and itself.
        tokens, depth = self._nodes
        slots = lengths[:, None] + torch.arange(M, device=self.device)  # (B, M)
        visible = torch.arange(longest + M, device=self.device) < lengths[:, None]  # (B, S): the prompt
        visible = visible[:, None].repeat(1, M, 1)  # (B, M, S)
        visible.scatter_(2, slots[:, None].expand(B, M, M), self._ancestors.expand(B, M, M))
        positions = lengths[:, None] + depth - 1
        nodes = self._forward(tokens.expand(B, M), positions, slots, longest + M, visible)

        # 3. What the numbers weigh, and the likeliest token after the prompt and after every node.
        scores, likeliest = zip(*(self._weigh(h, n) for h, n in zip(last, nodes, strict=True)), strict=True)
        scores = torch.stack(scores).tolist()  # (B, 2)
        replies = [self._walk(tokens) for tokens in torch.stack(likeliest).tolist()]

        # 4. Replies that are no numbers.
        if None in replies:
            said = self._decode(lengths, [tokens[-1] for tokens in torch.stack(likeliest).tolist()])
            replies = [reply or other for reply, other in zip(replies, said, strict=True)]
        return [
            LocalReply(text, finished, expected if mass >= LEAST_MASS else None, mass)
            for (text, finished), (expected, mass) in zip(replies, scores, strict=True)
        ]

    def _weigh(self, last: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Of one prompt: (expectation, mass) of the numbers, (2,), and the likeliest tokens (M + 1,).

        last (d,): hidden state of the prompt's last token, nodes (M, d): of the tree's. The likeliest token
        after the prompt comes last.
        """
        log_probs = self._log_probs(torch.cat((nodes, last[None])))  # (M + 1, V): row −1 is the prompt's
        tokens, depth = self._nodes
        path = log_probs[self._parents, tokens]  # (M,): of each node's token
        for level in range(2, MAX_NEW_TOKENS):
            path = torch.where(depth == level, path + path[self._parents.clamp(min=0)], path)
        ends = log_probs[:-1, self._stops].logsumexp(-1)  # (M,)
        p = (path + ends)[self._numbers].double().exp()  # (101,)
        mass = p.sum()
        expected = (p * torch.arange(len(NUMBERS), device=p.device)).sum() / mass
        return torch.stack((expected, mass)), log_probs.argmax(-1)

    def _walk(self, likeliest: list[int]) -> tuple[str, bool] | None:
        """The greedy reply, read off the tree; None where it leaves it."""
        node, reply = -1, []
        while (token := likeliest[node]) not in self.tokenizer.stop_ids:
            if (node := self.tree.child.get((node, token))) is None:
                return None
            reply.append(token)
        return self.tokenizer.decode(reply), True

    def _decode(self, lengths: Tensor, tokens: list[int]) -> list[tuple[str, bool]]:
        """The greedy reply to every prompt of the batch, token by token from their first ones, `tokens`."""
        replies = [tokens]
        for step in range(MAX_NEW_TOKENS - 1):
            place = (lengths + step)[:, None]
            ids = torch.tensor(replies[-1], device=self.device)[:, None]
            hidden = self._forward(ids, place, place, int(lengths.max()) + step + 1)[:, 0]
            replies.append(self._log_probs(hidden).argmax(-1).tolist())
        said = []
        for row in zip(*replies, strict=True):
            end = next((i for i, token in enumerate(row) if token in self.tokenizer.stop_ids), None)
            said.append((self.tokenizer.decode(row[:end]), end is not None))
        return said
