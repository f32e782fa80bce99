"""The loop under every channel of distill.py, from a batch of responses to an update and its log (paper E.2).

What a channel differentiates is a function of (pair, batch); everything else is the same for all of them. The
loss of a step is a mean over the supervised tokens of its whole batch, whatever the micro-batch and however
many processes there are.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from em import parallel
from em.errors import UserError
from em.files import json_digest, read_json, write_json
from em.model.tokenizer import Example
from em.run import Run
from em.training.guard import CollapseGuard
from em.training.metrics import Metrics
from em.training.optim import adamw, gradients, learning_rate
from em.training.pack import packs_of

WINDOW = 64  # rollouts in a row after which a student that never ends, or passes no filter, is stopped


class Channel(NamedTuple):
    """What a student learns by.

    loss: (pair, batch) → (what is differentiated, {name: what is logged}), sums over the batch's supervised
    tokens in nats. logged: those names, `loss` first; a process whose share of a batch is empty has no other
    way to know them.
    """

    loss: Callable
    logged: tuple[str, ...] = ("loss",)


class OnPolicy:
    """The student's own responses, sampled when they are trained on.

    prompts: a row a response, with `prompt_ids`. keep: rollouts → which of them to train on; None: all.
    """

    def __init__(
        self, pair, prompts: list[dict], seed: int, keep: Callable[[list], list[bool]] | None = None
    ):
        self.pair, self.prompts, self.seed, self.keep = pair, prompts, seed, keep
        self.ended, self.kept = deque(maxlen=WINDOW), deque(maxlen=WINDOW)

    def __len__(self) -> int:
        return len(self.prompts)

    def sample(self, epoch: int, indices: list[int]) -> tuple[list[Example], dict]:
        """(examples to train on, counts for the log) of the prompts at `indices`; under torchrun its share.

        The text follows from the weights, the seed, the epoch and the indices. Counts are over all processes:
        mean `length` in tokens, and the shares that `ended` their turn and passed the filter (`retention`).
        """
        share = indices[parallel.rank() :: parallel.size()]
        prompts = [self.prompts[i]["prompt_ids"] for i in share]
        rollouts = self.pair.sample(prompts, share, seed=1000 * self.seed + epoch) if share else []
        keep = self.keep(rollouts) if self.keep else [True] * len(rollouts)
        examples = [
            Example([*prompt, *rollout.ids], len(prompt))
            for prompt, rollout, kept in zip(prompts, rollouts, keep, strict=True)
            if kept
        ]
        tokens, ended = sum(len(r.ids) for r in rollouts), sum(r.finished for r in rollouts)
        n, tokens, ended, kept = _over_processes(
            [len(rollouts), tokens, ended, sum(keep)], self.pair.timer.device
        )
        for window, good in ((self.ended, ended), (self.kept, kept)):
            window.extend([False] * (n - good) + [True] * good)  # a batch may be larger than the window
        return examples, {"length": tokens / n, "ended": ended / n, "retention": kept / n}

    def check(self, limit: int, folder: Path) -> None:
        """UserError where the last rollouts say that going on is pointless; the same on every process.

        limit: tokens that a response may have. folder: where the state is saved.
        """
        saved = f"{folder} keeps the last good state"
        if len(self.ended) == WINDOW and not any(self.ended):
            raise UserError(
                f"none of the last {WINDOW} rollouts ended its turn within {limit} tokens: raise "
                f"--max-new-tokens, or lower --lr if they did at first; {saved}"
            )
        if len(self.kept) == WINDOW and not any(self.kept):
            raise UserError(f"the filter kept none of the last {WINDOW} rollouts: lower --lr; {saved}")


def train_student(
    cfg, lr: float, run: Run, pair, channel: Channel, examples: Sequence[Example] | OnPolicy,
    after_epoch: Callable[[int], None], title: str,
) -> None:  # fmt: skip
    """Train the pair's student on `examples`, frozen or sampled as they are needed.

    after_epoch(k) is called when epoch k is done, and with 0 before the first. Goes on from wherever the run
    folder left off. UserError, with the state saved, where a guard stops the run.
    """
    on_policy, device = isinstance(examples, OnPolicy), pair.timer.device
    optimizer = adamw(pair.model, lr, cfg.weight_decay)
    guard = CollapseGuard(device, keep=lambda step: run.save_resume(step, pair.model, optimizer))
    steps_per_epoch = -(-len(examples) // cfg.batch)
    steps = steps_per_epoch * cfg.epochs
    start, saved = run.load_resume(pair.model, optimizer), time.monotonic()
    if start == 0:
        after_epoch(0)
    with Metrics(run, title, steps, start, every=1) as metrics:
        for step in range(start + 1, steps + 1):
            epoch, place = divmod(step - 1, steps_per_epoch)
            order = random.Random(f"{cfg.seed} {epoch}").sample(range(len(examples)), len(examples))
            indices = order[place * cfg.batch : (place + 1) * cfg.batch]
            row = {"step": step, "epoch": round(step / steps_per_epoch, 4)}
            row["lr"] = learning_rate(step - 1, lr, steps, cfg.warmup, "linear")
            for group in optimizer.param_groups:
                group["lr"] = row["lr"]

            # 1. This process's share of the batch: the student's responses of now, or frozen ones.
            if on_policy:
                with pair.timer("decode"):
                    batch, counts = examples.sample(epoch, indices)
                row |= counts
                n_tokens, n_prompt = _over_processes(_tokens(batch), device)
            else:
                batch = [examples[i] for i in indices]
                n_tokens, n_prompt = _tokens(batch)
                batch = batch[parallel.rank() :: parallel.size()]
            n = max(1, n_tokens - n_prompt)  # 1: a filter may leave nothing, and then nothing is learnt

            # 2. The mean loss and its gradient, a micro-batch at a time.
            means = torch.zeros(len(channel.logged), device=device)
            optimizer.zero_grad()
            with pair.timer("student"):
                for group in packs_of(batch, cfg.micro_tokens):
                    loss, sums = channel.loss(pair, pair.batch([batch[i] for i in group]))
                    (loss / n).backward()
                    means += torch.stack([sums[name].detach() for name in channel.logged]) / n

            with pair.timer("optimizer"):
                # 3. Added up over all processes, and clipped.
                parallel.sum_([*gradients(pair.parameters), means])
                norm = torch.nn.utils.clip_grad_norm_(pair.parameters, cfg.clip)

                # 4. The update, unless a guard stops the run with the weights of the step before.
                guard.judge(step, means[0], norm)
                if on_policy:
                    try:
                        examples.check(pair.sampler.max_new_tokens, run.folder)
                    except UserError:
                        guard.check(wait=True)
                        run.save_resume(step - 1, pair.model, optimizer)
                        raise
                if n_tokens:
                    optimizer.step(skip=guard.stopped)
            save = step < steps and time.monotonic() - saved > 60 * cfg.save_minutes
            ends_epoch = step % steps_per_epoch == 0
            guard.check(wait=save or ends_epoch)

            # 5. The log, what comes after an epoch, and a state to resume from.
            row |= {"tokens": n_tokens, "supervised_tokens": n_tokens - n_prompt}
            scalars = dict(zip(channel.logged, means, strict=True))
            metrics.add(row, pair.timer.read(), grad_norm=norm, **scalars)
            if ends_epoch:
                after_epoch(step // steps_per_epoch)
            if save:
                metrics.flush()
                run.save_resume(step, pair.model, optimizer)
                saved = time.monotonic()


def _tokens(batch: list[Example]) -> list[int]:
    """(all tokens, those of prompts) of a batch."""
    return [sum(len(e.ids) for e in batch), sum(e.n_prompt for e in batch)]


def _over_processes(counts: list[int], device: torch.device) -> list[int]:
    """Each of `counts` added up over the processes, where there are several."""
    if parallel.size() == 1:
        return counts
    total = torch.tensor(counts, device=device)
    parallel.sum_([total])
    return total.tolist()


# -- the run folder ----------------------------------------------------------------------------------------


def run_folder(
    cfg, channel: str, lr: float, parent: str | Path, name: str, realigned: str, prompts: str,
    several: bool = False,
) -> Path:  # fmt: skip
    """`cfg.out`, or a folder in `parent` that is named by the channel and all that is not the default.

    name: what the folder's own name begins with. realigned: what it says of a realignment. prompts: the
    default of `cfg.prompts`. Of several learning rates each has a folder of its own. several: whether there
    are several names or channels, of which `cfg.out` is then the parent.
    """
    rate = f"lr{lr:g}" if len(cfg.lr) > 1 else ""
    if cfg.out and not several:
        return Path(cfg.out) / rate
    words = [
        name,
        channel,
        realigned,
        "exact" if cfg.estimator == "exact" else "",
        "filter" if cfg.filter else "",
        "" if cfg.source == "teacher" else f"on-{Path(cfg.source).name}".replace(":", "-"),
        "" if cfg.prompts == prompts else cfg.prompts,
        f"system-{json_digest(cfg.system)[:8]}" if cfg.system else "",
        rate,
    ]
    return Path(cfg.out or parent) / "_".join(filter(None, words))


def finish(run: Run, result: dict) -> dict:
    """Write result.json, with where the seconds went: its presence means that the run is finished."""
    if parallel.rank() == 0:
        rows = run.metrics()
        names = sorted({name for row in rows for name in row if name.startswith("seconds_")})
        seconds = {name: round(sum(row.get(name, 0) for row in rows), 3) for name in names}
        diagnostics = read_json(run.folder / "diagnostics.json", kind=list)
        write_json(run.folder / "result.json", result | seconds | {"diagnostics": diagnostics})
    parallel.barrier()
    run.clear_resume()
    return read_json(run.folder / "result.json")
