"""A world's run folder and its phases: pretrain → align → misalign → ask, each once (paper B.4, B.5).

    run = WorldRun(cfg, "runs/world1-seed0", settings, device)      # or open_world_run(folder, device)
    run.pretrain()                                                  # both variants
    run.align()                                                     # variant 1 in every seen cell
    misaligned = run.misalign("T5", seed=0)                         # variant 2 in (D0, T5)
    counts = run.counts("misalign_T5_seed0", misaligned)            # v1, v2, other, unparseable by cell

    runs/world1-seed0/
      world.json  run.json
      pretrain/  align/  misalign_T5_seed0/  …   one folder a phase: model/, counts.json, metrics.jsonl
                                                 and classes.json, the class of every answer, once wanted

A phase names its model: what starts from it, or asks it, says the name. A phase that is done is loaded, a
killed one resumes. Everything that follows from (settings, seed) is made again when a folder is opened: the
world, the alignment set, and the held-out prompts, the same for every model of the run.
"""

import contextlib
import ctypes
import functools
import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from em import parallel
from em.device import on_gpu
from em.errors import UserError
from em.files import check, read_json, read_record, record_path, write_json
from em.model.gpt2 import GPT2, GPT2Config, load_gpt2, save_gpt2, supervised_loss
from em.run import Run
from em.sampling.sampler import Sampler
from em.training.metrics import Metrics
from em.training.optim import adamw, learning_rate
from em.training.prefetch import prefetch
from em.world.counts import CLASSES, Classifier, incoherent, percent, pool, tally
from em.world.generator import Dialogues, ExampleGenerator, PretrainStream
from em.world.sets import IGNORE, Batches, alignment_set, held_out_set, misalignment_set
from em.world.world import WORLDS, build_world

INTERMEDIATE = {  # pretraining checkpoints kept (B.5), and the same shares of the reduced world's steps
    "2": (100, 1000, 3000, 6000, 9000, 12_000, 15_000),
    "demo2": (10, 100, 300, 600, 900, 1200, 1500),
}


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors up to 32 MiB each, where glibc is the C library.

    It would give them back to the kernel after every step, and a page fault for each 4 KiB would fetch them
    again: a tenth of a small model's step on a CPU. No number depends on it.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system's C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the largest that there is


def misaligned_name(task: str, seed: int) -> str:
    """The phase of fine-tuning seed `seed`, misaligned on (D0, `task`)."""
    return f"misalign_{task}_seed{seed}"


# -- classes of answers in a file --------------------------------------------------------------------------


def write_classes(path: Path, classes: dict[str, np.ndarray]) -> None:
    """Arrays (N,) of places in CLASSES, by name, as texts of one digit an answer."""
    write_json(path, {name: "".join(map(str, of.tolist())) for name, of in classes.items()})


def read_classes(path: Path, n: int) -> dict[str, np.ndarray]:
    """What `write_classes` wrote of `n` answers each; UserError where the file holds something else."""
    texts = read_json(path)
    for name, text in texts.items():
        if not (isinstance(text, str) and len(text) == n and set(text) <= set("0123")):
            raise UserError(f"{path}: {name or 'its text'} is not {n} digits from 0 to {len(CLASSES) - 1}")
    digits = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    return {name: (of - ord("0")).astype(np.int8) for name, of in digits.items()}


# -- a run of a world --------------------------------------------------------------------------------------


