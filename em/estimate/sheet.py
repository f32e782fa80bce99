"""The sheet that a dry run prints: what a run needs and how long it takes on a GPU, worked out on paper.

    Part    something that a run does a number of times, and what it costs once
    Plan    all parts of a run, and the knobs that would make it fit where it does not

A part is issued by the host operator by operator, or replayed from a CUDA graph; `seconds` are the host's
own.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from em.errors import UserError
from em.estimate.gpus import CAPTURE, CONTEXT, GPU, SLACK
from em.estimate.trace import CACHE, HEAD, Cost
from em.files import read_json

CALIBRATION = Path(__file__).parents[2] / "results" / "gpu" / "calibration.json"
GRAPHS, HOST = "graphs", "waiting for the host"
MEMORY_ORDER = ("weights", "adapters", "optimiser", CACHE, "activations", HEAD, GRAPHS)


@dataclass
class Part:
    """times: how often. cost: once. graphed: its kernels come from a CUDA graph. seconds: beside them, each
    time."""

    name: str
    times: float
    cost: Cost = field(default_factory=lambda: Cost({}))
    graphed: bool = False
    seconds: float = 0.0

    @property
    def lower(self) -> float:
        """Seconds of all times at least."""
        return self.times * (self.cost.lower + self.seconds)

    @property
    def likely(self) -> float:
        return self.times * ((self.cost.replayed if self.graphed else self.cost.likely) + self.seconds)


@dataclass
class Plan:
    """A run: its parts, what a step of it is, where its numbers come from.

    step: the names of the parts that make a step, each once a step. steps: how many. notes: lines for the
    reader. knobs: (what to type, the plan with it), the mildest first; each is worked out when it is asked
    for.
    """

    title: str
    gpu: GPU
    parts: list[Part]
    steps: float = 0
    step: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    knobs: list[tuple[str, Callable[[], "Plan"]]] = field(default_factory=list)

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by kind when the most are in use."""
        return max((part.cost.memory for part in self.parts), key=lambda memory: sum(memory.values()))

    @property
    def peak(self) -> float:
        """Bytes in use by tensors, at most."""
        return sum(self.memory.values())

    @property
    def needed(self) -> float:
        """Bytes of the card: with what the allocator cannot use and what CUDA takes."""
        return self.peak * (1 + SLACK) + CONTEXT

    @property
    def fits(self) -> bool:
        return self.needed <= self.gpu.memory

    def seconds(self, which: str, names: tuple[str, ...] | None = None) -> float:
        """Of the run, or of the parts `names`; which: lower or likely."""
        return sum(getattr(part, which) for part in self.parts if names is None or part.name in names)

    def shares(self) -> dict[str, float]:
        """Of the likely seconds by what takes them."""
        found: dict[str, float] = {}
        for part in self.parts:
            busy = part.cost.replayed
            for name, work in part.cost.work.items():
                found[name] = found.get(name, 0) + part.times * work.likely
            waiting = part.seconds + (0 if part.graphed else part.cost.likely - busy)
            name = GRAPHS if part.name.endswith(GRAPHS) else HOST
            found[name] = found.get(name, 0) + part.times * waiting
        total = sum(found.values()) or 1.0
        return {name: seconds / total for name, seconds in found.items()}


def graph_captures(sizes: list[Cost]) -> Part:
    """Making CUDA graphs of steps that cost so much each: an eager step, and a capture."""
    return Part(GRAPHS, 1, seconds=sum((1 + CAPTURE) * size.likely for size in sizes))


# -- how well it has been checked ---------------------------------------------------------------------------


def checked(gpu: str, path: Path = CALIBRATION) -> str:
    """How far such estimates were from what was measured: calibration.json, of bench/gpu.sh.

    That is a list of {what, estimate, measured, gpu}, and maybe more; estimate is null where there was none.
    """
    unmeasured = (
        "never measured on a card. Memory: by allocations of real steps on a CPU; FLOPs: by closed forms; "
        "times: arithmetic only"
    )
    if not path.exists():
        return unmeasured
    rows = read_json(path, kind=list)
    if not all(
        isinstance(row, dict) and {"what", "estimate", "measured", "gpu"} <= row.keys() for row in rows
    ):
        raise UserError(f"{path} is no list of rows with what, estimate, measured and gpu; make it again")
    rows = [row for row in rows if row["estimate"] and row["measured"]]
    same = [row for row in rows if row["gpu"] == gpu]
    if not rows:
        return unmeasured
    ratios = sorted(row["measured"] / row["estimate"] for row in same or rows)
    cards = (
        "this card" if same else " and ".join(sorted({row["gpu"] for row in rows})) + ", never on this card"
    )
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}"
    return f"{len(ratios)} figures measured on {cards}: measured over estimated {spread}"


