"""Tiny random models of every family the decoder covers: transformers' and ours, with the same weights."""

import copy

import torch
import transformers

from em.model.decoder import Decoder, DecoderConfig

SHAPE = dict(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=300.0, factor=4.0, original_max_position_embeddings=16, beta_fast=8.0
)
SLIDING = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
CASES = {
    "llama": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=200.0))),
    "llama, biases, llama3": ("llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)),
    "llama, tied, own head size, linear": (
        "llama",
        dict(
            tie_word_embeddings=True, head_dim=12, num_key_value_heads=6,
            rope_parameters=dict(rope_type="linear", rope_theta=200.0, factor=3.0),
        ),
    ),
    "qwen2": ("qwen2", dict(rms_norm_eps=1e-3)),
    "qwen2, sliding, tied": ("qwen2", dict(SLIDING, tie_word_embeddings=True)),
    "qwen2, yarn": ("qwen2", dict(rope_parameters=YARN)),
    "qwen2, yarn untruncated with mscale": (
        "qwen2",
        dict(
            rope_parameters=dict(
                YARN, truncate=False, original_max_position_embeddings=32, beta_fast=1.0, beta_slow=0.2,
                mscale=0.7, mscale_all_dim=1.3,
            )
        ),
    ),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "qwen3, sliding, biases": ("qwen3", dict(SLIDING, head_dim=8, attention_bias=True)),
    "olmo3": ("olmo3", dict(sliding_window=5)),
    "olmo3, yarn": (
        "olmo3",
        dict(
            sliding_window=5, num_key_value_heads=6,
            rope_parameters=dict(
                full_attention=dict(YARN, attention_factor=1.4),
                sliding_attention=dict(rope_type="default", rope_theta=900.0),
            ),
        ),
    ),
}  # fmt: skip


def perturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter away from what initialisation gives, norms and biases included; logits of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 1.3 / p.shape[1] ** 0.5 if p.dim() == 2 else noise * 0.3 + 0.7)


def reference_model(case: str):
    family, options = CASES[case]
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(SHAPE | options))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    perturb(model)
    return model


def ours_from(reference) -> Decoder:
    model = Decoder(DecoderConfig.from_hf(reference.config.to_dict()))
    state = reference.state_dict()
    if model.config.tied:
        del state["lm_head.weight"]
    model.load_state_dict(state, strict=True)
    return model.eval()


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


SMALL = SHAPE | dict(
    vocab_size=120, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4
)
FAMILIES = {"llama": dict(tie_word_embeddings=True), "qwen2": {}, "qwen3": dict(head_dim=8), "olmo3": {}}
IDS = torch.arange(2 * 9).view(2, 9) * 5 % 120


def saved_by_transformers(folder, family: str = "qwen2", dtype: torch.dtype = torch.float32, **options):
    """A tiny checkpoint, every parameter random, as save_pretrained writes it; and its logits."""
    config = transformers.AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.dim() == 1))
        model.to(dtype).save_pretrained(folder, **options)
        return model(IDS).logits


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text
