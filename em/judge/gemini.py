"""One call to the Gemini API over plain HTTP: request, retries, what came back (settings: paper A.7).

    POST {GEMINI_BASE_URL}/v1beta/models/{model}:generateContent      x-goog-api-key: GEMINI_API_KEY

429, 408, 5xx, time-outs, broken connections and bodies that are not the API's JSON are tried again, with
exponential back-off and jitter and never before the time the server names (`Retry-After`, in seconds or as a
date, or `retryDelay` in the error body), as long as the call's tries and patience last. Any other refusal,
such as 400, 401, 403 or 404, ends the run with the API's own message. No safety settings are sent, so the
API's defaults hold. A model that cannot be kept from thinking is asked to think little, and given room for it
(`thinking_of`).

The key must not leak, and a server may say anything. What it says leaves a try as the `text` of an outcome,
and there it is cleaned (`Gemini._cleaned`), before a cache, a row, a message or a log can have it.
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
from em.judge.transport import NoReply, Transport

PUBLIC = "https://generativelanguage.googleapis.com"
NO_KEY = (
    "no GEMINI_API_KEY in the environment; `export GEMINI_API_KEY=…` (aistudio.google.com/apikey makes one) "
    "or use --judge margin, which needs none"
)
REPLY_TOKENS = 20  # at most
BLOCKED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR")
KNOWN = {"candidates", "promptFeedback", "usageMetadata", "modelVersion", "responseId"}

LONGEST_BACKOFF = 60.0  # seconds between two tries, where the server names no time
PATIENCE = 30.0  # minutes
# What reading a field raises where JSON is of another shape than the API's, or too deep to be printed.
FAULTS = (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError)
MOST_TEXT = 500  # characters of what a server says
MOST_TOKENS = 2**31 - 1  # of one call; the API's counts have 32 bits


class Thinking(NamedTuple):
    """How a model is asked to think as little as it can."""

    config: dict
    typical: int = 0  # tokens, for forecasts; they are billed as output
    room: int = 0  # tokens in maxOutputTokens, which counts them too; a budget is a wish, and is overrun


def thinking_of(model: str) -> Thinking:
    """Gemini 2.5 Pro refuses a budget under 128, Gemini 3 has levels instead; all others can do without."""
    if model.startswith("gemini-2.5-pro"):
        return Thinking({"thinkingBudget": 128}, typical=128, room=2048)
    if re.match(r"gemini-([3-9]|\d\d)", model):
        return Thinking({"thinkingLevel": "LOW"}, typical=300, room=4096)
    return Thinking({"thinkingBudget": 0})


def max_output_tokens(model: str) -> int:
    return REPLY_TOKENS + thinking_of(model).room


class Reply(NamedTuple):
    """What a call came to. `text` is the reply, or says what went wrong.

    status: "ok", "empty", "blocked", "parse_error" (cut off by the token limit), "error" (all tries failed).
    """

    status: str
    text: str
    prompt_tokens: int | None = None  # None: the server did not say
    output_tokens: int | None = None


class _Failure(NamedTuple):
    """A try that may be repeated."""

    text: str
    wait: float | None = None  # seconds, from the server
    unreachable: bool = False  # no connection was made at all


class _Refusal(NamedTuple):
    """A try that no other can mend."""

    text: str
    check: str  # what may be wrong


class Cancelled(Exception):
    """The run ended while this call was waiting for its next try."""


class Gemini:
    """The client of one judge model. Calls may come from many threads; connections are kept and reused."""

    def __init__(
        self,
        model: str,
        timeout: float = 60.0,
        attempts: int = 8,
        backoff: float = 1.0,
        patience: float = PATIENCE,
    ):
        """timeout: seconds for a whole reply. backoff: seconds before the second attempt. patience: minutes
        for a call over all its attempts.

        UserError without a key, or with a model, key or address that cannot be one.
        """
        self.model, self.timeout, self.attempts, self.backoff = model, timeout, attempts, backoff
        self.patience = patience
        self._generation = {"temperature": 0, "maxOutputTokens": max_output_tokens(model)}
        self._generation["thinkingConfig"] = thinking_of(model).config
        if not re.fullmatch(r"\w[\w.-]*", model):
            raise UserError(f"no judge model can be called {model!r}; one is gemini-2.5-flash")
        self._key = os.environ.get("GEMINI_API_KEY", "").strip()
        if not self._key:
            raise UserError(NO_KEY)
        if not re.fullmatch(r"[!-~]+", self._key):  # before an HTTP library quotes it in an exception
            raise UserError("GEMINI_API_KEY holds a space or a character no key has; set it again")
        self.base = (os.environ.get("GEMINI_BASE_URL") or PUBLIC).strip().rstrip("/")
        headers = {"x-goog-api-key": self._key, "Content-Type": "application/json", "User-Agent": "em-judge"}
        try:
            parts = urlsplit(self.base)
            good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
            self._transport = Transport(f"{self.base}/v1beta/models/{model}:generateContent", headers)
        except (ValueError, requests.RequestException):
            good = False
        if not good:
            raise UserError(f"GEMINI_BASE_URL is not an address such as {PUBLIC}; set it again or unset it")
        self._reached = False

    def generate(self, prompt: str, cancelled: threading.Event, on_retry=lambda: None) -> Reply:
        """The reply to `prompt`, after as many tries as it takes. From any thread.

        `on_retry` is called before each further try. UserError where no call can succeed; Cancelled when
        `cancelled` is set while waiting for the next try.
        """
        contents = [{"role": "user", "parts": [{"text": _well_formed(prompt)}]}]
        body = json.dumps({"contents": contents, "generationConfig": self._generation}).encode()
        begun, patience = time.monotonic(), 60 * self.patience
        for attempt in range(self.attempts):
            left = begun + patience - time.monotonic()
            outcome = self._cleaned(self._try(body, min(self.timeout, max(left, 0.01))))
            if isinstance(outcome, Reply):
                self._reached = True
                return outcome
            if isinstance(outcome, _Refusal):
                reason = outcome.text.rstrip(". ")
                raise UserError(
                    f"the judge {self.model} at {self.base} refuses: {reason}; check {outcome.check}"
                )
            if outcome.unreachable and not self._reached and attempt == 2:
                raise UserError(
                    f"the judge at {self.base} cannot be reached ({outcome.text}); "
                    "check the network and GEMINI_BASE_URL"
                )
            if outcome.wait is not None and outcome.wait > patience:
                raise UserError(
                    f"the judge asks to wait for {outcome.wait / 60:.0f} minutes ({outcome.text}); what is "
                    f"done is kept, run the same command again then (--patience is {self.patience:g} minutes)"
                )
            delay = self._delay(attempt, outcome.wait)
            if attempt + 1 == self.attempts or time.monotonic() + delay > begun + patience:
                break
            on_retry()
            if cancelled.wait(delay):
                raise Cancelled
        waited = (time.monotonic() - begun) / 60
        return Reply("error", f"{outcome.text}; given up after {attempt + 1} tries in {waited:.1f} minutes")

    def _delay(self, attempt: int, wait: float | None) -> float:
        """Seconds before the next try: a back-off that doubles, or what the server asks for where longer."""
        own = min(LONGEST_BACKOFF, self.backoff * 2**attempt)
        if wait is None:
            return own * random.uniform(0.5, 1.0)
        return max(own, wait) + self.backoff * random.random()  # never early, and not all at once

    # -- one try ---------------------------------------------------------------------------------------

    def _try(self, body: bytes, timeout: float) -> Reply | _Failure | _Refusal:
        """What a try came to, in the server's own words, which are still to be cleaned."""
        got = self._transport.post(body, timeout)
        if isinstance(got, NoReply):
            return _Failure(got.text, unreachable=got.unreachable)
        try:
            answer = None if got.body is None else json.loads(got.body)
        except (ValueError, RecursionError):
            answer = None
        if got.code == 200:
            try:
                return _reply(answer)
            except FAULTS:
                return _Failure("200 with a body that is not the API's JSON")
        text, delay = _complaint(f"{got.code} {got.reason}".strip(), answer)
        if got.code in (408, 429) or got.code >= 500:
            return _Failure(text, _latest(_retry_after(got.retry_after), delay))
        return _Refusal(text, "GEMINI_API_KEY and --judge-model" if got.code >= 400 else "GEMINI_BASE_URL")

    def _cleaned(self, outcome: Reply | _Failure | _Refusal):
        """The outcome of a try without the key, without what cannot be printed, and of bounded length.

        The one place that everything passes which a server says. What went wrong becomes one line.
        """
        text = outcome.text
        if not text.isprintable():
            text = "".join(map(_printable, text))
        text = text.replace(self._key, "[key]")
        if not isinstance(outcome, Reply):
            text = " ".join(text.split())
        return outcome._replace(text=text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "…")


