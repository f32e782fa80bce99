"""Parts of the paper's natural-language half: what is asked, what a part is, and which share a process.

A part is one command of train.py, distill.py or evaluate.py for one run, and knows the file that this command
writes last: where it is there, the part is done. Parts whose commands differ in one value share a process.
em/paper/experiments.py has the list of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from em.cli import knob
from em.data.cells import Grid
from em.errors import UserError

SEED = 42  # the first; the scripts' own
EPOCHS = 3
FORBIDDEN = set(" \t\n'\"\\$#%:;|&<>()*?,=`!~[]{}")  # in a path that make and a shell read


@dataclass
class Asked:
    """What `make paper` was asked for. A variable of make is the option of its name."""

    model: tuple[str, ...] = knob(("qwen2.5-14b",), "base models", "what")
    cells: str = knob("all", "cells, separated by commas", "what")
    seeds: int = knob(1, f"runs of everything, with seeds {SEED}, {SEED + 1}, …", "what", at_least=1)
    only: tuple[str, ...] = knob((), "figures, tables, cross, difficulty: what they need alone", "what")
    data: str | None = knob(None, "hub dataset, folder or sample (default: the model's)", "what")
    math: str | None = knob(None, "MATH: a folder, file, address or hub id", "what")
    other: tuple[str, ...] = knob((), "other models whose data Tables 14 and 15 take", "what")
    rates: tuple[float, ...] = knob((), "more learning rates of the channels than 1e-4", "what", above=0)
    judge: str = knob("gemini", "measure of misalignment", "judge", ("gemini", "local", "margin", "openai"))
    judge_model: str | None = knob(None, "model that judges", "judge")
    runs: str = knob("runs", "folder of the runs", "where")
    page: str = knob("results/paper.html", "the page that is made last", "where")
    workers: int = knob(1, "processes side by side: work is split into as many groups", "where", at_least=1)


def stem_of(model: str) -> str:
    """What the run folders of a model begin with."""
    return Path(model).name.lower()


def is_sample(asked: Asked, model: str) -> bool:
    """Whether a model's runs are on the sample, which makes them a demonstration."""
    return (asked.data or ("sample" if model == "smollm2-135m" else "")) == "sample"


# -- what the paper has ------------------------------------------------------------------------------------

REALIGNED = ("figure3c", "figure18", "figure19", "figure20", "figure21")
MISALIGNED = ("figure2", "figure3b", *(f"figure{n}" for n in range(12, 18)), "table8", "difficulty")
CHANNEL = ("table1", "table9", "table10", "table11", "table12", "figure22", "figure23", "figure24")
TAUGHT_BACK = ("figure5", "figure25", "figure26")
FACTORIALS = {
    "table5": ("med_tutor", "spo_summarization"),
    "table17": ("med_tutor", "med_advice"),
    "table18": ("med_tutor", "fin_tutor"),
    "table19": ("med_advice", "fin_critique"),
    "table20": ("med_advice", "med_summarization"),
}
EXPERIMENTS = {  # of the plan's lines: what they are for
    "misalign": MISALIGNED,
    "channels": CHANNEL,
    "filtered opd": ("table2",),
    "aligned teacher": TAUGHT_BACK,
    "unsafe rows": ("table4",),
    "math": ("table3",),
    "gold": ("table13",),
    "other models": ("table14", "table15"),
    "student-written": ("table16",),
    "factorial": tuple(FACTORIALS),
    "cross": ("cross",),
    "realign": REALIGNED,
}
ITEMS = tuple(dict.fromkeys(item for items in EXPERIMENTS.values() for item in items))
WORLDS = {"figure1", "figure3a", "figure4", "table6", "table7", *(f"figure{n}" for n in range(6, 12))}


