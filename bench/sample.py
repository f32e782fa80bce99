"""Our sampler beside transformers' `generate`, in turn in one process.

    python bench/sample.py                            about 10 minutes on two cores
    python bench/sample.py --max-new-tokens 96 --rounds 1     a short trial
    python bench/sample.py --shape 14b --batch 8      on a GPU: tokens a second of 8 sequences, or of 40
    python bench/sample.py --shape 8b --responses 4800        on a GPU: that many responses, in seconds

CPU: SmolLM2-135M in fp32 on the sample's prompts, temperature 1. Useful tokens a second (up to a response's
first stop token) with lengths as they fall, and seconds a step of a full batch that nothing stops.
CUDA: random bf16 weights of Qwen2.5-14B's or Llama-3.1-8B's shape. --batch: 256 tokens for each sequence,
with and without a LoRA adapter, beside a static cache and compiled steps in transformers. --responses: of 130
tokens on average and 600 at most, which random weights come to if one token in 130 is a stop token.
"""

import copy
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from record import RESULTS, goal, save  # noqa: E402
from shapes import SHAPES, random_model  # noqa: E402

from em import parallel  # noqa: E402
from em.cli import command_line, knob  # noqa: E402
from em.data.cells import CELLS
from em.data.rows import load_broad, load_cell  # noqa: E402
from em.errors import UserError  # noqa: E402
from em.model import lora  # noqa: E402
from em.model.checkpoint import load_model, load_tokenizer  # noqa: E402
from em.model.decoder import Decoder  # noqa: E402
from em.run import provenance
from em.sampling.batch import Batch  # noqa: E402
from em.sampling.sampler import Sampler  # noqa: E402


@dataclass
class Config:
    shape: str | None = knob(None, "14b or 8b, on a GPU (default: the embedded model)", "what", tuple(SHAPES))
    batch: int | None = knob(None, "sequences decoded at once, GPU", "what", at_least=1)
    responses: int | None = knob(None, "responses to sample, GPU", "what", at_least=1)
    max_new_tokens: int = knob(256, "tokens a response at most", "what")
    sequences: int = knob(40, "responses a round, CPU", "what")
    rounds: int = knob(3, "times that each takes its turn", "what")
    out: str | None = knob(None, "the result's file (default: results/bench/sample_*.json)", "what")


def reference(model: Decoder):
    """transformers' model on the same weights, without a copy of them."""
    config = transformers.AutoConfig.for_model(**copy.deepcopy(model.config.hf))
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=model.head_weight.dtype)
    theirs.load_state_dict(model.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(model.head_weight.device)
    theirs.generation_config = transformers.GenerationConfig()
    return theirs.eval()


def generate(theirs, prompts, stop_ids, max_new_tokens, seed, **options) -> list[list[int]]:
    """What `theirs.generate` samples, each up to its first stop token."""
    torch.manual_seed(seed)
    device, longest = theirs.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, eos_token_id=list(stop_ids) or None, pad_token_id=0, **options,
    )[:, longest:].tolist()  # fmt: skip
    ends = [next((i + 1 for i, t in enumerate(row) if t in stop_ids), len(row)) for row in out]
    return [row[:end] for row, end in zip(out, ends, strict=True)]


def timed(call):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


class Stamps(transformers.StoppingCriteria):
    """Stops nothing; notes the time after every step of `generate`."""

    def __init__(self):
        self.times = []

    def __call__(self, ids, scores, **_):
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

    def step(self) -> float:
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:], strict=False))


def their_step(theirs, prompts) -> float:
    """Seconds a token of all rows, sampling included."""
    stamps = Stamps()
    generate(theirs, prompts, (), 16, 0, stopping_criteria=[stamps])
    return stamps.step()


def our_step(sampler: Sampler, prompts) -> float:
    stamps, run_batch = Stamps(), Batch.run

    def stamped(batch, *arguments):
        run_batch(batch, *arguments)
        stamps.times.append(time.perf_counter())

    with mock.patch.object(Batch, "run", stamped):
        sampler(prompts)
    return stamps.step()


