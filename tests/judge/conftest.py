"""What the tests of the judge share: the loopback server in the environment, and a judge that asks it."""

import pytest
from judge_server import KEY, JudgeServer

from em.judge.judge import Judge


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.delenv("GEMINI_BASE_URL", raising=False)


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) starts a server and points GEMINI_BASE_URL at it."""
    servers = []

    def start(behave=None) -> JudgeServer:
        servers.append(JudgeServer(behave).__enter__())
        monkeypatch.setenv("GEMINI_BASE_URL", servers[-1].url + "/")
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def make(tmp_path):
    """A Judge with a cache of its own, few workers and hardly any waiting."""

    def build(**options) -> Judge:
        defaults = {"cache": tmp_path / "cache.jsonl", "workers": 4, "timeout": 5.0, "backoff": 0.002}
        return Judge(**(defaults | options))

    return build
