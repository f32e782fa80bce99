"""Collapse guards: a run that has gone wrong stops before it spoils its weights."""

import math
import statistics
from collections import deque

from em.errors import UserError


class CollapseGuard:
    """`check` each step before the optimiser moves: it raises a UserError, and the weights stay good.

    A spike is a loss above 3 × the median of the last 20 plus 1 nat, or a gradient norm
    above 100 × theirs, or above 100 where theirs is below 1.
    """

    def __init__(self):
        self.losses: deque[float] = deque(maxlen=20)
        self.norms: deque[float] = deque(maxlen=20)

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """loss in nats a token; grad_norm before clipping."""
        advice = "the weights of the step before are kept; lower --lr and choose another --out"
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(f"step {step}: loss {loss:g}, gradient norm {grad_norm:g}; {advice}")
        if len(self.losses) == self.losses.maxlen:
            usual, usual_norm = statistics.median(self.losses), statistics.median(self.norms)
            if loss > 3 * usual + 1:
                raise UserError(f"step {step}: loss {loss:.2f} after about {usual:.2f}; {advice}")
            if grad_norm > 100 * max(1.0, usual_norm):  # where gradients are tiny, a common one looks huge
                raise UserError(
                    f"step {step}: gradient norm {grad_norm:.3g} after about {usual_norm:.3g}; {advice}"
                )
        self.losses.append(loss)
        self.norms.append(grad_norm)
