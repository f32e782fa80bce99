"""Collapse guards: a run that has gone wrong stops before it spoils its weights."""

import math
import statistics
from collections import deque
from collections.abc import Callable

import torch

from em.device import ToHost, on_gpu
from em.errors import UserError

LARGEST = torch.finfo(torch.float32).max


class CollapseGuard:
    """Each step, `judge` before the optimiser moves and `check` after; the weights stay good.

        guard.judge(step, loss, grad_norm)
        optimizer.step(skip=guard.stopped)
        guard.check()

    A spike is a loss above 3 × the median of the last 20 plus 1 nat, or a gradient norm
    above 100 × theirs, or above 100 where theirs is below 1.

    Nothing here waits for a GPU's queue. The device itself compares a step with the limits and from the first
    bad one on skips every update; the host learns of it a step later and stops the run. So there the last 20
    are those that the host knows, which end a step earlier than on a CPU.
    """

    def __init__(self, device: torch.device, keep: Callable[[int], None] = lambda step: None):
        """keep(step) is called when the run is to stop: the weights are those after `step`."""
        self.losses: deque[float] = deque(maxlen=20)
        self.norms: deque[float] = deque(maxlen=20)
        self.stopped = torch.zeros((), device=device)  # 1 from the first bad step on
        self.keep, self.behind = keep, int(on_gpu(device))
        self._judged: deque[tuple] = deque()

    def judge(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Set `stopped` if this step is bad. 0-d fp32: loss in nats a token, grad_norm before clipping."""
        usual, limits = None, (LARGEST, LARGEST)
        if len(self.losses) == self.losses.maxlen:
            usual = statistics.median(self.losses), statistics.median(self.norms)
            # where gradients are tiny, a common one looks huge
            limits = min(3 * usual[0] + 1, LARGEST), min(100 * max(1.0, usual[1]), LARGEST)
            limits = torch.tensor(limits).tolist()  # rounded to fp32, as the device compares
        fine = (loss <= limits[0]) & (grad_norm <= limits[1])  # which NaN and infinity are not
        self.stopped.masked_fill_(~fine, 1.0)
        self._judged.append((step, usual, limits, ToHost(torch.stack((loss, grad_norm)))))

    def check(self, wait: bool = False) -> None:
        """UserError if a step that the host knows by now was bad. wait: know them all, as before a save."""
        while len(self._judged) > (0 if wait else self.behind):
            step, usual, limits, values = self._judged.popleft()
            loss, grad_norm = values.read()
            if not (loss <= limits[0] and grad_norm <= limits[1]):
                self.keep(step - 1)
                raise UserError(f"step {step}: {_fault(loss, grad_norm, usual, limits)}; {ADVICE}")
            self.losses.append(loss)
            self.norms.append(grad_norm)


ADVICE = "the weights of the step before are kept; lower --lr and choose another --out"


def _fault(loss: float, grad_norm: float, usual: tuple, limits: tuple) -> str:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"loss {loss:g}, gradient norm {grad_norm:g}"
    if loss > limits[0]:
        return f"loss {loss:.2f} after about {usual[0]:.2f}"
    return f"gradient norm {grad_norm:.3g} after about {usual[1]:.3g}"
