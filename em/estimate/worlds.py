"""What synth.py would need: a GPT-2 pretrained, aligned, misaligned and asked on a synthetic world (paper
B.4, B.5).

Shapes and lengths are the world's own, which takes a fraction of a second to build. Training keeps fp32
parameters and computes in bf16; here a bf16 copy of the model stands for what autocast casts, and the casts
are counted.
"""

import numpy as np
import torch

from em.estimate.gpus import COMPILE, GPU, GRAPH_NODE, START, gpu_of
from em.estimate.replay import replay
from em.estimate.sheet import GRAPHS, Part, Plan, graph_captures
from em.estimate.trace import CACHE, Cost, Trace, line_through
from em.model.gpt2 import GPT2, GPT2Config, supervised_loss
from em.sampling.batch import Batch
from em.training.optim import adamw
from em.world.doses import PROMPTS, doses_of
from em.world.generator import ExampleGenerator
from em.world.world import WORLDS, build_world
from em.world.world_run import COMPILED_FROM

META = torch.device("meta")
ROWS = 512  # asked at once, as em.world.world_run does
DRAWN = 2000  # examples, for their lengths
FEW = 2  # layers traced, and twice as many


def _models(config: GPT2Config, n_layers: int) -> tuple[GPT2, GPT2]:
    """In fp32, and what autocast makes of it."""
    few = GPT2Config(config.vocab_size, config.n_positions, n_layers, config.n_head, config.n_embd)
    with META:
        return GPT2(few), GPT2(few).to(torch.bfloat16)


def _whole(config: GPT2Config, of_layers) -> Cost:
    if config.n_layer <= 2 * FEW:
        return of_layers(config.n_layer)
    return line_through(of_layers(FEW), of_layers(2 * FEW), (config.n_layer - FEW) / FEW)


def training_step(config: GPT2Config, gpu: GPU, batch: int, length: int, clip: float, compiled: bool) -> Cost:
    """A step of em.world.world_run.train_phase on (batch, length) tokens."""

    def of_layers(n: int) -> Cost:
        trace = Trace(gpu, vocabulary=config.padded_vocab)
        with trace.setting_up("weights"):
            model, low = _models(config, n)
        optimizer = adamw(model, 1e-4, 0.01)
        with trace.setting_up("optimiser"):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
        ids = torch.empty(batch, length, dtype=torch.long, device=META)

        def loss_and_gradients() -> None:
            for p, q in zip(model.parameters(), low.parameters(), strict=True):
                q.data.copy_(p)
            (supervised_loss(low, ids, ids) / (batch * length)).backward()
            for p, q in zip(model.parameters(), low.parameters(), strict=True):
                p.grad, q.grad = q.grad.float(), None

        with trace:
            if compiled:
                with trace.as_compiled():
                    loss_and_gradients()
            else:
                loss_and_gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return trace.cost()

    return _whole(config, of_layers)


def decode_step(config: GPT2Config, gpu: GPU, rows: int, positions: int, n: int, live_keys: float) -> Cost:
    """A token more for n of `rows` rows; autocast casts every weight in every step."""

    def of_layers(layers: int) -> Cost:
        trace = Trace(gpu, vocabulary=config.padded_vocab, live_keys=live_keys)
        with trace.setting_up("weights"):
            model, low = _models(config, layers)
        with torch.inference_mode():
            batch = Batch(low, rows, positions, (0,), positions, 0.0)
            trace.hold(CACHE, [batch.cache.keys, batch.cache.values])
            batch.begin_call()
            batch.cache.n_rows = n
            with trace:
                for (name, p), q in zip(model.named_parameters(), low.parameters(), strict=True):
                    if name.startswith("h.") and ".ln_" not in name:
                        q.copy_(p)
                batch._step(n)
        return trace.cost()

    return _whole(config, of_layers)