def compare(calls: dict, rounds: int, unit) -> dict:
    """calls: name → function of the seed, `unit` of whose result a second is the rate. Taken in turn."""
    rates = {name: [] for name in calls}
    for seed in range(rounds):
        for name, call in calls.items():
            seconds, result = timed(lambda call=call, seed=seed: call(seed))
            rates[name].append(unit(result) / seconds)
    ratios = [a / b for a, b in zip(rates["ours"], rates["transformers"], strict=True)]
    return {
        "per_s": {name: statistics.median(r) for name, r in rates.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def on_cpu(cfg: Config) -> dict:
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    theirs = reference(model)
    rows = [row for i in range(20) for cell in CELLS for row in load_cell("sample", cell)[i : i + 1]]
    prompts = [tokenizer.prompt_ids(row["question"]) for row in [*load_broad("sample"), *rows]]
    prompts, stops, limit = prompts[: cfg.sequences], tokenizer.stop_ids, cfg.max_new_tokens
    sampler = Sampler(model, stops, limit, rows=cfg.sequences)
    lengths = []

    def count(responses):
        lengths.append(statistics.mean(map(len, responses)))
        return sum(map(len, responses))

    calls = {
        "ours": lambda seed: [r.ids for r in sampler(prompts, seed=seed)],
        "transformers": lambda seed: generate(theirs, prompts, stops, limit, seed),
    }
    result = {"useful_tokens": compare(calls, cfg.rounds, count)}
    over = result["useful_tokens"]["ratio"]["median"]
    result["goals"] = [goal("sampler on a CPU, useful tokens over transformers'", over, "×", at_least=2.3)]
    result["useful_tokens"]["mean_length"] = {"ours": lengths[0::2], "transformers": lengths[1::2]}
    for batch in (cfg.sequences, 8, 1):
        some, sampler = prompts[:batch], Sampler(model, (), 16, rows=batch)
        pairs = [(our_step(sampler, some), their_step(theirs, some)) for _ in range(cfg.rounds + 2)]
        ours, others = zip(*pairs, strict=True)
        result[f"seconds_a_step_of_{batch}"] = {
            "ours": statistics.median(ours),
            "transformers": statistics.median(others),
            "ratio": (over := statistics.median(b / a for a, b in pairs)),
        }
        result["goals"].append(goal(f"a step of {batch}, over transformers'", over, "×", at_least=1))
    return result


def random_prompts(n: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(40, 110, (n,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def decode(cfg: Config) -> dict:
    model, prompts = random_model(cfg.shape), random_prompts(cfg.batch, SHAPES[cfg.shape]["vocab_size"])
    theirs, limit = reference(model), cfg.max_new_tokens
    lora.attach(model)
    lora.add_adapter(model, "adapter", seed=1)
    sampler, adapted = (Sampler(model, (), limit, rows=cfg.batch) for _ in range(2))

    def with_adapter(seed):
        with lora.stack(model, "adapter", frozen=True):
            return [r.ids for r in adapted(prompts, seed=seed)]

    calls = {
        "ours": lambda seed: [r.ids for r in sampler(prompts, seed=seed)],
        "transformers": lambda seed: generate(
            theirs, prompts, (), limit, seed, cache_implementation="static"
        ),
        "ours with LoRA": with_adapter,
    }
    for call in calls.values():  # graphs, compilation
        call(99)
    found = compare(calls, cfg.rounds, lambda responses: sum(map(len, responses)))
    what, least = f"decode {cfg.shape}, batch {cfg.batch}", {("14b", 8): 740, ("14b", 40): 3200}
    found["goals"] = [
        goal(what, found["per_s"]["ours"], "tokens/s", at_least=least.get((cfg.shape, cfg.batch))),
        goal(f"{what}, with LoRA", found["per_s"]["ours with LoRA"], "tokens/s"),
        goal(f"{what}, over transformers", found["ratio"]["median"], "×"),
    ]
    return found


def responses(cfg: Config) -> dict:
    model, V = random_model(cfg.shape), SHAPES[cfg.shape]["vocab_size"]
    sampler, prompts = Sampler(model, range(0, V, 130), 600, rows=128), random_prompts(cfg.responses, V)
    seconds, rollouts = timed(lambda: sampler(prompts))
    peak, what = torch.cuda.max_memory_allocated() / 1e9, f"{cfg.responses:,} responses {cfg.shape}"
    most = {("8b", 4800): 70}.get((cfg.shape, cfg.responses))
    return {
        "mean_length": statistics.mean(len(r.ids) for r in rollouts),
        "goals": [goal(what, seconds, "s", at_most=most), goal(f"peak of {what}", peak, "GB")],
    }


def main(cfg: Config) -> None:
    if bool(cfg.shape) != bool(cfg.batch or cfg.responses) or (cfg.batch and cfg.responses):
        raise UserError("--shape goes with --batch or with --responses")
    device = parallel.start("cuda" if cfg.shape else "cpu")
    result = {"command": " ".join(["python bench/sample.py", *sys.argv[1:]])}
    result["made_with"] = provenance(device) | {"transformers": transformers.__version__}
    if not cfg.shape:
        name, found = "cpu", on_cpu(cfg)
    elif cfg.batch:
        name, found = f"{cfg.shape}_batch{cfg.batch}", decode(cfg)
    else:
        name, found = f"{cfg.shape}_responses", responses(cfg)
    for key, value in found.items():
        print(key, value)
    save(result | found, cfg.out or RESULTS / f"sample_{name}.json")


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
