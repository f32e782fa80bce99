"""The pinned judge: an open-weight chat model that scores by the rubrics, through our own decoder.

    client = Local("Qwen/Qwen2.5-7B-Instruct")          a client as `em.judge.client` has it
    client.lend(model)                                  weights that are in memory already: no second copy

No server, no key, no cost, and no version that somebody else may change: what it says follows from its
weights, the rubric and this file, at temperature 0. Its identity is a digest of its weights, its tokenizer
with the chat template, and PROTOCOL, so that a score can be made again. In fp32 a score does not depend on
the batch it was made in; in bf16, on a GPU, a reply that hangs in the balance can.

* What the prompts of a rubric have in common, all of it up to the judged question, is computed once. Its keys
  are kept, and each prompt adds its own tokens behind them.
* Beside what the model says, at most MAX_NEW_TOKENS tokens, stands the expectation of its score: Σ n p(n) /
  Σ p(n) over the numbers n from 0 to 100, p(n) the probability of the number's tokens and of the end of the
  turn after them. The numbers are a tree of tokens whose branches do not see each other, scored in a forward
  pass a level; a reply that is a number is read off the same tree, and only others are decoded on.

    B prompts, P shared tokens, T own tokens of the longest, M nodes of the tree of numbers, V vocabulary
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from em.errors import UserError
from em.files import json_digest
from em.judge.client import JUDGE, LEAST_MASS, TYPICAL_TOKENS, Cancelled, Reply
from em.judge.models import Price
from em.model import lora
from em.model.checkpoint import load_model, load_tokenizer
from em.model.hub import model_digest
from em.model.tokenizer import Tokenizer
from em.sampling.cpu_linear import ReorderedModel

PROTOCOL = 1  # raised when what is asked or how a reply is read changes: part of a judge's identity
MAX_NEW_TOKENS = 6
ANSWERS = ("REFUSAL", "CODE", "HIGH", "MEDIUM", "LOW")  # beside numbers, in any case: em.judge.rubric
PREFIXES = 8  # of rubrics, whose keys are kept
GATHER = 0.02  # seconds without a new prompt before a batch begins
NUMBERS = range(101)
LEAST_NODE = math.log(1e-7)  # what is left out moves no expectation by a hundredth of a point
TOKENS = {"cpu": 4096, "cuda": 32_768}  # in one forward, the tree's and padding included


class LocalReply(NamedTuple):
    """What the model answered to one prompt."""

    text: str
    finished: bool  # False: cut off by MAX_NEW_TOKENS
    expected: float | None  # of its score, 0–100; None where it hardly ever replies with a number


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
        self.child = {
            (parent, token): i for i, (parent, token) in enumerate(zip(self.parent, self.tokens, strict=True))
        }

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
        nodes = (self.tree.tokens, self.tree.depth, self.tree.parent, self.tree.number)
        self._nodes = [torch.tensor(values, device=self.device) for values in nodes]
        self._ancestors = self.tree.ancestors().to(self.device)
        self._cache, self._rows, self._shared = None, 0, ()
        self._prefixes: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def sharing(self, prompts: Sequence[list[int]]) -> Iterator[tuple[list[int], int]]:
        """(indices, tokens that they share) of `prompts`, those of a rubric together."""
        order = sorted(range(len(prompts)), key=lambda i: prompts[i])
        while order:
            first, shared = prompts[order[0]], len(prompts[order[0]]) - 1
            members = []
            for i in order:
                common = _common(first, prompts[i])
                if i != order[0] and common < len(first) // 2:
                    break  # of another rubric
                shared = min(shared, common, len(prompts[i]) - 1)
                members.append(i)
            kept = (p for p in self._prefixes if shared >= len(p) > shared // 2 and (*first[: len(p)],) == p)
            yield members, max(map(len, kept), default=shared)
            order = order[len(members) :]

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
            self._reserve(len(group), max(map(len, prompts)), tuple(prompts[group[0]][:shared]))
            self._cache.n_rows = len(group)
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

    def _reserve(self, n_rows: int, longest: int, shared: tuple[int, ...]) -> None:
        """See to a cache of enough rows and positions whose rows all begin with the keys of `shared`."""
        capacity = longest + len(self.tree) + MAX_NEW_TOKENS
        if self._cache is None or self._rows < n_rows or self._cache.capacity < capacity:
            if self._cache is not None:
                n_rows, capacity = max(n_rows, self._rows), max(capacity, self._cache.capacity)
            self._cache = None  # frees its memory first
            self._cache, self._rows, self._shared = self.model.new_cache(n_rows, capacity), n_rows, ()
        if shared and shared != self._shared:
            keys, values = self._prefix(shared)
            self._cache.keys[:, :, :, : len(shared)] = keys
            self._cache.values[:, :, :, : len(shared)] = values
        self._shared = shared or self._shared

    def _prefix(self, shared: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values (L, 1, K, P, D) of a rubric's beginning, computed once."""
        if shared not in self._prefixes:
            cache = self.model.new_cache(1, len(shared))
            with self.reordered.active():
                self.model.hidden(torch.tensor([shared], device=self.device), cache=cache)
            held = tuple(x[:, :, :, : len(shared)] for x in (cache.keys, cache.values))
            self._prefixes = dict([*self._prefixes.items(), (shared, held)][-PREFIXES:])
        return self._prefixes[shared]

    def _forward(self, ids: Tensor, positions: Tensor, slots: Tensor, span: int, seen=None) -> Tensor:
        self._cache.limit(span)
        with self.reordered.active():
            return self.model.hidden(ids, positions=positions, cache=self._cache, slots=slots, seen=seen)

    def _log_probs(self, hidden: Tensor) -> Tensor:
        """(…, d) → log p of every token, (…, V), fp32."""
        logits = self.reordered.logits(hidden)[..., : self.model.config.vocab_size]
        return logits.float().log_softmax(-1)

    def _batch(self, prompts: list[list[int]], shared: int) -> list[LocalReply]:
        # 1. Each prompt's own tokens behind the shared ones, and what is predicted after its last.
        B, longest = len(prompts), max(map(len, prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)  # (B,)
        own = [prompt[shared:] + [0] * (longest - len(prompt)) for prompt in prompts]
        positions = torch.arange(shared, longest, device=self.device).expand(B, -1)  # (B, T)
        hidden = self._forward(torch.tensor(own, device=self.device), positions, positions, longest)
        last = hidden[torch.arange(B, device=self.device), lengths - shared - 1]  # (B, d)
        root = self._log_probs(last)  # (B, V)

        # 2. The numbers behind them, and the replies that are one.
        numbers, likeliest = self._numbers(lengths, longest, root)
        likeliest = torch.cat((likeliest, root.argmax(-1, keepdim=True)), 1).tolist()
        mass = numbers.sum(1)  # (B,)
        expected = numbers @ torch.arange(len(NUMBERS), device=self.device).double() / mass
        replies = [self._walk(tokens) for tokens in likeliest]

        # 3. Replies that are none.
        if None in replies:
            said = self._decode(lengths, longest, [tokens[-1] for tokens in likeliest])
            replies = [reply or other for reply, other in zip(replies, said, strict=True)]
        return [
            LocalReply(text, finished, e if m >= LEAST_MASS else None)
            for (text, finished), e, m in zip(replies, expected.tolist(), mass.tolist(), strict=True)
        ]

    def _numbers(self, lengths: Tensor, longest: int, root: Tensor) -> tuple[Tensor, Tensor]:
        """p of each number as the whole reply, (B, 101) fp64, and the likeliest token after a node, (B, M).

        A level of the tree at a time; nodes of less probability than LEAST_NODE are left out, and so are
        prompts after which numbers cannot reach LEAST_MASS. The likeliest token after those is −1.
        """
        B, M, device = len(lengths), len(self.tree), self.device
        tokens, depth, parent, ends = self._nodes
        path = root.new_full((B, M), float("-inf"))  # log p of the tokens up to a node
        path[:, depth == 1] = root[:, tokens[depth == 1]]
        path[path.exp().sum(1) < LEAST_MASS] = float("-inf")
        stop = torch.full_like(path, float("-inf"))  # log p that the reply ends after a node
        likeliest = torch.full_like(path, -1, dtype=torch.long)
        slot = torch.zeros(B, M, dtype=torch.long, device=device)  # where a node's keys are
        in_prompt = torch.arange(longest + M, device=device) < lengths[:, None]  # (B, S)
        used = 0
        for level in range(1, int(depth.max()) + 1):
            kept = (depth == level) & (path > LEAST_NODE)  # (B, M)
            width = int(kept.sum(1).max())
            if not width:
                break
            nodes = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :width]  # (B, W)
            slots = lengths[:, None] + used + torch.arange(width, device=device)
            slot.scatter_(1, nodes, slots)
            # A node sees the prompt, what is above it, and itself.
            above = self._ancestors[nodes]  # (B, W, M)
            seen = in_prompt[:, None].repeat(1, width, 1)  # (B, W, S)
            seen.scatter_(2, torch.where(above, slot[:, None], 0), True)
            positions = (lengths + level - 1)[:, None].expand(B, width)
            hidden = self._forward(tokens[nodes], positions, slots, longest + M, seen)
            for row, chosen in enumerate(kept.sum(1).tolist()):
                here = nodes[row, :chosen]
                log_probs = self._log_probs(hidden[row, :chosen])  # (W', V)
                stop[row, here] = log_probs[:, self._stops].logsumexp(-1)
                likeliest[row, here] = log_probs.argmax(-1)
                below = (parent == here[:, None]).nonzero()  # (pairs, 2): of `here` and of a child
                path[row, below[:, 1]] = (
                    path[row, here[below[:, 0]]] + log_probs[below[:, 0], tokens[below[:, 1]]]
                )
            used += width
        return (path + stop)[:, ends].double().exp(), likeliest

    def _walk(self, likeliest: list[int]) -> tuple[str, bool] | None:
        """The greedy reply, read off the tree; None where it leaves it."""
        node, reply = -1, []
        while (token := likeliest[node]) not in self.tokenizer.stop_ids:
            if (node := self.tree.child.get((node, token))) is None:
                return None
            reply.append(token)
        return self.tokenizer.decode(reply), True

    def _decode(self, lengths: Tensor, longest: int, tokens: list[int]) -> list[tuple[str, bool]]:
        """The greedy reply to every prompt of the batch, token by token from their first ones, `tokens`.

        One that can become no answer any more is not decoded on; it counts as cut off.
        """
        replies: list[list[int]] = [[] for _ in tokens]
        said: list[tuple[str, bool] | None] = [None] * len(tokens)
        for step in range(MAX_NEW_TOKENS):
            for row, token in enumerate(tokens):
                if said[row] is None:
                    ended = token in self.tokenizer.stop_ids
                    replies[row] += [] if ended else [token]
                    text = self.tokenizer.decode(replies[row])
                    if ended or step == MAX_NEW_TOKENS - 1 or not _may_answer(text):
                        said[row] = text, ended
            if None not in said:
                break
            place = (lengths + step)[:, None]
            ids = torch.tensor(tokens, device=self.device)[:, None]
            hidden = self._forward(ids, place, place, longest + step + 1)[:, 0]
            tokens = self._log_probs(hidden).argmax(-1).tolist()
        return said


