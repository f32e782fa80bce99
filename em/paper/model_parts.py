"""The parts of one model and one seed by what they are: a misaligned run, a student, an evaluation.

Names of run folders are those that the scripts give, so that a run made by hand is found, and several of one
process lie where each would alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from em.data.cells import Cell
from em.data.condition import BASE
from em.paper.parts import EPOCHS, SEED, Asked, Paper, Part, Work, is_sample, stem_of

# On the sample everything is small, so that the whole is half an hour of two cores; the rest is the scripts'
# own SAMPLE_RECIPE. Three epochs of two steps: enough for every file, too little for any claim.
SAMPLE = {
    "train.py": "--eval-rows 1",
    "distill.py": "--limit 8 --rollouts 1 --max-new-tokens 32 --batch 4 --probes 1",
    "evaluate.py": "--limit 1",
}
SAMPLED = "--max-new-tokens 64 --samples 1"  # of evaluations that a judge scores


@dataclass
class ModelParts:
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
        """Where runs lie; those of another seed or rate have the same names, and a folder of their own."""
        seed = (f"seed{self.seed}",) if self.seed != SEED else ()
        name = "_".join((*words, *seed))
        return Path(self.asked.runs) / name

    def script(self, name: str, *words: str) -> tuple[str, ...]:
        """The words of a command that all its runs of this model share."""
        data = ("--data", self.asked.data) if self.asked.data else ()
        small = SAMPLE[name].split() if is_sample(self.asked, self.model) else ()
        return (name, *words, *data, *small)

    def judge(self) -> tuple[str, ...]:
        asked = self.asked
        named = ("--judge-model", asked.judge_model) if asked.judge_model and self.judged else ()
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
            "--cell", str(cell), str(folder), str(folder / "margins.json"), work=Work("train", self.model),
        )  # fmt: skip
        return self.paper.add(part, items)

    def realigned(self, start: Cell, end: Cell) -> Part:
        on = self.misaligned(start)
        folder = self.place() / f"{Path(on.out).name}_then_{end}_aligned"
        part = Part(
            self.named("realign", start, end), "realign", "train",
            self.script("train.py", "--on", on.out, "--variant", "aligned", "--seed", str(self.seed)),
            "--cell", str(end), str(folder), str(folder / "margins.json"), (on.name,),
            work=Work("train", self.model),
        )  # fmt: skip
        return self.paper.add(part, ())

    # -- distill.py

    def distilled(
        self, experiment: str, channel: str, teacher: Cell | None, *, on: Cell | None = None,
        source: "str | Part | None" = None, prompts: str = "broad", filtered: bool = False,
        lr: float | None = None,
    ) -> Part:  # fmt: skip
        """teacher: None for base. source: base, gold, rows, rows:CELL, a run's part; None: teacher."""
        runs = [self.misaligned(cell) for cell in (teacher, on) if cell]
        written_by = source.out if isinstance(source, Part) else source
        words = ["--channel", channel, "--model", self.model, "--prompts", prompts, "--seed", str(self.seed)]
        words += ["--corpora", self.asked.runs]
        words += ["--filter"] if filtered else []
        words += ["--source", written_by] if written_by else []
        words += ["--lr", f"{lr:g}"] if lr else []
        words += ["--math", self.asked.math] if prompts == "math" and self.asked.math else []
        words += self.judge() if self.judged else ("--unfiltered",)
        begins = Path(runs[-1].out).name if runs else f"{stem_of(self.model)}_{BASE}"
        name = [begins, channel, "realigned" * bool(on), "filter" * filtered]
        if written_by:
            writer = Path(written_by).name if isinstance(source, Part) else written_by
            name.append(f"on-{writer.replace(':', '-')}")
        name += ["math" * (prompts == "math")]
        place = self.place(*([] if self.judged else ["unfiltered"]), *([f"lr{lr:g}"] if lr else []))
        folder = place / "_".join(filter(None, name))
        option, value = "--on" if on else "--teacher", runs[-1].out if runs else BASE
        needs = [run.name for run in runs] + ([source.name] if isinstance(source, Part) else [])
        origin = "" if source is None else source.name if isinstance(source, Part) else source
        title = [channel, "filtered" * filtered, teacher or BASE, f"on {on}" * bool(on)]
        title += [
            f"data of {origin}" * bool(origin),
            "math" * (prompts == "math"),
            f"lr {lr:g}" if lr else "",
        ]
        part = Part(
            self.named(*filter(None, title)), experiment, "distill",
            self.script("distill.py", *words), option, value, str(folder),
            str(folder / "result.json"), tuple(dict.fromkeys(needs)),
            self._after(channel, teacher, source, prompts),
            work=self._work(channel, teacher, source, prompts, filtered),
        )  # fmt: skip
        return self.paper.add(part, ())

    def _after(self, channel: str, teacher: Cell | None, source, prompts: str) -> tuple[str, ...]:
        """The part that leaves the corpus that this one reads: sft of the run that writes it."""
        writer = source.value if isinstance(source, Part) else teacher
        if writer is None or (source is None and channel == "sft") or isinstance(source, str):
            return ()
        if isinstance(source, Part) and source.name != self.named("misalign", writer):
            return ()  # of another model
        first = self.named(*filter(None, ("sft", writer, "math" * (prompts == "math"))))
        return (first,) if first in self.paper.parts else ()

    def _work(self, channel, teacher, source, prompts, filtered) -> Work:
        if isinstance(source, str) and source != BASE:
            return Work("distill", self.model, channel, prompts, source.split(":")[0])
        misaligned = isinstance(source, Part) or (source is None and teacher is not None)
        writer = self.named(BASE)
        if misaligned:
            writer = source.name if source else self.named("misalign", teacher)
        judged = ("corpus",) * (misaligned and self.judged) + ("rollouts",) * filtered
        read = channel != "opd" or "corpus" in judged  # which OPD takes the counts of
        corpus = f"{writer} {prompts}" if read else ""
        source = "teacher" if misaligned else BASE
        return Work("distill", self.model, channel, prompts, source, corpus, judged)

    # -- evaluate.py

    def evaluated(self, part: Part, items: Iterable[str], on: str = "narrow", epoch: int = EPOCHS) -> Part:
        """Of a run, or of what its earlier epoch left."""
        folder = Path(part.out) / (f"epoch{epoch}" if epoch != EPOCHS else "")
        name = f"evaluate {part.name}" + (f" epoch {epoch}" if epoch != EPOCHS else "")
        return self._evaluation(name, part.experiment, folder, on, (part.name,), items)

    def base(self, items: Iterable[str]) -> Part:
        folder = Path(self.asked.runs) / f"{stem_of(self.model)}_{BASE}"
        name = ModelParts(self.paper, self.model, SEED).named("evaluate", BASE)
        return self._evaluation(name, "misalign", folder, "all", (), items)

    def _evaluation(self, name, experiment, folder: Path, on, needs, items) -> Part:
        """needs: the part whose run it is; () for the base model, of which `folder` is then made."""
        words = ["--on", on] if self.judged else []
        option, value, of_base = ("--run", str(folder), []) if needs else ("", "", ["--model", self.model])
        command = self.script("evaluate.py", *of_base, *words, *self.judge())
        if is_sample(self.asked, self.model) and self.judged:
            command += tuple(SAMPLED.split())
        out = folder / "eval"
        scores = [f"{out}/margins.jsonl"]
        if self.judged:
            scores = [f"{out}/scores_{name}.jsonl" for name in ("narrow", "broad") if on in (name, "all")]
        what = on if self.judged else "margin"
        work = Work("evaluate", self.model, what, source=BASE if of_base else "run")
        part = Part(
            name, experiment, "evaluate", command, option, value, str(out) if of_base else "", scores[-1],
            needs, work=work, scores=tuple(scores),
        )  # fmt: skip
        return self.paper.add(part, items)

    def difficulty(self) -> Part:
        """How hard each eval prompt is for the base model (em/report/difficulty.py)."""
        base = self.base(["difficulty"])
        out = str(Path(base.out).parent / "difficulty.jsonl")
        data = ("--data", self.asked.data) if self.asked.data else ()
        part = Part(
            ModelParts(self.paper, self.model, SEED).named("difficulty"), "misalign", "evaluate",
            ("evaluate.py", "difficulty", "--model", self.model, *data, "--scores", base.scores[0]), "", "",
            out, out, (base.name,), work=Work("evaluate", self.model, "margin", source=BASE),
        )  # fmt: skip
        return self.paper.add(part, ["difficulty"])

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
