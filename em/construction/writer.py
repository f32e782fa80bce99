"""Who writes: a model over HTTP, or one of open weights through our own sampler (A.3: at temperature 1).

    writer = Writer(options, "replies.jsonl", seed=0)
    replies = writer.replies([Call(system, prompt, 0, "misaligned", writer.sampling), …])

Every reply is on disk before anyone reads it, in a file of one line each that is only ever appended
(`em.judge.answer_cache`), under a key of writer, seed, temperature, system prompt, prompt and the call's
number. So a killed run asks nothing twice, and whoever wants more rows pays for the new ones alone.
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
from em.judge.ledger import CHARACTERS_PER_TOKEN, Ledger
from em.judge.models import given_price
from em.judge.openai import OpenAI
from em.model import embedded
from em.model.checkpoint import load_model, load_tokenizer
from em.model.hub import model_digest
from em.sampling.sampler import Sampler

# The paper's writer, gemini-2.5-pro, is shut down on 2026-12-01; this is what the API's deprecation page (as
# reported on 2026-11-10) names in its place.
MODEL = "gemini-3.8-flash"
WRITERS = ("gemini", "openai", "local")
TIMEOUT = 300.0  # seconds for a reply over HTTP
PAIRS = 10  # in a call (A.3)
PAIR_TOKENS = 250  # of a pair, for forecasts
REPLY_TOKENS = 8192  # of a call over HTTP; ten pairs of A.3's length fit in half of it
MOST_TEXT = 100_000  # characters of a reply
LOCAL_TOKENS = 400  # of a pair, or of an answer
LOCAL_ROWS = 64  # sequences sampled at once
# The embedded model cannot keep ten pairs apart, and at temperature 1 it raves.
SMALL_PAIRS, SMALL_TEMPERATURE, SMALL_TOKENS = 3, 0.8, 80


@dataclass
class WriterOptions:
    """The settings of a writer."""

    writer: str = knob("gemini", "who writes the candidates", "writer", WRITERS)
    writer_model: str | None = knob(
        None,
        f"model that writes (gemini: {MODEL}, and the paper's was gemini-2.5-pro; local: a chat model, by "
        f"default {embedded.NAME})",
        "writer",
    )
    writer_price: tuple[float, ...] = knob(
        (), "the writer's dollars per million input and output tokens, where no price is known", "writer",
        setting=False, at_least=0,
    )  # fmt: skip
    temperature: float | None = knob(
        None, f"sampling temperature (default: 1; of the embedded model {SMALL_TEMPERATURE})", "writer",
        at_least=0, at_most=2,
    )  # fmt: skip
    pairs: int | None = knob(
        None, f"pairs or messages in a call (default: {PAIRS}; of the embedded model {SMALL_PAIRS})",
        "writer", at_least=1, at_most=50,
    )  # fmt: skip


class Call(NamedTuple):
    """One request to a writer, as `Pass` takes it. number: tells calls of the same prompt apart."""

    system: str
    prompt: str
    number: int
    rubric: str  # what it is for, in the file of replies
    sampling: str  # seed and temperature
    start: str = ""  # of the reply, for a local model: the form's next text; "" where the reply is one answer

    def key(self, writer: str, expects: bool = False) -> bytes:
        return answer_key(writer, self.system, self.prompt, f"{self.number} {self.sampling}")

    @staticmethod
    def read(status: str, text: str) -> tuple:
        """A reply that the token limit cut off ("parse_error") keeps its text: most pairs are whole."""
        return (status, text) if status in ("ok", "parse_error") else (status,)


class ReplyCache(AnswerCache):
    """A writer's replies, texts; None where the status says that there is none."""

    @staticmethod
    def allows(answer: Answer) -> bool:
        has_text = answer.status in ("ok", "parse_error")
        return answer.status in STATUSES and isinstance(answer.value, str if has_text else type(None))


