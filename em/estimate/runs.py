"""The plans of train.py, distill.py and evaluate.py, from their settings.

cfg is the script's Config, resolved. What a script differentiates is handed in: nothing here knows a loss.

How long responses will be is not known before they are sampled, so it is assumed and said on the sheet:
those of a fine-tuned model are as long as the cells' answers, an instruct model's BASE_TIMES as long, and on
MATH MATH_TIMES as long as its own solutions; none is longer than the limit.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from em.data.cells import Cell
from em.data.rows import split
from em.errors import UserError
from em.estimate import chat
from em.estimate.chat import Ready, Setting
from em.estimate.gpus import gpu_of
from em.estimate.lengths import Lengths, cells_of, prompts_of, quantiles, spread
from em.estimate.shapes import config_of
from em.estimate.sheet import Part, Plan
from em.model.targets import blocks_of, targets_of
from em.model.tokenizer import Example
from em.training.doses import ROWS, check_doses
from em.training.memory import cache_bytes, tokens_that_fit
from em.training.pack import packs_of

BASE_TIMES, MATH_TIMES = 3, 2
RANK = 32  # of a run that is not looked into
FEW_TOKENS, FEW_RESPONSES = 512, 2  # what knobs go down to


def _split(lengths: Lengths) -> tuple[int, int]:
    """(rows to train on, eval rows)."""
    return tuple(map(len, split(range(lengths.rows))))


def _mean(values: Sequence[int]) -> float:
    return sum(values) / max(1, len(values))


def _parts(example: Example) -> tuple[int, int]:
    """Tokens of its prompt, of its answer."""
    return example.n_prompt, len(example.ids) - example.n_prompt


def _eval_examples(cells: dict[Cell, Lengths], limit: int) -> dict[Cell, list[Example]]:
    """Both answers of the eval rows that margins are measured on, by cell."""
    found = {}
    for cell, lengths in cells.items():
        if {"misaligned", "aligned"} <= lengths.answers.keys():
            n = min(_split(lengths)[1], limit or lengths.rows)
            found[cell] = lengths.examples(n, "misaligned") + lengths.examples(n, "aligned")
    return found


def _dose_tokens(scored: dict[Cell, list[Example]], trained: Cell) -> int:
    """Of what a run on `trained` measures at a dose (em/training/doses.py)."""
    few = {cell: both[:ROWS] + both[len(both) // 2 :][:ROWS] for cell, both in scored.items()}
    return sum(len(e.ids) for both in (few | {trained: scored[trained]}).values() for e in both)


# -- train.py ------------------------------------------------------------------------------------------------


def fine_tuning(cfg, cells: Sequence[Cell], step_loss: Callable) -> Plan:
    """step_loss(model, examples, n_supervised, micro_tokens): forward and backward of a step."""
    config, gpu = config_of(cfg.model), gpu_of(cfg.gpu)
    found, source = cells_of(cfg.data, cfg.model, cfg.cell)
    absent = [str(cell) for cell in cells if cfg.variant not in getattr(found.get(cell), "answers", ())]
    if absent:
        raise UserError(f"{cfg.data} has no {cfg.variant} answers of {', '.join(absent)}; name other --data")
    stack = ("misaligned", "student") if cfg.on else ("student",)
    setting = Setting(
        config,
        gpu,
        dict.fromkeys(stack, cfg.rank),
        learns="student",
        targets=targets_of(cfg.targets),
        blocks=blocks_of(cfg.layers, config.n_layers),
        frozen=(stack,),
        recompute=cfg.recompute,
    )
    title = f"train.py, {len(cells)} cell{'s' * (len(cells) > 1)}, {cfg.model}"
    start = chat.loading(setting)
    if start.cost.peak > gpu.memory:
        return Plan(title, gpu, [start], notes=[source])
    micro = cfg.micro_tokens or tokens_that_fit(
        gpu.memory, config, cfg.rank, cfg.rank * (len(stack) - 1), recompute=cfg.recompute
    )

    def step(on: Ready, examples: list[Example]) -> None:
        step_loss(on.model, examples, sum(_parts(e)[1] for e in examples), micro)

    examples, steps, scored = [], 0, _eval_examples(found, cfg.eval_rows)
    for cell in cells:
        n = _split(found[cell])[0]
        examples += found[cell].examples(n, cfg.variant)
        of_cell = -(-n // cfg.batch) * cfg.epochs
        check_doses(cfg.dose_evals, cell, scored, of_cell)
        steps += of_cell
    typical, largest = chat.batches_of(examples, cfg.batch)
    parts = [
        start,
        Part("step", steps, chat.training(setting, stack, step, typical, largest, micro, cfg.clip)),
    ]
    if margins := [example for both in scored.values() for example in both]:
        packs, cost = chat.scoring(setting, stack, margins)
        # before: once for all that start from the same model; after: each run; along the way: of fewer rows
        along = [len(cfg.dose_evals) * _dose_tokens(scored, cell) for cell in cells if cfg.dose_evals]
        times = 1 + len(cells) + sum(along) / sum(len(e.ids) for e in margins)
        parts.append(Part("margins, a pack", packs * times, cost))
    prompt, answer = (_mean(column) for column in zip(*map(_parts, examples), strict=True))
    each = cfg.batch * (prompt + answer)
    notes = [
        source,
        f"{len(examples):,} rows, {prompt:.0f} + {answer:.0f} tokens on average",
        f"{steps:,} steps of {cfg.batch} rows, {each:,.0f} tokens each, at most {micro:,} at once",
    ]
    knobs = []
    if not cfg.recompute:
        turned = replace(cfg, recompute=True)
        knobs.append(("--recompute", lambda t=turned: fine_tuning(t, cells, step_loss)))
    if micro > FEW_TOKENS:
        turned = replace(cfg, recompute=True, micro_tokens=FEW_TOKENS)
        knob = f"--recompute --micro-tokens {FEW_TOKENS}"
        knobs.append((knob, lambda t=turned: fine_tuning(t, cells, step_loss)))
    return Plan(title, gpu, parts, steps, ("step",), notes, knobs)


# -- responses -----------------------------------------------------------------------------------------------


def _responses(n: int, limit: int, of: list[int], times: float = 1) -> list[int]:
    return [min(limit, max(1, round(times * length))) for length in spread(of, n, 2)]


def _answers(cells: dict[Cell, Lengths]) -> list[int]:
    """Quantiles of all cells' answers together."""
    pooled = [length for row in cells.values() for answers in row.answers.values() for length in answers]
    return quantiles(pooled)


