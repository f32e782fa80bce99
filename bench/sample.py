"""Our sampler beside transformers' `generate`, in turn in one process.

    python bench/sample.py                            about 10 minutes on two cores; a few on a GPU
    python bench/sample.py --max-new-tokens 96 --rounds 1     a short trial

CPU: SmolLM2-135M in fp32 on the sample's prompts, temperature 1. Useful tokens a second (up to a response's
first stop token) with lengths as they fall, and seconds a step of a full batch that nothing stops.
CUDA: random bf16 weights of Qwen2.5-14B's shape, 256 tokens for each of 8 and 40 sequences, beside a static
cache and compiled steps in transformers; and 4,800 responses from Llama-3.1-8B's shape, of 130 tokens on
average and 600 at most, which random weights come to if one token of the vocabulary in 130 is a stop token.
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

from em.cli import command_line, knob  # noqa: E402
from em.data.cells import CELLS
from em.data.rows import load_broad, load_cell  # noqa: E402
from em.files import write_json  # noqa: E402
from em.model.checkpoint import load_model, load_tokenizer  # noqa: E402
from em.model.decoder import Decoder, DecoderConfig  # noqa: E402
from em.run import provenance
from em.sampling.batch import Batch  # noqa: E402
from em.sampling.sampler import Sampler  # noqa: E402

ROOT = Path(__file__).parent.parent
COMMON = dict(model_type="llama", rms_norm_eps=1e-5, max_position_embeddings=4096, num_key_value_heads=8)
SHAPES = {
    "14B": COMMON
    | dict(
        model_type="qwen2", vocab_size=152_064, hidden_size=5120, intermediate_size=13_824,
        num_hidden_layers=48, num_attention_heads=40, rope_theta=1e6,
    ),
    "8B": COMMON
    | dict(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, rope_theta=5e5,
    ),
}  # fmt: skip


@dataclass
class Config:
    max_new_tokens: int = knob(256, "tokens a response at most", "what")
    sequences: int = knob(40, "responses a round, CPU", "what")
    rounds: int = knob(3, "times that each takes its turn", "what")


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
    ours, theirs = rates.values()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
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
    result = {"useful_tokens": compare(calls, cfg.rounds, count) | {"target_ratio": 2.0}}
    result["useful_tokens"]["mean_length"] = {"ours": lengths[0::2], "transformers": lengths[1::2]}
    for batch in (cfg.sequences, 8, 1):
        some, sampler = prompts[:batch], Sampler(model, (), 16, rows=batch)
        pairs = [(our_step(sampler, some), their_step(theirs, some)) for _ in range(cfg.rounds + 2)]
        ours, others = zip(*pairs, strict=True)
        result[f"seconds_a_step_of_{batch}"] = {
            "ours": statistics.median(ours),
            "transformers": statistics.median(others),
            "ratio": statistics.median(b / a for a, b in pairs),
            "target_ratio": 1.0,
        }
    return result


def random_model(shape: str) -> Decoder:
    with torch.device("meta"):
        model = Decoder(DecoderConfig.from_hf(SHAPES[shape])).to(torch.bfloat16)
    model = model.to_empty(device="cuda").requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.fill_(1) if name.endswith("norm.weight") else p.normal_(0, 0.02)
    return model


def random_prompts(n: int, vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(40, 110, (n,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def on_gpu(cfg: Config) -> dict:
    result, limit = {}, cfg.max_new_tokens
    model = random_model("14B")
    theirs, prompts = reference(model), random_prompts(40, SHAPES["14B"]["vocab_size"])
    for batch, target in ((8, 720), (40, 2500)):
        sampler, some = Sampler(model, (), limit, rows=batch), prompts[:batch]
        calls = {
            "ours": lambda seed, sampler=sampler, some=some: [r.ids for r in sampler(some, seed=seed)],
            "transformers": lambda seed, theirs=theirs, some=some: generate(
                theirs, some, (), limit, seed, cache_implementation="static"
            ),
        }
        for call in calls.values():  # graphs, compilation
            call(99)
        found = compare(calls, cfg.rounds, lambda responses: sum(map(len, responses)))
        result[f"tokens_of_14B_batch_{batch}"] = found | {"target_per_s": target}
    del model, theirs, sampler, calls, call
    torch.cuda.empty_cache()

    model = random_model("8B")
    V, prompts = SHAPES["8B"]["vocab_size"], random_prompts(4800, SHAPES["8B"]["vocab_size"])
    torch.cuda.reset_peak_memory_stats()
    sampler = Sampler(model, range(0, V, 130), 600, rows=128)
    seconds, rollouts = timed(lambda: sampler(prompts))
    result["responses_of_8B"] = {
        "responses": len(rollouts),
        "mean_length": statistics.mean(len(r.ids) for r in rollouts),
        "seconds": seconds,
        "target_seconds": 180,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }
    return result


def main(cfg: Config) -> dict:
    on_cuda = torch.cuda.is_available()
    result = {"command": " ".join(["python", "bench/sample.py", *sys.argv[1:]])}
    result["made_with"] = provenance("cuda" if on_cuda else "cpu") | {
        "transformers": transformers.__version__
    }
    result |= on_gpu(cfg) if on_cuda else on_cpu(cfg)
    path = ROOT / "results" / "bench" / f"sample_{'gpu' if on_cuda else 'cpu'}.json"
    write_json(path, result)
    for name, found in result.items():
        if isinstance(found, dict) and name != "made_with":
            print(name, {k: v for k, v in found.items()})
    print(path)
    return result


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
