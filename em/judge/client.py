"""What a judge is to the rest of the code: one small interface, and what its clients over HTTP share.

A writer of data (em.construction) is asked through the same clients: `Generation` says how it differs.

    client.asked            the name it is asked for by
    client.identity         what rows, reports and the cache's keys call it. Judges whose scores can differ
                            never share one: over HTTP it is the model that answered, and how it was asked
                            where that is not its usual way; for weights of one's own, their digest.
    client.settled          whether `identity` is sure; before, it is what is presumed
    client.presume(name)    take an identity from earlier answers under the same `label`, where it can be that
    client.label            `asked`, with what makes the same name another judge
    client.price            `Price`, or None where none is known
    client.typical_output, client.most_output       tokens of one answer: for forecasts, and at most
    client.generation       `Generation`: what it is asked to be, and how long its answers may be
    client.expects          whether replies carry the expectation over the numbers 0–100 as well
    client.backoff          seconds before an empty reply that may pass is asked for again
    client.ask(prompt, cancelled, on_retry) → Reply

`ask` comes from many threads at once, `--workers` of them; a client that is faster with many prompts together
collects what its threads bring. The first call of a pass goes alone, so that `identity` is settled before any
row is given out. Clients: `gemini.Gemini`, `openai.OpenAI`.

Over HTTP: 429, 408, 5xx, time-outs, broken connections and bodies that are not the API's JSON are tried
again, with exponential back-off and jitter and never before the time the server names (`Retry-After`, in
seconds or as a date, or a field of the body), as long as the call's tries and patience last. A setting that a
model refuses by name is asked for in another way, once each, and the way that works is kept. Any other
refusal ends the run with the API's own message, and so does a quota of the day that is used up.

The key must not leak, and a server may say anything. What it says leaves a try as the `text` and `model` of
an outcome, and there they are cleaned (`HTTPClient._cleaned`), before a cache, a row, a message or a log can
have them.
"""

import json
import math
import os
import random
import re
import threading
import time
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urlsplit

import requests

from em.errors import UserError
from em.judge.models import Price, is_version, known_price
from em.judge.transport import NoReply, Transport

REPLY_TOKENS = 20  # at most
TYPICAL_TOKENS = 3  # of "85" or "REFUSAL"
LEAST_MASS = 0.25  # of the probability on numbers, for an expectation, as in Betley et al.'s judge
LONGEST_BACKOFF = 60.0  # seconds between two tries, where the server names no time
PATIENCE = 30.0  # minutes
# What reading a field raises where JSON is of another shape than the API's, or too deep to be printed.
FAULTS = (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError)
MOST_TEXT = 500  # characters of what a server says
MOST_TOKENS = 2**31 - 1  # of one call; the API's counts have 32 bits
TOMORROW = "the quota of the day is used up; what is done is kept, go on tomorrow with the same command"


class Generation(NamedTuple):
    """What is asked of a model besides the prompt of a call."""

    role: str = "judge"  # its name in messages and options
    system: str = ""  # instructions before every prompt
    temperature: float = 0.0  # sent where the model takes one
    reply_tokens: int = REPLY_TOKENS  # at most, thoughts apart
    typical_tokens: int = TYPICAL_TOKENS
    most_text: int = MOST_TEXT  # characters of a reply

    @property
    def price_option(self) -> str:
        return "--price" if self.role == "judge" else f"--{self.role}-price"


JUDGE = Generation()


class Reply(NamedTuple):
    """What a call came to. `text` is the reply, or says what went wrong.

    status: "ok", "empty", "blocked", "parse_error" (cut off by the token limit), "error" (all
    tries failed). passes: an empty reply of the kind that another call may not get.
    """

    status: str
    text: str
    prompt_tokens: int | None = None  # None: the server did not say
    output_tokens: int | None = None
    model: str | None = None  # which model answered, by the server's word
    expected: float | None = None  # expectation over the numbers 0–100, where asked for and to be had
    passes: bool = False


class Failure(NamedTuple):
    """A try that may be repeated."""

    text: str
    wait: float | None = None  # seconds, from the server
    unreachable: bool = False  # no connection was made at all


class Refusal(NamedTuple):
    """A try that no other can mend, unless it is asked in another way."""

    text: str
    advice: str
    code: int = 0


