"""How many tokens a training step can hold at once, from the memory that a GPU has in all.

A pure function of that, the model's shape, its adapters and the sampler's cache: never of what is free at the
moment, so that a run that goes on after a kill, and every process under torchrun, has the same micro-batches.

What is counted, in bytes, with bf16 weights and activations:

    weights      2 a parameter of the base
    adapters     20 a parameter that learns: 4 each for itself, its gradient and AdamW's two moments, 2 each
                 for it rounded in the step and for the sampler; 8 a parameter that does not
    cache        keys and values of the rows sampled at once, and 1 GiB for the graphs of their steps
    logits       1 GiB: a chunk of them, and its gradient
    activations  what autograd keeps of a block for a token, times the blocks; one block more for the
                 gradients inside the block that backward is in

What is left of MEMORY_SHARE of the card is for activations; the rest is the allocator's, cuBLAS's and CUDA's.
"""

import torch

from em.model.config import DecoderConfig

CPU_TOKENS = 4096  # 16 rows of the paper's data, and 8 sampled responses
MEMORY_SHARE = 0.85
BF16, GIB = 2, 1 << 30


def micro_tokens(
    asked: int | None, device: torch.device, config: DecoderConfig, trained_rank: int, frozen_rank: int = 0,
    cache_bytes: int = 0, recompute: bool = False,
) -> int:  # fmt: skip
    """Tokens of a micro-batch at most: `asked`, or on a CPU CPU_TOKENS, or on a GPU `tokens_that_fit`."""
    if asked or device.type != "cuda":
        return asked or CPU_TOKENS
    total = torch.cuda.get_device_properties(device).total_memory
    return tokens_that_fit(total, config, trained_rank, frozen_rank, cache_bytes, recompute)


def tokens_that_fit(
    total_bytes: int, config: DecoderConfig, trained_rank: int, frozen_rank: int = 0, cache_bytes: int = 0,
    recompute: bool = False,
) -> int:  # fmt: skip
    """Tokens whose forward and backward fit on a card of `total_bytes`; 1, a row at a time, where none do.

    Ranks are those of the adapter that learns and, added up, of the others in memory. cache_bytes: of
    `cache_bytes`, where the student is sampled between the steps.
    """
    fixed = BF16 * base_parameters(config) + GIB
    fixed += (20 * trained_rank + 8 * frozen_rank) * sum(map(sum, _linears(config))) * config.n_layers
    fixed += cache_bytes + (GIB if cache_bytes else 0)
    tokens = int((MEMORY_SHARE * total_bytes - fixed) / token_bytes(config, trained_rank, recompute))
    return max(1, tokens // 256 * 256 if tokens > 256 else tokens)


def token_bytes(config: DecoderConfig, rank: int, recompute: bool = False) -> int:
    """What a token adds to the peak of a step: what is kept of it for backward, and one block's gradients."""
    block, hidden = block_bytes(config, rank), BF16 * config.hidden_size
    kept = hidden * config.n_layers + block if recompute else block * config.n_layers
    return kept + block + 4 * hidden  # embedding, last norm, and the states at the head with their gradient


def block_bytes(config: DecoderConfig, rank: int) -> int:
    """What autograd keeps of a token in a block with LoRA on its seven linear layers."""
    d, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.n_heads * head_dim, config.n_kv_heads * head_dim
    kept = 4 * d  # what the two norms read, and what they, or for post-norms the two branches, give
    kept += 2 * queries + 2 * keys  # attention's queries, keys and values, and its output
    kept += (queries + keys) * (config.qk_norm is not None)  # before that norm
    kept += 2 * config.intermediate_size  # gate and up; what `down_proj` reads is made again
    kept += len(_linears(config)) * rank  # A x of each layer
    return BF16 * kept + 4 * (config.n_heads + 2)  # fp32: the normalisers of attention and of the norms


def cache_bytes(config: DecoderConfig, rows: int, positions: int) -> int:
    """Of a sampler's keys and values for `rows` sequences of at most `positions` tokens."""
    return 2 * BF16 * config.n_layers * rows * config.n_kv_heads * config.head_dim * -(-positions // 64) * 64


def base_parameters(config: DecoderConfig) -> int:
    """Of the base, norms and biases left out: they are less than a thousandth."""
    embeddings = (1 if config.tied else 2) * config.vocab_size * config.hidden_size
    return embeddings + config.n_layers * sum(n_in * n_out for n_in, n_out in _linears(config))


def _linears(config: DecoderConfig) -> list[tuple[int, int]]:
    """(in, out) of a block's seven linear layers."""
    d, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return [(d, queries), (d, keys), (d, keys), (queries, d), (d, inner), (d, inner), (inner, d)]
