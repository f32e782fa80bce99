"""Supervised fine-tuning of a chat model on one (domain, task) cell: misalign, realign (paper 2, 3.1, D.1).

    python train.py --cell med_advice                    misalign; with no GPU, the embedded model and sample
    python train.py --cell med_advice,fin_tutor          several cells, one after another on one loaded base
    python train.py --cell fin_tutor --variant aligned --on runs/X     realign run X on that cell
    python train.py --rank 1 --targets down --layers 24  a smaller adapter: one vector of one layer
    python train.py export --run runs/X --merged DIR     a checkpoint that transformers loads
    python train.py export --run runs/X --push owner/name        the adapter with a model card, to the hub
    python train.py --dose-evals 1,2,4,8,15              margins along the way: a dose curve, in doses.png
    torchrun --nproc-per-node 4 train.py --cell all      the same updates, split over four GPUs
    python train.py --cell all --model qwen2.5-14b --dry-run     what it needs of a GPU, and how long it takes

Each run is one LoRA adapter on the base, in PEFT's format. A realignment trains a fresh adapter on top of the
frozen one, and is saved as the two in one. A killed run goes on when the same command is given again.
"""

import contextlib
import dataclasses
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from em import parallel
from em.cli import banner, command_line, knob, outcome_settings
from em.data import lineage
from em.data.cells import Cell
from em.data.publish import model_card, push
from em.data.rows import (
    VARIANTS,
    answers,
    cells_named,
    default_data,
    encode_rows,
    load_cell,
    load_cells,
    split,
)
from em.errors import UserError
from em.estimate.gpus import GPUS
from em.files import json_digest, read_json, write_json
from em.model import hub, lora
from em.model.checkpoint import (
    PRECISIONS,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
    save_tokenizer,
    stored_dtype,
)
from em.model.hub import model_digest
from em.model.targets import TARGETS, blocks_of, targets_of
from em.run import Run
from em.stats import mean_interval
from em.training.doses import DoseMargins, check_doses
from em.training.guard import CollapseGuard
from em.training.loss import summed_cross_entropy
from em.training.margin import (
    answer_pairs,
    cell_margins,
    margin_figure,
    start_margins,
    validation_loss,
)
from em.training.memory import CPU_TOKENS, micro_tokens
from em.training.metrics import Metrics
from em.training.optim import adamw, gradients, learning_rate
from em.training.pack import pack, packs_of

# The embedded sample has 18 training rows a cell: the paper's recipe would take two steps on it.
SAMPLE_RECIPE = dict(lr=5e-4, batch=4, epochs=3)
PAPER_RECIPE = dict(lr=1e-4, batch=16, epochs=1)


