"""The metrics of a run: one row a step, with a progress bar, and without waiting for the device.

Losses stay tensors until `flush`, which reads many steps back at once; a loss that is not finite stops the
run there, before anything more is saved.
"""

import contextlib
import math
import time

import torch
from tqdm import tqdm

from em import parallel
from em.errors import UserError
from em.run import Run


class StepTimer:
    """Seconds of a step by part: `with timer("decode"): …`, then `timer.read()`. Waits for the device."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        began = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - began

    def read(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        seconds, self.seconds = self.seconds, {}
        return {f"seconds_{name}": round(value, 4) for name, value in seconds.items()}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Metrics:
    """with Metrics(run, "align", steps) as metrics: … metrics.add({"step": 1, "tokens": 512}, loss=loss)

    Rows gain `tokens_per_s` and `peak_mem_bytes` (CUDA) when they are flushed, every `every` steps. A scalar
    that is not finite is null in its row, since JSON has no number for it.
    """

    def __init__(self, run: Run, title: str, steps: int, start: int = 0, every: int = 50):
        self.run, self.title, self.steps, self.every = run, title, steps, every
        self.pending: list[tuple[dict, dict[str, torch.Tensor]]] = []
        quiet = parallel.rank() > 0
        hide = {"disable": True} if quiet else {}  # else the environment may: TQDM_DISABLE=1
        self.bar = tqdm(total=steps, initial=start, desc=title, unit="step", mininterval=0.5, **hide)
        self.clock = time.perf_counter()
        run.drop_metrics_after(start)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def add(self, row: dict, **scalars: torch.Tensor) -> None:
        """A step is done. `row` needs `step` and `tokens`, `scalars` (0-d tensors) need `loss`."""
        self.pending.append((row, scalars))
        self.bar.update()
        if len(self.pending) >= self.every or row["step"] == self.steps:
            self.flush()

    def flush(self) -> None:
        """Read the pending scalars back (the only wait for the device) and write their rows."""
        if not self.pending:
            return
        values = torch.stack([s.float() for _, scalars in self.pending for s in scalars.values()]).tolist()
        seconds = (time.perf_counter() - self.clock) / len(self.pending)
        rows = []
        for row, scalars in self.pending:
            numbers = {name: values.pop(0) for name in scalars}
            row = row | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            row["tokens_per_s"] = round(row["tokens"] / seconds)
            if torch.cuda.is_available():
                row["peak_mem_bytes"] = torch.cuda.max_memory_allocated()
            rows.append(row)
        bad = [row["step"] for row in rows if row["loss"] is None]
        if bad:
            raise UserError(
                f"{self.title}: the loss is not finite at step {bad[0]}; lower the learning rate "
                f"({self.run.folder} keeps the last good state)"
            )
        self.run.log(rows)
        self.bar.set_postfix(loss=f"{rows[-1]['loss']:.3f}", refresh=False)
        self.pending = []
        self.clock = time.perf_counter()
