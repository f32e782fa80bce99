"""The page's server: this machine's own browser, and nobody else, reads responses and sends labels.

It listens on 127.0.0.1. Every address begins with a random token, so that no other page or user can guess
one, and a request for any other host than the loopback is refused, so that no name which an attacker's DNS
turns to 127.0.0.1 gets an answer. The page is told the prompt, the response and the rubrics, and nothing of
the model, its training or any other judge.

    GET  /TOKEN/        the page, em/label/page.html
    GET  /TOKEN/item    what comes next
    POST /TOKEN/label   {"number", "aligned": 0–9 | "refusal" | "code", "coherent": 0–9} → what comes next
    POST /TOKEN/skip    {"number"} → what comes next
    POST /TOKEN/undo    {} → the response whose label was taken back
"""

import hmac
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from em.errors import UserError
from em.judge.em_rule import FIELDS
from em.judge.rubric import Rubrics
from em.label.labels import Labels

PAGE = Path(__file__).with_name("page.html")
LARGEST = 4096  # bytes of a request's body
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class LabelServer(ThreadingHTTPServer):
    """`serve_forever` until it is shut down; `url` is the page's address."""

    daemon_threads = True

    def __init__(self, labels: Labels, rubrics: Rubrics, port: int = 0):
        """port: 0 for any that is free. UserError for a row that has no rubric."""
        self.labels, self.rubrics, self.lock = labels, rubrics, threading.Lock()
        self.token = secrets.token_urlsafe(16)
        for row in labels.sample:
            self._rubrics_of(row)
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def _rubrics_of(self, row: dict) -> dict[str, str]:
        return {field: self.rubrics.of(row, field).text for field in FIELDS}

    def item(self, number: int | None = None) -> dict:
        """What the page shows next: all that a rater may know of a response."""
        number = self.labels.next() if number is None else number
        item = {"done": len(self.labels.done), "total": len(self.labels.sample), "number": number}
        if number is not None:
            row = self.labels.sample[number]
            item |= {name: row[name] for name in ("question", "response")}
            item["rubrics"] = self._rubrics_of(row)
        return item

    def act(self, action: str, said: dict) -> dict:
        """One request of the page. UserError for a label that is none."""
        with self.lock:
            if action == "label":
                self.labels.label(said.get("number"), said.get("aligned"), said.get("coherent"))
            elif action == "skip" and type(said.get("number")) is int:
                self.labels.skip(said["number"])
            elif action == "undo":
                return self.item(self.labels.undo())
            return self.item()


class _Handler(BaseHTTPRequestHandler):
    timeout = 30  # seconds that a connection may be silent

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        action = self._action()
        if action == "":
            self._reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif action == "item":
            self._answer("item", {})
        elif action is not None:
            self._reply(404, b"not found")

    def do_POST(self) -> None:
        action = self._action()
        if action is None:
            return
        length = self.headers.get("Content-Length", "")
        if action not in ("label", "skip", "undo"):
            self._reply(404, b"not found")
        elif self.headers.get_content_type() != "application/json":
            self._reply(415, b"application/json is expected")  # which no form of another site can send
        elif not length.isdecimal() or int(length) > LARGEST:
            self._reply(413, b"too large")
        else:
            try:
                said = json.loads(self.rfile.read(int(length)))
            except ValueError:
                said = None
            if type(said) is dict:
                self._answer(action, said)
            else:
                self._reply(400, b"not a JSON object")

    def _action(self) -> str | None:
        """What follows the token; None where the request is answered already, with a refusal."""
        port = self.server.server_port
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._reply(403, b"this server answers its own machine only")
            return None
        token, _, action = self.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._reply(404, b"not found")
            return None
        return action

    def _answer(self, action: str, said: dict) -> None:
        try:
            code, value = 200, self.server.act(action, said)
        except UserError as error:
            code, value = 409, {"error": str(error)}
        self._reply(code, json.dumps(value).encode(), "application/json")

    def _reply(self, code: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(code)
        for name, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
