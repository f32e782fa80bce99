"""Where the seconds of an on-policy distillation step go: decode, teacher, student, optimiser.

    python bench/opd.py                   the embedded model on a CPU, 8 responses of at most 64 tokens
    python bench/opd.py --shape 14b       on a GPU: random weights of the real shape, bf16, 8 × 256 tokens

The steps are those of distill.py (em.distillation.loop.train_student under its `opd`), on prompts of 60 to
180 random tokens; on a GPU nothing ends early, so that every step is the full 8 × 256. The first two steps
warm up and do not count.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from record import RESULTS, goal, save  # noqa: E402
from shapes import SHAPES, random_model  # noqa: E402

import distill  # noqa: E402
from em import parallel  # noqa: E402
from em.cli import command_line, knob  # noqa: E402
from em.distillation.loop import OnPolicy, train_student  # noqa: E402
from em.distillation.pair import ChatPair  # noqa: E402
from em.model import lora as adapters  # noqa: E402
from em.model.checkpoint import load_model  # noqa: E402
from em.run import Run, provenance  # noqa: E402


@dataclass
class Config:
    shape: str | None = knob(
        None, "14b or 8b, on a GPU (default: the embedded model, CPU)", "bench", tuple(SHAPES)
    )
    steps: int = knob(6, "steps, the first two for warming up", "bench")
    responses: int = knob(8, "responses a step", "bench")
    out: str | None = knob(None, "the result's file (default: results/bench/opd_*.json)", "bench")


def main(cfg: Config) -> None:
    parallel.start("cuda" if cfg.shape else "cpu")
    model = random_model(cfg.shape) if cfg.shape else load_model("smollm2-135m", torch.device("cpu"))
    device, limit = model.head_weight.device, 256 if cfg.shape else 64
    adapters.attach(model)
    for name, seed in (("teacher", 1), ("student", 2)):
        adapters.add_adapter(model, name, seed=seed)
    with torch.no_grad():  # a teacher that differs
        for p in adapters.trainable(model, "teacher")[1::2]:
            p.normal_(0, 0.01)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 181, (cfg.responses * cfg.steps,), generator=generator).tolist()
    prompts = [
        {"prompt_ids": torch.randint(1000, 40_000, (n,), generator=generator).tolist()} for n in lengths
    ]
    pair = ChatPair(model, ("student",), ("teacher",), (-1,) if cfg.shape else (2,), limit, cfg.responses)
    settings = SimpleNamespace(
        batch=cfg.responses, epochs=1, micro_tokens=4096, seed=0, warmup=0, clip=1.0,
        weight_decay=0.01, save_minutes=1e9,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        log = Run(folder, "bench", {}, device)
        examples = OnPolicy(pair, prompts, seed=0)
        examples.check = lambda *_: None  # random weights never end a turn
        train_student(settings, 1e-4, log, pair, distill.CHANNELS["opd"], examples, lambda epoch: None, "opd")
        rows = log.metrics()[2:]
    names = [name for name in rows[0] if name.startswith("seconds_")]
    seconds = {name.removeprefix("seconds_"): statistics.median(row[name] for row in rows) for name in names}
    step = statistics.median(sum(row[name] for name in names) for row in rows)
    found = {
        "command": " ".join(["python bench/opd.py", *sys.argv[1:]]),
        "made_with": provenance(device),
        "model": cfg.shape or "smollm2-135m",
        "responses": cfg.responses,
        "new_tokens_a_response": statistics.mean(row["length"] for row in rows),
        "seconds_a_step": step,
        "seconds": seconds,
        "share": {name: value / step for name, value in seconds.items()},
        "tokens_per_s": statistics.median(row["supervised_tokens"] for row in rows) / step,
        "goals": [],
    }
    if device.type == "cuda":
        found |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    if cfg.shape == "14b":
        what = f"OPD step 14b, {cfg.responses} x {limit}"
        found["goals"] = [
            goal(what, step, "s", at_most=3.4),
            goal(f"peak of {what}", found["peak_gb"], "GB", at_most=75),
        ]
    for name, value in found.items():
        print(name, value)
    save(found, cfg.out or RESULTS / f"opd_{cfg.shape or 'cpu'}.json")


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
