"""One call to the Gemini API over plain HTTP: request, retries, what came back (settings: paper A.7).

    POST {GEMINI_BASE_URL}/v1beta/models/{model}:generateContent      x-goog-api-key: GEMINI_API_KEY

429, 408, 5xx, time-outs, broken connections and bodies that are not the API's JSON are tried again, with
exponential back-off and jitter and never before the time the server names (`Retry-After`, in seconds or as a
date, or `retryDelay` in the error body). Any other refusal, such as 400, 401, 403 or 404, ends the run with
the API's own message. No safety settings are sent, so the API's defaults hold. A model that cannot be kept
from thinking is asked to think little, and given room for it (`thinking_of`).

The key must not leak. requests puts the request, headers and all, on its exceptions and follows redirects
with our header on. So its exceptions are turned into text here and never chained, redirects are not followed,
and whatever the server says is cleaned of the key before anyone sees it.
"""

import json
import os
import random
import re
import threading
import time
from collections import deque
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ProxyError

from em.errors import UserError

PUBLIC = "https://generativelanguage.googleapis.com"
NO_KEY = (
    "no GEMINI_API_KEY in the environment; `export GEMINI_API_KEY=…` (aistudio.google.com/apikey makes one) "
    "or use --judge margin, which needs none"
)
REPLY_TOKENS = 20  # at most
BLOCKED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR")
KNOWN = {"candidates", "promptFeedback", "usageMetadata", "modelVersion", "responseId"}

CONNECT_SECONDS = 10.0
LONGEST_BACKOFF = 60.0  # seconds between two tries, where the server names no time
LONGEST_WAIT = 900.0  # seconds the server may ask for before the run stops instead


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

    reason: str
    wait: float | None = None  # seconds, from the server
    unreachable: bool = False  # no connection was made at all


class Cancelled(Exception):
    """The run ended while this call was waiting for its next try."""


