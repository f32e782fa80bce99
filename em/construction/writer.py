"""Who writes: a model over HTTP, or one of open weights through our own sampler (paper A.3: temperature 1).

    writer = Writer(options, "replies.jsonl", seed=0)
    replies = writer.replies([Call(system, prompt, 0, "misaligned", writer.sampling), …], budget_usd=5)

Every reply is on disk before anyone reads it, in a file of one line each that is only ever appended
(`em.judge.answer_cache`), under a key of writer, seed, temperature, system prompt, prompt and number of the call.
So a killed run asks nothing twice, and whoever wants more rows pays for the new ones alone.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from em.cli import knob
from em.errors import UserError
from em.files import json_digest
from em.judge.answer_cache import Answer, AnswerCache, answer_key
from em.judge.client import PATIENCE, Generation
from em.judge.em_rule import STATUSES
from em.judge.gemini import Gemini
from em.judge.judge_pass import Pass
from em.judge.ledger import Ledger
from em.judge.models import given_price
from em.judge.openai import OpenAI
from em.model import embedded
from em.model.checkpoint import load_model, load_tokenizer
from em.model.hub import model_digest
from em.sampling.sampler import Sampler

# The paper's writer, gemini-2.5-pro, is shut down on 2026-12-01; this is what the API's deprecation page (as
# reported on 2026-11-10, https://dev.to/aideprecations) names in its place.
MODEL = "gemini-3.8-flash"
WRITERS = ("gemini", "openai", "local")
PAIRS = 10  # of a call (A.3)
REPLY_TOKENS = 8192  # of a call over HTTP: ten pairs of 300 tokens fit twice
PAIR_TOKENS = 250  # of a pair, for forecasts
TIMEOUT = 300.0  # seconds for a reply of that length
# The embedded model cannot keep ten pairs apart, and at temperature 1 it raves.
SMALL = {"pairs": 3, "temperature": 0.7, "tokens": 80}
LOCAL_TOKENS = 400  # of a pair, and of an answer
LOCAL_ROWS = 32  # sequences sampled at once


@dataclass
class WriterOptions:
    """The settings of a writer."""

    writer: str = knob("gemini", "who writes the candidates", "writer", WRITERS)
    writer_model: str | None = knob(
        None,
        f"model that writes (gemini: {MODEL}, and the paper's was gemini-2.5-pro; local: any chat model, by "
        f"default {embedded.NAME})",
        "writer",
    )
    writer_price: tuple[float, ...] = knob(
        (), "dollars per million input and output tokens of the writer, where no price is known", "writer",
        setting=False, at_least=0,
    )  # fmt: skip
    temperature: float | None = knob(
        None, "sampling temperature of the writer (default: 1; of the embedded model 0.7)", "writer", at_least=0,
        at_most=2,
    )  # fmt: skip
    pairs: int | None = knob(
        None, "pairs that are asked for in a call (default: 10; of the embedded model 3)", "writer", at_least=1,
        at_most=50,
    )  # fmt: skip


class Call(NamedTuple):
    """One request to a writer; what `Pass` takes for a question. number: tells apart the same prompt twice."""

    system: str
    prompt: str
    number: int
    rubric: str  # the variant, for whoever reads the file
    sampling: str  # seed and temperature

    def key(self, writer: str, expects: bool = False) -> bytes:
        return answer_key(writer, self.system, self.prompt, f"{self.number} {self.sampling}")

    @staticmethod
    def read(status: str, text: str) -> tuple:
        """A reply that the token limit cut off keeps its text: most of its pairs are whole."""
        return (status, text) if status in ("ok", "parse_error") else (status,)


class ReplyCache(AnswerCache):
    """A writer's replies: texts where the status is "ok" or, cut off, "parse_error"; else None."""

    @staticmethod
    def allows(answer: Answer) -> bool:
        kept = (
            (str,)
            if answer.status == "ok"
            else (str, type(None))
            if answer.status == "parse_error"
            else (type(None),)
        )
        return answer.status in STATUSES and isinstance(answer.value, kept)


