"""A loopback Gemini API, and a server of OpenAI's chat completions, that answer and misbehave as the real
ones do.

    with JudgeServer() as server: …                 # server.url is a GEMINI_BASE_URL and an OPENAI_BASE_URL
    python tests/judge_server.py 8080               # the same by hand; KEY is its only key

It speaks HTTP/1.1 with keep-alive on one asyncio thread. What it refuses, it refuses in the API's own words
and shapes: a wrong key, an unknown model or field, a setting that the model does not take. `behave(prompt,
nth)` decides on every good request, the prompt with its instructions before it; nth counts the requests with
the same prompt from 1. An answer says who it is from: the model that was asked, or the one that `answers_for`
names in its place.
"""

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import ssl
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

KEY = "AIzaSy-not-a-real-key-0123456789"
MODELS = (
    "gemini-2.5-flash",
    "gemini-2.5-pro",
    "gemini-3-pro-preview",
    "gemini-3.5-flash-lite",
    "gemini-3.7-flash",
    "gemini-3.8-flash",
    "gemini-flash-latest",
    "gemma-3-27b-it",
)
CHAT_MODELS = (
    "gpt-4o",
    "gpt-4o-mini",
    "gpt-5-mini",
    "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5:7b",
    "gemini-2.5-flash",
    "our-reasoner",
)
REASONING = ("gpt-5-mini", "our-reasoner")  # of them; these take neither max_tokens nor a temperature
ANSWERS_FOR = {"gpt-4o": "gpt-4o-2024-08-06", "gemini-flash-latest": "gemini-3.6-flash"}
ASKED = "{asked}"  # in an answer: the model that was asked, or what answers for it
REASONS = {
    200: "OK",
    302: "Found",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
}
REASONS |= {429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable"}
STATUSES = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND"}
STATUSES |= {429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}


@dataclass
class Response:
    body: bytes
    code: int = 200
    headers: dict = field(default_factory=dict)
    seconds: float = 0.0  # before it is sent
    reset: bool = False  # break the connection instead
    cut: bool = False  # break it in the middle of the body
    reason: str = ""  # in the status line
    pieces: tuple[bytes, ...] | None = None  # sent as they are, instead, one every `pause` seconds
    forever: bytes = b""  # sent after them again and again
    pause: float = 0.0


def raw(*pieces: bytes, forever: bytes = b"", pause: float = 0.0) -> Response:
    """Bytes as they are, which need not be HTTP; then `forever`, or the end of the connection."""
    return Response(b"", pieces=pieces, forever=forever, pause=pause)


def _json(value, **options) -> Response:
    return Response(json.dumps(value, indent=2).encode(), **options)


def answer(
    text: str | None, finish="STOP", prompt_tokens: int = 600, thoughts: int = 0, model=ASKED, **options
) -> Response:
    """What generateContent returns; text None leaves the content without parts. thoughts: tokens. model: who
    answers, None for an answer that does not say.
    """
    content = {"role": "model"} if text is None else {"parts": [{"text": text}], "role": "model"}
    output = {} if text is None else {"candidatesTokenCount": max(1, len(text) // 2)}
    usage = {"promptTokenCount": prompt_tokens, **output}
    usage |= {"thoughtsTokenCount": thoughts} if thoughts else {}
    usage["totalTokenCount"] = sum(usage.values())
    usage["promptTokensDetails"] = [{"modality": "TEXT", "tokenCount": prompt_tokens}]
    body = {"candidates": [{"content": content, "finishReason": finish, "index": 0}], "usageMetadata": usage}
    said = {} if model is None else {"modelVersion": model}
    return _json(body | said | {"responseId": "kXb0aJ_7"}, **options)


def no_candidates() -> Response:
    usage = {"promptTokenCount": 600, "totalTokenCount": 600}
    return _json({"usageMetadata": usage, "modelVersion": ASKED})


def prompt_blocked(reason: str = "PROHIBITED_CONTENT") -> Response:
    usage = {"promptTokenCount": 600, "totalTokenCount": 600}
    return _json({"promptFeedback": {"blockReason": reason}, "usageMetadata": usage, "modelVersion": ASKED})


def failure(
    code: int, message: str = "", retry_after=None, retry_delay: str | None = None, quota: str = "PerMinute"
) -> Response:
    """An error as the API words it; retry_delay, such as "13s", and the quota that is used up go into the
    body.
    """
    error = {"code": code, "message": message or REASONS[code], "status": STATUSES[code]}
    if retry_delay:
        error["details"] = [
            {
                "@type": "type.googleapis.com/google.rpc.QuotaFailure",
                "violations": [{"quotaId": f"GenerateRequests{quota}PerProjectPerModel-FreeTier"}],
            },
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": retry_delay},
        ]
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return _json({"error": error}, code=code, headers=headers)


def chat(
    text: str | None,
    finish="stop",
    prompt_tokens: int = 600,
    model=ASKED,
    tokens: tuple[str, ...] = (),
    top: dict[str, float] | None = None,
    **options,
) -> Response:
    """What chat completions return. tokens: of the reply, where log-probabilities are given; top: the first
    one's alternatives, each with its probability.
    """
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if top is not None:
        alternatives = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top.items()]
        content = [{"token": t, "logprob": -0.1, "bytes": None, "top_logprobs": alternatives} for t in tokens]
        choice["logprobs"] = {"content": content, "refusal": None}
    n = max(1, len(text or "") // 2)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": n, "total_tokens": prompt_tokens + n}
    body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "choices": [choice],
        "usage": usage,
    }
    return _json(body | ({} if model is None else {"model": model}), **options)


# How servers word an error: {message, code or type} → the body.
FORMS = {
    "openai": lambda message, kind, code: {
        "error": {"message": message, "type": kind, "param": None, "code": kind}
    },
    "vllm": lambda message, kind, code: {"object": "error", "message": message, "type": kind, "code": code},
    "ollama": lambda message, kind, code: {"error": message},
    "llama.cpp": lambda message, kind, code: {"error": {"code": code, "message": message, "type": kind}},
    "openrouter": lambda message, kind, code: {"error": {"message": message, "code": code, "metadata": {}}},
    "fastapi": lambda message, kind, code: {"detail": message},
}


def chat_failure(
    code: int, message: str = "", kind: str = "", form: str = "openai", status: int | None = None, **headers
) -> Response:
    """An error as a server words it. status: of HTTP, where it is another one than the body's code."""
    body = FORMS[form](message or REASONS[code], kind or "invalid_request_error", code)
    headers = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return _json(body, code=status or code, headers=headers)


def _thinking_fault(model: str, config: dict) -> str | None:
    """What the Gemini API has against a thinkingConfig."""
    budget, level = config.get("thinkingBudget"), config.get("thinkingLevel")
    if model.startswith("gemma") and config:
        return f"Thinking is not enabled for models/{model}"
    if model != "gemini-2.5-flash" and budget == 0:
        return "Budget 0 is invalid. This model only works in thinking mode."
    if model == "gemini-2.5-pro" and budget is not None and not 128 <= budget <= 32_768:
        return f"The thinking budget {budget} is invalid. Please choose a value between 128 and 32768."
    if model.startswith("gemini-2.5") and level is not None:
        return "Thinking level is not supported for this model."
    if model in ("gemini-3-pro-preview", "gemini-3.7-flash", "gemini-3.8-flash") and level == "MINIMAL":
        return (
            "'minimal' is not a supported thinking level for this model. Allowed values: medium, low, high."
        )
    return None


def _chat_fault(model: str, request: dict) -> str | None:
    """What an OpenAI-style server has against a setting."""
    if model in REASONING and "max_tokens" in request:
        other = "Use 'max_completion_tokens' instead."
        return f"Unsupported parameter: 'max_tokens' is not supported with this model. {other}"
    if model in REASONING and request.get("temperature", 1) != 1:
        other = "Only the default (1) value is supported."
        return f"Unsupported value: 'temperature' does not support 0 with this model. {other}"
    if model in REASONING and request.get("reasoning_effort") == "none":
        return f"Unsupported value: 'none' is not supported with the '{model}' model. Supported: 'minimal'."
    if model not in REASONING and "reasoning_effort" in request:
        return "Unrecognized request argument supplied: reasoning_effort"
    return None


def score_of(prompt: str) -> int:
    """A score that depends on the prompt alone."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 101


def in_turn(*responses):
    """The nth request with a prompt gets the nth response; after the last, that one again."""
    return lambda prompt, nth: responses[min(nth, len(responses)) - 1]


class JudgeServer:
    """Runs from `with` to its end.

    prompts: how often each was asked. connections, closed: how many were opened, and have ended.
    """

    def __init__(self, behave=None, port: int = 0, key: str = KEY, tls: bool = False, answers_for=None):
        """key: "" where none is needed. tls: speaks TLS, without a certificate, so that no request comes
        through. answers_for: model asked → model that answers, besides what aliases stand for.
        """
        self.behave, self.answers_for = behave, ANSWERS_FOR | (answers_for or {})
        self.port, self.key = port, key
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        self.prompts: collections.Counter = collections.Counter()
        self.requests: list[dict] = []  # the last few, as (path, headers, body)
        self.received = 0  # requests, the refused ones among them
        self.connections = self.closed = self.in_flight = self.most_in_flight = 0
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def total(self) -> int:
        return sum(self.prompts.values())

    def __enter__(self):
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exception):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(
            lambda: _Connection(self), "127.0.0.1", self.port, ssl=self.tls
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    def respond(self, path: str, headers: dict, body: bytes) -> Response:
        self.received += 1
        self.requests = [*self.requests[-9:], {"path": path, "headers": headers, "body": body}]
        found = re.fullmatch(r"/v1(?:beta)?/models/([^/:]+):generateContent", path)
        if found:
            return self._generate_content(found[1], headers, body)
        if path == "/v1/chat/completions":
            return self._chat_completions(headers, body)
        return Response(b"<!DOCTYPE html><title>Error 404 (Not Found)</title>", 404)

    def _generate_content(self, model: str, headers: dict, body: bytes) -> Response:
        if headers.get("x-goog-api-key") != self.key:
            return failure(400, "API key not valid. Please pass a valid API key.")
        if model not in MODELS:
            message = f"models/{model} is not found for API version v1beta, or is not supported for "
            return failure(404, message + "generateContent. Call ListModels to see the list of models.")
        request = json.loads(body)
        unknown = request.keys() - {"contents", "generationConfig", "systemInstruction", "safetySettings"}
        if unknown:
            message = f'Invalid JSON payload received. Unknown name "{unknown.pop()}": Cannot find field.'
            return failure(400, message)
        if not request.get("contents"):
            return failure(400, "* GenerateContentRequest.contents: contents is not specified\n")
        refused = _thinking_fault(model, request.get("generationConfig", {}).get("thinkingConfig", {}))
        if refused:
            return failure(400, refused)
        told = request.get("systemInstruction", {"parts": [{"text": ""}]})
        texts = [content["parts"][0]["text"] for content in (told, *request["contents"])]
        return self._answer(model, "\n\n".join(filter(None, texts)), answer)

    def _chat_completions(self, headers: dict, body: bytes) -> Response:
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return chat_failure(401, "Incorrect API key provided.", "invalid_api_key")
        request = json.loads(body)
        if request["model"] not in CHAT_MODELS:
            return chat_failure(404, f"The model `{request['model']}` does not exist.", "model_not_found")
        refused = _chat_fault(request["model"], request)
        if refused:
            return chat_failure(400, refused, "unsupported_value")
        roles = [message["role"] for message in request["messages"]]
        if roles not in (["user"], ["system", "user"]):
            return chat_failure(400, f"unexpected roles {roles}")
        prompt = "\n\n".join(message["content"] for message in request["messages"])
        return self._answer(request["model"], prompt, chat)

    def _answer(self, model: str, prompt: str, form) -> Response:
        self.prompts[prompt] += 1
        nth = self.prompts[prompt]
        response = self.behave(prompt, nth) if self.behave else form(str(score_of(prompt)))
        name = self.answers_for.get(model, model).encode()
        return dataclasses.replace(response, body=response.body.replace(ASKED.encode(), name))


class _Connection(asyncio.Protocol):
    def __init__(self, server: JudgeServer):
        self.server, self.buffer = server, b""

    def connection_made(self, transport) -> None:
        self.transport = transport
        self.server.connections += 1

    def connection_lost(self, error) -> None:
        self.server.closed += 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.buffer[:2] == b"\x16\x03":  # TLS
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()
            return
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
            headers = {
                name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            stop = end + 4 + int(headers.get("content-length", 0))
            if len(self.buffer) < stop:
                return
            body, self.buffer = self.buffer[end + 4 : stop], self.buffer[stop:]
            response = self.server.respond(first.split()[1], headers, body)
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
            if response.seconds:
                asyncio.get_running_loop().call_later(response.seconds, self.send, response)
            else:
                self.send(response)

    def send(self, response: Response) -> None:
        self.server.in_flight -= 1
        if response.reset:
            self.transport.abort()
            return
        if response.pieces is not None:
            forever = itertools.repeat(response.forever) if response.forever else ()
            self.drip(itertools.chain(response.pieces, forever), response.pause)
            return
        headers = {"Content-Type": "application/json; charset=UTF-8", "Content-Length": len(response.body)}
        lines = [f"HTTP/1.1 {response.code} {response.reason or REASONS.get(response.code, '')}"]
        lines += [f"{name}: {value}" for name, value in (headers | response.headers).items()]
        body = response.body[: len(response.body) // 2] if response.cut else response.body
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        if response.cut:
            self.transport.close()

    def drip(self, pieces: Iterator[bytes], pause: float) -> None:
        piece = next(pieces, None)
        if piece is None or self.transport.is_closing():
            self.transport.close()
            return
        self.transport.write(piece)
        asyncio.get_running_loop().call_later(pause, self.drip, pieces, pause)


if __name__ == "__main__":
    with JudgeServer(port=int(sys.argv[1]) if len(sys.argv) > 1 else 0) as server:
        print(f"export GEMINI_BASE_URL={server.url} GEMINI_API_KEY={KEY}")
        print(f"export OPENAI_BASE_URL={server.url} OPENAI_API_KEY={KEY}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
