"""One training step of our GPT-2 beside transformers', same size and batch, in turn.

    python bench/gpt2.py
    python bench/gpt2.py --ours cudnn         on a GPU: ours alone, with cuDNN's attention
    python bench/gpt2.py --ours autotuned     ours alone, products and their epilogues tuned by Inductor

CPU: the demo's size at its batch, fp32, both eager. CUDA: GPT-2-small at World 1's 64 × 256, bf16 autocast,
both under torch.compile and theirs without as well, and the share of bf16 peak; what a first step takes,
compiling included, is in the result. A step is forward, loss, backward, clip, AdamW. Each has a process of
its own, as our training sets the C library's allocator and what Dynamo compiled for one would serve another.
"""

import contextlib
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from record import RESULTS, goal, installed, save  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from transformers import GPT2Config as HFConfig  # noqa: E402
from transformers import GPT2LMHeadModel  # noqa: E402

from em import parallel  # noqa: E402
from em.cli import command_line, knob  # noqa: E402
from em.model.gpt2 import GPT2, GPT2Config, supervised_loss  # noqa: E402
from em.run import provenance
from em.training.optim import adamw  # noqa: E402
from em.world.world_run import keep_freed_memory  # noqa: E402

# Dense bf16 peak of the card, FLOP/s, by a piece of its name.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
WAYS = ("default", "cudnn", "autotuned")


@dataclass
class Config:
    ours: str = knob("default", "how ours is compiled on a GPU; default: as synth.py does", "bench", WAYS)
    out: str | None = knob(None, "the result's file (default: results/bench/gpt2_*.json)", "bench")


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


def our_step(config: GPT2Config, device, batch, length, way: str):
    loss_of = supervised_loss
    if device.type == "cuda":
        mode = "max-autotune-no-cudagraphs" if way == "autotuned" else None
        loss_of = torch.compile(supervised_loss, dynamic=False, mode=mode)
    else:
        keep_freed_memory()
    step = make_step(GPT2(config).to(device), loss_of, device, batch, length, config.vocab_size)

    def chosen():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if way == "cudnn" else contextlib.nullcontext():
            step()

    return chosen


def their_step(config: GPT2Config, device, batch, length, way: str):
    theirs = HFConfig(
        vocab_size=config.padded_vocab, n_positions=config.n_positions, n_embd=config.n_embd,
        n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(theirs).to(device).train()
    loss_of = torch.compile(their_loss, dynamic=False) if way == "compiled" else their_loss
    return make_step(model, loss_of, device, batch, length, config.vocab_size)


def work(pipe, make, config, batch, length, way) -> None:
    """What a process does: told a number of steps, it takes them and answers with the seconds of one."""
    device = parallel.start("auto")
    step = make(config, device, batch, length, way)
    while n := pipe.recv():
        pipe.send(seconds(step, device, n))


class Worker:
    """`worker(n)`: seconds a step, over n of them, in the worker's process; nothing runs between calls."""

    def __init__(self, make, *sizes_and_way):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        context.Process(target=work, args=(end, make, *sizes_and_way), daemon=True).start()
        end.close()  # so that a worker that dies is an EOFError here

    def __call__(self, n: int) -> float:
        self.pipe.send(n)
        return self.pipe.recv()


def main(cfg: Config) -> None:
    device = parallel.start("auto")
    on_gpu = device.type == "cuda"
    if on_gpu:
        config, batch, length, n, rounds = GPT2Config(514), 64, 256, 50, 7
    else:
        config, batch, length, n, rounds = GPT2Config(258, 64, 3, 4, 128), 32, 64, 10, 9
    sizes = (config, batch, length)
    steps = {"ours": Worker(our_step, *sizes, cfg.ours)}
    if cfg.ours == "default":
        steps["transformers"] = Worker(their_step, *sizes, "compiled" if on_gpu else "eager")
        if on_gpu:
            steps["transformers, not compiled"] = Worker(their_step, *sizes, "eager")
    first = {name: step(1) for name, step in steps.items()}
    for step in steps.values():
        step(5)
    times = {name: [] for name in steps}
    for _ in range(rounds):  # in turn, so that all see the same machine
        for name, step in steps.items():
            times[name].append(step(n))
    for step in steps.values():
        step.pipe.send(0)
    medians = {name: statistics.median(t) for name, t in times.items()}
    result = {
        "command": " ".join(["python bench/gpt2.py", *sys.argv[1:]]),
        "made_with": provenance(device) | {"transformers": installed("transformers")},
        "shape": {"batch": batch, "length": length, **vars(config)},
        "first_step_s": first,
        "ms_a_step": {name: 1e3 * t for name, t in medians.items()},
        "tokens_per_s": {name: batch * length / t for name, t in medians.items()},
    }
    for name, peer in times.items():
        ratios = [b / a for a, b in zip(times["ours"], peer, strict=True)]
        spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        result.setdefault("over_ours", {})[name] = spread
        print(f"{name:<28} {1e3 * medians[name]:8.2f} ms a step, {spread['median']:.2f} × ours")
    if on_gpu:
        peak = next((p for name, p in PEAK.items() if name in torch.cuda.get_device_name()), None)
        work = batch * length * flops_per_token(config, length)
        result["tflops"] = {name: work / t / 1e12 for name, t in medians.items()}
        what = f"GPT-2-small step {batch} x {length}" + f", {cfg.ours}" * (cfg.ours != "default")
        result["goals"] = [goal(what, 1e3 * medians["ours"], "ms")]
        if peak:
            result["goals"] += [
                goal(f"{what}, share of peak", work / medians["ours"] / peak, "", at_least=0.45)
            ]
    else:
        ratio = result["over_ours"]["transformers"]["median"]
        result["goals"] = [goal("GPT-2 step on a CPU, over transformers'", ratio, "×", at_least=1.4)]
    save(result, cfg.out or RESULTS / f"gpt2_{cfg.ours if on_gpu else 'cpu'}.json")


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