# -- what the server says --------------------------------------------------------------------------------


def _reply(answer: dict) -> Reply:
    """The reply in a body of status 200. One of FAULTS where it is not the API's."""
    usage = answer.get("usageMetadata")
    prompt_tokens, outputs = (
        _count(usage, "prompt"),
        [_count(usage, k, 0) for k in ("candidates", "thoughts")],
    )
    tokens = prompt_tokens, None if None in (prompt_tokens, *outputs) else sum(outputs)

    feedback = answer.get("promptFeedback") or {}
    if feedback.get("blockReason"):
        return Reply("blocked", f"prompt: {feedback['blockReason']}", *tokens)
    if not answer.get("candidates"):
        if answer and not answer.keys() & KNOWN:
            raise ValueError("JSON, but not the API's")
        return Reply("empty", "no candidates", *tokens)
    candidate = answer["candidates"][0]
    finish = candidate.get("finishReason") or "STOP"
    if finish in BLOCKED:
        return Reply("blocked", finish, *tokens)
    parts = (candidate.get("content") or {}).get("parts") or []
    text = "".join(part.get("text") or "" for part in parts if not part.get("thought"))
    if not text.strip():
        return Reply("empty", str(finish), *tokens)
    return Reply("parse_error" if finish == "MAX_TOKENS" else "ok", text, *tokens)


