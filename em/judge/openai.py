"""OpenAI's chat completions over plain HTTP, as vLLM, Ollama, llama.cpp, OpenRouter and OpenAI serve them.

    POST {OPENAI_BASE_URL}/v1/chat/completions      Authorization: Bearer OPENAI_API_KEY

A base that ends in a version, as in https://openrouter.ai/api/v1, is not given another one. A server of one's
own needs no key. The prompt is one message of the user; temperature 0 and at most 20 tokens are asked for, in
the form that the model takes: max_tokens or max_completion_tokens, no temperature and a reasoning effort for
the models that reason (`models.json`), and the other way where a server refuses the first.

With `logprobs`, each reply also has the expectation over the numbers 0 to 100 in the first token's
alternatives, the score of Betley et al.: the mean of the numbers, weighted by their probabilities among the
numbers, or none where these hold less than a quarter of all. It needs a tokenizer with a token for each
number, which OpenAI's have. Where the reply's number goes on in a second token, a first digit says nothing of
the score, and there is no expectation.
"""

import json
import math
import re
from typing import NamedTuple

from em.errors import UserError
from em.judge.client import (
    LEAST_MASS,
    TOMORROW,
    Failure,
    HTTPClient,
    Refusal,
    Reply,
    Said,
    count,
    model_name,
)
from em.judge.models import Price, known

TOP = 20  # alternatives asked for, the most that OpenAI gives
EFFORTS = {
    "off": (0, 0),
    "minimal": (0, 1024),
    "low": (300, 4096),
    "medium": (1000, 8192),
    "high": (3000, 16384),
}


class Way(NamedTuple):
    """What a request says besides the prompt."""

    limit: str  # max_tokens or max_completion_tokens
    temperature: bool
    effort: str | None  # one of EFFORTS; None: nothing is said
    top: int  # alternatives of the first token; 0: none are asked for