class Said(NamedTuple):
    """An error in an API's own words; `text` is empty where the body is not of the API's form."""

    text: str = ""
    wait: float | None = None  # seconds
    advice: str = ""  # where trying again is of no use


class Cancelled(Exception):
    """The run ended while this call was waiting for its next try."""


class HTTPClient:
    """The client of one judge model over HTTP. Calls may come from many threads; connections are kept and
    reused.

    An API says in its class how a request and its answers look: `_headers`, `_url`, `_body`, `_reply`,
    `_said` and, for what a model may refuse, `_other_way`.
    """

    api = ""  # its name in models.json
    address = ""  # the environment's variable of the server's address
    keys: tuple[str, ...] = ()  # of the key; the first that is set counts
    public = ""  # the API's own address
    model_form = r"\w[\w.-]*"
    example = ""  # of a model

    def __init__(
        self,
        model: str,
        *,
        accept_routed: bool = False,
        thinking: str | None = None,
        timeout: float = 60.0,
        attempts: int = 8,
        backoff: float = 1.0,
        patience: float = PATIENCE,
        generation: Generation = JUDGE,
    ):
        """accept_routed: another model than the one asked for may answer, and is then the judge. thinking:
        how the model is asked to think, see `models.json`. timeout: seconds for a whole reply. backoff:
        seconds before the second attempt. patience: minutes for a call over all its attempts.

        UserError without a key, or with a model, key or address that cannot be one.
        """
        self.asked = model.removeprefix("models/")
        self.accept_routed, self.timeout, self.attempts = accept_routed, timeout, attempts
        self.backoff, self.patience, self.generation = backoff, patience, generation
        if not re.fullmatch(self.model_form, self.asked):
            raise UserError(f"no {generation.role} model can be called {self.asked!r}; one is {self.example}")
        self._connect()
        self._lock = threading.Lock()
        self._given_thinking = thinking
        self._suffix = self._named_apart() + (f"@thinking={thinking}" if thinking else "")
        self._answered: str | None = None  # the model that has answered
        self.settled = self._reached = False
        self.expects = False
        self._call(self.asked)
        self.way = self._first_way(thinking)
        self._ways = {self.way}

    def _connect(self) -> None:
        self._key = next(filter(None, (os.environ.get(name, "").strip() for name in self.keys)), "")
        base = (os.environ.get(self.address) or self.public).strip().rstrip("/")
        if not self._key and self._needs_key(base):
            raise UserError(self._no_key())
        if self._key and not re.fullmatch(
            r"[!-~]+", self._key
        ):  # before an HTTP library quotes it in an exception
            raise UserError(f"{self.keys[0]} holds a space or a character no key has; set it again")
        self.base = self._stripped(base)
        headers = self._headers() | {"Content-Type": "application/json", "User-Agent": "em-judge"}
        try:
            parts = urlsplit(self.base)
            good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
            self._transport = Transport(self._url(), headers)
        except (ValueError, requests.RequestException):
            good = False
        if not good:
            raise UserError(
                f"{self.address} is not an address such as {self.public}; set it again or unset it"
            )

    # -- what an API says of itself --------------------------------------------------------------------

    def _needs_key(self, base: str) -> bool:
        return True

    def _no_key(self) -> str:
        raise NotImplementedError

    def _named_apart(self) -> str:
        """What follows a model's name in the judge's, where the same model is another judge over this API."""
        return ""

    def _stripped(self, base: str) -> str:
        """The server's address without what `_url` puts behind it."""
        raise NotImplementedError

    def _url(self) -> str:
        raise NotImplementedError

    def _headers(self) -> dict[str, str]:
        raise NotImplementedError

    def _first_way(self, thinking: str | None):
        """How the model is asked at first: a hashable value that `_body` understands. UserError for a
        `thinking` that cannot be one.
        """
        raise NotImplementedError

    def _other_way(self, way, said: str):
        """How to ask where `way` was refused with these words, which name one of its settings; else None."""
        raise NotImplementedError

    def _body(self, prompt: str, way) -> bytes:
        raise NotImplementedError

    def _reply(self, answer) -> Reply | Failure | Refusal:
        """What a body of status 200 says. One of FAULTS where it is not the API's."""
        raise NotImplementedError

    def _said(self, answer) -> Said:
        """What a body of another status says. One of FAULTS where it is not the API's."""
        raise NotImplementedError

    # -- who answers -----------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        return self.asked + self._suffix

    @property
    def price(self) -> Price | None:
        return self._price

    def presume(self, identity: str | None) -> None:
        model = (identity or "").removesuffix(self._suffix)
        if model and not self.settled and (self.accept_routed or is_version(model, self.asked)):
            self._call(model)

    def _call(self, model: str) -> None:
        self.identity, self._price = model + self._suffix, self._price_of(model)

    def _price_of(self, model: str) -> Price | None:
        return known_price(self.api, model)

    def _hear(self, model: str | None) -> None:
        """A model has answered, by the server's word. UserError for one that may not."""
        role = self.generation.role
        if model is not None and model != self._answered:
            with self._lock:
                if not (self.accept_routed or is_version(model, self.asked)):
                    raise UserError(
                        f"{self.asked} was asked and {model} answered: another {role}, whose answers cannot "
                        f"be compared with the first one's. Name it (--{role}-model {model}), or say "
                        f"--accept-routed to make it the {role} of these rows; nothing of it was kept"
                    )
                if self._answered not in (None, model):
                    raise UserError(
                        f"{self.asked} was {self._answered} so far and is {model} now; name the one that is "
                        f"meant with --{role}-model, so that all rows have one {role}"
                    )
                self._answered = model
                self._call(model)
        self.settled = True

    # -- a call ----------------------------------------------------------------------------------------

    def ask(self, prompt: str, cancelled: threading.Event, on_retry=lambda: None) -> Reply:
        """The reply to `prompt`, after as many tries as it takes. From any thread.

        `on_retry` is called before each further try. UserError where no call can succeed, and for an answer
        of another model than the one asked for; Cancelled when `cancelled` is set while waiting for the next
        try.
        """
        prompt, role = well_formed(prompt), self.generation.role
        begun, patience, attempt = time.monotonic(), 60 * self.patience, 0
        while True:
            left, way = begun + patience - time.monotonic(), self.way
            outcome = self._cleaned(self._try(self._body(prompt, way), min(self.timeout, max(left, 0.01))))
            if isinstance(outcome, Reply):
                self._reached = True
                self._hear(outcome.model)
                return outcome
            if isinstance(outcome, Refusal):
                if outcome.code in (400, 422) and self._turn(way, outcome.text):
                    continue
                said, advice = outcome.text.rstrip(". "), outcome.advice
                raise UserError(f"the {role} {self.asked} at {self.base} refuses: {said}; {advice}")
            if outcome.unreachable and not self._reached and attempt == 2:
                raise UserError(
                    f"the {role} at {self.base} cannot be reached ({outcome.text}); "
                    f"check the network and {self.address}"
                )
            if outcome.wait is not None and outcome.wait > patience:
                raise UserError(
                    f"the {role} asks to wait for {outcome.wait / 60:.0f} minutes ({outcome.text}); what is "
                    f"done is kept, run the same command again then (--patience is {self.patience:g} minutes)"
                )
            delay = self._delay(attempt, outcome.wait)
            attempt += 1
            if attempt == self.attempts or time.monotonic() + delay > begun + patience:
                break
            on_retry()
            if cancelled.wait(delay):
                raise Cancelled
        waited = (time.monotonic() - begun) / 60
        return Reply("error", f"{outcome.text}; given up after {attempt} tries in {waited:.1f} minutes")

    def _turn(self, way, said: str) -> bool:
        """Whether to ask again: a setting of `way` was refused, and there is a way not tried yet."""
        with self._lock:
            if self.way != way:
                return True  # another thread has found one
            other = self._other_way(way, said)
            if other is None or other in self._ways:
                return False
            self._ways.add(other)
            self.way = other
            return True

    def _delay(self, attempt: int, wait: float | None) -> float:
        """Seconds before the next try: a back-off that doubles, or what the server asks for where longer."""
        own = min(LONGEST_BACKOFF, self.backoff * 2**attempt)
        if wait is None:
            return own * random.uniform(0.5, 1.0)
        return max(own, wait) + self.backoff * random.random()  # never early, and not all at once

    # -- one try ---------------------------------------------------------------------------------------

    def _try(self, body: bytes, timeout: float) -> Reply | Failure | Refusal:
        """What a try came to, in the server's own words, which are still to be cleaned."""
        got = self._transport.post(body, timeout)
        if isinstance(got, NoReply):
            return Failure(got.text, unreachable=got.unreachable)
        try:
            answer = None if got.body is None else json.loads(got.body)
        except (ValueError, RecursionError):
            answer = None
        if got.code == 200:
            try:
                return self._reply(answer)
            except FAULTS:
                return Failure("200 with a body that is not the API's JSON")
        try:
            said = self._said(answer)
        except FAULTS:
            said = Said()  # a proxy's page, or half of a body: the status line says what there is to say
        text = f"{got.code} {said.text or got.reason}".strip()
        return self._judged(
            got.code, text, said._replace(wait=latest(retry_after(got.retry_after), said.wait))
        )

    def _judged(self, code: int, text: str, said: Said) -> Failure | Refusal:
        """Whether an error may pass."""
        if said.advice:
            return Refusal(text, said.advice)
        if code in (408, 429) or code >= 500:
            return Failure(text, said.wait)
        # A page that is not there is no word of the API's about a model.
        nowhere = code in (404, 405) and re.fullmatch(
            r"((file|page)?\s*not found)?", said.text.strip(". "), re.I
        )
        if code < 400 or nowhere:
            return Refusal(text, f"is {self.address} the server's address? Requests go to {self._url()}")
        knobs = (
            ("--logprobs", "logprobs"),
            ("--thinking", "thinking|reasoning|budget"),
            (f"--{self.generation.role}-model", ""),
        )
        knob = next(knob for knob, words in knobs if re.search(words, text, re.I))
        return Refusal(text, f"check {self.keys[0]} and {knob}", code)

    def _cleaned(self, outcome: Reply | Failure | Refusal):
        """The outcome of a try without the key, without what cannot be printed, and of bounded length.

        The one place that everything passes which a server says. What went wrong becomes one line.
        """
        text = self._clean(outcome.text)
        if not isinstance(outcome, Reply):
            return outcome._replace(text=_bounded(" ".join(text.split())))
        model = outcome.model and _bounded(" ".join(self._clean(outcome.model).split()), 100)
        return outcome._replace(text=_bounded(text, self.generation.most_text), model=model or None)

    def _clean(self, text: str) -> str:
        if not text.isprintable():
            text = "".join(map(_printable, text))
        return text.replace(self._key, "[key]") if self._key else text