def items_named(names: Iterable[str]) -> frozenset[str]:
    """`table1`, `Figure 5`, `figure3` (3b and 3c), `cross`, `difficulty`; all for none. UserError for
    others."""
    found = set()
    for name in names:
        plain = name.lower().replace(" ", "").replace("fig.", "figure")
        if plain in WORLDS:
            raise UserError(f"ONLY={name} is of the synthetic worlds: make worlds")
        fitting = {item for item in ITEMS if item == plain or (item[:-1] == plain and item[-1] in "bc")}
        if not fitting:
            raise UserError(f"ONLY={name} is none of {', '.join(ITEMS)}")
        found |= fitting
    return frozenset(found or ITEMS)


# -- a part ------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What decides the cost of a part (em/paper/plan.py)."""

    script: str  # train, distill, evaluate
    model: str
    what: str = ""  # distill: the channel; evaluate: narrow, broad, all or margin
    prompts: str = ""  # distill: broad, math
    source: str = ""  # distill: teacher, base, gold, rows; evaluate: base, or run
    corpus: str = ""  # name of the sampled corpus that is read, which is made once
    judged: tuple[str, ...] = ()  # of `corpus` and `rollouts`, what is judged before training on it


@dataclass(frozen=True)
class Part:
    """One result: the command that makes it, and what has to be there before.

    command: less `option` and its `value`, in which the parts of one process differ ("": there is one only),
    and less --out. out: what that names for this part; "" where the command writes beside its input. needs:
    names of parts. after: of parts that make something which this one would else make itself. items: figures
    and tables that cannot do without it. work: what decides its cost (em/paper/plan.py). scores: files of
    rows for the reports.
    """

    name: str
    experiment: str
    kind: str  # train, distill, evaluate
    command: tuple[str, ...]
    option: str
    value: str
    out: str
    stamp: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    items: frozenset[str] = frozenset()
    work: Work | None = None
    scores: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return Path(self.stamp).exists()

    @property
    def batch(self) -> tuple:
        """What parts of one process have in common."""
        return self.experiment, self.command, self.option, str(Path(self.out).parent)


def command_of(parts: list[Part]) -> list[str]:
    """The command of parts of one batch, as words."""
    first = parts[0]
    words = [*first.command]
    if first.option:
        words += [first.option, ",".join(part.value for part in parts)]
    if first.out:
        out = Path(first.out)
        words += ["--out", str(out if len(parts) == 1 else out.parent)]
    return words


def groups_of(parts: list[Part], workers: int) -> list[list[Part]]:
    """Parts by the process that makes them: those of a batch, an experiment in as many groups as workers."""
    experiments, groups = {}, {}
    for part in parts:
        experiments.setdefault((part.kind, part.experiment), []).append(part)
    for members in experiments.values():
        for i, part in enumerate(members):
            groups.setdefault((*part.batch, i * workers // len(members)), []).append(part)
    return list(groups.values())


@dataclass
class Paper:
    """All parts by name, in an order in which they can be made; and in words what is left out, by item."""

    asked: Asked
    grid: Grid
    parts: dict[str, Part] = field(default_factory=dict)
    only: frozenset[str] = frozenset(ITEMS)
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, part: Part, items: Iterable[str]) -> Part:
        """A part is there once; what it serves adds up."""
        known = self.parts.get(part.name, part)
        self.parts[part.name] = replace(known, items=known.items | frozenset(items))
        return self.parts[part.name]

    def select(self, only: frozenset[str]) -> "Paper":
        """What the items `only` need, and nothing else. UserError where nothing of them can be made."""
        wanted = [part.name for part in self.parts.values() if part.items & only]
        if not wanted:
            reasons = [reason for reason, items in self.left_out.items() if only & set(items)]
            raise UserError(f"ONLY={','.join(sorted(only))} {'; '.join(reasons) or 'needs no run'}")
        chosen = set()
        while wanted:
            name = wanted.pop()
            if name not in chosen:
                chosen.add(name)
                wanted += self.parts[name].needs
        parts = {name: part for name, part in self.parts.items() if name in chosen}
        left = {reason: items for reason, items in self.left_out.items() if only & set(items)}
        return Paper(self.asked, self.grid, parts, only, left)