def asking(config: GPT2Config, gpu: GPU, prompts: list[range], limit: int, lengths: list[int]) -> list[Part]:
    """One round of asking: decode steps and making their graphs. Prefills are some dozens of small
    forwards."""
    with META:
        model = GPT2(GPT2Config(config.vocab_size, config.n_positions, 1, config.n_head, config.n_embd))
    schedule = replay(model.to(torch.bfloat16), prompts, 1, limit, ROWS, lengths)
    total, cost, sizes = sum(schedule.steps.values()), Cost({}), []
    positions = max(map(len, prompts)) + limit - 1
    for n in sorted(schedule.steps, reverse=True):
        share, keys = schedule.steps[n] / total, schedule.keys_held[n] / schedule.steps[n]
        if share >= 0.01:
            sizes.append(decode_step(config, gpu, schedule.n_rows, positions, n, keys))
        cost += sizes[-1] * share
    memory = cost.memory | {GRAPHS: GRAPH_NODE * sum(size.total.kernels for size in sizes)}
    cost = Cost(cost.work, cost.calls, memory)
    return [Part("ask: decode, a token a row", total, cost, graphed=True), graph_captures(sizes)]


def world_run(cfg) -> Plan:
    """The plan of synth.py's main command, cfg resolved."""
    gpu, world = gpu_of(cfg.gpu), build_world(WORLDS[cfg.world], cfg.seed)
    generator = ExampleGenerator(world)
    rng = np.random.default_rng(0)
    cells = rng.integers(0, len(world.seen_cells), DRAWN)
    drawn = generator.dialogues(rng, generator.draw(rng, cells), variant=1)
    positions = max(cfg.length, generator.max_tokens)
    config = GPT2Config(world.vocabulary, positions, cfg.layers, cfg.heads, cfg.width)
    tuned = min(64 * -(-int(drawn.total.max() - 1) // 64), positions)
    misalign = (cfg.misalign_steps, cfg.misalign_batch, tuned)
    phases = {
        "pretrain, a step": (cfg.steps, cfg.batch, cfg.length, 1),
        "align, a step": (cfg.align_steps, cfg.align_batch, tuned, 1),
        "misalign, a step": (*misalign, len(cfg.misalign) * cfg.misalign_seeds),
    }
    curves, doses = (phases["misalign, a step"][3], doses_of(cfg)) if cfg.doses else (0, ())
    if curves:
        phases["along the doses, a step"] = (max(doses), cfg.misalign_batch, tuned, curves)
    shapes = {(batch, length) for steps, batch, length, _ in phases.values() if steps >= COMPILED_FROM}
    parts = [Part("start, build the world", 1, seconds=START), Part("compile", len(shapes), seconds=COMPILE)]
    for name, (steps, batch, length, times) in phases.items():
        cost = training_step(config, gpu, batch, length, cfg.clip, steps >= COMPILED_FROM)
        parts.append(Part(name, steps * times, cost))
    asked = len(world.cells) * cfg.eval_prompts
    picked = np.arange(asked) % DRAWN
    prompts = [range(int(n)) for n in drawn.prompt[picked]]
    lengths = [int(n) for n in (drawn.total - drawn.prompt)[picked]]
    models = 2 + phases["misalign, a step"][3]
    watched = cfg.evals * 8 * len(world.seen_cells) / asked  # a sample of the prompts while it pretrains
    steps, captures = asking(config, gpu, prompts, generator.max_answer, lengths)
    of_a_dose = cfg.eval_prompts + min(PROMPTS, cfg.eval_prompts) * (len(world.cells) - 1)
    steps.times *= models + watched + curves * len(doses) * of_a_dose / asked
    captures.times = models + curves + 1  # each model's sampler captures its own
    parts += [steps, captures]
    tokens = cfg.batch * cfg.length
    millions, mean = cfg.steps * tokens / 1e6, drawn.total.mean()
    notes = [
        f"vocabulary {world.vocabulary}, {len(world.cells)} cells, examples of {mean:.0f} tokens",
        f"pretraining on {millions:,.0f} M tokens, {tokens:,} a step; each model is asked {asked:,} prompts",
    ]
    title = f"synth.py, world {cfg.world}, GPT-2 of {cfg.layers} × {cfg.width}"
    return Plan(title, gpu, parts, cfg.steps, ("pretrain, a step",), notes)