class OpenAI(HTTPClient):
    api = "openai"
    address = "OPENAI_BASE_URL"
    keys = ("OPENAI_API_KEY",)
    public = "https://api.openai.com"
    model_form = r"[\w./][\w./:@+-]*"
    example = "gpt-4o or Qwen/Qwen2.5-7B-Instruct"

    def __init__(self, model: str, *, logprobs: bool = False, **options):
        """logprobs: replies carry the expectation over the numbers 0–100 where it can be had."""
        self._top = TOP if logprobs else 0
        super().__init__(model, **options)
        self.expects = logprobs

    def _needs_key(self, base: str) -> bool:
        return base.startswith(self.public)

    def _no_key(self) -> str:
        return (
            "no OPENAI_API_KEY in the environment; export OPENAI_API_KEY=…, or name a server of your own, "
            "which needs none: export OPENAI_BASE_URL=http://127.0.0.1:8000"
        )

    def _named_apart(self) -> str:
        # The same name, but asked otherwise: here a Gemini thinks as it likes.
        return "@openai" if self.asked.split("/")[-1].startswith(("gemini-", "gemma-")) else ""

    def _price_of(self, model: str) -> Price | None:
        return (
            super()._price_of(model) if self.base.startswith(self.public) else None
        )  # others have their own

    def _stripped(self, base: str) -> str:
        return re.sub(r"(/chat/completions)?/*$", "", base)

    def _url(self) -> str:
        version = "" if re.search(r"/v\d\w*(/openai)?$", self.base) else "/v1"
        return f"{self.base}{version}/chat/completions"

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _first_way(self, thinking: str | None) -> Way:
        entry = known(self.api, self.asked)
        effort = thinking or entry.get("thinking")
        if effort not in (*EFFORTS, None):
            raise UserError(f"--thinking takes {', '.join(EFFORTS)} with --judge openai, not {effort!r:.40}")
        return Way(entry.get("limit", "max_tokens"), entry.get("temperature", True), effort, self._top)

    def _other_way(self, way: Way, said: str) -> Way | None:
        said = said.lower()
        if "max_tokens" in said or "max_completion_tokens" in said:
            other = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
            return way._replace(limit=other[way.limit])
        if "temperature" in said:
            return way._replace(temperature=False)
        efforts = f"reasoning|'({way.effort}|none)' is not supported|unsupported value: '({way.effort}|none)'"
        if way.effort and not self._given_thinking and re.search(efforts, said):
            left = (way._replace(effort=effort) for effort in ("off", "minimal", "low", None))
            return next((other for other in left if other not in self._ways), None)
        if "logprobs" in said and way.top > 5:  # the most that some servers give
            return way._replace(top=5)
        return None

    @property
    def typical_output(self) -> int:
        return self.generation.typical_tokens + EFFORTS.get(self.way.effort, (0, 0))[0]

    @property
    def most_output(self) -> int:
        return self.generation.reply_tokens + EFFORTS.get(self.way.effort, (0, 0))[1]

    def _body(self, prompt: str, way: Way) -> bytes:
        asked = self.generation
        messages = [{"role": "system", "content": asked.system}] if asked.system else []
        request = {"model": self.asked, "messages": [*messages, {"role": "user", "content": prompt}]}
        request[way.limit] = asked.reply_tokens + EFFORTS.get(way.effort, (0, 0))[1]
        if way.temperature:
            request["temperature"] = asked.temperature
        if way.effort:
            request["reasoning_effort"] = "none" if way.effort == "off" else way.effort
        if way.top:
            request |= {"logprobs": True, "top_logprobs": way.top}
        return json.dumps(request).encode()

    def _reply(self, answer: dict) -> Reply | Failure | Refusal:
        if answer.get("error"):  # a router says so with status 200 where its provider failed
            return self._inner(answer)
        usage = answer.get("usage")
        about = (
            count(usage, "prompt_tokens"),
            count(usage, "completion_tokens"),
            model_name(answer.get("model")),
        )
        choice = (answer["choices"] or [{}])[0]
        if choice.get("error"):
            return self._inner(choice)
        finish, message = choice.get("finish_reason") or "stop", choice.get("message") or {}
        if finish == "content_filter":
            return Reply("blocked", "content_filter", *about)
        if message.get("refusal"):
            return Reply("blocked", f"refusal: {message['refusal']}", *about)
        text = message.get("content") or ""
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text if part.get("type") == "text")
        if not text.strip():
            return Reply("empty", str(finish), *about, passes=finish != "length")
        expected = expectation(choice.get("logprobs")) if self.expects else None
        return Reply("parse_error" if finish == "length" else "ok", text, *about, expected)

    def _inner(self, answer: dict) -> Failure | Refusal:
        said, code = self._said(answer), answer["error"].get("code")
        code = code if type(code) is int and 400 <= code < 600 else 503
        return self._judged(code, f"{code} {said.text}", said)

    def _judged(self, code: int, text: str, said: Said) -> Failure | Refusal | Reply:
        if code == 400 and re.search(r"content[_ ](filter|management)", text, re.I):  # of the prompt
            return Reply("blocked", text)
        return super()._judged(code, text, said)

    def _said(self, answer: dict) -> Said:
        # {"error": {"message", "type", "code"}}, {"error": "…"}, {"message": …} or {"detail": …}
        error = answer.get("error", answer)
        if not isinstance(error, dict):
            error = {"message": error}
        detail = error.get("message") or error.get("detail")
        text = str(detail or "")
        kind = error.get("code") or error.get("type")
        if isinstance(kind, str) and kind not in text:
            text = ": ".join(filter(None, (kind, text)))
        if re.search("insufficient_quota", text):
            return Said(text, None, "this key has no credit left: what is done is kept, add some and go on")
        day = re.search(r"per[- ]day|\((RPD|TPD)\)|free-models-per-day", text)
        return Said(text, None, TOMORROW if day else "")


def expectation(logprobs) -> float | None:
    """The mean of the numbers 0–100 among the first token's alternatives, by their probabilities.

    logprobs: of one choice. None where there are none, where numbers hold less than LEAST_MASS, and where a
    number is more than one token. One of FAULTS where it is not the API's.
    """
    first, *rest = (logprobs or {}).get("content") or [{}]
    masses: dict[int, float] = {}
    for entry in first.get("top_logprobs") or ():
        if re.fullmatch(r"\s?[0-9]{1,3}", entry["token"]) and int(entry["token"]) <= 100:
            number, probability = int(entry["token"]), math.exp(min(0.0, entry["logprob"]))
            masses[number] = masses.get(number, 0.0) + probability
    if re.match(r"\s*[0-9]", first.get("token") or ""):
        whole = not (rest and re.match(r"[0-9]", rest[0].get("token") or ""))
    else:
        whole = any(number > 9 for number in masses)  # else digits only, by a tokenizer that has no more
    total = sum(masses.values())
    if not whole or not total >= LEAST_MASS:
        return None
    return sum(number * mass for number, mass in masses.items()) / total
