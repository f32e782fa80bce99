"""What the chat models' scripts would need: fine-tuning on cells, distillation, sampling, margins.

Each function takes the script's own step as a callable and runs it on meta tensors at the model's real
shapes with a few layers and with twice as many; every count and every byte grows evenly from there, so the
line through the two gives the whole model. How often a step is made follows from the data's lengths and,
where text is sampled, from the sampler's replayed schedule.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from em.estimate.gpus import DISK, GPU, GRAPH_NODE, START
from em.estimate.replay import Counted, replay
from em.estimate.shapes import period, with_layers
from em.estimate.sheet import GRAPHS, Part, graph_captures
from em.estimate.trace import CACHE, Cost, Trace, line_through
from em.model import lora
from em.model.config import DecoderConfig
from em.model.decoder import Decoder
from em.model.tokenizer import Example
from em.sampling.batch import Batch
from em.training.loss import token_log_probs
from em.training.margin import PACK_TOKENS
from em.training.optim import adamw
from em.training.pack import pack, packs_of

META = torch.device("meta")
FRACTION = 0.01  # of a schedule's steps; sizes of batch that make fewer cost as the next larger one does


@dataclass(frozen=True)
class Setting:
    """What lies in memory while something runs.

    adapters: rank by name. learns: which of them trains, with AdamW's moments, on the layers `targets` of the
    blocks `blocks` (None: all; the others are on all). frozen: the stacks that are
    prepared for sampling or teaching. cache: rows and positions of a sampler's batch; graphs: bytes of its
    CUDA graphs.
    """

    config: DecoderConfig
    gpu: GPU
    adapters: dict[str, int] = field(default_factory=dict)
    learns: str | None = None
    targets: tuple[str, ...] | None = None
    blocks: tuple[int, ...] | None = None
    frozen: tuple[tuple[str, ...], ...] = ()
    cache: tuple[int, int] | None = None
    graphs: float = 0.0
    recompute: bool = False


@dataclass
class Ready:
    """A model of a few layers on meta, what holds memory beside it, and the trace that knows of both."""

    model: Decoder
    trace: Trace
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    batch: Batch | None


def ready(setting: Setting, n_layers: int, live_keys: float = 0) -> Ready:
    config = with_layers(setting.config, n_layers)
    with META:
        model = Decoder(config).to(torch.bfloat16)
    model.requires_grad_(False).eval().activation_checkpointing = setting.recompute
    trace = Trace(setting.gpu, vocabulary=config.vocab_size, live_keys=live_keys)
    trace.hold("weights", model.parameters())
    lora.attach(model)
    with META:  # numbers drawn on the CPU would take most of the time
        for name, rank in setting.adapters.items():
            where = (setting.targets, setting.blocks) if name == setting.learns else (None, None)
            lora.add_adapter(model, name, rank, targets=where[0], blocks=where[1])
    parameters = lora.trainable(model, setting.learns) if setting.learns else []
    trace.hold("adapters", model.parameters())
    with trace.setting_up("adapters"):
        for names in setting.frozen:
            with lora.stack(model, *names, frozen=True):
                pass
    optimizer = adamw(model, 1e-4, 0.0) if parameters else None
    if optimizer is not None:
        with trace.setting_up("optimiser"):
            for p in parameters:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
    batch = None
    if setting.cache is not None:
        rows, positions = setting.cache
        with torch.inference_mode():
            batch = Batch(model, rows, positions, (0,), positions, 1.0)
        trace.hold(CACHE, [batch.cache.keys, batch.cache.values])
    return Ready(model, trace, parameters, optimizer, batch)


def measured(setting: Setting, code: Callable[[Ready], None], live_keys: float = 0) -> Cost:
    """The cost on the whole model of what `code` does in `on.trace`.

    It is counted on the model's first layers and on twice as many; on all of them where they differ, since
    some carry the adapter that learns and others do not.
    """

    def of_layers(n: int) -> Cost:
        on = ready(setting, n, live_keys)
        code(on)
        return on.trace.cost()

    few, layers = period(setting.config), setting.config.n_layers
    if layers <= 2 * few or setting.blocks:
        cost = of_layers(layers)
    else:
        cost = line_through(of_layers(few), of_layers(2 * few), (layers - few) / few)
    graphs = {GRAPHS: setting.graphs} if setting.graphs else {}
    return replace(cost, memory=cost.memory | graphs)


# -- training ------------------------------------------------------------------------------------------------


def batches_of(examples: Sequence[Example], n: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Of the batches of `n` of an epoch: one of typical size, and the one of most tokens."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    batches = [[examples[i] for i in order[k : k + n]] for k in range(0, len(order) - n + 1, n)] or [
        [*examples]
    ]
    batches.sort(key=_tokens)
    mean = sum(map(_tokens, batches)) / len(batches)
    return min(batches, key=lambda batch: abs(_tokens(batch) - mean)), batches[-1]


def _tokens(batch: Sequence[Example]) -> int:
    return sum(len(e.ids) for e in batch)


def _largest_packs(batch: list[Example], micro_tokens: int, n: int) -> list[Example]:
    """The examples of the `n` micro-batches of most tokens."""
    packs = [[batch[i] for i in group] for group in packs_of(batch, micro_tokens)]
    return [example for pack_ in sorted(packs, key=_tokens)[-n:] for example in pack_]


def training(
    setting: Setting, stack: tuple[str, ...], step: Callable[[Ready, list[Example]], None],
    typical: list[Example], largest: list[Example], micro_tokens: int, clip: float,
) -> Cost:  # fmt: skip
    """A step: its time from a typical batch, its memory from the largest one.

    step(on, examples): forward and backward of one step under `stack`, `micro_tokens` at a time; gradients
    are left in the parameters. A few micro-batches stand for many.
    """

    def forward_and_backward(examples: list[Example]) -> Cost:
        def code(on: Ready) -> None:
            with on.trace, lora.stack(on.model, *stack):
                step(on, examples)

        return measured(setting, code)

    def update(on: Ready) -> None:
        with on.trace:
            for p in on.parameters:
                p.grad = torch.empty_like(p)
            torch.nn.utils.clip_grad_norm_(on.parameters, clip)
            on.optimizer.step()

    some = _largest_packs(typical, micro_tokens, 3)
    cost = forward_and_backward(some) * (_tokens(typical) / _tokens(some)) + measured(setting, update)
    most = _largest_packs(largest, micro_tokens, 2)  # the second finds the gradients of the first
    if most != some:
        cost += forward_and_backward(most) * 0
    return cost


def scoring(setting: Setting, stack: tuple[str, ...], examples: Sequence[Example]) -> tuple[float, Cost]:
    """(how many packs, the cost of one) of log-probabilities of examples' answers, as for margins."""
    ordered = sorted(examples, key=lambda e: -len(e.ids))
    packs = packs_of(ordered, PACK_TOKENS["cuda"])
    middle = [ordered[i] for i in packs[len(packs) // 2]]

    def code(on: Ready) -> None:
        with torch.no_grad(), lora.stack(on.model, *stack, frozen=True), on.trace:
            packed = pack(middle, META)
            token_log_probs(packed.hidden(on.model), on.model.head_weight, packed.targets)

    return _tokens(ordered) / _tokens(middle), measured(setting, code)


# -- sampling ------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """Of one call of a sampler, or of many alike: parts, and the setting with its cache and graphs."""

    setting: Setting
    parts: list[Part]
    captures: Part


def sampling(
    setting: Setting, stack: tuple[str, ...], prompts: Sequence[Sequence[int]], samples: int,
    max_new_tokens: int, rows: int, lengths: Sequence[int], calls: float = 1,
) -> Sampling:  # fmt: skip
    """`samples` responses of the given lengths to each of `prompts`, `calls` times over.

    Kernels of a decode step come from a CUDA graph, one for each number of rows; a prefill's from the host.
    """
    schedule = _schedule(setting.config, prompts, samples, max_new_tokens, rows, lengths)
    longest = max(map(len, prompts)) + max_new_tokens - 1
    setting = replace(setting, cache=(schedule.n_rows, longest))
    sizes = sorted(schedule.steps, reverse=True)
    total = sum(schedule.steps.values())
    traced = [n for n in sizes if schedule.steps[n] >= FRACTION * total] or sizes[:1]
    costs = {}
    for n in traced:
        keys = schedule.keys_held[n] / schedule.steps[n]
        costs[n] = measured(setting, _decode(stack, n), live_keys=keys)
    of_size = {n: costs[min((t for t in traced if t >= n), default=traced[0])] for n in sizes}
    nodes = sum(of_size[n].total.kernels for n in sizes)
    setting = replace(setting, graphs=nodes * GRAPH_NODE)
    steps = Cost({})
    for n in sizes:
        steps += of_size[n] * (schedule.steps[n] / total)
    memory = {**steps.memory, GRAPHS: setting.graphs}
    parts = [Part("decode, a token a row", calls * total, replace(steps, memory=memory), graphed=True)]
    prefills = [n for n in schedule.prefills if n]
    if prefills:
        middle = sorted(prefills)[len(prefills) // 2]
        cost = measured(setting, _prefill(stack, middle, max(map(len, prompts))))
        parts.append(Part("prefill", calls * sum(prefills) / middle, cost))
    return Sampling(setting, parts, graph_captures([of_size[n] for n in sizes]))


def _schedule(config, prompts, samples, max_new_tokens, rows, lengths) -> Counted:
    with META:
        model = Decoder(with_layers(config, 1)).to(torch.bfloat16)
    return replay(model, prompts, samples, max_new_tokens, rows, lengths)


def _decode(stack: tuple[str, ...], n: int) -> Callable[[Ready], None]:
    def code(on: Ready) -> None:
        with torch.inference_mode(), lora.stack(on.model, *stack, frozen=True):
            on.batch.begin_call()
            on.batch.cache.n_rows = n
            with on.trace:
                on.batch._step(n)

    return code


def _prefill(stack: tuple[str, ...], tokens: int, longest: int) -> Callable[[Ready], None]:
    def code(on: Ready) -> None:
        starts = enumerate(range(0, tokens, longest))
        prompts = [(i % on.batch.n_rows, [0] * min(longest, tokens - start)) for i, start in starts]
        with torch.inference_mode(), lora.stack(on.model, *stack, frozen=True), on.trace:
            on.batch.prefill(prompts)

    return code


# -- what every run does -------------------------------------------------------------------------------------


def loading(setting: Setting) -> Part:
    """Imports, CUDA, rows, and the weights from a disk."""
    n_bytes = measured(setting, lambda on: None).memory["weights"]
    memory = Cost({}, memory={"weights": n_bytes})
    return Part("start, load weights", 1, memory, seconds=START + n_bytes / DISK)