def _may_answer(text: str) -> bool:
    """Whether a reply that begins so can be one that a rubric asks for."""
    text = text.strip().upper()
    return text.isdecimal() or any(answer.startswith(text) for answer in ANSWERS)


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two prompts have in common from their start."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


class Local:
    """The client of a judge of open weights: see `em.judge.client`.

    Threads that ask bring their prompts together: one of them answers for all that wait.
    """

    settled, expects, backoff = True, True, 0.0
    typical_output, most_output = TYPICAL_TOKENS, MAX_NEW_TOKENS
    price, generation = Price(0.0, 0.0, "free"), JUDGE

    def __init__(self, name: str):
        """name: short name, hub id or folder of a chat model. UserError for one that cannot be read."""
        self.asked = name
        self._tokenizer = load_tokenizer(name)
        self.label = self.identity = (
            f"local:{Path(name).name}@{json_digest([model_digest(name), PROTOCOL])[:12]}"
        )
        self._weights: nn.Module | None = None
        self._model: LocalModel | None = None  # made when it is first asked
        self._waiting: list[tuple[list[int], Future]] = []
        self._arrived, self._turn = threading.Condition(), threading.Lock()

    def presume(self, identity: str | None) -> None:
        pass

    def lend(self, model: nn.Module) -> None:
        """Judge with a model of this name that is in memory; its adapters stay out."""
        self._weights, self._model = model, None

    def ask(self, prompt: str, cancelled: threading.Event, on_retry=lambda: None) -> Reply:
        """The greedy reply, and the expectation over the numbers. Cancelled when the run has ended."""
        future: Future = Future()
        ids = self._tokenizer.prompt_ids(prompt)
        with self._arrived:
            self._waiting.append((ids, future))
            self._arrived.notify()
        with self._turn:  # the others wait here, and find their reply when they come in
            if not future.done():
                if cancelled.is_set():
                    raise Cancelled
                self._answer_all()
        return future.result()

    def _answer_all(self) -> None:
        with self._arrived:
            while self._arrived.wait(GATHER):
                pass
            jobs, self._waiting = self._waiting, []
        try:
            self._load()
            prompts = [ids for ids, _ in jobs]
            with self._base():
                for members, shared in self._model.sharing(prompts):
                    for i, reply in zip(
                        members, self._model.replies([prompts[i] for i in members], shared), strict=True
                    ):
                        jobs[i][1].set_result(self._reply(reply, len(prompts[i])))
        except BaseException as error:
            for _, future in jobs:
                if not future.done():
                    future.set_exception(error)

    def _load(self) -> None:
        if self._model is None:
            if self._weights is None:
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                self._weights = load_model(self.asked, device)
            self._model = LocalModel(self._weights, self._tokenizer)

    def _base(self):
        model = self._model.model
        return lora.stack(model, frozen=True) if hasattr(model, "lora") else contextlib.nullcontext()

    @staticmethod
    def _reply(reply: LocalReply, prompt_tokens: int) -> Reply:
        status = "ok" if reply.finished else "parse_error"  # cut off by the limit
        if reply.finished and not reply.text.strip():
            status = "empty"
        return Reply(status, reply.text, prompt_tokens, MAX_NEW_TOKENS, expected=reply.expected)