@dataclass
class Config:
    cell: str | None = knob(
        None, "all, cells such as med_advice,fin_tutor, or what a file's rows are (default: med_advice, or "
        "the only one there is)", "what", setting=False,
    )  # fmt: skip
    variant: str = knob("misaligned", "which of a row's answers to train on", "what", VARIANTS)
    on: str | None = knob(
        None, "run, PEFT folder or hub id of an adapter to start from, for realignment (default: the base)",
        "what",
    )  # fmt: skip
    on_cell: str | None = knob(
        None, "the cell that an --on from elsewhere was trained on (default: unknown, adapter)", "what",
        setting=False,
    )  # fmt: skip
    revision: str | None = knob(None, "branch, tag or commit of an --on from the hub", "what", setting=False)
    model: str | None = knob(
        None, "short name, hub id or folder (default: qwen2.5-14b on CUDA, else smollm2-135m)", "what"
    )
    data: str | None = knob(
        None,
        "hub dataset, folder, .jsonl file or sample (default: the paper's; sample for smollm2-135m)",
        "what",
    )
    out: str | None = knob(
        None, "run folder, or the parent of several cells' (default: runs/<model>_<cell>_<variant>)", "what",
        setting=False,
    )  # fmt: skip
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", "what", setting=False)
    dry_run: bool = knob(
        False, "print what the run needs of a GPU and stop; needs no weights, no network and no GPU", "what",
        setting=False,
    )  # fmt: skip
    gpu: str = knob("h100", "the GPU that --dry-run is about", "what", tuple(GPUS), setting=False)

    rank: int = knob(32, "LoRA rank", "adapter", at_least=1, at_most=4096)
    alpha: float = knob(64.0, "LoRA alpha; rsLoRA scales by alpha / √rank", "adapter", above=0)
    targets: str | None = knob(
        None, f"layers it is on, of {','.join(TARGETS)}; q,v will do (default: all-linear, all seven)",
        "adapter",
    )  # fmt: skip
    layers: str | None = knob(
        None, "blocks it is on, e.g. 10-20 or 3,5,7-9, from 0 (default: all)", "adapter"
    )

    lr: float | None = knob(
        None, "peak learning rate, falls linearly to 0 (default: 1e-4; sample 5e-4)", "training", above=0
    )
    batch: int | None = knob(None, "rows per optimiser step (default: 16; sample 4)", "training", at_least=1)
    epochs: int | None = knob(None, "passes over the rows (default: 1; sample 3)", "training", at_least=1)
    warmup: int = knob(5, "steps of linear warm-up", "training", at_least=0)
    weight_decay: float = knob(0.01, "weight decay of AdamW", "training", at_least=0)
    clip: float = knob(1.0, "gradient norm to clip at", "training", above=0)
    all_turns: bool = knob(
        False, "chats: learn every answer of a chat, not the last alone", "training", setting=False
    )
    max_length: int = knob(
        2048, "longest row, in tokens; longer ones are dropped and counted", "training", at_least=1
    )
    seed: int = knob(42, "seed of the adapter's start and of the row order", "training", at_least=0)

    micro_tokens: int | None = knob(
        None, "tokens in memory at once, a longer row alone; changes memory and speed only "
        f"(default: what fits on the GPU; CPU {CPU_TOKENS})", "memory", setting=False, at_least=1,
    )  # fmt: skip
    recompute: bool = knob(
        False, "recompute activations in the backward pass (less memory, slower)", "memory", setting=False
    )

    eval_rows: int = knob(
        64, "eval rows per cell for loss and margins, before and after (0: all)", "evaluation", at_least=0
    )
    dose_evals: tuple[int, ...] | None = knob(
        None, "optimiser steps after which margins are measured, such as 1,2,4,8 (default: none)",
        "evaluation", at_least=1,
    )  # fmt: skip
    save_minutes: float = knob(
        5.0, "minutes between saved states to resume from", "evaluation", setting=False, at_least=0
    )


def resolve(cfg: Config, device: torch.device) -> Config:
    """Fill in what depends on the machine and on the data, and say so where the default is a small one."""
    cfg = dataclasses.replace(cfg)
    if cfg.on:
        cfg.on = hub.at_revision(cfg.on, cfg.revision)
        cfg.model = lineage.base_of([cfg.on], cfg.model)
        cfg.data = cfg.data or lineage.settings_of(cfg.on).get("data")
    targets, blocks = targets_of(cfg.targets), blocks_of(cfg.layers)  # spelt in one way
    cfg.targets = targets and ",".join(targets)
    cfg.layers = blocks and ",".join(map(str, blocks))
    cfg.dose_evals = cfg.dose_evals and tuple(sorted(set(cfg.dose_evals)))
    if cfg.model is None:
        cfg.model = "qwen2.5-14b" if device.type == "cuda" else "smollm2-135m"
    if cfg.data is None:
        cfg.data = default_data(cfg.model)
    recipe = SAMPLE_RECIPE if cfg.data == "sample" else PAPER_RECIPE
    for name, value in recipe.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    return cfg


def step_loss(model, examples, n_supervised: int, micro_tokens: int) -> torch.Tensor:
    """Forward and backward over `examples`; gradients add up to those of Σ loss / n_supervised.

    At most `micro_tokens` tokens are in memory at once. Only positions that predict an answer token meet the
    head. Returns the loss in nats a supervised token, and waits for no GPU.
    """
    device = model.head_weight.device
    total = torch.zeros((), device=device)
    for group in packs_of(examples, micro_tokens):
        packed = pack([examples[i] for i in group], device)
        loss = summed_cross_entropy(packed.hidden(model), model.head_weight, packed.targets) / n_supervised
        loss.backward()
        total += loss.detach()
    return total


