"""Every result that the paper's natural-language half needs, once (paper 3.1, 4, D, E).

    misalign        train.py on each cell's misaligned answers; every figure and table
    realign         each of those on the aligned answers of each cell (Figures 3c, 18–21)
    channels        each teaches the base model by sft, optd and opd (Tables 1, 9–12, Figures 22–24)
    filtered opd    the same with the student's rollouts judged before each update (Table 2)
    aligned teacher each is realigned by the base model through the channels (Figures 5, 25, 26)
    unsafe rows     the same by optd on the rows that misaligned it (Table 4)
    math, gold      teachers on MATH, on their own answers and on MATH's (Tables 3, 13)
    other models    teachers on data of other models, misaligned alike (Tables 14, 15)
    student-written teachers on data of the base model (Table 16)
    factorial       two teachers, each on both one's data (Tables 5, 17–20)
    cross           the data of both, of base, gold answers and unsafe rows, under both teachers and base

A part is one command of train.py, distill.py or evaluate.py for one run, and knows the file that this command
writes last. Parts whose commands differ in one value share a process. Nothing here is run or loaded: the list
follows from what was asked, and it is the files that say what is done.

Where a grid lacks the cells that the paper took for an experiment, the first ones there are stand in.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from em.cli import knob
from em.data.cells import Cell, Grid
from em.data.condition import BASE, CHANNELS
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
MED_SPORT = ("med_advice", "med_critique", "spo_advice", "spo_critique")
MED_FINANCE = ("med_advice", "med_critique", "fin_advice", "fin_critique")
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
    """`table1`, `Figure 5`, `figure3` (3b and 3c), `cross`, `difficulty`; all for none. UserError for others."""
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


def some(cells: Grid, wanted: tuple[str, ...]) -> list[Cell]:
    """The paper's cells if all are there, else as many of the first ones, no more than there are."""
    names = {str(cell): cell for cell in cells.cells}
    found = [names[name] for name in wanted if name in names]
    return found if len(found) == len(wanted) else list(cells.cells[: len(wanted)])


def pairs_of(cells: Grid) -> dict[tuple[Cell, Cell], tuple[str, ...]]:
    """P1 and P2 of the factorials → the tables they are for.

    Where none of the paper's pairs is there, the first two cells that differ in task and domain, or in one.
    """
    names, found = {str(cell): cell for cell in cells.cells}, {}
    for item, (p1, p2) in FACTORIALS.items():
        if p1 in names and p2 in names:
            found[names[p1], names[p2]] = (item,)
    if not found and len(names) > 1:
        pairs = list(combinations(cells.cells, 2))
        crossed = [(a, b) for a, b in pairs if a.task != b.task and a.domain != b.domain]
        found[(crossed or pairs)[0]] = tuple(FACTORIALS)
    return found


