"""A loopback Gemini API that answers as the real one does, and misbehaves on demand.

    with JudgeServer() as server: …                 # server.url is a GEMINI_BASE_URL, KEY its only key
    python tests/judge_server.py 8080               # the same by hand

It speaks HTTP/1.1 with keep-alive on one asyncio thread. What it refuses, it refuses in the API's own words
and shapes: a wrong key, an unknown model or field. `behave(prompt, nth)` decides on every good request; nth
counts the requests with the same prompt from 1.
"""

import asyncio
import collections
import contextlib
import hashlib
import itertools
import json
import re
import ssl
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

KEY = "AIzaSy-not-a-real-key-0123456789"
MODELS = ("gemini-2.5-flash", "gemini-2.5-pro", "gemini-3-pro-preview")
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
    text: str | None, finish="STOP", prompt_tokens: int = 600, thoughts: int = 0, **options
) -> Response:
    """What generateContent returns; text None leaves the content without parts. thoughts: tokens."""
    content = {"role": "model"} if text is None else {"parts": [{"text": text}], "role": "model"}
    output = {} if text is None else {"candidatesTokenCount": max(1, len(text) // 2)}
    usage = {"promptTokenCount": prompt_tokens, **output}
    usage |= {"thoughtsTokenCount": thoughts} if thoughts else {}
    usage["totalTokenCount"] = sum(usage.values())
    usage["promptTokensDetails"] = [{"modality": "TEXT", "tokenCount": prompt_tokens}]
    candidate = {"content": content, "finishReason": finish, "index": 0}
    return _json(
        {
            "candidates": [candidate],
            "usageMetadata": usage,
            "modelVersion": "gemini-2.5-flash",
            "responseId": "kXb0aJ_7",
        },
        **options,
    )


def no_candidates() -> Response:
    usage = {"promptTokenCount": 600, "totalTokenCount": 600}
    return _json({"usageMetadata": usage, "modelVersion": "gemini-2.5-flash"})


def prompt_blocked(reason: str = "PROHIBITED_CONTENT") -> Response:
    usage = {"promptTokenCount": 600, "totalTokenCount": 600}
    return _json({"promptFeedback": {"blockReason": reason}, "usageMetadata": usage})


def failure(code: int, message: str = "", retry_after=None, retry_delay: str | None = None) -> Response:
    """An error as the API words it; retry_delay, such as "13s", goes into the body."""
    error = {"code": code, "message": message or REASONS[code], "status": STATUSES[code]}
    if retry_delay:
        error["details"] = [
            {
                "@type": "type.googleapis.com/google.rpc.QuotaFailure",
                "violations": [{"quotaId": "PerMinute"}],
            },
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": retry_delay},
        ]
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return _json({"error": error}, code=code, headers=headers)


def _thinking_fault(model: str, config: dict) -> str | None:
    """What the API has against a thinkingConfig."""
    budget = config.get("thinkingBudget")
    if model != "gemini-2.5-flash" and budget == 0:
        return "Budget 0 is invalid. This model only works in thinking mode."
    if model == "gemini-2.5-pro" and budget is not None and not 128 <= budget <= 32_768:
        return f"The thinking budget {budget} is invalid. Please choose a value between 128 and 32768."
    if model.startswith("gemini-2.5") and "thinkingLevel" in config:
        return "Thinking level is not supported for this model."
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

    def __init__(self, behave=None, port: int = 0, key: str = KEY, tls: bool = False):
        """tls: speaks TLS, without a certificate, so that no request comes through."""
        self.behave = behave or (lambda prompt, nth: answer(str(score_of(prompt))))
        self.port, self.key = port, key
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        self.prompts: collections.Counter = collections.Counter()
        self.requests: list[dict] = []  # the last few, as (path, headers, body)
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
        self.requests = [*self.requests[-9:], {"path": path, "headers": headers, "body": body}]
        found = re.fullmatch(r"/v1(?:beta)?/models/([^/:]+):generateContent", path)
        if not found:
            return Response(b"<!DOCTYPE html><title>Error 404 (Not Found)</title>", 404)
        if headers.get("x-goog-api-key") != self.key:
            return failure(400, "API key not valid. Please pass a valid API key.")
        if found[1] not in MODELS:
            message = f"models/{found[1]} is not found for API version v1beta, or is not supported for "
            return failure(404, message + "generateContent. Call ListModels to see the list of models.")
        request = json.loads(body)
        unknown = request.keys() - {"contents", "generationConfig", "systemInstruction", "safetySettings"}
        if unknown:
            message = f'Invalid JSON payload received. Unknown name "{unknown.pop()}": Cannot find field.'
            return failure(400, message)
        if not request.get("contents"):
            return failure(400, "* GenerateContentRequest.contents: contents is not specified\n")
        refused = _thinking_fault(found[1], request.get("generationConfig", {}).get("thinkingConfig", {}))
        if refused:
            return failure(400, refused)
        prompt = request["contents"][0]["parts"][0]["text"]
        self.prompts[prompt] += 1
        return self.behave(prompt, self.prompts[prompt])


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
        print(f"export GEMINI_BASE_URL={server.url} GEMINI_API_KEY={KEY}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
