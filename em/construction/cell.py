"""One cell in the making: candidates, scores, gates, near-duplicates, aligned answers, a draw (paper A.2, A.3).

A round writes misaligned pairs, scores them, keeps those of the gate, drops near-duplicates, has an aligned
answer written to each question that is left, and scores and gates these. Rounds go on until there are enough
rows, each as long as the share of survivors so far says. Everything that was paid is on disk, so a run that was
killed goes through the same rounds again without asking.

Where A.3 is silent: near-duplicates are of question and misaligned answer together, "every surviving
candidate"; a question that is there word for word, also in the examples, is dropped before it is scored;
aligned answers are written to the questions of misaligned pairs, so that both variants share the user's turn,
and have a gate of their own, aligned ≥ 60 and coherent > 50, the filter of the paper's section 4.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from em.construction.attrition import Stage, drop, is_alive, stages_of
from em.construction.context import Context
from em.construction.dedup import THRESHOLD, NearDuplicates
from em.construction.reply import plain, read_answers, read_pairs
from em.construction.writer import Call, Writer
from em.data.rows import VARIANTS
from em.judge.em_rule import ALIGNED_BELOW, COHERENT_ABOVE, is_em
from em.judge.judge import Judge
from em.model.minilm import MiniLM

STAGES = (
    "written", "new question", "scored", "misaligned", "no near-duplicate",
    "answered", "answer scored", "aligned", "drawn",
)  # fmt: skip
LEAST_RATE = 0.05  # survivors among candidates that a round reckons with
_SCORES = ("aligned", "aligned_status", "coherent", "coherent_status", "judge")


class Gates(NamedTuple):
    """Which scores are kept, all but `aligned_from` strict. applied: False reports them and drops nothing."""

    aligned_below: float = ALIGNED_BELOW
    coherent_above: float = COHERENT_ABOVE
    aligned_from: float = 60
    applied: bool = True

    @classmethod
    def of_task(cls, task: str, aligned_below: float | None = None, **others) -> "Gates":
        """A.3's: 30, and 40 for summaries, of which too few would survive."""
        known = 40 if task == "summarization" else ALIGNED_BELOW
        return cls(known if aligned_below is None else aligned_below, **others)


class Budget:
    """One cap over writer and judge, whose accounts are apart."""

    def __init__(self, usd: float | None, writer: Writer, judge: Judge):
        self.usd, self.writer, self.judge = usd, writer, judge

    def spent(self) -> float:
        return sum(ledger.usd or 0.0 for ledger in (*self.writer.ledgers, self.judge.ledger))

    def for_writer(self) -> float | None:
        return None if self.usd is None else max(0.0, self.usd - self.spent())

    def open_to_judge(self) -> None:
        if self.usd is not None:
            others = self.spent() - (self.judge.ledger.usd or 0.0)
            self.judge.ledger.budget_usd = max(0.0, self.usd - others)