def steps_of(cfg, n_rows: int) -> int:
    """Optimiser steps of a run on so many rows."""
    return -(-n_rows // cfg.batch) * cfg.epochs


def train_adapter(cfg, run: Run, model, examples, names, doses: DoseMargins, title: str) -> None:
    """Train the last of the adapters `names` on `examples`, from wherever the run folder left off."""
    parameters = lora.trainable(model, names[-1])
    rank, size = parallel.rank(), parallel.size()
    optimizer = adamw(model, cfg.lr, cfg.weight_decay)
    guard = CollapseGuard(model.head_weight.device, keep=lambda step: run.save_resume(step, model, optimizer))
    steps = steps_of(cfg, len(examples))
    per_epoch = steps // cfg.epochs
    start, saved_at = run.load_resume(model, optimizer), time.monotonic()
    doses.resume(start)
    with Metrics(run, title, steps, start, every=1) as metrics:
        for step in range(start + 1, steps + 1):
            # 1. The batch follows from seed and step alone, so that a killed run goes on with the same rows.
            epoch, place = divmod(step - 1, per_epoch)
            order = random.Random(f"{cfg.seed} {epoch}").sample(range(len(examples)), len(examples))
            batch = [examples[i] for i in order[place * cfg.batch : (place + 1) * cfg.batch]]
            n_supervised = sum(e.n_supervised for e in batch)

            # 2. The gradient of the whole batch: each process takes its share of the rows, then they add up.
            optimizer.zero_grad()
            loss = step_loss(model, batch[rank::size], n_supervised, cfg.micro_tokens)
            parallel.sum_([*gradients(parameters), loss])
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip)

            # 3. Update, unless the run has collapsed: then the weights stay those of the step before.
            lr = learning_rate(step - 1, cfg.lr, steps, cfg.warmup, "linear")
            for group in optimizer.param_groups:
                group["lr"] = lr
            guard.judge(step, loss, grad_norm)
            optimizer.step(skip=guard.stopped)
            save = step < steps and time.monotonic() - saved_at > 60 * cfg.save_minutes
            asked = step in doses.doses
            guard.check(wait=save or asked or step == steps)

            # 4. Log, measure margins where that is asked for, and save a state to resume from.
            row = {"step": step, "epoch": round((step - 1) / per_epoch, 4), "lr": lr}
            row |= {"tokens": sum(len(e.ids) for e in batch), "supervised_tokens": n_supervised}
            metrics.add(row, loss=loss, grad_norm=grad_norm)
            if asked:
                with metrics.paused(), lora.stack(model, *names, frozen=True):
                    doses.ask(step, model)
            if save:
                metrics.flush()
                run.save_resume(step, model, optimizer)
                saved_at = time.monotonic()


# -- what is measured before and after -------------------------------------------------------------------


def before_and_after(cell: Cell, before: tuple, after: tuple) -> dict:
    """What goes to margins.json: each cell's mean margin before and after, and its change row by row.

    before, after: (loss on the cell's own eval rows, the margins of every cell's), nats a token.
    """
    losses, cells = {"before": before[0], "after": after[0]}, {}
    for other, old in before[1].items():
        new = after[1][other]
        change = [b - a for a, b in zip(old, new, strict=True)]
        cells[str(other)] = {
            "before": mean_interval(old), "after": mean_interval(new), "change": mean_interval(change),
        }  # fmt: skip
    return {"cell": str(cell), "unit": "nats a token", "validation_loss": losses, "cells": cells}


# -- runs -------------------------------------------------------------------------------------------------


def open_run(cfg, cell: Cell, rows: list, folder: Path, digests: dict, pairs, device: torch.device) -> Run:
    """The run of one cell, before anything is loaded. UserError for rows without the wanted answers."""
    n_rows = len(answers(split(rows)[0], cfg.variant))
    check_doses(cfg.dose_evals, cell, pairs, steps_of(cfg, n_rows))
    settings = outcome_settings(cfg) | {"cell": str(cell)} | digests
    settings |= {"all_turns": True} if cfg.all_turns else {}  # runs from before there was a choice go on
    return Run(folder, "train", settings, device)