# -- what servers say ------------------------------------------------------------------------------------


def count(usage, name: str, absent: int | None = None) -> int | None:
    """A count of tokens, `absent` where it is left out; None for what is no whole number from 0."""
    number = usage.get(name) if isinstance(usage, dict) else None
    if number is None:
        return absent
    return number if type(number) is int and 0 <= number <= MOST_TOKENS else None


def model_name(name) -> str | None:
    """A model's name in an answer; None where it has none. ValueError for what is no name."""
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        raise ValueError("no name of a model")
    return name.removeprefix("models/")


def seconds(text: str) -> float | None:
    """A finite number of seconds from 0; ValueError for what is no number, None for the other numbers."""
    number = float(text)
    return max(0.0, number) if math.isfinite(number) else None


def retry_after(header: str | None) -> float | None:
    """Seconds from now of a Retry-After header, which holds seconds or a date; None where it says nothing."""
    try:
        return seconds(header or "nan")
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
        if date.tzinfo is None:
            date = date.replace(tzinfo=timezone.utc)
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def latest(*waits: float | None) -> float | None:
    return max((wait for wait in waits if wait is not None), default=None)


def _bounded(text: str, most: int = MOST_TEXT) -> str:
    return text if len(text) <= most else text[:most] + "…"


def _printable(character: str) -> str:
    """The character, a space for another kind of space, U+FFFD for controls and half surrogate pairs."""
    if character == "\n" or character.isprintable():
        return character
    return " " if character.isspace() else "\ufffd"


def well_formed(text: str) -> str:
    """Half surrogate pairs, which JSON can carry and APIs refuse, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