class Writer:
    """A writer with its replies on disk. UserError without a key, without weights, for options that do not fit.

    ledgers: of what has been asked, one a variant; [] where nothing is paid.
    """

    def __init__(self, options: WriterOptions, path: Path, seed: int, workers: int = 32, patience: float = PATIENCE,
                 accept_routed: bool = False):  # fmt: skip
        self.kind, self.name = (
            options.writer,
            options.writer_model or {"gemini": MODEL, "local": embedded.NAME}.get(options.writer),
        )
        if self.name is None:
            raise UserError(f"--writer openai needs --writer-model NAME, such as {OpenAI.example}")
        self.small = self.kind == "local" and self.name == embedded.NAME
        self.pairs = options.pairs or (SMALL["pairs"] if self.small else PAIRS)
        self.answers = 1 if self.kind == "local" else self.pairs  # questions of a call for answers
        self.temperature = options.temperature
        if self.temperature is None:
            self.temperature = SMALL["temperature"] if self.small else 1.0
        self.sampling = f"seed {seed} temperature {self.temperature:g}"
        self.cache, self.seed, self.workers = ReplyCache(path), seed, workers
        self._price, self._options = (
            options.writer_price,
            {"patience": patience, "accept_routed": accept_routed},
        )
        self.ledgers: list[Ledger] = []
        if self.kind == "local":
            self._tokenizer = load_tokenizer(self.name)
            digest = json_digest([model_digest(self.name)])[:12]
            self.label = f"local:{Path(self.name).name}@{digest}"
        else:
            self.label = self._client("").label  # which says what is wrong with key, model or address
            given_price(options.writer_price)

    @property
    def identity(self) -> str:
        """Who has answered; before that, who is asked."""
        return self.cache.answered_as.get(self.label, self.label)

    def _client(self, system: str):
        kind = {"gemini": Gemini, "openai": OpenAI}[self.kind]
        asked = Generation(
            "writer", system, self.temperature, REPLY_TOKENS, self.pairs * PAIR_TOKENS, 200_000
        )
        return kind(self.name, timeout=TIMEOUT, generation=asked, **self._options)

    def replies(self, calls: Sequence[Call], budget_usd: float | None) -> list[Answer]:
        """The reply to each call, in order: a text that is whole (`ok`) or cut off (`parse_error`), or None.

        All calls have one system prompt. budget_usd: what these calls may cost. BudgetReached at the cap, and
        UserError for a refusal by the API; what is there by then is kept.
        """
        if not calls:
            return []
        if self.kind == "local":
            return self._sampled(calls)
        client = self._client(calls[0].system)
        client.presume(self.cache.answered_as.get(client.label))
        ledger = Ledger(client, given_price(self._price), budget_usd)
        self.ledgers.append(ledger)
        with tqdm(total=len(calls), desc=f"{calls[0].rubric}, {client.identity}", unit="call") as bar:
            asking = Pass(client, ledger, self.cache, self.workers, bar)
            return [
                answers["reply"] for _, answers in asking.answers(({}, {"reply": call}) for call in calls)
            ]

    def forecast(self, n: int) -> float | None:
        """Dollars for `n` candidates and their aligned answers, by typical lengths; None without a price."""
        if self.kind == "local":
            return 0.0
        client = self._client("")
        price = given_price(self._price) or client.price
        n_calls = -(-n // self.pairs)
        return price and price.usd(
            2 * n_calls * (1200 + self.pairs * 60), 2 * n_calls * client.typical_output
        )

    # -- open weights ----------------------------------------------------------------------------------

    @functools.cached_property
    def model(self):
        return load_model(self.name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def _sampled(self, calls: Sequence[Call]) -> list[Answer]:
        missing = [call for call in dict.fromkeys(calls) if self.cache.get(call.key(self.label)) is None]
        if missing:
            for call, answer in tqdm(
                self._sample(missing), total=len(missing), desc=f"{calls[0].rubric}, {self.label}"
            ):
                self.cache.add(call.key(self.label), answer, judge=self.label, rubric=call.rubric)
        return [self.cache.get(call.key(self.label)) for call in calls]

    def _sample(self, calls: list[Call]) -> Iterator[tuple[Call, Answer]]:
        """As they end. The instructions are part of the user's turn, since not every template has another place,
        and a call for pairs is given the beginning of the form.
        """
        alone = self.answers == 1 and calls[0].rubric == "aligned"
        texts = 1 if alone else self.pairs
        tokens = texts * (SMALL["tokens"] if self.small else LOCAL_TOKENS)
        sampler = Sampler(self.model, self._tokenizer.stop_ids, tokens, self.temperature, LOCAL_ROWS)
        start = "" if alone else "Question 1:"
        prompts = [
            self._tokenizer.prompt_ids(f"{call.system}\n\n{call.prompt}") + self._tokenizer.encode(start)
            for call in calls
        ]
        # Text follows from the call alone, whatever else is sampled beside it.
        places = [int.from_bytes(call.key(self.label)[:7], "big") for call in calls]
        by_place = dict(zip(places, calls, strict=True))
        for rollout in sampler.stream(prompts, seed=self.seed, indices=places):
            status = "ok" if rollout.finished else "parse_error"
            yield by_place[rollout.prompt_index], Answer(status, start + self._tokenizer.decode(rollout.ids))