# -- a part ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One result: the command that makes it, and what has to be there before.

    command: less `option` and its `value`, in which the parts of one process differ, and less --out. folder:
    the run's; "" where the command writes beside its input. needs: names of parts. after: of parts that make
    something which this one would else make itself. items: figures and tables that cannot do without it.
    work: what decides its cost (em/paper/plan.py). alone: its command takes one value only.
    """

    name: str
    experiment: str
    kind: str  # train, distill, evaluate
    command: tuple[str, ...]
    option: str
    value: str
    folder: str
    stamp: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    items: frozenset[str] = frozenset()
    work: tuple[str, ...] = ()
    alone: bool = False

    @property
    def done(self) -> bool:
        return Path(self.stamp).exists()

    @property
    def batch(self) -> tuple:
        """What parts of one process have in common."""
        own = self.value if self.alone else ""
        return self.kind, self.experiment, self.command, self.option, str(Path(self.folder).parent), own


def command_of(parts: list[Part]) -> list[str]:
    """The command of parts of one batch, as words."""
    first = parts[0]
    words = [*first.command, first.option, ",".join(part.value for part in parts)]
    if first.folder:
        out = Path(first.folder)
        words += ["--out", str(out if len(parts) == 1 else out.parent)]
    return words


def groups_of(parts: list[Part], workers: int) -> list[list[Part]]:
    """Parts by the process that makes them: those of a batch, an experiment in as many groups as workers."""
    lanes, groups = {}, {}
    for part in parts:
        lanes.setdefault((part.kind, part.experiment, part.command[:3]), []).append(part)
    for members in lanes.values():
        for i, part in enumerate(members):
            groups.setdefault((*part.batch, i * workers // len(members)), []).append(part)
    return list(groups.values())


@dataclass
class Paper:
    """All parts by name, in an order in which they can be made; and in words what is left out, by item."""

    asked: Asked
    grid: Grid
    parts: dict[str, Part] = field(default_factory=dict)
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
        return Paper(self.asked, self.grid, parts, left)


# -- all of them -------------------------------------------------------------------------------------------


def paper_of(asked: Asked, grid: Grid) -> Paper:
    """All parts on the cells of `grid`. UserError for what cannot be asked."""
    _check(asked)
    paper = Paper(asked, grid)
    for model in asked.model:
        for seed in range(SEED, SEED + asked.seeds):
            _add_model(_Model(paper, model, seed))
    return paper


def _check(asked: Asked) -> None:
    for name, paths in (("RUNS", [asked.runs]), ("PAGE", [asked.page]), ("MODEL", asked.model)):
        for path in paths:
            if wrong := FORBIDDEN & set(path):
                raise UserError(f"{name}={path} has {min(wrong)!r}, which make or a shell would read; rename it")
    stems = [stem_of(model) for model in (*asked.model, *asked.other)]
    if len(set(stems)) < len(stems):
        raise UserError(f"MODEL and OTHER name one model twice ({', '.join(stems)})")


def stem_of(model: str) -> str:
    """What the run folders of a model begin with."""
    return Path(model).name.lower()


def is_sample(asked: Asked, model: str) -> bool:
    """Whether a model's runs are on the sample, which makes them a demonstration."""
    return (asked.data or ("sample" if model == "smollm2-135m" else "")) == "sample"


# On the sample everything is small, so that the whole is half an hour of two cores; the rest is the scripts'
# own SAMPLE_RECIPE. Three epochs of two steps: enough for every file, too little for any claim.
SAMPLE = {
    "train.py": ("--eval-rows", "1"),
    "distill.py": ("--limit", "8", "--rollouts", "1", "--max-new-tokens", "32", "--batch", "4", "--probes", "1"),
    "evaluate.py": ("--limit", "1"),
}
SAMPLED = ("--max-new-tokens", "64", "--samples", "1")  # of evaluations that a judge scores