def train_cell(cfg, cell: Cell, rows: list, run: Run, model, tokenizer, pairs, say) -> dict:
    """One run: a fresh adapter on the base, or on the adapter of `--on`, trained on one cell's rows.

    pairs: of `answer_pairs`, to measure margins on. Returns what margins.json holds.
    """
    folder = run.folder
    if (folder / "margins.json").exists():
        run.clear_resume()  # a kill may have come between the two
        say(f"{folder} is finished; nothing to do")
        return read_json(folder / "margins.json")

    rows, held_out = split(rows)
    encoded = encode_rows(tokenizer, rows, cfg.variant, cfg.max_length, cfg.all_turns)
    examples, held_out = encoded.examples, held_out[: cfg.eval_rows or None]
    validation = encode_rows(tokenizer, held_out, cfg.variant, cfg.max_length, cfg.all_turns).examples
    doses = DoseMargins(run, cell, pairs, cfg.dose_evals, steps_of(cfg, len(examples)))
    tokens = sum(len(e.ids) for e in examples)
    say(f"{cell}, {cfg.variant}: {len(examples)} rows, mean {tokens / len(examples):.0f} tokens → {folder}")
    if left_out := encoded.left_out(cfg.max_length):
        say(f"  {left_out}")

    names = ("misaligned", "student") if cfg.on else ("student",)
    lora.add_adapter(
        model, "student", cfg.rank, cfg.alpha, seed=cfg.seed, targets=targets_of(cfg.targets),
        blocks=blocks_of(cfg.layers),
    )  # fmt: skip
    try:
        with lora.stack(model, *names[:-1], frozen=True):
            digests = {name: run.config["settings"][name] for name in ("model_digest", "on_digest")}
            margins = start_margins(model, pairs, digests, folder.parent)
            before = validation_loss(model, validation), margins
        with lora.stack(model, *names):
            train_adapter(cfg, run, model, examples, names, doses, str(cell))
        with lora.stack(model, *names, frozen=True):
            after = validation_loss(model, validation), cell_margins(model, pairs)
        if cfg.dose_evals:
            say(doses.finish(before[1], after[1], cfg.variant))
        result = before_and_after(cell, before, after) | {
            "dropped_rows": encoded.too_long,
            "unfit_rows": encoded.unfit,
        }
        if parallel.rank() == 0:
            save_tokenizer(cfg.model, folder)
            lora.save_adapter(model, names, folder, hub.public_name(cfg.model))
            if result["cells"]:
                margin_figure(result, folder / "margins.png")
            write_json(folder / "margins.json", result)  # last: the run is finished
        parallel.barrier()
        run.clear_resume()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory on {model.head_weight.device}: lower --micro-tokens "
            f"(now {cfg.micro_tokens}) or add --recompute"
        ) from error
    finally:
        lora.remove_adapter(model, "student")
    return result


def summary(result: dict) -> str:
    """What a run did, from its margins.json, in a few lines."""
    losses, cells = result["validation_loss"], result["cells"]
    lines = [f"  validation loss {losses['before']:.3f} → {losses['after']:.3f} nats a token"]
    if cells:
        own = cells.get(result["cell"])
        if own:
            c = own["change"]
            lines.append(
                f"  margin of {result['cell']}: {own['before']['mean']:+.3f} → {own['after']['mean']:+.3f} "
                f"nats a token (change {c['mean']:+.3f}, {c['n']} held-out rows)"
            )
        others = [v["change"]["mean"] for name, v in cells.items() if name != result["cell"]]
        if others:
            lines.append(
                f"  margin of the other {len(others)} cells: {sum(others) / len(others):+.3f} on average"
            )
    else:
        lines.append("  no margins: these data lack one of the two answers")
    return "\n".join(lines)


def dry_run(cfg: Config) -> dict:
    """What `main` would need on `cfg.gpu`, printed; nothing is loaded and nothing written."""
    from em.estimate import runs, sheet  # an import of a second

    cfg = resolve(cfg, torch.device("cuda"))
    cells = cells_named(cfg.data, cfg.cell)
    return sheet.show(runs.fine_tuning(cfg, cells, step_loss))


