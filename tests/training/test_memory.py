"""The formula for micro-batches beside what autograd really keeps, on meta tensors."""

import pytest
import torch
from tiny_models import CASES, SHAPE

from em.model import attention, lora
from em.model.config import DecoderConfig
from em.model.decoder import Decoder
from em.training import memory
from em.training.memory import CPU_TOKENS, micro_tokens, tokens_that_fit

SHARED = dict(rms_norm_eps=1e-6, max_position_embeddings=32_768, tie_word_embeddings=False)
QWEN_14B = SHARED | dict(
    model_type="qwen2", vocab_size=152_064, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=48,
    num_attention_heads=40, num_key_value_heads=8,
)  # fmt: skip
LLAMA_8B = SHARED | dict(
    model_type="llama", vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip
GB = 10**9
H100 = 80 * GB


def on_meta(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config).to(torch.bfloat16)


class Norm(torch.autograd.Function):
    """What a GPU's fused norm keeps: what it read, and a number a row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention, "_flash_runs", lambda q: True, raising=False)
    monkeypatch.setattr("torch.nn.functional.rms_norm", lambda x, shape, weight, eps: Norm.apply(x, weight))


def kept_bytes(config: DecoderConfig, tokens: int, rank: int) -> int:
    """Of all that autograd keeps for a backward through the blocks."""
    model = on_meta(config)
    lora.attach(model)
    lora.add_adapter(model, "student", rank)
    lora.trainable(model, "student")
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    segments = torch.arange(tokens)[None] // 50
    with lora.stack(model, "student"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(ids, segments=segments)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "olmo3"])
def test_what_a_token_keeps_in_a_block_is_what_is_counted(case, as_on_a_gpu):
    family, options = CASES[case]
    shape = SHAPE | options | dict(hidden_size=192, intermediate_size=320, num_attention_heads=6, head_dim=32)

    def config(layers: int) -> DecoderConfig:
        return DecoderConfig.from_hf(shape | dict(model_type=family, num_hidden_layers=layers))

    def a_token(layers: int) -> float:
        return (kept_bytes(config(layers), 200, 8) - kept_bytes(config(layers), 100, 8)) / 100

    kept, counted = a_token(4) - a_token(3), memory.block_bytes(config(4), 8)
    assert 0.7 * counted <= kept <= 1.01 * counted


@pytest.mark.parametrize("hf", [QWEN_14B, LLAMA_8B], ids=["14b", "8b"])
def test_weights_adapters_and_cache_are_what_the_model_holds(hf):
    config = DecoderConfig.from_hf(hf)
    model = on_meta(config)
    held = sum(p.numel() for p in model.parameters())
    assert memory.base_parameters(config) == pytest.approx(held, rel=1e-3)
    lora.attach(model)
    linears = sum(layer.in_features + layer.out_features for layer in model.lora.layers.values())
    assert linears == config.n_layers * sum(map(sum, memory._linears(config)))
    with torch.device("meta"):
        cache = model.new_cache(8, 1100)
    assert memory.cache_bytes(config, 8, 1100) == cache.keys.nbytes + cache.values.nbytes


def test_on_80_gb_a_batch_of_the_paper_is_one_micro_batch_and_one_of_math_at_14b_is_split():
    qwen, llama = DecoderConfig.from_hf(QWEN_14B), DecoderConfig.from_hf(LLAMA_8B)
    for config in (qwen, llama):
        assert tokens_that_fit(H100, config, 32) > 16 * 230  # rows of train.py
        broad = memory.cache_bytes(config, 8, 180 + 256)
        assert tokens_that_fit(H100, config, 32, 32, broad) > 8 * (120 + 256)
    math = memory.cache_bytes(qwen, 8, 400 + 1024)
    assert 1174 < tokens_that_fit(H100, qwen, 32, 32, math) < 8 * 1174
    assert 8 * 1174 * memory.token_bytes(qwen, 32) > H100 - 30 * GB  # beside the weights: which is why


def test_less_memory_and_more_in_it_leave_fewer_tokens_and_recomputing_leaves_more():
    config = DecoderConfig.from_hf(QWEN_14B)
    base, cache = tokens_that_fit(H100, config, 32), memory.cache_bytes(config, 8, 1400)
    assert tokens_that_fit(48 * GB, config, 32) < base < tokens_that_fit(141 * GB, config, 32)
    assert tokens_that_fit(H100, config, 128) < base and tokens_that_fit(H100, config, 32, 64) < base
    assert tokens_that_fit(H100, config, 32, 0, cache) < base
    assert base < tokens_that_fit(H100, config, 32, recompute=True)
    assert tokens_that_fit(16 * GB, config, 32) == 1  # a row at a time


def test_a_number_that_is_given_counts_and_a_cpu_has_a_fixed_one():
    config = DecoderConfig.from_hf(QWEN_14B)
    assert micro_tokens(None, torch.device("cpu"), config, 32) == CPU_TOKENS
    for device in ("cpu", "cuda"):
        assert micro_tokens(7, torch.device(device), config, 32) == 7