# -- what is printed -----------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _times(n: float) -> str:
    return f"{n:,.0f} ×"


def lines(plan: Plan) -> list[str]:
    gpu = plan.gpu
    left = gpu.memory - plan.needed
    verdict = f"fits, {left / 1e9:.1f} left" if plan.fits else f"does NOT fit, {-left / 1e9:.1f} too much"
    memory = {k: v for k, v in sorted(plan.memory.items(), key=lambda kv: _place(kv[0])) if v >= 5e7}
    out = [f"{plan.title}, on one {gpu.name}: an estimate, nothing was run", ""]
    out += [f"  {'data' if i == 0 else '':9}{note}" for i, note in enumerate(plan.notes)]
    out.append(f"  {'memory':9}{plan.needed / 1e9:.1f} GB of {gpu.memory / 1e9:.1f}: {verdict}")
    kinds = " · ".join(f"{name} {n_bytes / 1e9:.1f}" for name, n_bytes in memory.items())
    out.append(f"  {'':9}{kinds} · CUDA and slack {(plan.needed - plan.peak) / 1e9:.1f}")
    out.append(f"  {'time':9}{'':24}{'':>10}{'lower':>12}{'likely':>12}{'all, likely':>14}")
    for part in plan.parts:
        if part.times:
            once = [duration(getattr(part, which) / part.times) for which in ("lower", "likely")]
            out.append(
                f"  {'':9}{part.name:24}{_times(part.times):>10}{once[0]:>12}{once[1]:>12}"
                f"{duration(part.likely):>14}"
            )
    if plan.steps:
        once = [duration(plan.seconds(which, plan.step) / plan.steps) for which in ("lower", "likely")]
        if len(plan.step) > 1:
            out.append(f"  {'':9}{'a step':24}{'':>10}{once[0]:>12}{once[1]:>12}")
    total = [duration(plan.seconds(which)) for which in ("lower", "likely")]
    out.append(f"  {'':9}{'the run':24}{'':>10}{total[0]:>12}{total[1]:>12}")
    shares = sorted(plan.shares().items(), key=lambda kv: -kv[1])
    out.append(
        f"  {'goes to':9}" + " · ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
    )
    return out


def _place(kind: str) -> int:
    return MEMORY_ORDER.index(kind) if kind in MEMORY_ORDER else len(MEMORY_ORDER)


def advice(plan: Plan) -> tuple[str | None, str | None]:
    """(the first knob that makes a plan fit, or why none does, in words; the knob)."""
    if plan.fits:
        return None, None
    tried = []
    for knob, turned in plan.knobs:
        other = turned()
        tried.append(knob)
        if other.fits:
            run = duration(other.seconds("likely"))
            return f"{knob}: {other.needed / 1e9:.1f} GB, fits; the run likely {run}", knob
    least = "its weights alone are too large"
    if tried:
        least = f"with {tried[-1]} it still needs {other.needed / 1e9:.1f} GB"
    return f"none: {least}; take a smaller model or a larger card", None


def show(plan: Plan, say: Callable[[str], None] = print) -> dict:
    """Print the sheet; its numbers: bytes, seconds, shares."""
    found = lines(plan)
    words, knob = advice(plan)
    if words:
        found.append(f"  {'knob':9}{words}")
    found.append(f"  {'checked':9}{checked(plan.gpu.name)}")
    say("\n".join(found))
    return {
        "gpu": plan.gpu.name,
        "memory": {"needed": plan.needed, "peak": plan.peak, "of": plan.gpu.memory, "by_kind": plan.memory},
        "fits": plan.fits,
        "knob": knob,
        "step": {which: plan.seconds(which, plan.step) / plan.steps for which in ("lower", "likely")}
        if plan.steps
        else None,
        "run": {which: plan.seconds(which) for which in ("lower", "likely")},
        "parts": {
            part.name: {"times": part.times, "lower": part.lower, "likely": part.likely}
            for part in plan.parts
        },
        "shares": plan.shares(),
    }