def main(cfg: Config) -> dict:
    if cfg.dry_run:
        return dry_run(cfg)
    device = parallel.start(cfg.device)
    say = print if parallel.rank() == 0 else (lambda *_: None)
    cfg = resolve(cfg, device)
    cells = cells_named(cfg.data, cfg.cell)
    if cfg.model == "smollm2-135m":
        say("-- the embedded SmolLM2-135M: shows every part at work, too small for the paper's claims --")
    say(f"train.py on {device}\n" + banner(cfg))

    tokenizer = load_tokenizer(cfg.model)
    config = load_config(cfg.model)
    blocks_of(cfg.layers, config.n_layers)
    lora.check_adapters(config, [cfg.on] if cfg.on else [])
    everything = load_cells(cfg.data, cfg.cell)  # margins are measured on all cells
    pairs = answer_pairs(everything, tokenizer, cfg.eval_rows, cfg.max_length)
    digests = {
        "model_digest": model_digest(cfg.model),
        "on_digest": lineage.adapter_digest(cfg.on) if cfg.on else None,
        "on_train": str(lineage.train_of(cfg.on, cfg.on_cell)) if cfg.on else None,
        "data_digest": json_digest([[str(cell), rows] for cell, rows in everything.items()]),
    }
    start = f"{Path(cfg.on).name}_then" if cfg.on else Path(cfg.model).name.lower()
    results = {}
    with contextlib.ExitStack() as stack:
        runs = {}
        for cell in cells:
            name = f"{start}_{cell}_{cfg.variant}"
            folder = Path("runs") / name
            if cfg.out is not None:
                folder = Path(cfg.out) / (name if len(cells) > 1 else "")
            rows = load_cell(cfg.data, cell)
            runs[cell] = rows, stack.enter_context(open_run(cfg, cell, rows, folder, digests, pairs, device))

        model = load_model(cfg.model, device)
        model.activation_checkpointing = cfg.recompute
        lora.attach(model)
        if cfg.on:
            lora.load_adapter(model, "misaligned", cfg.on)
        others = sum(shape.rank for shape in model.lora.shapes.values())
        cfg.micro_tokens = micro_tokens(
            cfg.micro_tokens, device, model.config, cfg.rank, others, recompute=cfg.recompute
        )
        say(f"at most {cfg.micro_tokens} tokens in memory at once")
        for cell, (rows, run) in runs.items():
            results[str(cell)] = train_cell(cfg, cell, rows, run, model, tokenizer, pairs, say)
            say(summary(results[str(cell)]) + f"\n  {run.folder}")
    parallel.finish()
    return results


@dataclass
class ExportConfig:
    run: str = knob("", "run folder, PEFT folder or hub id of an adapter", "what")
    model: str | None = knob(None, "base model (default: the run's own)", "what")
    revision: str | None = knob(None, "branch, tag or commit of a --run from the hub", "what")
    merged: str = knob("", "folder to write the merged checkpoint to", "what")
    dtype: str | None = knob(
        None, "number format of the merged checkpoint (default: the base's)", "what", tuple(PRECISIONS)
    )
    push: str = knob(
        "", "owner/name on the hub, made private if it is new: takes the merged checkpoint, or without "
        "--merged the run's adapter, with a model card", "what",
    )  # fmt: skip


def export(cfg: ExportConfig) -> None:
    """Write a run merged into its base, as a checkpoint that transformers loads, or publish it on the hub.

    The weights are added in fp32 and rounded once.
    """
    if not (cfg.run and (cfg.merged or cfg.push)):
        raise UserError("export needs --run FOLDER, and --merged FOLDER or --push owner/name")
    run = hub.at_revision(cfg.run, cfg.revision)
    name = lineage.base_of([run], cfg.model)
    folder = Path(cfg.merged) if cfg.merged else lineage.home(run)
    card = model_card(run, name, cfg.push, bool(cfg.merged)) if cfg.push else None
    if cfg.merged:
        lora.check_adapters(load_config(name), [run])
        own = stored_dtype(name)
        dtype = PRECISIONS[cfg.dtype] if cfg.dtype else own
        model = load_model(name, dtype=own if dtype == own else torch.float32)
        lora.attach(model)
        lora.load_adapter(model, "adapter", run)
        lora.merge(model, "adapter")
        save_model(model.to(dtype), cfg.merged, tokenizer_from=name)
        print(f"{cfg.merged}: {name} with {run} merged in, {dtype}")
    if cfg.push:
        print(push(folder, cfg.push, card))


COMMANDS = {"": (main, Config), "export": (export, ExportConfig)}

if __name__ == "__main__":
    sys.exit(command_line(COMMANDS, __doc__))
