"""What config.json may say: every family and every published model of the paper, and what is refused."""

import copy
import json

import pytest
import torch
import transformers
from tiny_models import CASES, SHAPE

from em.errors import UserError
from em.model.config import DecoderConfig
from em.model.decoder import Decoder

HUB = {  # the config.json of the paper's models, in the format of transformers 4
    "Qwen2.5-14B-Instruct": dict(
        architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151645,
        hidden_act="silu", hidden_size=5120, initializer_range=0.02, intermediate_size=13824,
        max_position_embeddings=32768, max_window_layers=70, model_type="qwen2", num_attention_heads=40,
        num_hidden_layers=48, num_key_value_heads=8, rms_norm_eps=1e-06, rope_theta=1000000.0,
        sliding_window=131072, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
        transformers_version="4.43.1", use_sliding_window=False, vocab_size=152064,
    ),
    "Llama-3.1-8B-Instruct": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009], hidden_act="silu", hidden_size=4096, initializer_range=0.02,
        intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1,
        rms_norm_eps=1e-05, rope_scaling=dict(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
        vocab_size=128256,
    ),
    "Qwen3-14B": dict(
        architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, head_dim=128,
        hidden_act="silu", hidden_size=5120, intermediate_size=17408, max_position_embeddings=40960,
        max_window_layers=40, model_type="qwen3", num_attention_heads=40, num_hidden_layers=40,
        num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None,
        tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936,
    ),
    "Olmo-3-7B-Instruct": dict(
        architectures=["Olmo3ForCausalLM"], attention_bias=False, attention_dropout=0.0, hidden_act="silu",
        hidden_size=4096, intermediate_size=11008, max_position_embeddings=65536, model_type="olmo3",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pad_token_id=100277,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 8,
        rms_norm_eps=1e-06, sliding_window=4096, rope_theta=500000, tie_word_embeddings=False,
        vocab_size=100278, rope_scaling=dict(
            attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0,
            original_max_position_embeddings=8192, rope_type="yarn",
        ),
    ),
    "SmolLM2-135M-Instruct": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, hidden_act="silu",
        hidden_size=576, intermediate_size=1536, is_llama_config=True, max_position_embeddings=8192,
        mlp_bias=False, model_type="llama", num_attention_heads=9, num_hidden_layers=30,
        num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-05, rope_interleaved=False,
        rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, vocab_size=49152,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_published_configs_give_the_same_rotary_tables_and_shapes_as_transformers(name):
    config = DecoderConfig.from_hf(HUB[name])
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(HUB[name]))
    assert DecoderConfig.from_hf(theirs.to_dict()) == config  # the same file, rewritten by transformers 5
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(theirs)
        shapes = {key: value.shape for key, value in Decoder(config).state_dict().items()}
    expected = {key: value.shape for key, value in reference.state_dict().items()}
    assert shapes == {
        key: shape for key, shape in expected.items() if not (config.tied and key == "lm_head.weight")
    }
    rotary = type(reference.model.rotary_emb)(theirs)
    positions = torch.arange(0, theirs.max_position_embeddings, 997)[None]
    for layer, kind in enumerate(
        getattr(theirs, "layer_types", None) or ["full_attention"] * config.n_layers
    ):
        arguments = (kind,) if name.startswith("Olmo") else ()
        cos, sin = rotary(torch.zeros(1), positions, *arguments)
        ours_cos, ours_sin = config.ropes[layer].table(positions, config.head_dim)
        half = config.head_dim // 2
        torch.testing.assert_close(
            ours_cos[..., 0, :], cos, atol=1e-3, rtol=0
        )  # angles reach 1e5 radians in fp32
        torch.testing.assert_close(ours_sin[..., 0, half:], sin[..., half:], atol=1e-3, rtol=0)
        assert config.windows[layer] == (4096 if kind == "sliding_attention" else None)


def test_saved_configs_read_back_as_themselves(tmp_path):
    for family, options in CASES.values():
        config = transformers.AutoConfig.for_model(family, **copy.deepcopy(SHAPE | options))
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert DecoderConfig.from_hf(saved) == DecoderConfig.from_hf(config.to_dict())


@pytest.mark.parametrize("case", CASES)
def test_absent_keys_take_the_defaults_of_transformers(case):
    family, options = CASES[case]
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(SHAPE | options))
    assert DecoderConfig.from_hf(SHAPE | options | {"model_type": family}) == DecoderConfig.from_hf(
        config.to_dict()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="gemma3"), "model_type 'gemma3' is not supported"),
        (dict(model_type=None), "model_type None is not supported"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "rope type 'longrope'"),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope type 'dynamic'"),
        (dict(rope_scaling=dict(rope_type="linear")), "positive factor"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "positive low_freq_factor"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=2.0, mystery=1)), "'mystery': 1"),
        (dict(rope_parameters=dict(type="linear", factor=2.0), rope_scaling=dict(type="linear", factor=4.0)),
         "contradict"),
        (dict(rope_parameters=dict(full_attention={}, chunked_attention={})), "keyed by full_attention"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
        (dict(attention_dropout=0.1), "attention_dropout = 0.1"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping = 30.0"),
        (dict(sliding_window=128), "sliding_window = 128"),  # llama has none
        (dict(layer_types=["sliding_attention"] * 32), "no sliding window"),
        (dict(layer_types=["full_attention"] * 3), "each of the 32 layers"),
        (dict(layer_types=["linear_attention"] * 32), "each of the 32 layers"),
        (dict(quantization_config=dict(quant_method="awq")), "quantised"),
        (dict(hidden_size=None), "hidden_size must be given"),
        (dict(num_key_value_heads=5), "32 heads of size 128 over 5"),
    ],
)  # fmt: skip
def test_a_config_that_would_change_the_mathematics_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        DecoderConfig.from_hf(HUB["Llama-3.1-8B-Instruct"] | change, source="folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ") and "\n" not in str(caught.value)


def test_unknown_keys_that_are_off_are_accepted():
    extra = dict(some_future_switch=False, another=None, third=0, fourth=[], _private="x")
    plain = HUB["Llama-3.1-8B-Instruct"]
    assert DecoderConfig.from_hf(plain | extra) == DecoderConfig.from_hf(plain)