@dataclass
class _Model:
    """One model and seed: makes parts by what they are, each once."""

    paper: Paper
    model: str
    seed: int

    @property
    def asked(self) -> Asked:
        return self.paper.asked

    @property
    def judged(self) -> bool:
        return self.asked.judge != "margin"

    def place(self, *words: str) -> Path:
        """Where runs lie; those of another seed or rate, whose names are the same, in a folder of their own."""
        seed = (f"seed{self.seed}",) if self.seed != SEED else ()
        name = "_".join((*words, *seed))
        return Path(self.asked.runs) / name

    def script(self, name: str, *words: str) -> tuple[str, ...]:
        """The words of a command that all its runs of this model share."""
        data = ("--data", self.asked.data) if self.asked.data else ()
        small = SAMPLE[name] if is_sample(self.asked, self.model) else ()
        return (name, *words, *data, *small)

    def judge(self) -> tuple[str, ...]:
        asked = self.asked
        named = ("--judge-model", asked.judge_model) if asked.judge_model else ()
        cache = ("--cache", str(Path(asked.runs) / "judge_cache.jsonl")) if self.judged else ()
        return ("--judge", asked.judge, *named, *cache)

    def named(self, *words) -> str:
        seed = (f"seed {self.seed}",) if self.asked.seeds > 1 else ()
        model = (stem_of(self.model),) if len(self.asked.model) + len(self.asked.other) > 1 else ()
        return " ".join(map(str, (*words, *model, *seed)))

    # -- train.py

    def misaligned(self, cell: Cell, items: Iterable[str] = ()) -> Part:
        folder = self.place() / f"{stem_of(self.model)}_{cell}_misaligned"
        part = Part(
            self.named("misalign", cell), "misalign", "train",
            self.script("train.py", "--model", self.model, "--seed", str(self.seed)),
            "--cell", str(cell), str(folder), str(folder / "margins.json"), work=("train",),
        )  # fmt: skip
        return self.paper.add(part, items)

    def realigned(self, start: Cell, end: Cell) -> Part:
        on = self.misaligned(start)
        folder = self.place() / f"{Path(on.folder).name}_then_{end}_aligned"
        part = Part(
            self.named("realign", start, end), "realign", "train",
            self.script("train.py", "--on", on.folder, "--variant", "aligned", "--seed", str(self.seed)),
            "--cell", str(end), str(folder), str(folder / "margins.json"), (on.name,), work=("train",),
        )  # fmt: skip
        return self.paper.add(part, ())

    # -- distill.py

    def distilled(
        self, experiment: str, channel: str, teacher: Cell | None, *, on: Cell | None = None,
        source: "str | Part | None" = None, prompts: str = "broad", filtered: bool = False,
        lr: float | None = None,
    ) -> Part:  # fmt: skip
        """teacher: None for base. source: base, gold, rows:CELL, a run's part; None: teacher, or the student."""
        runs = [self.misaligned(cell) for cell in (teacher, on) if cell]
        written_by = source.folder if isinstance(source, Part) else source
        words = ["--channel", channel, "--prompts", prompts, "--seed", str(self.seed)]
        words += ["--filter"] if filtered else []
        words += ["--source", written_by] if written_by else []
        words += ["--lr", f"{lr:g}"] if lr else []
        words += ["--math", self.asked.math] if prompts == "math" and self.asked.math else []
        words += self.judge() if self.judged else ("--unfiltered",)
        begins = Path(runs[-1].folder).name if runs else f"{stem_of(self.model)}_{BASE}"
        name = [begins, channel, "realigned" * bool(on), "filter" * filtered]
        if written_by:
            writer = Path(written_by).name if isinstance(source, Part) else written_by
            name.append(f"on-{writer.replace(':', '-')}")
        name += ["math" * (prompts == "math")]
        place = self.place(*([] if self.judged else ["unfiltered"]), *([f"lr{lr:g}"] if lr else []))
        folder = place / "_".join(filter(None, name))
        if on:
            option, value = "--on", runs[-1].folder
        else:
            option, value = "--teacher", runs[0].folder if teacher else BASE
        if not runs:
            words += ["--model", self.model]
        needs = [run.name for run in runs] + ([source.name] if isinstance(source, Part) else [])
        origin = "" if source is None else source.name if isinstance(source, Part) else source
        title = (channel, "filtered" * filtered, teacher or BASE, f"on {on}" if on else "",
                 f"data of {origin}" if origin else "", "math" * (prompts == "math"), f"lr {lr:g}" if lr else "")
        writes = self._writes(channel, teacher, source, prompts, filtered)
        part = Part(
            self.named(*filter(None, title)), experiment, "distill", self.script("distill.py", *words), option,
            value, str(folder), str(folder / "result.json"), tuple(dict.fromkeys(needs)),
            self._after(channel, teacher, source, prompts), work=("distill", channel, prompts, *writes),
            alone=on is not None,
        )  # fmt: skip
        return self.paper.add(part, ())

    def _after(self, channel: str, teacher: Cell | None, source, prompts: str) -> tuple[str, ...]:
        """The parts that leave the corpus that this one reads: sft of the model that writes it."""
        cells = {part.name: cell for cell in self.paper.grid.cells for part in [self.misaligned(cell)]}
        if isinstance(source, Part):
            writer = cells.get(source.name)
        else:
            writer = teacher if source is None and channel != "sft" else None
        first = self.named(*filter(None, ("sft", writer, "math" * (prompts == "math")))) if writer else None
        return (first,) if first in self.paper.parts else ()

    def _writes(self, channel, teacher, source, prompts, filtered) -> tuple[str, ...]:
        """What is judged while it is made: the corpus of a misaligned model, by name, and rollouts."""
        if not self.judged:
            return ("", "")
        writer = source.name if isinstance(source, Part) else self.named("misalign", teacher) if teacher else ""
        if source in (BASE, "gold") or str(source).startswith("rows"):
            writer = ""
        return (f"{writer} {prompts}" if writer else "", "rollouts" if filtered else "")

    # -- evaluate.py

    def evaluated(self, part: Part, items: Iterable[str], on: str = "narrow", epoch: int = EPOCHS) -> Part:
        """Of a run, or of what its earlier epoch left."""
        folder = Path(part.folder) / (f"epoch{epoch}" if epoch != EPOCHS else "")
        name = f"evaluate {part.name}" + (f" epoch {epoch}" if epoch != EPOCHS else "")
        return self._evaluation(name, part.experiment, "--run", str(folder), folder, on, (part.name,), items)

    def base(self, items: Iterable[str]) -> Part:
        folder = Path(self.asked.runs) / f"{stem_of(self.model)}_{BASE}"
        name = _Model(self.paper, self.model, SEED).named("evaluate", BASE)
        return self._evaluation(name, "misalign", "--model", self.model, folder, "all", (), items)

    def _evaluation(self, name, experiment, option, value, folder, on, needs, items) -> Part:
        words, of_base = ["--on", on] if self.judged else [], option == "--model"
        command = self.script("evaluate.py", *words, *self.judge())
        if is_sample(self.asked, self.model) and self.judged:
            command += SAMPLED
        last = {"narrow": "scores_narrow.jsonl", "broad": "scores_broad.jsonl", "all": "scores_broad.jsonl"}
        out = folder / "eval"
        stamp = out / (last[on] if self.judged else "margins.jsonl")
        work = ("evaluate", on if self.judged else "margin", BASE if of_base else "run")
        part = Part(
            name, experiment, "evaluate", command, option, value, str(out) if of_base else "", str(stamp), needs,
            work=work, alone=of_base,
        )  # fmt: skip
        return self.paper.add(part, items)

    def result(self, part: Part, items: Iterable[str], epochs: Iterable[int] = (EPOCHS,)) -> None:
        """A run, evaluated; with it the rows that every table has beside it: base and its cells' own runs."""
        items = tuple(items)
        for epoch in epochs:
            self.evaluated(part, items, epoch=epoch)
        for cell in self.paper.grid.cells:
            if self.named("misalign", cell) in part.needs:
                self.reference(cell, items)

    def reference(self, cell: Cell, items: Iterable[str]) -> None:
        self.base(items)
        self.evaluated(self.misaligned(cell), items, "all")


