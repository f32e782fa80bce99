"""What the tests of the judge share: the loopback server in the environment, and a judge that asks it."""

import pytest
from judge_server import KEY, JudgeServer

from em.judge.gemini import Gemini
from em.judge.judge import Judge

OF_JUDGE = {"rubrics", "cache", "workers", "budget_usd", "price"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("GEMINI_BASE_URL", "GOOGLE_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) starts a server and points GEMINI_BASE_URL and OPENAI_BASE_URL at it."""
    servers = []

    def start(behave=None, **options) -> JudgeServer:
        servers.append(JudgeServer(behave, **options).__enter__())
        monkeypatch.setenv("GEMINI_BASE_URL", servers[-1].url + "/")
        monkeypatch.setenv("OPENAI_BASE_URL", servers[-1].url + "/v1")
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


PAPERS = "gemini-2.5-flash"  # judge


@pytest.fixture
def make(tmp_path):
    """A Judge with a cache of its own, few workers and hardly any waiting; options: its or the client's."""

    def build(model=PAPERS, client=Gemini, **options) -> Judge:
        mine = {name: options.pop(name) for name in OF_JUDGE & options.keys()}
        asked = client(model, **({"timeout": 5.0, "backoff": 0.002} | options))
        return Judge(asked, **({"cache": tmp_path / "cache.jsonl", "workers": 4} | mine))

    return build