class Gemini:
    """The client of one judge model. Calls may come from many threads; connections are kept and reused."""

    def __init__(self, model: str, timeout: float = 60.0, attempts: int = 8, backoff: float = 1.0):
        """timeout: seconds without a byte from the server. backoff: seconds before the second attempt.

        UserError without a key, or with a model, key or address that cannot be one.
        """
        self.model, self.timeout, self.attempts, self.backoff = model, timeout, attempts, backoff
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
        try:
            url = f"{self.base}/v1beta/models/{model}:generateContent"
            parts = urlsplit(self.base)
            good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
            headers = {"x-goog-api-key": self._key, "Content-Type": "application/json"}
            headers |= {"Accept-Encoding": "gzip, deflate", "User-Agent": "em-judge"}
            self._request = requests.Request("POST", url, headers).prepare()
        except (ValueError, requests.RequestException):
            good = False
        if not good:
            raise UserError(f"GEMINI_BASE_URL is not an address such as {PUBLIC}; set it again or unset it")
        with requests.Session() as session:  # proxies and certificates from the environment, read once
            self._settings = session.merge_environment_settings(url, {}, None, None, None)
        self._sessions: deque[requests.Session] = deque()
        self._reached = False

    def _clean(self, text: str) -> str:
        """One line, without the key."""
        return " ".join(text.replace(self._key, "[key]").split())

    def generate(self, prompt: str, cancelled: threading.Event, on_retry=lambda: None) -> Reply:
        """The reply to `prompt`, after as many tries as it takes. From any thread.

        `on_retry` is called before each further try. UserError where no call can succeed; Cancelled when
        `cancelled` is set while waiting for the next try.
        """
        contents = [{"role": "user", "parts": [{"text": _well_formed(prompt)}]}]
        body = json.dumps({"contents": contents, "generationConfig": self._generation}).encode()
        for attempt in range(self.attempts):
            outcome = self._try(body)
            if isinstance(outcome, Reply):
                self._reached = True
                return outcome
            if outcome.unreachable and not self._reached and attempt == 2:
                raise UserError(
                    f"the judge at {self.base} cannot be reached ({outcome.reason}); "
                    "check the network and GEMINI_BASE_URL"
                )
            if outcome.wait is not None and outcome.wait > LONGEST_WAIT:
                raise UserError(
                    f"the judge asks to wait for {outcome.wait / 60:.0f} minutes ({outcome.reason}); "
                    "what is done is kept, run the same command again then"
                )
            if attempt + 1 < self.attempts:
                on_retry()
                if cancelled.wait(self._delay(attempt, outcome.wait)):
                    raise Cancelled
        return Reply("error", outcome.reason)

    def _delay(self, attempt: int, wait: float | None) -> float:
        """Seconds before the next try: a back-off that doubles, or what the server asks for where longer."""
        own = min(LONGEST_BACKOFF, self.backoff * 2**attempt)
        if wait is None:
            return own * random.uniform(0.5, 1.0)
        return max(own, wait) + self.backoff * random.random()  # never early, and not all at once

    # -- one try ---------------------------------------------------------------------------------------

    def _try(self, body: bytes) -> Reply | _Failure:
        request = self._request.copy()
        request.body = body
        request.headers["Content-Length"] = str(len(body))
        session = self._session()
        try:
            response = session.send(
                request, timeout=(CONNECT_SECONDS, self.timeout), allow_redirects=False, **self._settings
            )
        except requests.RequestException as error:
            return self._no_response(error)
        finally:
            self._sessions.append(session)
        try:
            answer = json.loads(response.content)
        except ValueError:
            answer = None
        if response.status_code == 200:
            try:
                return self._reply(answer)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                return _Failure("200 with a body that is not the API's JSON")
        code, reason, delay = response.status_code, *self._complaint(response, answer)
        if code in (408, 429) or code >= 500:
            return _Failure(reason, _latest(_retry_after(response.headers.get("Retry-After")), delay))
        hint = "GEMINI_API_KEY and --judge-model" if code >= 400 else "GEMINI_BASE_URL"
        raise UserError(f"the judge {self.model} at {self.base} refuses: {reason.rstrip('. ')}; check {hint}")

    def _session(self) -> requests.Session:
        """A session that no other thread is using; as many exist as calls were ever in flight at once."""
        try:
            return self._sessions.pop()
        except IndexError:
            session = requests.Session()
            adapter = HTTPAdapter(pool_connections=1, pool_maxsize=1, max_retries=0)
            session.mount("https://", adapter)
            session.mount("http://", adapter)
            return session

    def _no_response(self, error: requests.RequestException) -> _Failure:
        root: object = error
        while isinstance(root, BaseException):  # requests and urllib3 nest the cause in `reason` or `args`
            inner = [getattr(root, "reason", None), *reversed(root.args)]
            cause = next((i for i in inner if isinstance(i, BaseException)), None)
            if cause is None:
                break
            root = cause
        never = isinstance(root, (NewConnectionError, ConnectTimeoutError, ProxyError))
        never |= isinstance(error, (requests.exceptions.SSLError, requests.exceptions.ProxyError))
        text = re.sub(r"^.*?: (?=\S)", "", str(root)) if isinstance(root, NewConnectionError) else str(root)
        return _Failure(self._clean(f"{type(root).__name__}: {text}")[:300], unreachable=never)

    def _complaint(self, response, answer) -> tuple[str, float | None]:
        """(what the API says is wrong, seconds of its retryDelay) of a response that is not a 200."""
        reason, delay = f"{response.status_code} {response.reason or ''}".strip(), None
        try:
            error = (answer[0] if isinstance(answer, list) else answer)["error"]
            parts = [str(error.get(name) or "") for name in ("status", "message")]
            reason = f"{response.status_code} {': '.join(filter(None, parts))}"
            for detail in error.get("details") or ():
                if detail.get("@type", "").endswith("google.rpc.RetryInfo"):
                    delay = float(detail["retryDelay"].removesuffix("s"))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            pass  # a proxy's page, or half of a body: the status line says what there is to say
        return self._clean(reason)[:500], delay

    def _reply(self, answer: dict) -> Reply:
        usage = answer.get("usageMetadata") or {}
        counted = "promptTokenCount" in usage
        prompt_tokens = int(usage["promptTokenCount"]) if counted else None
        outputs = [int(usage.get(f"{kind}TokenCount") or 0) for kind in ("candidates", "thoughts")]
        tokens = (prompt_tokens, sum(outputs) if counted else None)

        feedback = answer.get("promptFeedback") or {}
        if feedback.get("blockReason"):
            return Reply("blocked", f"prompt: {self._clean(str(feedback['blockReason']))}", *tokens)
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
        text = text.replace(self._key, "[key]")
        if not text.strip():
            return Reply("empty", str(finish), *tokens)
        return Reply("parse_error" if finish == "MAX_TOKENS" else "ok", text, *tokens)


def _well_formed(text: str) -> str:
    """Half surrogate pairs, which JSON can carry and the API refuses, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _retry_after(header: str | None) -> float | None:
    """Seconds from now of a Retry-After header, which holds seconds or a date; None where it says nothing."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except (TypeError, ValueError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, date.timestamp() - time.time())


def _latest(*waits: float | None) -> float | None:
    return max((wait for wait in waits if wait is not None), default=None)
