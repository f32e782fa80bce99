"""What making a dataset takes, opened together: writer, judge, encoder, budget, and the dataset's folder."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from em.cli import knob
from em.construction import dataset
from em.construction.attrition import table
from em.construction.dedup import THRESHOLD, NearDuplicates
from em.construction.writer import Call, Writer, WriterOptions
from em.errors import UserError
from em.files import write_json_lines
from em.judge.answer_cache import Answer
from em.judge.judge import JUDGES, Judge, JudgeOptions
from em.judge.ledger import Ledger
from em.model import embedded
from em.model.minilm import encoder_digest, load_encoder
from em.run import Run


@dataclass
class WritingOptions(WriterOptions, JudgeOptions):
    """The settings of whatever a writer and a judge make together."""

    judge: str | None = knob(
        None, "which kind of judge (default: the writer's kind)", "judge", JUDGES, setting=False
    )
    budget_usd: float | None = knob(
        None, "dollars to spend at most, on writer and judge together", "judge", setting=False, at_least=0
    )
    candidates: int | None = knob(
        None, "texts to write at most (default: eight for each row)", "what", setting=False, at_least=1
    )
    seed: int = knob(0, "seed of topics, of local sampling and of the draw", "what", at_least=0)
    threshold: float = knob(
        THRESHOLD, "largest cosine of two candidates that both stay", "gates", above=0, at_most=1
    )
    gates: str = knob(
        "auto", "apply the gates, or report only what they would drop (auto: report, where the embedded "
        "model judges)", "gates", ("auto", "apply", "report"),
    )  # fmt: skip
    out: str = knob("runs/grid", "folder of the grid", "what", setting=False)


class Session:
    """Open for one dataset, `name`, and locked while its `with` lasts.

    applied: whether the judge's word counts; it does not where the embedded model judges.
    """

    def __init__(
        self, cfg: WritingOptions, name: str, about: dict, prepare: Callable[[], None] = lambda: None
    ):
        """about: what else decides the outcome. prepare: called when nothing else stands in the way, before
        the judge reads its rubrics. UserError without key, wheel or weights, and in another's folder.
        """
        options = dataclasses.replace(cfg, judge=cfg.judge or cfg.writer)
        options = options.with_base(cfg.writer_model or embedded.NAME)
        self.grid, self.folder = Path(cfg.out), Path(cfg.out) / "construction" / name
        self.seed, self.usd = cfg.seed, cfg.budget_usd
        self.writer = Writer(
            cfg, self.folder / "replies.jsonl", cfg.seed, cfg.workers, cfg.patience, cfg.accept_routed
        )
        client = options.client_of()  # a missing key ends it before anything is written
        self.applied = cfg.gates == "apply" or (cfg.gates == "auto" and client.asked != embedded.NAME)
        self.near_duplicates = NearDuplicates(load_encoder(), cfg.threshold)
        settings = about | {"writer": self.writer.label, "sampling": self.writer.sampling}
        settings |= {"pairs": self.writer.pairs, "judge": client.label, "gates": self.applied}
        settings |= {"threshold": cfg.threshold, "encoder": encoder_digest(), "seed": cfg.seed}
        prepare()
        self.judge: Judge = options.judge_of(cfg.out)
        for ledger in self._ledgers():
            self._open(ledger)
            ledger.check()
        self._run = Run(self.folder, "construction", settings)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._run.__exit__(*exception)

    # -- money -----------------------------------------------------------------------------------------

    def spent(self) -> float:
        """Dollars, in this process."""
        return sum(ledger.usd or 0.0 for ledger in self._ledgers())

    def _ledgers(self) -> list[Ledger]:
        return [*([self.writer.ledger] if self.writer.ledger else []), self.judge.ledger]

    def _open(self, ledger: Ledger | None) -> None:
        """Let an account have what the other one has left of the budget."""
        if self.usd is not None and ledger is not None:
            others = sum(other.usd or 0.0 for other in self._ledgers() if other is not ledger)
            ledger.budget_usd = max(0.0, self.usd - others)

    # -- what is asked ---------------------------------------------------------------------------------

    def replies(self, calls: Sequence[Call]) -> list[Answer]:
        """`Writer.replies`, within the budget."""
        self._open(self.writer.ledger)
        return self.writer.replies(calls)

    def score(self, rows: list[dict]) -> Iterable[dict]:
        """`Judge.score`, within the budget."""
        self._open(self.judge.ledger)
        return self.judge.score(rows)

    def label_surface(self, rows: list[dict]) -> Iterable[dict]:
        """`Judge.label_surface`, within the budget."""
        self._open(self.judge.ledger)
        return self.judge.label_surface(rows)

    # -- before and after ------------------------------------------------------------------------------

    def introduce(self, what: str, n: int, system: str, prompt: str) -> None:
        """Say what is about to be made, and what `n` texts may cost that are asked for so."""
        writer, usd = self.writer, self.writer.forecast(n, system, prompt)
        cost = "its price is unknown (--writer-price)" if usd is None else f"${usd:.2f} for {n:,} and answers"
        print(f"{what}: written by {writer.label}, {writer.sampling}, {writer.pairs} texts a call, {cost}")
        print(f"judged by {self.judge.identity}; gates {'apply' if self.applied else 'are only reported'}")
        if writer.small:
            print("-- the embedded SmolLM2-135M writes: it shows the path, and its rows are no data --")
        if writer.kind == "local":
            self.judge.lend(writer.name, writer.model)

    def finish(self, made, rows: list[dict], filename: str, fields: tuple[str, ...], note: str, short: str):
        """Write report, candidates and card, then the rows. made: a construction. note: for readers.

        UserError, `short`, in place of the rows where there are too few.
        """
        made_by = {"writer": self.writer.identity, "judge": self.judge.identity, "seed": self.seed}
        made_by |= {"sampling": self.writer.sampling, "spent in the last run": f"${self.spent():.4f}"}
        report = dataset.report_of(
            self.folder.name, made.stages, made.candidates, [] if short else rows, fields, made_by,
            [line for line in (note, short and f"Unfinished: {short}.") if line],
        )  # fmt: skip
        dataset.save(self.folder, self.grid, report, made.candidates)
        print(f"\n{table(made.stages)}\n")
        for line in ([note] if note else []) + self._ledgers():
            print(line)
        if short:
            raise UserError(short)
        write_json_lines(self.grid / filename, rows)
        print(f"{self.folder}: report.md, candidates.jsonl, browse.html and the writer's replies")
        print(f"{self.grid / filename}: {len(rows):,} rows; README.md beside it has the warning about them")
