"""What the dry run's arithmetic says of the work that bench/gpu.sh measures, by the benches' own names.

    python bench/estimates.py --gpu h100

It needs no GPU. bench/calibrate.py puts these numbers beside what was measured.
"""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import distill  # noqa: E402
import synth  # noqa: E402
import train  # noqa: E402
from em.cli import command_line, knob  # noqa: E402
from em.distillation.pair import ChatPair  # noqa: E402
from em.estimate import chat, worlds  # noqa: E402
from em.estimate.chat import META, Setting  # noqa: E402
from em.estimate.gpus import GPU, GPUS  # noqa: E402
from em.estimate.shapes import config_of  # noqa: E402
from em.estimate.trace import Trace  # noqa: E402
from em.model.gpt2 import GPT2Config  # noqa: E402
from em.model.tokenizer import Example  # noqa: E402
from em.training.kl import forward_kl  # noqa: E402
from em.training.memory import cache_bytes, tokens_that_fit  # noqa: E402
from em.training.pack import packs_of  # noqa: E402

SHAPES = {"14b": "qwen2.5-14b", "8b": "llama3.1-8b"}
STUDENT = ("student",)


@dataclass
class Config:
    gpu: str = knob("h100", "the GPU", "what", tuple(GPUS))


def rows(n: int) -> list[Example]:
    """Of the real rows' lengths, as in bench/lora.py and bench/cell.py."""
    rng, found = random.Random(0), []
    for _ in range(n):
        answer, prompt = max(8, round(rng.gauss(110, 30))), max(20, round(rng.gauss(115, 40)))
        found.append(Example(range(prompt + answer), prompt))
    return found


def prompts(n: int) -> list[range]:
    rng = random.Random(0)
    return [range(rng.randrange(40, 110)) for _ in range(n)]


def fine_tuning(shape: str, gpu: GPU) -> dict[str, float]:
    config = config_of(SHAPES[shape])
    setting = Setting(config, gpu, {"student": 32}, learns="student", frozen=(STUDENT,))
    micro = tokens_that_fit(gpu.memory, config, 32)

    def step(on, examples):
        train.step_loss(on.model, examples, sum(len(e.ids) - e.n_prompt for e in examples), micro)

    typical, largest = chat.batches_of(rows(4100), 16)
    cost = chat.training(setting, STUDENT, step, typical, largest, micro, 1.0)
    packs, margins = chat.scoring(setting, STUDENT, rows(12 * 64 * 2))
    measured_once = packs * margins.likely
    own = 2 * measured_once / 24  # the loss on the cell's own eval rows, before and after
    cell = 257 * cost.likely + measured_once + own
    return {
        f"SFT step {shape}, 16 rows": cost.likely,
        f"peak of SFT step {shape}": cost.peak / 1e9,
        f"SFT a cell {shape}": cell + measured_once,
        f"SFT a cell {shape}, the next": cell,
        f"peak of SFT a cell {shape}": max(cost.peak, margins.peak) / 1e9,
    }


def kl(gpu: GPU) -> dict[str, float]:
    n, vocabulary, d = 2048, 152_064, 5120
    with META:
        student, teacher = (torch.empty(n, d, dtype=torch.bfloat16) for _ in range(2))
        head = torch.empty(vocabulary, d, dtype=torch.bfloat16)
    student.requires_grad_()
    trace = Trace(gpu, vocabulary=vocabulary)
    trace.hold("inputs", (student, teacher, head))
    with trace:
        forward_kl(student, teacher, head).backward()
    cost, what = trace.cost(), f"forward_kl {n} x {vocabulary} x {d}"
    return {what: 1e3 * cost.likely, f"peak of {what}": (cost.peak - cost.memory["inputs"]) / 1e9}


def decoding(shape: str, batch: int, gpu: GPU) -> dict[str, float]:
    found, limit, what = {}, 256, f"decode {shape}, batch {batch}"
    for stack, name in (((), what), (STUDENT, f"{what}, with LoRA")):
        frozen = (stack,) if stack else ()
        setting = Setting(config_of(SHAPES[shape]), gpu, dict.fromkeys(stack, 32), frozen=frozen)
        sampled = chat.sampling(setting, stack, prompts(batch), 1, limit, batch, [limit] * batch)
        found[name] = batch * limit / sum(part.likely for part in sampled.parts)
    return found


def responses(shape: str, n: int, gpu: GPU) -> dict[str, float]:
    rng, setting = random.Random(0), Setting(config_of(SHAPES[shape]), gpu)
    lengths = [1 + int(rng.expovariate(1 / 130)) for _ in range(n)]  # one token in 130 ends a response
    sampled = chat.sampling(setting, (), prompts(n), 1, 600, 128, lengths)
    parts, what = [*sampled.parts, sampled.captures], f"{n:,} responses {shape}"
    return {
        what: sum(part.likely for part in parts),
        f"peak of {what}": max(part.cost.peak for part in parts) / 1e9,
    }


def on_policy(shape: str, batch: int, limit: int, gpu: GPU) -> dict[str, float]:
    config, rng = config_of(SHAPES[shape]), random.Random(0)
    adapters = {"teacher": 32, "student": 32}
    setting = Setting(config, gpu, adapters, learns="student", frozen=(STUDENT, ("teacher",)))
    asked = [range(rng.randint(60, 180)) for _ in range(batch)]
    sampled = chat.sampling(setting, STUDENT, asked, 1, limit, batch, [limit] * batch)
    positions = max(map(len, asked)) + limit
    setting = replace(sampled.setting, cache=(batch, positions))
    micro = tokens_that_fit(gpu.memory, config, 32, 32, cache_bytes(config, batch, positions))

    def step(on, examples):
        pair = ChatPair(on.model, STUDENT, ("teacher",), (0,), limit, batch)
        for group in packs_of(examples, micro):
            loss, _ = distill.opd(pair, pair.batch([examples[i] for i in group]))
            loss.backward()

    examples = [Example(range(len(p) + limit), len(p)) for p in asked]
    cost = chat.training(setting, (), step, examples, examples, micro, 1.0)
    what = f"OPD step {shape}, {batch} x {limit}"
    return {what: cost.likely + sum(p.likely for p in sampled.parts), f"peak of {what}": cost.peak / 1e9}


def gpt2(gpu: GPU) -> dict[str, float]:
    config, batch, length = GPT2Config(514), 64, 256
    cost = worlds.training_step(config, gpu, batch, length, clip=1.0, compiled=True)
    what = f"GPT-2-small step {batch} x {length}"
    matrices = 12 * config.n_layer * config.n_embd**2 + config.padded_vocab * config.n_embd
    flops = batch * length * (6 * matrices + 12 * config.n_layer * config.n_embd * length)
    return {what: 1e3 * cost.likely, f"{what}, share of peak": flops / cost.likely / gpu.flops}


def estimates(gpu: str) -> dict[str, float]:
    """By the benches' names, in their units; {} for a GPU that the dry run does not know."""
    if gpu not in GPUS:
        return {}
    card = GPUS[gpu]
    found = kl(card) | decoding("14b", 8, card) | decoding("14b", 40, card) | responses("8b", 4800, card)
    found |= fine_tuning("14b", card) | fine_tuning("8b", card) | on_policy("14b", 8, 256, card)
    found |= gpt2(card)
    for world in ("1", "2"):
        plan = worlds.world_run(synth.resolve(synth.Config(world=world, gpu=gpu)))
        found[f"World {world} from nothing"] = plan.seconds("likely")
    return found


def main(cfg: Config) -> None:
    for what, value in estimates(cfg.gpu).items():
        print(f"  {what:45} {value:10.4g}")


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
