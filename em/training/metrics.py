"""The metrics of a run: one row a step, with a progress bar, and without waiting for the device.

Losses stay tensors and go to the host many steps at once. From a GPU they are read when the next ones are on
their way, so that its queue is never empty. A loss that is not finite stops the run there, before anything
more is saved.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable

import torch
from tqdm import tqdm

from em import parallel
from em.device import ToHost, on_gpu
from em.errors import UserError
from em.run import Run


class StepTimer:
    """Seconds of a step by part: `with timer("decode"): …`, then `timer.read()`.

    A part within another counts as its own alone. On a GPU the clock is that of its queue, which nothing here
    waits for.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._open: list[str] = []
        self._laps: list[tuple] = []  # (name, name of the part around it or None, its start, its end)

    @contextlib.contextmanager
    def __call__(self, name: str):
        around, began = self._open[-1] if self._open else None, self._now()
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
        self._laps.append((name, around, began, self._now()))

    def read(self) -> Callable[[], dict[str, float]]:
        """The seconds by name since the last call, to be had once the device has done all that is queued."""
        laps, self._laps = self._laps, []

        def seconds() -> dict[str, float]:
            total = dict.fromkeys((name for name, *_ in laps), 0.0)
            for name, around, began, ended in laps:
                took = began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
                total[name] += took
                if around in total:
                    total[around] -= took
            return {f"seconds_{name}": round(value, 4) for name, value in total.items()}

        return seconds

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Metrics:
    """with Metrics(run, "align", steps) as metrics: … metrics.add({"step": 1, "tokens": 512}, loss=loss)

    Rows gain `tokens_per_s` and `peak_mem_bytes` (CUDA) when they are flushed, every `every` steps. A scalar
    that is not finite is null in its row, since JSON has no number for it.
    """

    def __init__(self, run: Run, title: str, steps: int, start: int = 0, every: int = 50):
        self.run, self.title, self.steps, self.every = run, title, steps, every
        self.pending: list[tuple[dict, Callable, dict[str, torch.Tensor]]] = []
        self.sent: deque[tuple[list, ToHost]] = deque()  # groups of rows whose scalars are on their way
        quiet = parallel.rank() > 0
        hide = {"disable": True} if quiet else {}  # else the environment may: TQDM_DISABLE=1
        self.bar = tqdm(total=steps, initial=start, desc=title, unit="step", mininterval=0.5, **hide)
        self.clock = time.perf_counter()
        run.drop_metrics_after(start)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def add(self, row: dict, seconds: Callable[[], dict] = dict, **scalars: torch.Tensor) -> None:
        """A step is queued. `row` needs `step` and `tokens`, `scalars` (0-d tensors) need `loss`.

        seconds: of `StepTimer.read`.
        """
        self.pending.append((row, seconds, scalars))
        self.bar.update()
        if row["step"] == self.steps:
            self.flush()
        elif len(self.pending) >= self.every:
            self._send(behind=int(on_gpu(scalars["loss"])))

    def flush(self) -> None:
        """Write the rows of all steps so far."""
        self._send(behind=0)

    @contextlib.contextmanager
    def paused(self):
        """with metrics.paused(): … takes time that is none of the steps'."""
        self.flush()
        try:
            yield
        finally:
            self.clock = time.perf_counter()

    def _send(self, behind: int) -> None:
        """Send the pending scalars to the host; write the rows of all groups but the last `behind` sent."""
        if self.pending:
            values = torch.stack([s.float() for *_, scalars in self.pending for s in scalars.values()])
            self.sent.append((self.pending, ToHost(values)))
            self.pending = []
        while len(self.sent) > behind:
            group, values = self.sent.popleft()
            self._write(group, values.read())

    def _write(self, group: list[tuple], values: list[float]) -> None:
        seconds = (time.perf_counter() - self.clock) / len(group)
        rows = []
        for row, parts, scalars in group:
            numbers = {name: values.pop(0) for name in scalars}
            row = row | parts()
            row |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
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
        self.clock = time.perf_counter()
