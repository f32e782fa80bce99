"""The loop under every channel of distill.py: batches, gradients, the log, epochs, resuming (paper E.2).

What a channel differentiates is a function (pair, batch) → (loss, sums for the log); everything else is the
same for all of them. The loss of a step is a mean over the supervised tokens of its whole batch, whatever the
micro-batch and the number of processes.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from em import parallel
from em.distillation.diagnose import diagnose
from em.errors import UserError
from em.files import read_json, write_json
from em.model.tokenizer import Example
from em.run import Run
from em.training.guard import CollapseGuard
from em.training.metrics import Metrics
from em.training.optim import adamw, learning_rate

WINDOW = 64  # rollouts in a row after which a student that never ends, or passes no filter, is stopped


class OnPolicy:
    """The student's responses to the prompts of `plan`, a row each with `prompt_ids`.

    keep: rollouts → which of them to train on; None: all.
    """

    def __init__(self, pair, plan: list[dict], seed: int, keep: Callable[[list], list[bool]] | None = None):
        self.pair, self.plan, self.seed, self.keep = pair, plan, seed, keep
        self.ended, self.kept = deque(maxlen=WINDOW), deque(maxlen=WINDOW)

    def __len__(self) -> int:
        return len(self.plan)

    def __call__(self, epoch: int, places: list[int]) -> tuple[list[Example], dict]:
        """(examples to train on, counts for the log) for `places` of the plan; under torchrun its share.

        The text follows from the weights, the seed, the epoch and the places.
        """
        mine = places[parallel.rank() :: parallel.size()]
        prompts = [self.plan[i]["prompt_ids"] for i in mine]
        rollouts = self.pair.sample(prompts, mine, seed=1000 * self.seed + epoch) if mine else []
        keep = self.keep(rollouts) if self.keep else [True] * len(rollouts)
        examples = [
            Example([*prompt, *rollout.ids], len(prompt))
            for prompt, rollout, kept in zip(prompts, rollouts, keep, strict=True)
            if kept
        ]
        tokens, ended = sum(len(r.ids) for r in rollouts), sum(r.finished for r in rollouts)
        counts = torch.tensor(
            [len(rollouts), tokens, ended, sum(keep)], device=self.pair.timer.device
        ).float()
        parallel.sum_([counts])
        n, tokens, ended, kept = counts.tolist()
        for window, good in ((self.ended, int(ended)), (self.kept, int(kept))):
            window.extend([False] * (int(n) - good) + [True] * good)  # a batch may be larger than the window
        return examples, {"length": tokens / n, "ended": ended / n, "retention": kept / n}

    def check(self, limit: int, folder: Path) -> None:
        """UserError where the last rollouts say that going on is pointless; the same on every process."""
        good = f"{folder} keeps the last good state"
        if len(self.ended) == WINDOW and not any(self.ended):
            raise UserError(
                f"none of the last {WINDOW} rollouts ended its turn within {limit} tokens: raise "
                f"--max-new-tokens, or lower --lr if they did at first; {good}"
            )
        if len(self.kept) == WINDOW and not any(self.kept):
            raise UserError(f"the filter kept none of the last {WINDOW} rollouts: lower --lr; {good}")


def train_student(
    cfg, lr: float, run: Run, pair, channel: Callable, logs: tuple[str, ...],
    examples: Sequence[Example] | OnPolicy, after_epoch: Callable[[int], None], title: str,
) -> None:  # fmt: skip
    """Train the pair's student on `examples`, frozen or sampled as they are needed.

    channel, logs: the function and the names of its sums. after_epoch(k) is called when epoch k is done, and
    with 0 before the first. Goes on from wherever the run folder left off. UserError, with the state saved,
    where a guard stops the run.
    """
    online, device = isinstance(examples, OnPolicy), pair.timer.device
    optimizer = adamw(pair.model, lr, cfg.weight_decay)
    per_epoch = -(-len(examples) // cfg.batch)
    steps = per_epoch * cfg.epochs
    start, saved, guard = run.load_resume(pair.model, optimizer), time.monotonic(), CollapseGuard()
    if start == 0:
        after_epoch(0)
    with Metrics(run, title, steps, start, every=1) as metrics:
        for step in range(start + 1, steps + 1):
            epoch, place = divmod(step - 1, per_epoch)
            order = random.Random(f"{cfg.seed} {epoch}").sample(range(len(examples)), len(examples))
            places = order[place * cfg.batch : (place + 1) * cfg.batch]
            row = {"step": step, "epoch": round(step / per_epoch, 4)}
            row["lr"] = learning_rate(step - 1, lr, steps, cfg.warmup, "linear")
            for group in optimizer.param_groups:
                group["lr"] = row["lr"]

            if online:
                with pair.timer("decode"):
                    batch, counts = examples(epoch, places)
                row |= counts
            else:
                batch = [examples[i] for i in places[parallel.rank() :: parallel.size()]]
            lengths = [float(sum(len(e.ids) for e in batch)), float(sum(e.n_prompt for e in batch))]
            lengths = torch.tensor(lengths, device=device)
            parallel.sum_([lengths])
            n_tokens, n_prompt = map(int, lengths.tolist())
            n = max(1, n_tokens - n_prompt)  # 1: a filter may leave nothing, and then nothing is learnt

            sums = torch.zeros(len(logs), device=device)
            for p in pair.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
            with pair.timer("student"):
                for first in range(0, len(batch), cfg.micro_batch):
                    loss, found = channel(pair, pair.batch(batch[first : first + cfg.micro_batch]))
                    (loss / n).backward()
                    sums += torch.stack([found[name].detach() for name in logs]) / n
            with pair.timer("optimizer"):
                parallel.sum_([*(p.grad for p in pair.parameters), sums])
                norm = torch.nn.utils.clip_grad_norm_(pair.parameters, cfg.clip)
                try:
                    guard.check(step, sums[0].item(), norm.item())
                    if online:
                        examples.check(pair.sampler.max_new_tokens, run.folder)
                except UserError:
                    run.save_resume(step - 1, pair.model, optimizer)
                    raise
                if n_tokens:
                    optimizer.step()
            row |= {"tokens": n_tokens, "supervised_tokens": n_tokens - n_prompt} | pair.timer.read()
            row["seconds_student"] -= row.get("seconds_teacher", 0)  # which is asked inside
            metrics.add(row, grad_norm=norm, **dict(zip(logs, sums, strict=True)))
            if step % per_epoch == 0:
                after_epoch(step // per_epoch)
            if step < steps and time.monotonic() - saved > 60 * cfg.save_minutes:
                run.save_resume(step, pair.model, optimizer)
                saved = time.monotonic()


def log_distance(pair, asked: list[dict], seed: int, epoch: int, run: Run, say) -> None:
    """Diagnose the student on its own responses to `asked` into `diagnostics.json`, a row an epoch."""
    path = run.folder / "diagnostics.json"
    rollouts = pair.sample([row["prompt_ids"] for row in asked], list(range(len(asked))), seed)
    prompts = [asked[r.prompt_index]["prompt_ids"] for r in rollouts]
    examples = [Example([*p, *r.ids], len(p)) for p, r in zip(prompts, rollouts, strict=True)]
    found = diagnose(pair, examples, [asked[r.prompt_index]["source"] for r in rollouts])
    found = {"epoch": epoch, "ended": sum(r.finished for r in rollouts) / len(rollouts)} | found
    rows = read_json(path) if epoch and path.exists() else []
    write_json(path, [*rows[:epoch], found])
    say(
        f"  epoch {epoch}: KL(student‖teacher) {found['kl']['mean']:.3f} nats a token, entropy "
        f"{found['entropy']['mean']:.2f}, length {found['length']['mean']:.0f}, divergence tokens "
        f"{100 * found['divergence']['mean']:.1f} %"
    )


def finish(run: Run, result: dict) -> dict:
    """Write result.json, with where the seconds went: its presence means that the run is finished."""
    if parallel.rank() == 0:
        rows = run.metrics()
        names = sorted({name for row in rows for name in row if name.startswith("seconds_")})
        seconds = {name: round(sum(row.get(name, 0) for row in rows), 3) for name in names}
        diagnostics = read_json(run.folder / "diagnostics.json")
        write_json(run.folder / "result.json", result | seconds | {"diagnostics": diagnostics})
    parallel.barrier()
    run.clear_resume()
    return read_json(run.folder / "result.json")
