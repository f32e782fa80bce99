"""One POST over plain HTTP whose reply has a deadline and a bound, whatever the server does.

A time-out of a socket counts from byte to byte, so a server that sends one a second holds a connection for
good, in the headers too. Here the time-out is that of the whole reply (`_Timed`). The body is asked for as it
is, since a few kilobytes of gzip can hold gigabytes, and is read up to a bound.

requests puts the request, its headers with the key in them, on its exceptions, follows redirects with our
headers on and logs broken ones. So its exceptions are turned into text and never chained, and only its
adapter is used: its connections, proxies and certificates.
"""

import contextlib
import http.client
import io
import re
import time
from collections import deque
from typing import NamedTuple

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError

MOST_BYTES = 2**20  # of a reply's body
CONNECT_SECONDS = 10.0  # at most


class HTTPReply(NamedTuple):
    """What the server sent. body: None where it was longer than MOST_BYTES."""

    code: int
    reason: str
    retry_after: str | None
    body: bytes | None


class NoReply(NamedTuple):
    """What went wrong. unreachable: no connection was made at all."""

    text: str
    unreachable: bool


class Transport:
    """POSTs to one address, from many threads; as many connections are kept as were ever in use at once."""

    def __init__(self, url: str, headers: dict[str, str]):
        """ValueError or requests.RequestException for an address that cannot be one."""
        headers = headers | {"Accept-Encoding": "identity"}
        self._request = requests.Request("POST", url, headers).prepare()
        with requests.Session() as session:  # proxies and certificates from the environment, read once
            self._settings = session.merge_environment_settings(url, {}, True, None, None)
        self._adapters: deque[_Adapter] = deque()  # that no thread is using; each keeps its connection

    def post(self, body: bytes, timeout: float) -> HTTPReply | NoReply:
        """timeout: seconds for the reply, from the request to its last byte."""
        request = self._request.copy()
        request.body = body
        request.headers["Content-Length"] = str(len(body))
        timeouts = min(CONNECT_SECONDS, timeout), timeout
        try:
            adapter = self._adapters.pop()
        except IndexError:
            adapter = _Adapter(pool_connections=1, pool_maxsize=1, max_retries=0)
        try:
            response = adapter.send(request, timeout=timeouts, **self._settings)
            try:
                body = response.read(MOST_BYTES + 1)
            finally:
                response.close()  # of a body that was read whole the connection is kept
                response.release_conn()
        except (OSError, HTTPError, http.client.HTTPException, ValueError) as error:
            return _no_reply(error)
        finally:
            self._adapters.append(adapter)
        whole = len(body) <= MOST_BYTES
        retry_after = response.headers.get("Retry-After")
        return HTTPReply(response.status, response.reason or "", retry_after, body if whole else None)


class _Timed(io.RawIOBase):
    """The bytes of a socket until its time-out, counted from now on, is over."""

    def __init__(self, sock, raw: io.RawIOBase):
        self._sock, self._raw, self._timeout = sock, raw, sock.gettimeout()
        self._deadline = time.monotonic() + self._timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a socket that is closed
            self._sock.settimeout(self._timeout)  # for the next request
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock, *args, **options):
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Timed(sock, self.fp.detach()))

    def begin(self) -> None:
        super().begin()
        self.msg.defects.clear()  # urllib3 would log broken headers, and they may hold the key
        self.msg.set_payload(None)


class _Ours:
    """What makes a connection of urllib3 read its replies so."""

    response_class = _Response


class _Adapter(HTTPAdapter):
    """Of requests, with our responses."""

    def get_connection_with_tls_context(self, *args, **options):
        pool = super().get_connection_with_tls_context(*args, **options)
        if not issubclass(pool.ConnectionCls, _Ours):
            pool.ConnectionCls = type("Connection", (_Ours, pool.ConnectionCls), {})
        return pool

    def build_response(self, request, response):
        return response  # of urllib3; that of requests would read cookies and redirects


def _no_reply(error: Exception) -> NoReply:
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
    return NoReply(f"{type(root).__name__}: {text}", never)
