"""Models of the real shapes with random weights, made on the GPU: the shape decides speed and memory."""

import torch
import torch.nn as nn

from em.model.decoder import Decoder, DecoderConfig

SHARED = {"max_position_embeddings": 32_768, "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES = {  # the checkpoints' own config.json, in what decides the cost
    "14b": SHARED | {  # Qwen2.5-14B
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152_064,
        "hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 48,
        "num_attention_heads": 40, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    },
    "8b": SHARED | {  # Llama-3.1-8B
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256,
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    },
}  # fmt: skip


def random_model(shape: str, who: str = "ours") -> nn.Module:
    """Our decoder of `shape`, or transformers' model of the same (`who` another), in bf16 on CUDA, frozen."""
    with torch.device("meta"):
        if who == "ours":
            model = Decoder(DecoderConfig.from_hf(SHAPES[shape]))
        else:
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model(**SHAPES[shape])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.fill_(1) if name.endswith("norm.weight") else p.normal_(0, 0.02)
    for module in model.modules():  # transformers' rotary frequencies are buffers, which to_empty left blank
        if hasattr(module, "inv_freq"):
            module.__init__(module.config, device="cuda")
    return model