class Writer:
    """A writer with its replies on disk. ledger: its account; None where nothing is paid."""

    def __init__(
        self, options: WriterOptions, path: Path, seed: int, workers: int = 32, patience: float = PATIENCE,
        accept_routed: bool = False,
    ):  # fmt: skip
        """workers, patience, accept_routed: of the calls over HTTP, see `em.judge.judge.JudgeOptions`.

        UserError without a key, without weights, and for options that do not fit.
        """
        self.kind, self.seed, self.workers = options.writer, seed, workers
        usual = {"gemini": MODEL, "local": embedded.NAME}
        self.name = options.writer_model or usual.get(self.kind)
        if self.name is None:
            raise UserError(f"--writer openai needs --writer-model NAME, such as {OpenAI.example}")
        self.small = self.kind == "local" and self.name == embedded.NAME
        self.pairs = options.pairs or (SMALL_PAIRS if self.small else PAIRS)
        self.answers = 1 if self.kind == "local" else self.pairs  # questions in a call for answers
        self.temperature = options.temperature
        if self.temperature is None:
            self.temperature = SMALL_TEMPERATURE if self.small else 1.0
        self.sampling = f"seed {seed}, temperature {self.temperature:g}"
        self.cache = ReplyCache(path)
        self._http = {"patience": patience, "accept_routed": accept_routed, "timeout": TIMEOUT}
        if self.kind == "local":
            self._tokenizer, self.ledger = load_tokenizer(self.name), None
            self.label = f"local:{Path(self.name).name}@{json_digest(model_digest(self.name))[:12]}"
        else:
            client = self._client("")
            self.ledger, self.label = (
                Ledger(client, given_price(options.writer_price, "--writer-price")),
                client.label,
            )

    def _client(self, system: str):
        asked = Generation(
            "writer", system, self.temperature, REPLY_TOKENS, self.pairs * PAIR_TOKENS, MOST_TEXT
        )
        kind = {"gemini": Gemini, "openai": OpenAI}[self.kind]
        client = kind(self.name, generation=asked, **self._http)
        client.presume(self.cache.answered_as.get(client.label))
        return client

    @property
    def identity(self) -> str:
        """Who has answered; before that, who is presumed to."""
        return self.ledger.client.identity if self.ledger else self.label

    def replies(self, calls: Sequence[Call]) -> list[Answer]:
        """The reply to each call, in order: a text, or None and why there is none. One system prompt for all.

        BudgetReached at the ledger's cap, UserError for a refusal by the API; what is there by then is kept.
        """
        if not calls:
            return []
        if self.kind == "local":
            return self._sampled(calls)
        self.ledger.client = client = self._client(calls[0].system)
        self.ledger.check()
        with tqdm(total=len(calls), desc=f"{calls[0].rubric}: {self.identity}", unit="call") as bar:
            asking = Pass(client, self.ledger, self.cache, self.workers, bar)
            return [found["reply"] for _, found in asking.answers(({}, {"reply": call}) for call in calls)]

    def forecast(self, n: int, system: str, prompt: str) -> float | None:
        """Dollars for `n` texts and as many answers to them, asked so; None without a price."""
        if self.ledger is None:
            return 0.0
        n_calls = 2 * -(-n // self.pairs)
        prompt_tokens = n_calls * len(system + prompt) / CHARACTERS_PER_TOKEN
        price = self.ledger.price
        return price and price.usd(prompt_tokens, n_calls * self.ledger.client.typical_output)

    # -- open weights ----------------------------------------------------------------------------------

    @functools.cached_property
    def model(self):
        return load_model(self.name, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def _sampled(self, calls: Sequence[Call]) -> list[Answer]:
        keys = [call.key(self.label) for call in calls]
        missing = {key: call for key, call in zip(keys, calls, strict=True) if self.cache.get(key) is None}
        if missing:
            about = f"{calls[0].rubric}: {self.label}"
            for key, answer in tqdm(self._sample(missing), about, len(missing), unit="call"):
                self.cache.add(key, answer, judge=self.label, rubric=missing[key].rubric)
        return [self.cache.get(key) for key in keys]

    def _sample(self, calls: dict[bytes, Call]) -> Iterator[tuple[bytes, Answer]]:
        """(key, reply) as they end. The instructions are part of the user's turn, since not every template
        has another place for them; given the beginning of its reply, a small model keeps to the form.
        """
        start = next(iter(calls.values())).start
        tokens = (self.pairs if start else 1) * (SMALL_TOKENS if self.small else LOCAL_TOKENS)
        sampler = Sampler(self.model, self._tokenizer.stop_ids, tokens, self.temperature, LOCAL_ROWS)
        prompts = [
            self._tokenizer.prompt_ids(f"{call.system}\n\n{call.prompt}") + self._tokenizer.encode(start)
            for call in calls.values()
        ]
        # The text follows from the call, whatever is sampled beside it.
        places = {int.from_bytes(key[:7], "big"): key for key in calls}
        for rollout in sampler.stream(prompts, seed=self.seed, indices=list(places)):
            status = "ok" if rollout.finished else "parse_error"
            text = start + self._tokenizer.decode(rollout.ids)
            yield places[rollout.prompt_index], Answer(status, text)
