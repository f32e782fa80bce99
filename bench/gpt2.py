"""One training step of our GPT-2 beside transformers', same size and batch, in turn in one process.

    python bench/gpt2.py

CPU: the demo's size at its batch, fp32, both eager. CUDA: GPT-2-small at World 1's 64 × 256, bf16 autocast,
both under torch.compile, and the share of bf16 peak. A step is forward, loss, backward, clip, AdamW.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import GPT2Config as HFConfig  # noqa: E402
from transformers import GPT2LMHeadModel  # noqa: E402

from em.files import write_json  # noqa: E402
from em.model.gpt2 import GPT2, GPT2Config, supervised_loss  # noqa: E402
from em.run import provenance
from em.training.optim import adamw  # noqa: E402

# Dense bf16 peak of the card, FLOP/s, by a piece of its name.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
ROOT = Path(__file__).parent.parent


def flops_per_token(config: GPT2Config, length: int) -> float:
    """6 a matrix weight, and 12 L d T for attention: forward and backward, causality not discounted."""
    matrices = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab * config.n_embd
    return 6 * matrices + 12 * config.n_layer * config.n_embd * length


def make_step(model, loss_of, device, batch, length, vocabulary):
    optimizer = adamw(model, 3e-4, 0.01)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, length + 1), generator=generator).to(device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model, inputs, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_loss(model, ids, targets):
    logits = model(ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def seconds(step, device, n: int) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(n):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / n


def main() -> dict:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
        config, batch, length, n, rounds = GPT2Config(514), 64, 256, 50, 7
    else:
        config, batch, length, n, rounds = GPT2Config(258, 64, 3, 4, 128), 32, 64, 10, 9
    theirs_config = HFConfig(
        vocab_size=config.padded_vocab,
        n_positions=config.n_positions,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    ours = GPT2(config).to(device)
    theirs = GPT2LMHeadModel(theirs_config).to(device).train()
    compiled = (lambda f: torch.compile(f, dynamic=False)) if on_gpu else (lambda f: f)
    steps = {
        "ours": make_step(ours, compiled(supervised_loss), device, batch, length, config.vocab_size),
        "transformers": make_step(theirs, compiled(their_loss), device, batch, length, config.vocab_size),
    }
    for step in steps.values():
        seconds(step, device, 5)
    times = {name: [] for name in steps}
    for _ in range(rounds):  # in turn, so that both see the same machine
        for name, step in steps.items():
            times[name].append(seconds(step, device, n))
    tokens = batch * length
    ratios = [b / a for a, b in zip(times["ours"], times["transformers"], strict=True)]
    result = {
        "command": "python bench/gpt2.py",
        "made_with": provenance(device),
        "shape": {"batch": batch, "length": length, **vars(config)},
        "tokens_per_s": {name: tokens / statistics.median(t) for name, t in times.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "target_ratio": 1.3 if on_gpu else 1.2,
    }
    if on_gpu:
        peak = next((p for name, p in PEAK.items() if name in torch.cuda.get_device_name()), None)
        rate = result["tokens_per_s"]["ours"] * flops_per_token(config, length)
        result["share_of_bf16_peak"] = rate / peak if peak else None
    for name, rate in result["tokens_per_s"].items():
        print(f"{name:<14} {rate:12,.0f} tokens/s")
    middle, low, high = result["ratio"].values()
    print(f"ratio {middle:.2f} ({low:.2f}–{high:.2f}), target {result['target_ratio']}")
    if result.get("share_of_bf16_peak"):
        print(f"{100 * result['share_of_bf16_peak']:.0f} % of bf16 peak, target 45 %")
    return result


if __name__ == "__main__":
    result = main()
    path = ROOT / "results" / "bench" / f"gpt2_{'gpu' if torch.cuda.is_available() else 'cpu'}.json"
    write_json(path, result)
    print(path)