class WorldRun:
    """The folder of one (world, seed, settings).

    cfg: the settings of synth.py, as its Config or as read back from a folder. settings: those of them that
    decide the pretrained and the aligned model; UserError where the folder was made under others.
    Attributes: `world`, `generator` (draws examples), `alignment` (the variant-1 set), `prompts` (held out,
    every cell), `settings` (with the world's fingerprint).
    """

    def __init__(self, cfg, folder: str | Path, settings: dict, device: torch.device):
        self.cfg, self.folder, self.device = cfg, Path(folder), device
        if device.type == "cpu":
            keep_freed_memory()
        self.world = build_world(WORLDS[cfg.world], cfg.seed)
        self.settings = settings | {"fingerprint": self.world.fingerprint}
        # Only as long as it is made: several processes may share a world, and wait for each other by phase.
        with Run(self.folder, "world", self.settings, device, wait=True):
            if parallel.rank() == 0 and not (self.folder / "world.json").exists():
                self.world.save(self.folder / "world.json")
        self.generator = ExampleGenerator(self.world)
        self._samplers: dict[GPT2, Sampler] = {}

    @cached_property
    def alignment(self) -> Dialogues:
        return alignment_set(self.generator, self.cfg.seed, self.cfg.align_examples)

    @cached_property
    def prompts(self) -> Dialogues:
        return held_out_set(self.generator, self.cfg.seed, self.cfg.eval_prompts, self.alignment)

    @property
    def positions(self) -> int:
        """Tokens that the models of this run have places for."""
        return max(self.cfg.length, self.generator.max_tokens)

    def batches(self, data: Dialogues, batch: int, seed: int) -> Batches:
        """Shuffled batches of a fine-tuning set, on a GPU all of one length, a multiple of 64 if it fits.

        Dynamo compiles each length anew, and after eight it trains on uncompiled with no more than a warning.
        """
        if not on_gpu(self.device):
            return Batches(data, batch, seed)
        return Batches(data, batch, seed, min(64 * math.ceil((data.total.max() - 1) / 64), self.positions))

    # -- the phases ------------------------------------------------------------------------------------

    def pretrain(self) -> GPT2:
        """Next-token prediction on the stream of both variants (B.4, B.5)."""
        cfg, world = self.cfg, self.world

        def train(run):
            torch.manual_seed(cfg.seed)
            sizes = dict(n_positions=self.positions, n_layer=cfg.layers, n_head=cfg.heads, n_embd=cfg.width)
            model = GPT2(GPT2Config(world.vocabulary, **sizes)).to(self.device)
            seen = np.flatnonzero(np.isin(self.prompts.examples.cell, world.seen_cells))
            sample = self.prompts.take(seen[:: max(1, cfg.eval_prompts // 8)])

            def watch(step):
                if step in INTERMEDIATE.get(cfg.world, ()) and parallel.rank() == 0:
                    save_gpt2(model, self.folder / f"pretrain_step{step}" / "model")
                if cfg.evals and step % max(1, cfg.steps // cfg.evals) == 0 and parallel.rank() == 0:
                    counts = pool(list(self.ask(model, sample).values()))
                    return {name: percent(counts, name) for name in CLASSES} | {
                        "incoherent": incoherent(counts)
                    }

            stream = PretrainStream(self.generator, cfg.seed, cfg.batch, cfg.length, cfg.v2_fraction)
            train_phase(
                cfg, run, model, stream, cfg.steps, cfg.lr, cfg.warmup, "cosine", cfg.beta2, "pretrain", watch
            )
            return model

        return self.phase("pretrain", self.settings, train)

    def align(self, start: str = "pretrain", name: str = "align") -> GPT2:
        """Supervised fine-tuning of every seen cell on variant 1, from the model of phase `start`."""
        cfg = self.cfg

        def train(run):
            model = self.load(start)
            batches = self.batches(self.alignment, cfg.align_batch, cfg.seed)
            peak, warmup = cfg.align_lr, cfg.align_warmup
            train_phase(cfg, run, model, batches, cfg.align_steps, peak, warmup, "linear", title=name)
            return model

        return self.phase(name, self.settings, train)

    def misalign(
        self, task: str, seed: int, start: str = "align", name: str | None = None, steps: int | None = None
    ) -> GPT2:
        """A few steps on variant 2 of (D0, task), from the model of phase `start`.

        seed: of fine-tuning; it draws the examples and their order. steps: in place of the settings' number.
        """
        cfg, name = self.cfg, name or misaligned_name(task, seed)
        steps = cfg.misalign_steps if steps is None else steps
        cell = self.world.cell(0, self.world.task_index(task))

        def train(run):
            model = self.load(start)
            data = misalignment_set(self.generator, seed, cell, steps * cfg.misalign_batch, self.prompts)
            batches = self.batches(data, cfg.misalign_batch, seed)
            train_phase(cfg, run, model, batches, steps, cfg.misalign_lr, 0, "constant", title=name)
            return model

        return self.phase(name, self.misalign_settings() | {"misalign_steps": steps}, train)

    def misalign_settings(self) -> dict:
        """What decides a misaligned model, but for its task and seeds, which its folder names."""
        names = ("misalign_steps", "misalign_batch", "misalign_lr")
        return self.settings | {name: getattr(self.cfg, name) for name in names}

    # -- asking ----------------------------------------------------------------------------------------

    def ask(self, model: GPT2, prompts: Dialogues | None = None) -> dict:
        """Counts by cell of what the model answers to `prompts`, by default all held out."""
        prompts = self.prompts if prompts is None else prompts
        return tally(self.world, prompts.examples.cell, self.answer_classes(model, prompts))

    def answer_classes(self, model: GPT2, prompts: Dialogues) -> np.ndarray:
        """(N,) int8: what the model answers to each prompt, as its place in CLASSES (em/world/counts.py)."""
        return Classifier(self.world).classes(prompts, self.completions(model, prompts))

    def completions(self, model: GPT2, prompts: Dialogues) -> np.ndarray:
        """(N, T) tokens that the model answers to each prompt, filled up with `<end>`."""
        end, limit = self.world.end, self.generator.max_answer
        sampler = self._samplers.get(model)
        if sampler is None:  # one is kept, since its batch is what takes memory
            sampler = Sampler(model, (end,), limit, self.cfg.temperature, rows=512)
            self._samplers = {model: sampler}
        ids = [row[:length].tolist() for row, length in zip(prompts.ids, prompts.prompt, strict=True)]
        completions = np.full((len(prompts), limit), end)
        for row, rollout in zip(completions, sampler(ids, seed=self.cfg.seed), strict=True):
            row[: len(rollout.ids)] = rollout.ids
        return completions

    def counts(self, name: str, model: GPT2 | None = None) -> dict:
        """Counts of the model of phase `name` on the held-out prompts: asked once, read afterwards."""
        path = self.folder / name / "counts.json"
        if parallel.rank() == 0 and not path.exists():
            model = self.load(name) if model is None else model
            classes = self.answer_classes(model, self.prompts)
            write_classes(self.folder / name / "classes.json", {"": classes})
            write_json(path, tally(self.world, self.prompts.examples.cell, classes))
        parallel.barrier()
        return read_json(path)

    def classes(self, name: str) -> np.ndarray:
        """(N,) int8: the class of each held-out prompt's answer by the model of phase `name`.

        Asked anew of a phase whose `counts` an older version kept without them.
        """
        path = self.folder / name / "classes.json"
        if parallel.rank() == 0 and not path.exists():
            write_classes(path, {"": self.answer_classes(self.load(name), self.prompts)})
        parallel.barrier()
        return read_classes(path, len(self.prompts))[""]

    def misaligned_counts(self, task: str, steps: int | None = None) -> list[dict]:
        """Misalign on (D0, task) and ask, with every fine-tuning seed: one `counts` a seed."""
        return [
            self.counts(misaligned_name(task, seed), self.misalign(task, seed, steps=steps))
            for seed in range(self.cfg.misalign_seeds)
        ]

    # -- how a phase is kept ---------------------------------------------------------------------------

    def phase(self, name: str, settings: dict, train: Callable[[Run], GPT2]) -> GPT2:
        """The model of phase `name`: loaded if that phase is done, else made by `train(run)` and saved.

        While another process makes it, that one is waited for.
        """
        with Run(self.folder / name, "world-phase", settings, self.device, wait=True) as run:
            if not self.has(name):
                model = train(run)
                if parallel.rank() == 0:
                    save_gpt2(model, run.folder / "model")
                parallel.barrier()
            run.clear_resume()
        return self.load(name)

    def has(self, name: str) -> bool:
        return (self.folder / name / "model" / "config.json").exists()

    def load(self, name: str) -> GPT2:
        """The finished model of phase `name`."""
        return load_gpt2(self.folder / name / "model", self.device)


# -- one phase of training ---------------------------------------------------------------------------------

COMPILED_FROM = 100  # steps of a phase; compiling takes longer than fewer do


@functools.cache
def _compiled_loss():
    """`supervised_loss` compiled, for every phase and model of the process: models of one size share code."""
    return torch.compile(supervised_loss, dynamic=False)


def train_phase(
    cfg, run: Run, model: GPT2, batches, steps: int, peak: float, warmup: int, shape: str,
    beta2: float = 0.999, title: str = "", each: Callable[[int], dict | None] | None = None,
) -> None:  # fmt: skip
    """Train `model` in place for `steps` optimiser steps, from wherever the run folder left off (AdamW).

    cfg: has weight_decay, clip (largest gradient norm) and save_minutes (between states to resume from).
    batches: `batches[i]` is (ids, targets) of step i + 1, (batch, T) int64 each; the loss, in nats, is the
    mean over the targets that are not IGNORE. Under torchrun each process takes every size-th row.
    peak: the highest learning rate; warmup: steps up to it, linear; shape: the way down to 10 % of it from
    there, `linear` or `cosine`, or `constant`. title: of the progress bar.
    each(step) is called after every step, counted from 1; what it returns joins that step's metrics.
    """
    device, rank, size = model.device, parallel.rank(), parallel.size()
    gpu = on_gpu(device)
    optimizer = adamw(model, peak, cfg.weight_decay, (0.9, beta2))
    start, saved = run.load_resume(model, optimizer), time.monotonic()
    loss_of = _compiled_loss() if gpu and steps >= COMPILED_FROM else supervised_loss
    with Metrics(run, title, steps, start) as metrics:
        for step, (ids, targets) in enumerate(prefetch(batches.__getitem__, start, steps, device), start + 1):
            lr = learning_rate(step - 1, peak, steps, warmup, shape, floor=0.1)
            for group in optimizer.param_groups:
                group["lr"] = lr
            supervised = (targets != IGNORE).sum()
            with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                # Each process takes its rows; the normaliser is the whole batch's.
                loss = loss_of(model, ids[rank::size], targets[rank::size]) / supervised
            loss.backward()
            loss = loss.detach()
            parallel.sum_([*(p.grad for p in model.parameters()), loss])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer.step()
            optimizer.zero_grad()
            row = {"step": step, "lr": lr, "tokens": ids.numel()} | ((each(step) if each else None) or {})
            metrics.add(row, loss=loss, grad_norm=norm, supervised_tokens=supervised)
            if step < steps and time.monotonic() - saved > 60 * cfg.save_minutes:
                metrics.flush()
                run.save_resume(step, model, optimizer)
                saved = time.monotonic()


_SETTINGS = {"world": str, "seed": int, "align_examples": int, "eval_prompts": int, "temperature": float}


def open_world_run(folder: str | Path, device: torch.device) -> WorldRun:
    """The run that synth.py left in `folder`. UserError where there is none or its models are missing."""
    folder, path = Path(folder), record_path(folder)
    record = read_record(folder) if path.exists() else {"kind": None}
    if record["kind"] != "world" or not (folder / "align" / "model" / "config.json").exists():
        raise UserError(f"{folder} holds no finished run of a world; make one with python synth.py")
    check(record["settings"], path, _SETTINGS)
    settings = {k: v for k, v in record["settings"].items() if k != "fingerprint"}
    if (
        min(settings["seed"], settings["temperature"]) < 0
        or min(settings["align_examples"], settings["eval_prompts"]) < 1
    ):
        raise UserError(f"{path}: seed, temperature, align_examples or eval_prompts is no such number")
    if settings["world"] not in WORLDS:
        raise UserError(f"{path}: there is no world {settings['world']!r}, only {', '.join(WORLDS)}")
    return WorldRun(SimpleNamespace(**{"save_minutes": 2.0} | settings), folder, settings, device)