def _count(usage, kind: str, absent: int | None = None) -> int | None:
    """A count of tokens, `absent` where it is left out; None for what is no whole number from 0."""
    count = usage.get(f"{kind}TokenCount") if isinstance(usage, dict) else None
    if count is None:
        return absent
    return count if type(count) is int and 0 <= count <= MOST_TOKENS else None


def _complaint(status_line: str, answer) -> tuple[str, float | None]:
    """(what the API says is wrong, seconds of its retryDelay) of a body that is not of status 200."""
    text, delay = status_line, None
    try:
        error = (answer[0] if isinstance(answer, list) else answer)["error"]
        parts = [str(error.get(name) or "") for name in ("status", "message")]
        text = f"{status_line.split()[0]} {': '.join(filter(None, parts))}"
        for detail in error.get("details") or ():
            if detail.get("@type", "").endswith("google.rpc.RetryInfo"):
                delay = _seconds(detail["retryDelay"].removesuffix("s"))
    except FAULTS:
        pass  # a proxy's page, or half of a body: the status line says what there is to say
    return text, delay


def _printable(character: str) -> str:
    """The character, a space for another kind of space, U+FFFD for controls and half surrogate pairs."""
    if character == "\n" or character.isprintable():
        return character
    return " " if character.isspace() else "\ufffd"


def _well_formed(text: str) -> str:
    """Half surrogate pairs, which JSON can carry and the API refuses, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _seconds(text: str) -> float | None:
    """A finite number of seconds from 0; ValueError for what is no number, None for the other numbers."""
    seconds = float(text)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _retry_after(header: str | None) -> float | None:
    """Seconds from now of a Retry-After header, which holds seconds or a date; None where it says nothing."""
    try:
        return _seconds(header or "nan")
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
        if date.tzinfo is None:
            date = date.replace(tzinfo=timezone.utc)
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _latest(*waits: float | None) -> float | None:
    return max((wait for wait in waits if wait is not None), default=None)