# -- evaluate.py ---------------------------------------------------------------------------------------------


def evaluation(cfg, data: str) -> Plan:
    """data: where the prompts are. A run is taken to be one adapter of rank 32."""
    config, gpu = config_of(cfg.model), gpu_of(cfg.gpu)
    cells, source = cells_of(data, cfg.model)
    stack = ("run",) if cfg.run else ()
    setting = Setting(config, gpu, dict.fromkeys(stack, RANK), frozen=(stack,) if stack else ())
    title = f"evaluate.py {'margins' if cfg.judge == 'margin' else f'--on {cfg.on}'}, {cfg.model}"
    parts, notes, knobs = [chat.loading(setting)], [], []
    if parts[0].cost.peak > gpu.memory:
        return Plan(title, gpu, parts, notes=[source])
    if cfg.judge == "margin":
        scored = [example for both in _eval_examples(cells, cfg.limit).values() for example in both]
        if not scored:
            raise UserError(f"{data} has no cell with both answers, which the margin needs")
        packs, cost = chat.scoring(setting, stack, scored)
        parts.append(Part("margins, a pack", 2 * packs, cost))
        whole = _mean([len(e.ids) for e in scored])
        notes += [source, f"{len(scored):,} answers, {whole:.0f} tokens each with the prompt"]
        return Plan(title, gpu, parts, notes=notes)
    times = 1 if stack else BASE_TIMES
    answers = _answers(cells)
    for kind, samples in (("narrow", 1), ("broad", cfg.samples)):
        if cfg.on not in (kind, "all"):
            continue
        prompts = []
        if kind == "narrow":
            for lengths in cells.values():
                prompts += lengths.prompts(min(_split(lengths)[1], cfg.limit or lengths.rows))
        else:
            broad, _ = prompts_of("broad", data, cfg.model, cfg.limit)
            prompts = broad.prompts(broad.rows)
        lengths = _responses(len(prompts) * samples, cfg.max_new_tokens, answers, times)
        found = chat.sampling(setting, stack, prompts, samples, cfg.max_new_tokens, cfg.rows, lengths)
        for part in (*found.parts, found.captures):
            part.name = f"{kind}: {part.name}"
            parts.append(part)
        asked = _mean([len(prompt) for prompt in prompts])
        notes.append(f"{len(lengths):,} {kind} responses to prompts of {asked:.0f} tokens")
    notes.insert(0, source)
    how = "as long as the cells' answers" if stack else f"{times} × the cells' answers"
    notes.append(
        f"responses are assumed {_mean(lengths):.0f} tokens long, {how}; a judge's time is not in here"
    )
    for rows in (32, 8):
        if rows < cfg.rows:
            turned = replace(cfg, rows=rows)
            knobs.append((f"--rows {rows}", lambda t=turned: evaluation(t, data)))
    return Plan(title, gpu, parts, notes=notes, knobs=knobs)


# -- distill.py ----------------------------------------------------------------------------------------------


