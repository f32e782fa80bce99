"""The Gemini API over plain HTTP (settings: paper A.7).

    POST {GEMINI_BASE_URL}/v1beta/models/{model}:generateContent      x-goog-api-key: GEMINI_API_KEY

The paper's settings are temperature 0 and no thinking. How close to them a model can be asked follows what it
is (`models.json`): a thinking budget of 0 up to 2.5, a thinking level from 3 on and for aliases, neither for
models that do not think; and no temperature where none is taken. A thinking model is given room for its
thoughts, which are billed. No safety settings are sent, so the API's defaults hold.
"""

import json
import re
from typing import NamedTuple

from em.errors import UserError
from em.judge.client import (
    TOMORROW,
    HTTPClient,
    Reply,
    Said,
    count,
    model_name,
    seconds,
)
from em.judge.models import known

BLOCKED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "MODEL_ARMOR", "LANGUAGE")
KNOWN = {"candidates", "promptFeedback", "usageMetadata", "modelVersion", "responseId"}


class Thinking(NamedTuple):
    """How a model is asked to think."""

    config: dict | None  # None: nothing is said of it
    typical: int = 0  # tokens, for forecasts; they are billed as output
    room: int = 0  # tokens in maxOutputTokens, which counts them too; a budget is a wish, and is overrun


LEVELS = {
    "off": Thinking({"thinkingBudget": 0}),
    "minimal": Thinking({"thinkingLevel": "MINIMAL"}, room=1024),
    "low": Thinking({"thinkingLevel": "LOW"}, typical=300, room=4096),
    "none": Thinking(None, room=1024),
    "medium": Thinking({"thinkingLevel": "MEDIUM"}, typical=1000, room=8192),
    "high": Thinking({"thinkingLevel": "HIGH"}, typical=3000, room=16384),
}
_IN_TURN = ("off", "minimal", "low", "none")  # what is tried where a model refuses one


def thinking_of(name: str) -> Thinking:
    """name: one of LEVELS, or a budget in tokens. UserError for anything else."""
    if name in LEVELS:
        return LEVELS[name]
    if not re.fullmatch(r"\d{1,5}", name):
        raise UserError(f"--thinking takes {', '.join(LEVELS)} or a number of tokens, not {name!r:.40}")
    return Thinking({"thinkingBudget": int(name)}, typical=int(name), room=max(2048, 2 * int(name)))


class Way(NamedTuple):
    """What a request says besides the prompt."""

    thinking: str  # of `thinking_of`
    temperature: bool


class Gemini(HTTPClient):
    api = "gemini"
    address = "GEMINI_BASE_URL"
    keys = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
    public = "https://generativelanguage.googleapis.com"
    example = "gemini-3.5-flash-lite"

    def _no_key(self) -> str:
        return (
            "no GEMINI_API_KEY in the environment; `export GEMINI_API_KEY=…` (aistudio.google.com/apikey "
            "makes one; GOOGLE_API_KEY counts too), or take --judge openai with a server of your own, or "
            "--judge margin, which needs none"
        )

    def _stripped(self, base: str) -> str:
        return re.sub(r"(/v1(beta|alpha)?(/openai)?)?/*$", "", base)

    def _url(self) -> str:
        return f"{self.base}/v1beta/models/{self.asked}:generateContent"

    def _headers(self) -> dict[str, str]:
        return {"x-goog-api-key": self._key}

    def _first_way(self, thinking: str | None) -> Way:
        entry = known(self.api, self.asked)
        way = Way(thinking or entry["thinking"], entry.get("temperature", True))
        thinking_of(way.thinking)
        return way

    def _other_way(self, way: Way, said: str) -> Way | None:
        if "temperature" in said.lower():
            return way._replace(temperature=False)
        if self._given_thinking or not re.search("thinking|budget", said, re.I):
            return None
        if "not enabled" in said:
            return way._replace(thinking="none")
        left = (way._replace(thinking=name) for name in _IN_TURN)
        return next((other for other in left if other not in self._ways), None)

    @property
    def typical_output(self) -> int:
        return self.generation.typical_tokens + thinking_of(self.way.thinking).typical

    @property
    def most_output(self) -> int:
        return self.generation.reply_tokens + thinking_of(self.way.thinking).room

    def _body(self, prompt: str, way: Way) -> bytes:
        thinking = thinking_of(way.thinking)
        asked = self.generation
        config = {"temperature": asked.temperature} if way.temperature else {}
        config["maxOutputTokens"] = asked.reply_tokens + thinking.room
        if thinking.config is not None:
            config["thinkingConfig"] = thinking.config
        request = {"contents": [{"role": "user", "parts": [{"text": prompt}]}], "generationConfig": config}
        if asked.system:
            request["systemInstruction"] = {"parts": [{"text": asked.system}]}
        return json.dumps(request).encode()

    def _reply(self, answer: dict) -> Reply:
        usage = answer.get("usageMetadata")
        prompt, *output = (count(usage, f"{kind}TokenCount", absent) for kind, absent in _COUNTS)
        about = (
            prompt,
            None if None in (prompt, *output) else sum(output),
            model_name(answer.get("modelVersion")),
        )

        feedback = answer.get("promptFeedback") or {}
        if feedback.get("blockReason"):
            return Reply("blocked", f"prompt: {feedback['blockReason']}", *about)
        if not answer.get("candidates"):
            if answer and not answer.keys() & KNOWN:
                raise ValueError("JSON, but not the API's")
            return Reply("empty", "no candidates", *about, passes=True)
        candidate = answer["candidates"][0]
        finish = candidate.get("finishReason") or "STOP"
        if finish in BLOCKED:
            return Reply("blocked", finish, *about)
        parts = (candidate.get("content") or {}).get("parts") or []
        text = "".join(part.get("text") or "" for part in parts if not part.get("thought"))
        if not text.strip():
            return Reply("empty", str(finish), *about, passes=finish != "MAX_TOKENS")
        return Reply("parse_error" if finish == "MAX_TOKENS" else "ok", text, *about)

    def _said(self, answer) -> Said:
        error = (answer[0] if isinstance(answer, list) else answer)["error"]
        text = ": ".join(filter(None, (str(error.get(name) or "") for name in ("status", "message"))))
        wait, quotas = None, []
        try:
            for detail in error.get("details") or ():
                kind = detail.get("@type", "")
                if kind.endswith("google.rpc.RetryInfo"):
                    wait = seconds(detail["retryDelay"].removesuffix("s"))
                elif kind.endswith("google.rpc.QuotaFailure"):
                    quotas += [str(violation.get("quotaId")) for violation in detail.get("violations") or ()]
        except (AttributeError, KeyError, TypeError, ValueError):
            pass  # the rest of the error says what there is to say
        if error.get("code") == 429 and re.search(r"limit: 0(?!\.?\d)", text):
            return Said(
                text, wait, "this key has no quota for it: name another --judge-model, or set up billing"
            )
        day = any("PerDay" in quota for quota in quotas) or re.search("quota.* per day", text, re.I)
        return Said(text, wait, TOMORROW if day else "")


_COUNTS = (("prompt", None), ("candidates", 0), ("thoughts", 0))