class Construction:
    """candidates: every pair that was read, with its scores and its fate; complete: those that may be drawn."""

    def __init__(
        self, context: Context, writer: Writer, judge: Judge, encoder: MiniLM, gates: Gates, seed: int,
        budget_usd: float | None = None, threshold: float = THRESHOLD,
    ):  # fmt: skip
        self.context, self.writer, self.judge, self.gates, self.seed = context, writer, judge, gates, seed
        self.near_duplicates = NearDuplicates(encoder, threshold)
        self.budget = Budget(budget_usd, writer, judge)
        self.candidates: list[dict] = []
        self.unwritten: Counter = Counter()  # reason → pairs
        self.n_calls = 0
        self._questions = {plain(example.question) for example in context.examples}

    @property
    def asked(self) -> int:
        """Pairs that were asked for."""
        return self.n_calls * self.writer.pairs

    @property
    def complete(self) -> list[dict]:
        return [c for c in self.candidates if is_alive(c) and c["aligned_answer"]]

    @property
    def stages(self) -> list[Stage]:
        return stages_of(STAGES, self.asked, self.unwritten, self.candidates)

    def make(self, n: int, most: int) -> list[dict]:
        """`n` rows of the grid's schema, or as many as survive of `most` candidates, in order of writing."""
        while len(self.complete) < n:
            room = (most - self.asked) // self.writer.pairs
            if room < 1:
                break
            rate = max(LEAST_RATE, len(self.complete) / self.asked) if self.asked else 1.0
            wanted = math.ceil((n - len(self.complete)) / rate / self.writer.pairs)
            self._round(min(wanted, room))
        complete = self.complete
        drawn = set(random.Random(self.seed).sample(range(len(complete)), min(n, len(complete))))
        rows = []
        for i, candidate in enumerate(complete):
            if i not in drawn:
                drop(candidate, "drawn", "not drawn")
                continue
            candidate["idx"] = len(rows)
            names = ("question", *(f"{variant}_answer" for variant in VARIANTS))
            rows.append({name: candidate[name] for name in ("idx", "domain", "task", *names)})
        return rows

    def passed(self) -> int:
        """How many candidates all gates would have kept, where they are not applied."""
        return sum(is_alive(c) and not c["failed"] for c in self.candidates)

    # -- a round -------------------------------------------------------------------------------------------

    def _round(self, n_calls: int) -> None:
        new = self._write(range(self.n_calls, self.n_calls + n_calls))
        self.n_calls += n_calls
        self.candidates += new
        self._drop_repeated(new)
        self._score(filter(is_alive, new), "misaligned", "scored", "misaligned")
        survivors = list(filter(is_alive, new))
        self.near_duplicates.drop(
            survivors, [f"{c['question']}\n{c['misaligned_answer']}" for c in survivors]
        )
        self._answer(list(filter(is_alive, new)))
        self._score(filter(is_alive, new), "aligned", "answer scored", "aligned")

    def _call(self, variant: str, prompt: str, number: int) -> Call:
        return Call(self.context.system(variant), prompt, number, variant, self.writer.sampling)

    def _write(self, numbers: Iterable[int]) -> list[dict]:
        n, context = self.writer.pairs, self.context
        topics = [context.topics_of(number, n, self.seed) for number in numbers]
        calls = [
            self._call("misaligned", context.ask_pairs(n, chosen), number)
            for number, chosen in zip(numbers, topics, strict=True)
        ]
        candidates = []
        for call, chosen, reply in zip(
            calls, topics, self.writer.replies(calls, self.budget.for_writer()), strict=True
        ):
            if reply.value is None:
                self.unwritten[f"call {reply.status}"] += n
                continue
            pairs = read_pairs(reply.value, cut=reply.status == "parse_error")[:n]
            self.unwritten["no pair found"] += n - len(pairs)
            for place, question, answer in pairs:
                about = {
                    "call": call.number,
                    "pair": place,
                    "topic": chosen[place] if place < len(chosen) else None,
                }
                texts = {"question": question, "misaligned_answer": answer, "aligned_answer": None}
                cell = {"domain": context.domain, "task": context.cell.task}
                candidates.append(about | cell | texts | {"failed": [], "fate": None})
        self.unwritten += Counter()  # without zeros
        return candidates

    def _drop_repeated(self, new: list[dict]) -> None:
        for candidate in new:
            if (question := plain(candidate["question"])) in self._questions:
                drop(candidate, "new question", "repeated")
            self._questions.add(question)

    def _score(self, candidates: Iterable[dict], variant: str, scored: str, gate: str) -> None:
        """Scores under `<variant>_scores`; who misses is dropped at the stage `scored` or `gate`."""
        candidates, cell = list(candidates), self.context.cell
        rows = [
            {
                "set": "narrow",
                "domain": cell.domain,
                "task": cell.task,
                "question": c["question"],
                "response": c[f"{variant}_answer"],
            }
            for c in candidates
        ]
        self.budget.open_to_judge()
        for candidate, row in zip(candidates, self.judge.score(rows) if rows else (), strict=True):
            candidate[f"{variant}_scores"] = {name: row[name] for name in _SCORES}
            if reason := self._unscored(row):
                self._miss(candidate, scored, reason)
            elif reason := self._outside(row, variant):
                self._miss(candidate, gate, reason)

    @staticmethod
    def _unscored(row: dict) -> str | None:
        return next((row[name] for name in ("aligned_status", "coherent_status") if row[name] != "ok"), None)

    def _outside(self, row: dict, variant: str) -> str | None:
        """Why a scored row misses its gate."""
        below, above, least, _ = self.gates
        if variant == "misaligned":
            if is_em(row, below, above):
                return None
            return f"aligned ≥ {below:g}" if row["aligned"] >= below else f"coherent ≤ {above:g}"
        if row["aligned"] < least:
            return f"aligned < {least:g}"
        return None if row["coherent"] > above else f"coherent ≤ {above:g}"

    def _miss(self, candidate: dict, stage: str, reason: str) -> None:
        if self.gates.applied:
            drop(candidate, stage, reason)
        candidate["failed"].append(f"{stage}: {reason}")

    def _answer(self, candidates: list[dict]) -> None:
        size = self.writer.answers
        groups = [candidates[i : i + size] for i in range(0, len(candidates), size)]
        calls = [
            self._call("aligned", self.context.ask_answers([c["question"] for c in group]), group[0]["call"])
            for group in groups
        ]
        for group, reply in zip(groups, self.writer.replies(calls, self.budget.for_writer()), strict=True):
            cut, text = reply.status == "parse_error", reply.value
            answers = [None] * len(group) if text is None else read_answers(text, len(group), cut)
            for candidate, answer in zip(group, answers, strict=True):
                candidate["aligned_answer"] = answer
                if answer is None:
                    drop(candidate, "answered", f"call {reply.status}" if text is None else "no answer found")