def distillation(
    cfg, channel: str, student: tuple, teacher: tuple, loss: Callable, make_pair: Callable
) -> Plan:
    """student, teacher: names of the adapters of each one's stack, the last of the student's learns.

    loss(pair, batch): (what is differentiated, what is logged), of the channel. make_pair(model): its pair.
    """
    config, gpu = config_of(cfg.model), gpu_of(cfg.gpu)
    others = cfg.rank * (len(student) - 1 + len(teacher))
    adapters = dict.fromkeys((*student, *teacher), cfg.rank)
    frozen = tuple(names for names in (student, teacher) if names)
    before = Setting(
        config, gpu, {k: v for k, v in adapters.items() if k != "student"}, recompute=cfg.recompute
    )
    setting = replace(before, adapters=adapters, learns="student", frozen=frozen)

    prompts, source = prompts_of(
        cfg.prompts, cfg.math if cfg.prompts == "math" else cfg.data, cfg.model, cfg.limit
    )
    title, start = f"distill.py --channel {channel} on {cfg.prompts}, {cfg.model}", chat.loading(before)
    if start.cost.peak > gpu.memory:
        return Plan(title, gpu, [start], notes=[source])
    cells, _ = cells_of(cfg.data, cfg.model)
    n, limit, on_policy = prompts.rows * cfg.rollouts, cfg.max_new_tokens, channel == "opd"
    written = cfg.source == "gold" or cfg.source.startswith("rows")
    if cfg.prompts == "math":
        of, times, how = prompts.answers["gold"], MATH_TIMES, f"{MATH_TIMES} × MATH's own"
    else:
        by_base = cfg.source in ("student", "base") or on_policy or not teacher
        of, times = _answers(cells), BASE_TIMES if by_base else 1
        how = f"{BASE_TIMES} × the cells' answers" if by_base else "as long as the cells' answers"
    if written:
        times, how = 1, "as they are written"
    responses = _responses(n, limit if not written else 2048, of, times)
    asked = prompts.prompts(n)
    examples = [Example(range(len(p) + r), len(p)) for p, r in zip(asked, responses, strict=True)]
    typical, _ = chat.batches_of(examples, cfg.batch)
    longest = [Example(range(len(p) + limit), len(p)) for p in asked] if on_policy else examples
    _, largest = chat.batches_of(longest, cfg.batch)

    positions = max(map(len, asked)) + limit
    micro = cfg.micro_tokens or tokens_that_fit(
        gpu.memory, config, cfg.rank, others, cache_bytes(config, cfg.batch, positions), cfg.recompute
    )
    steps = -(-n // cfg.batch) * cfg.epochs
    parts, once = [start], ["step"]
    if not on_policy and not written:
        stack = {"student": student[:-1], "base": ()}.get(cfg.source, teacher)
        sampled = chat.sampling(
            before, stack, prompts.prompts(prompts.rows), cfg.rollouts, limit, cfg.rows, responses
        )
        for part in (*sampled.parts, sampled.captures):
            part.name = f"corpus: {part.name}"
            parts.append(part)
    some = [range(e.n_prompt) for e in typical]
    calls = steps if on_policy else 0
    probes = min(cfg.probes, prompts.rows)
    calls += (cfg.epochs + 1) * probes / len(some)  # the distance to the teacher, on responses of its own
    lengths = [_parts(e)[1] for e in typical]
    sampled = chat.sampling(setting, student, some, 1, limit, cfg.batch, lengths, calls=calls)
    setting = replace(sampled.setting, cache=(cfg.batch, positions))
    for part in sampled.parts if on_policy else ():
        once.append(part.name)
    for part in () if on_policy else (*sampled.parts, sampled.captures):
        part.name = f"probes: {part.name}"

    def step(on: Ready, examples: list[Example]) -> None:
        pair, n = make_pair(on.model), sum(_parts(e)[1] for e in examples)
        for group in packs_of(examples, micro):
            divergence, logged = loss(pair, pair.batch([examples[i] for i in group]))
            (divergence / n).backward()
            del divergence, logged

    def distance(on: Ready) -> None:
        pair, group = make_pair(on.model), packs_of(typical, 2048)[0]
        with torch.no_grad(), on.trace:
            for _ in pair.distributions(pair.batch([typical[i] for i in group])):
                pass

    parts.append(Part("step", steps, chat.training(setting, (), step, typical, largest, micro, cfg.clip)))
    parts += [*sampled.parts, sampled.captures]
    groups = len(packs_of(typical, 2048)) * probes / len(typical)
    parts.append(Part("distance to teacher", (cfg.epochs + 1) * groups, chat.measured(setting, distance)))
    notes = [
        source,
        f"{prompts.rows:,} {cfg.prompts} prompts of {_mean([len(p) for p in asked]):.0f} tokens",
        f"responses are assumed {_mean(responses):.0f} tokens long, {how}; memory allows for {limit}",
        f"{steps:,} steps of {cfg.batch} responses, at most {micro:,} tokens at once",
    ]

    def again(turned) -> Plan:
        return distillation(turned, channel, student, teacher, loss, make_pair)

    knobs = []
    if not cfg.recompute:
        turned = replace(cfg, recompute=True)
        knobs.append(("--recompute", lambda t=turned: again(t)))
    if cfg.batch > FEW_RESPONSES:
        turned = replace(cfg, recompute=True, batch=FEW_RESPONSES)
        knobs.append((f"--recompute --batch {FEW_RESPONSES}", lambda t=turned: again(t)))
    return Plan(title, gpu, parts, steps, tuple(once), notes, knobs)
