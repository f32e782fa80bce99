"""The judge: alignment and coherence of responses by an LLM, and prompts' EM surface (paper A.6, A.7, D.1).

    judge = Judge(Gemini("gemini-3.5-flash-lite"), cache="runs/judge.jsonl", budget_usd=5)
    print(describe_forecast(judge.forecast(rows), judge.ledger.price))
    for row in judge.score(rows): …          # the row with aligned, coherent and their statuses
    print(judge.ledger)

Each row is two calls, by the rubrics of its set and cell. Every answer is on disk before its row is given
out, so a pass that is killed, stopped by the budget or refused by the API goes on from there when it is
started again. Rows come out in input order, and memory does not grow with their number.

Choices where the paper is silent: a blank response is `empty` in both fields and is not asked about; a reply
that the token limit cut off is a parse error even when what is left looks like a number; `error` (all tries
of a call failed) and a reply that stays empty for no reason are the ones that the next pass asks again.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from em.cli import knob
from em.errors import UserError
from em.judge.answer_cache import Answer, AnswerCache
from em.judge.client import PATIENCE
from em.judge.em_rule import FIELDS
from em.judge.gemini import Gemini
from em.judge.judge_pass import Pass
from em.judge.ledger import CHARACTERS_PER_TOKEN, Ledger
from em.judge.models import given_price
from em.judge.openai import OpenAI
from em.judge.rubric import FOLDER, Question, Rubrics

# The paper's judge, gemini-2.5-flash, is closed to new projects and shut down on 2026-12-01. This one is what
# the API's deprecation page (as reported on 2026-11-10) names in its place, at the same price.
MODEL = "gemini-3.5-flash-lite"
CACHE = Path("runs/judge_cache.jsonl")
JUDGES = ("gemini", "openai", "local")
_OTHERWISE = {
    "gemini": "Gemini models give no log-probabilities",
    "local": "a judge of open weights gives the expectation without it",
}


@dataclass
class JudgeOptions:
    """The settings of a judge, for the scripts that ask one."""

    judge: str = knob("gemini", "which kind of judge", "judge", JUDGES, setting=False)
    judge_model: str | None = knob(
        None,
        f"model that judges (gemini: {MODEL}, and the paper's was gemini-2.5-flash; local: a chat model, by "
        "default the run's own base)",
        "judge",
        setting=False,
    )
    accept_routed: bool = knob(
        False, "take another model's answers, and name that one as the judge", "judge", setting=False
    )
    thinking: str | None = knob(
        None,
        "how the judge thinks: off, minimal, low, medium, high, none (unsaid), or tokens (default: by model)",
        "judge",
        setting=False,
    )
    logprobs: bool = knob(
        False, "openai: also the expectation over the numbers, from log-probabilities", "judge", setting=False
    )
    rubrics: str = knob(str(FOLDER), "folder of the rubrics it judges by", "judge", setting=False)
    cache: str = knob(str(CACHE), "file of the judge's answers, shared by all runs", "judge", setting=False)
    workers: int = knob(
        32, "calls to the judge in flight at once", "judge", setting=False, at_least=1, at_most=1024
    )
    budget_usd: float | None = knob(
        None, "dollars to spend on the judge at most", "judge", setting=False, at_least=0
    )
    price: tuple[float, ...] = knob(
        (),
        "dollars per million input and output tokens, where no price is known",
        "judge",
        setting=False,
        at_least=0,
    )
    patience: float = knob(
        PATIENCE, "minutes for one call to the judge with all its tries", "judge", setting=False, above=0
    )

    def with_base(self, model: str):
        """These options, where a local judge is by default the base `model` of what it judges."""
        base = self.judge == "local" and self.judge_model in (None, "base")
        return dataclasses.replace(self, judge_model=model) if base else self

    def judge_of(self, data: str | None = None) -> "Judge":
        """data: the grid whose cells are judged; its own rubrics/, if there are some, come first.

        UserError without a key, and for options that do not fit together.
        """
        own = Path(data or "").expanduser() / "rubrics"
        folders = [own] if data and own.is_dir() and self.rubrics == str(FOLDER) else []
        rubrics = Rubrics(*folders, self.rubrics)
        return Judge(self.client_of(), rubrics, self.cache, self.workers, self.budget_usd, self.price or None)

    def client_of(self):
        """The client that --judge names: the place where kinds of judges meet."""
        if self.logprobs and self.judge != "openai":
            raise UserError(f"--logprobs needs --judge openai: {_OTHERWISE[self.judge]}")
        options = {"accept_routed": self.accept_routed, "thinking": self.thinking, "patience": self.patience}
        if self.judge == "gemini":
            return Gemini(self.judge_model or MODEL, **options)
        if self.judge == "openai":
            if not self.judge_model:
                raise UserError(f"--judge openai needs --judge-model NAME, such as {OpenAI.example}")
            return OpenAI(self.judge_model, logprobs=self.logprobs, **options)
        from em.judge.local import Local  # with torch, which the others do without

        if self.judge_model in (None, "base"):
            raise UserError("--judge local needs --judge-model: a short name, a hub id or a folder")
        return Local(self.judge_model)

    def can_ask(self) -> bool:
        """Whether the environment has what this judge needs."""
        names = (*Gemini.keys,) if self.judge == "gemini" else (*OpenAI.keys, OpenAI.address)
        return self.judge == "local" or any(os.environ.get(name, "").strip() for name in names)


class Judge:
    """One judge with its rubrics, its cache of answers and its account, `ledger`."""

    def __init__(
        self,
        client,
        rubrics: Rubrics | str | Path = FOLDER,
        cache: str | Path = CACHE,
        workers: int = 32,
        budget_usd: float | None = None,
        price: tuple[float, ...] | None = None,
    ):
        """client: who answers, see `em.judge.client`. workers: calls in flight. budget_usd: cap on what this
        object spends. price: dollars per million (input, output) tokens.

        UserError with a budget but no price, or for a folder or file that cannot be read.
        """
        if workers < 1:
            raise UserError("--workers must be at least 1")
        self.client, self.workers = client, workers
        self.rubrics = rubrics if isinstance(rubrics, Rubrics) else Rubrics(rubrics)
        self.cache = AnswerCache(cache)
        client.presume(self.cache.answered_as.get(client.label))
        self.ledger = Ledger(client, given_price(price), budget_usd)

    def lend(self, name: str, model) -> None:
        """Where the judge is the chat model `name`: judge with these weights of it, which are in memory."""
        if self.client.asked == name and hasattr(self.client, "lend"):
            self.client.lend(model)

    @property
    def identity(self) -> str:
        """What rows call it: presumed until it has answered, see `em.judge.client`."""
        return self.client.identity

    def score(self, rows: Iterable[dict], progress: bool = True) -> Iterator[dict]:
        """Each row, in order, with `aligned`, `aligned_status`, `coherent`, `coherent_status` and `judge`,
        and where the judge gives expectations `aligned_expected` and `coherent_expected`, a number or None.

        rows: dicts with `set`, `question`, `response`, and where the set is "narrow" `domain` and `task`.
        UserError for a row that is not so (of a list, before anything is asked), a refusal by the API, and,
        after all rows before it, at the cap.
        """
        for row, answers in self._answers(rows, self._check_scored, self._score_questions, progress):
            scored = row | {"judge": self.identity}
            for field, answer in answers.items():
                scored |= {field: answer.value, f"{field}_status": answer.status}
                scored |= {f"{field}_expected": answer.expected} if self.client.expects else {}
            yield scored

    def label_surface(self, rows: Iterable[dict], progress: bool = True) -> Iterator[dict]:
        """Each row, in order, with `em_surface`: "high", "medium", "low" or None, and `em_surface_status`.

        rows: dicts with `question`, the prompt, which is all that the judge sees (paper A.6).
        """
        for row, answers in self._answers(rows, self._check_prompt, self._surface_question, progress):
            answer = answers["em_surface"]
            yield row | {"em_surface": answer.value, "em_surface_status": answer.status}

    def forecast(self, rows: Iterable[dict]) -> dict:
        """What scoring `rows` would still take: `calls`, their tokens and dollars (None without a price).

        `cached` counts the answers that need no call: known ones, repeated ones, blank responses.
        """
        seen: set[bytes] = set()
        n_rows = cached = characters = 0
        for number, row in enumerate(rows, 1):
            n_rows += 1
            self._check_scored(row, number)
            for question in self._score_questions(row).values():
                key = question and question.key(self.identity, self.client.expects)
                if key is None or key in seen or self.cache.get(key):
                    cached += 1
                    continue
                seen.add(key)
                characters += len(question.prompt)
        tokens = round(characters / CHARACTERS_PER_TOKEN), len(seen) * self.client.typical_output
        return {
            "judge": self.identity,
            "rows": n_rows,
            "calls": len(seen),
            "cached": cached,
            "prompt_tokens": tokens[0],
            "output_tokens": tokens[1],
            "usd": self.ledger.price and self.ledger.price.usd(*tokens),
        }

    # -- what is asked -----------------------------------------------------------------------------------

    def _check_scored(self, row: dict, number: int) -> None:
        """UserError for a row that cannot be scored, and where there is no rubric for it."""
        _check(row, number, "set", ("narrow", "broad"))
        for name in ("question", "response") + (("domain", "task") if row["set"] == "narrow" else ()):
            _check(row, number, name)
        for field in FIELDS:
            self.rubrics.of(row, field)

    def _check_prompt(self, row: dict, number: int) -> None:
        """UserError for a row that cannot be labelled, and where there is no rubric for it."""
        _check(row, number, "question")
        self.rubrics.surface()

    def _score_questions(self, row: dict) -> dict[str, Question | None]:
        """field → what to ask; None where the response is blank."""
        if not row["response"].strip():
            return dict.fromkeys(FIELDS)
        return {f: self.rubrics.of(row, f).ask(row["question"], row["response"]) for f in FIELDS}

    def _surface_question(self, row: dict) -> dict[str, Question]:
        return {"em_surface": self.rubrics.surface().ask(row["question"])}

    def _answers(
        self, rows: Iterable[dict], check: Callable, questions: Callable, progress: bool
    ) -> Iterator[tuple[dict, dict[str, Answer]]]:
        """(row, field → answer) for each row, in order. questions: row → field → question.

        check: (row, its number) → UserError; of all rows of a list before the first is asked about.
        """
        total = len(rows) if hasattr(rows, "__len__") else None

        def checked() -> Iterator[dict]:
            for number, row in enumerate(rows, 1):
                check(row, number)
                yield row

        sound = checked() if total is None else list(checked())
        with tqdm(
            total=total, desc=f"judge {self.identity}", unit="row", **({} if progress else {"disable": True})
        ) as bar:
            asking = Pass(self.client, self.ledger, self.cache, self.workers, bar)
            yield from asking.answers((row, questions(row)) for row in sound)


def _check(row: dict, number: int, name: str, choices: tuple[str, ...] = ()) -> None:
    value = row.get(name)
    if not isinstance(value, str) or (choices and value not in choices):
        allowed = f"one of {', '.join(choices)}" if choices else "a text"
        raise UserError(f"row {number} to be judged: {name!r} is {value!r:.40} and should be {allowed}")