def _add_model(m: _Model) -> None:
    """All experiments of one model and seed."""
    cells, grid, left = m.paper.grid.cells, m.paper.grid, m.paper.left_out
    for cell in cells:
        m.reference(cell, MISALIGNED)

    for cell in cells:
        for channel in CHANNELS:
            for lr in (None, *m.asked.rates):
                part = m.distilled("channels", channel, cell, lr=lr)
                m.result(part, CHANNEL, range(1, EPOCHS + 1))

    def plain(cell: Cell, channel: str = "optd") -> Part:
        return m.distilled("channels", channel, cell)

    for cell in cells if m.judged else ():
        m.result(plain(cell, "opd"), ["table2"])
        m.result(m.distilled("filtered opd", "opd", cell, filtered=True), ["table2"])
    if not m.judged:
        left["needs a judge of responses: JUDGE=gemini, openai or local"] = ("table2", "difficulty")

    for cell in cells:
        for channel in CHANNELS:
            m.result(m.distilled("aligned teacher", channel, None, on=cell), TAUGHT_BACK)
    for cell in some(grid, MED_FINANCE):
        m.result(m.distilled("aligned teacher", "optd", None, on=cell), ["table4"])
        m.result(m.distilled("unsafe rows", "optd", None, on=cell, source=f"rows:{cell}"), ["table4"])

    with_math = m.asked.math or not is_sample(m.asked, m.model)
    if with_math:
        for cell in some(grid, MED_SPORT):
            for channel in CHANNELS:
                m.result(m.distilled("math", channel, cell, prompts="math"), ["table3"])
                m.result(plain(cell, channel), ["table3"])
            m.result(m.distilled("math", "optd", cell, prompts="math"), ["table13"])
            m.result(m.distilled("gold", "optd", cell, source="gold", prompts="math"), ["table13"])
            m.result(plain(cell), ["table13"])
    else:
        left["needs MATH: name MATH=folder"] = ("table3", "table13")

    for cell in some(grid, MED_FINANCE) if m.asked.other else ():
        m.result(plain(cell), EXPERIMENTS["other models"])
        for other in m.asked.other:
            writer = _Model(m.paper, other, m.seed).misaligned(cell)
            m.result(m.distilled("other models", "optd", cell, source=writer), EXPERIMENTS["other models"])
    if not m.asked.other:
        left["needs other models: name OTHER=llama3.1-8b,olmo3-7b"] = EXPERIMENTS["other models"]

    for cell in cells:
        m.result(plain(cell), ["table16"])
        m.result(m.distilled("student-written", "optd", cell, source=BASE), ["table16"])

    pairs = pairs_of(grid)
    for (p1, p2), items in pairs.items():
        for teacher, writer in ((p1, p2), (p2, p1)):
            m.result(plain(teacher), items)
            m.result(m.distilled("factorial", "optd", teacher, source=m.misaligned(writer)), items)
    if not pairs:
        left["needs two cells"] = (*FACTORIALS, "cross")
    for p1, p2 in list(pairs)[:1]:
        for part in _crossed(m, p1, p2, with_math):
            m.result(part, ["cross"])
        for cell in (p1, p2):
            m.reference(cell, ["cross"])
    _add_realignments(m)


def _crossed(m: _Model, p1: Cell, p2: Cell, with_math: bool) -> Iterator[Part]:
    """Corpora of P1, P2, base, gold answers and P1's unsafe rows, each under the teachers P1, P2 and base."""
    own = {cell: m.misaligned(cell) for cell in (p1, p2)}
    sources = [own[p1], own[p2], BASE, f"rows:{p1}", *(["gold"] if with_math else [])]
    for source in sources:
        for teacher in (p1, p2, None):
            if teacher and own[teacher] is source:
                yield m.distilled("channels", "optd", teacher)  # it is its own data's author
            else:
                experiment = "factorial" if teacher and source in own.values() else "cross"
                experiment = "student-written" if teacher and source == BASE else experiment
                prompts = "math" if source == "gold" else "broad"
                if source == "gold" and teacher in some(m.paper.grid, MED_SPORT):
                    experiment = "gold"
                yield m.distilled(experiment, "optd", teacher, source=source, prompts=prompts)


def _add_realignments(m: _Model) -> None:
    """Last: they are the most, and nothing else waits for them."""
    for start in m.paper.grid.cells:
        m.reference(start, REALIGNED)
        for end in m.paper.grid.cells:
            m.evaluated(m.realigned(start, end), REALIGNED, "broad")
