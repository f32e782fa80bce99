"""A writer and a judge on the loopback, and an encoder that takes no time."""

import hashlib

import pytest
import torch
from judge_server import KEY, JudgeServer
from writing_server import WritingServer

import synth
from em.cli import command_line


class Encoder:
    """A text as the sum of vectors of its words: near where most words are the same."""

    def encode(self, texts):
        rows = torch.stack([sum(map(self._vector, text.split())) for text in texts])
        return torch.nn.functional.normalize(rows, dim=1)

    @staticmethod
    def _vector(word: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        return torch.randn(64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """serve(**options) starts a WritingServer and points both APIs at it; (behaviour, server)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("em.construction.session.load_encoder", Encoder)
    servers = []

    def start(behave=None, **options):
        behave = behave or WritingServer(**options)
        servers.append(JudgeServer(behave).__enter__())
        for api, suffix in (("GEMINI", ""), ("OPENAI", "/v1")):
            monkeypatch.setenv(f"{api}_BASE_URL", servers[-1].url + suffix)
            monkeypatch.setenv(f"{api}_API_KEY", KEY)
        return behave, servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture
def run(capsys):
    """run("cells", …) → (status, what it printed, its line of error)."""

    def command(*arguments):
        status = command_line(synth.COMMANDS, argv=list(map(str, arguments)))
        said = capsys.readouterr()
        return status, said.out, "".join(x for x in said.err.splitlines(True) if x.startswith("error: "))

    return command
