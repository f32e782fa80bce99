"""A LoRA training step beside transformers + peft on the same rows, in turn in one process.

    python bench/lora.py                  SmolLM2-135M and the sample rows on a CPU, fp32
    python bench/lora.py --shape 14b      on a GPU: random weights of the real shape, real lengths, bf16
    python bench/lora.py --shape 8b

A step is forward, loss, backward, clip, AdamW over 16 rows (CPU: 8), padded for peft as its collators do.
tokens/s count the rows' own tokens. Peak memory is that of a process which only trains one of the two. A
whole cell, margins included, is bench/cell.py.
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from record import RESULTS, goal, installed, save  # noqa: E402
from shapes import SHAPES, random_model  # noqa: E402

import train  # noqa: E402
from em import parallel  # noqa: E402
from em.data.cells import CELLS
from em.data.rows import encode_rows, load_cell
from em.model import lora  # noqa: E402
from em.model.checkpoint import load_model, load_tokenizer, save_model  # noqa: E402
from em.model.decoder import Decoder, DecoderConfig  # noqa: E402
from em.model.tokenizer import Example  # noqa: E402
from em.run import provenance
from em.training.optim import adamw  # noqa: E402

PEAK_FLOPS = 989e12  # H100, dense bf16
EPOCH_ROWS = 4100


def rows_of(shape: str | None) -> list[list[Example]]:
    """Batches of examples: the sample's rows, or random ids of the real rows' lengths."""
    if shape is None:
        rows = load_cell("sample", CELLS[0])[:8]
        return [encode_rows(load_tokenizer("smollm2-135m"), rows, "misaligned", 2048).examples]
    rng = random.Random(0)

    def example() -> Example:
        n_answer = max(8, round(rng.gauss(110, 30)))
        n_prompt = max(20, round(rng.gauss(115, 40)))
        return Example([rng.randrange(1000, 100_000) for _ in range(n_prompt + n_answer)], n_prompt)

    return [[example() for _ in range(16)] for _ in range(8)]


def our_step(model, batches):
    lora.attach(model)
    lora.add_adapter(model, "student")
    parameters = lora.trainable(model, "student")
    optimizer = adamw(model, 1e-4, 0.01)

    def step(i: int) -> None:
        examples = batches[i % len(batches)]
        n = sum(len(e.ids) - e.n_prompt for e in examples)
        with lora.stack(model, "student"):
            train.step_loss(model, examples, n, micro_tokens=8192)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_step(model, batches, checkpointing: bool):
    import peft

    config = peft.LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules=list(lora.TARGETS))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(model, config).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01, fused=True)
    device = trainable[0].device

    def step(i: int) -> None:
        examples = batches[i % len(batches)]
        width = max(len(e.ids) for e in examples)
        ids, labels, mask = (torch.zeros(len(examples), width, dtype=torch.long) for _ in range(3))
        labels.fill_(-100)
        for row, e in enumerate(examples):
            ids[row, : len(e.ids)] = torch.tensor(e.ids)
            labels[row, e.n_prompt : len(e.ids)] = torch.tensor(e.ids[e.n_prompt :])
            mask[row, : len(e.ids)] = 1
        model(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make(who: str, shape: str | None, folder: str | None, checkpointing: bool = False):
    batches = rows_of(shape)
    if shape is not None:
        model = random_model(shape, who)
    elif who == "ours":
        model = load_model("smollm2-135m")
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
    return our_step(model, batches) if who == "ours" else their_step(model, batches, checkpointing)


def seconds(step, i: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    step(i)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(who: str, shape: str | None, folder: str | None) -> int:
    """Peak memory of a process that makes three steps: resident set on a CPU, allocated on a GPU."""
    arguments = (
        ["--child", who] + (["--shape", shape] if shape else []) + (["--folder", folder] if folder else [])
    )
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def child(who: str, shape: str | None, folder: str | None) -> None:
    step = make(who, shape, folder)
    for i in range(3):
        step(i)
    on_gpu = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    print(peak)


def on_cpu(rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        save_model(load_model("smollm2-135m"), Path(folder) / "smollm2")
        folder = str(Path(folder) / "smollm2")
        peaks = {who: peak_bytes(who, None, folder) for who in ("ours", "peft")}
        steps = {who: make(who, None, folder) for who in ("ours", "peft")}
    times: dict[str, list[float]] = {who: [] for who in steps}
    for i in range(rounds + 1):
        for who, step in steps.items():
            took = seconds(step, i)
            if i:  # the first of each is a warm-up
                times[who].append(took)
    tokens = sum(len(e.ids) for e in rows_of(None)[0])
    ratios = [b / a for a, b in zip(times["ours"], times["peft"], strict=True)]
    return {
        "tokens_per_s": {who: tokens / statistics.median(t) for who, t in times.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "peak_bytes": peaks,
        "goals": [
            goal("LoRA step on a CPU, over peft's", statistics.median(ratios), "×", at_least=1.5),
            goal("its peak memory, of peft's", peaks["ours"] / peaks["peft"], "×", at_most=0.65),
        ],
    }


def on_gpu(shape: str, rounds: int) -> dict:
    """One model at a time: two of this size do not fit. peft recomputes activations where it must."""
    result = {}
    batches = rows_of(shape)
    tokens = statistics.mean(sum(len(e.ids) for e in b) for b in batches)
    with torch.device("meta"):
        n_weights = sum(
            p.numel() for p in Decoder(DecoderConfig.from_hf(SHAPES[shape])).model.layers.parameters()
        )
    for who, checkpointing in (("ours", False), ("peft", False), ("peft", True)):
        name = who + (" recomputing" if checkpointing else "")
        try:
            torch.cuda.reset_peak_memory_stats()
            step = make(who, shape, None, checkpointing)
            times = [seconds(step, i) for i in range(rounds + 3)][3:]
        except torch.OutOfMemoryError:
            result[name] = "out of memory"
        else:
            step_s = statistics.median(times)
            result[name] = {
                "tokens_per_s": tokens / step_s,
                "epoch_s": step_s * EPOCH_ROWS / 16,
                "peak_bytes": torch.cuda.max_memory_allocated(),
                # 4 a weight and token: the frozen base needs no weight gradient
                "share_of_bf16_peak": 4 * n_weights * tokens / step_s / PEAK_FLOPS,
            }
        step = None
        torch.cuda.empty_cache()
    result["goals"] = []
    if isinstance(ours := result["ours"], dict):
        seconds_a_step = ours["epoch_s"] * 16 / EPOCH_ROWS
        result["goals"] = [
            goal(f"SFT step {shape}, 16 rows", seconds_a_step, "s"),
            goal(f"peak of SFT step {shape}", ours["peak_bytes"] / 1e9, "GB", at_most=70),
        ]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=("ours", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="the result's file (default: results/bench/lora_*.json)")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.shape, arguments.folder)
    device = parallel.start("cuda" if arguments.shape else "cpu")
    result = on_gpu(arguments.shape, arguments.rounds) if arguments.shape else on_cpu(arguments.rounds)
    command = "python bench/lora.py" + (f" --shape {arguments.shape}" if arguments.shape else "")
    made_with = provenance(device) | {name: installed(name) for name in ("transformers", "peft")}
    result = {"command": command, "made_with": made_with, **result}
    print(json.dumps(result, indent=1))
    save(result, arguments.out or RESULTS / f"lora_{arguments.shape or 'cpu'}.json")


if __name__ == "__main__":
    main()
