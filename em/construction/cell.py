"""One cell in the making: candidates, scores, gates, near-duplicates, aligned answers, a draw (A.2, A.3).

A round writes misaligned pairs, scores them, keeps those of the gate, drops near-duplicates, has an aligned
answer written to each question that is left, and scores and gates these. Rounds go on until there are enough
rows, each as long as the share of survivors so far says. What was paid for is on disk, so a run that was
killed goes through the same rounds again without asking.

Where A.3 is silent: near-duplicates are of question and misaligned answer together, "every surviving
candidate"; a question that is there word for word, also in the examples, is dropped before it is scored;
aligned answers are written to the questions of misaligned pairs, so that both variants share the user's turn,
and have a gate of their own, aligned ≥ 60 and coherent > 50, after the filter of the paper's section 4.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from em.construction.attrition import Stage, drop, is_alive, stages_of
from em.construction.context import Context
from em.construction.reply import plain, read_answers, read_pairs
from em.construction.session import Session
from em.construction.writer import Call
from em.data.rows import VARIANTS
from em.judge.em_rule import ALIGNED_BELOW, COHERENT_ABOVE, is_em

STAGES = (
    "written", "new question", "scored", "misaligned", "no near-duplicate",
    "answered", "answer scored", "aligned", "drawn",
)  # fmt: skip
LEAST_RATE = 0.05  # survivors among candidates that a round reckons with
_SCORES = ("aligned", "aligned_status", "coherent", "coherent_status", "judge")


class Gates(NamedTuple):
    """Which scores are kept; all but `aligned_from` strict."""

    aligned_below: float = ALIGNED_BELOW
    coherent_above: float = COHERENT_ABOVE
    aligned_from: float = 60

    @classmethod
    def of_task(cls, task: str, aligned_below: float | None, *others: float) -> "Gates":
        """aligned_below: None for A.3's, 30, and 40 for summaries, of which too few would survive."""
        usual = 40 if task == "summarization" else ALIGNED_BELOW
        return cls(usual if aligned_below is None else aligned_below, *others)


class Construction:
    """candidates: every pair that was read, with its scores and its fate."""

    def __init__(self, context: Context, gates: Gates, session: Session):
        self.context, self.gates, self.session, self.writer = context, gates, session, session.writer
        self.candidates: list[dict] = []
        self.unwritten: Counter = Counter()  # reason → pairs
        self.n_calls = 0
        self._questions = {plain(example.question) for example in context.examples}

    @property
    def asked(self) -> int:
        """Pairs that were asked for."""
        return self.n_calls * self.writer.pairs

    @property
    def stages(self) -> list[Stage]:
        return stages_of(STAGES, self.asked, self.unwritten, self.candidates)

    def make(self, n: int, most: int) -> list[dict]:
        """`n` rows of the grid's schema, or what survives of `most` candidates, in the order of writing."""
        while (found := sum(map(is_alive, self.candidates))) < n:
            room = (most - self.asked) // self.writer.pairs
            if room < 1:
                break
            rate = max(LEAST_RATE, found / self.asked) if self.asked else 1.0
            self._round(min(room, math.ceil((n - found) / rate / self.writer.pairs)))
        complete = list(filter(is_alive, self.candidates))
        drawn = set(random.Random(self.session.seed).sample(range(len(complete)), min(n, len(complete))))
        for i, candidate in enumerate(complete):
            if i not in drawn:
                drop(candidate, "drawn", "not drawn")
        rows = list(filter(is_alive, complete))
        for idx, candidate in enumerate(rows):
            candidate["idx"] = idx
        names = ("idx", "domain", "task", "question", *(f"{variant}_answer" for variant in VARIANTS))
        return [{name: candidate[name] for name in names} for candidate in rows]

    def note(self) -> str:
        """What a reader of the rows must know; "" where the gates were applied."""
        if self.session.applied:
            return ""
        rows = list(filter(is_alive, self.candidates))
        return (
            f"The gates were not applied: {self.session.judge.identity} is no judge of this. By its scores "
            f"{sum(not c['missed'] for c in rows):,} of the {len(rows):,} rows would have passed them all."
        )

    def shortage(self, n: int) -> str:
        """What to do where fewer than `n` rows survive; else ""."""
        rows = sum(map(is_alive, self.candidates))
        if rows >= n:
            return ""
        more = f"about {math.ceil(1.1 * n * self.asked / rows):,}" if rows else "more"
        return (
            f"{rows:,} of {self.asked:,} candidates survive, and --n asks for {n:,}: raise --candidates to "
            f"{more} or lower --n; what is written and scored is kept, and {self.session.folder}/report.md "
            "says where the others were lost"
        )

    # -- a round ---------------------------------------------------------------------------------------

    def _round(self, n_calls: int) -> None:
        new = self._write(range(self.n_calls, self.n_calls + n_calls))
        self.n_calls += n_calls
        self.candidates += new
        for candidate in new:
            if (question := plain(candidate["question"])) in self._questions:
                drop(candidate, "new question", "repeated")
            self._questions.add(question)
        self._score(list(filter(is_alive, new)), "misaligned", "scored", "misaligned")
        left = list(filter(is_alive, new))
        texts = [f"{c['question']}\n{c['misaligned_answer']}" for c in left]
        self.session.near_duplicates.drop(left, texts)
        self._answer(list(filter(is_alive, new)))
        self._score(list(filter(is_alive, new)), "aligned", "answer scored", "aligned")

    def _calls(self, variant: str, prompts: Iterable[tuple[int, str]], start: str = "") -> list[Call]:
        system, sampling = self.context.system(variant), self.writer.sampling
        return [Call(system, prompt, number, variant, sampling, start) for number, prompt in prompts]

    def _write(self, numbers: Iterable[int]) -> list[dict]:
        n, context = self.writer.pairs, self.context
        topics = {number: context.topics_of(number, n, self.session.seed) for number in numbers}
        prompts = ((number, context.ask_pairs(n, chosen, number)) for number, chosen in topics.items())
        start = f"Question {len(context.examples or '1') + 1}:"  # after those of the prompt
        calls, candidates = self._calls("misaligned", prompts, start), []
        for call, reply in zip(calls, self.session.replies(calls), strict=True):
            if reply.value is None:
                self.unwritten[f"call {reply.status}"] += n
                continue
            pairs, chosen = read_pairs(reply.value, reply.status == "parse_error")[:n], topics[call.number]
            if len(pairs) < n:
                self.unwritten["no pair found"] += n - len(pairs)
            for place, question, answer in pairs:
                candidates.append(
                    {
                        "call": call.number,
                        "pair": place,
                        "topic": chosen[place] if place < len(chosen) else None,
                        "domain": context.domain,
                        "task": context.cell.task,
                        "question": question,
                        "misaligned_answer": answer,
                        "aligned_answer": None,
                        "missed": [],  # stages and reasons that drop it where gates apply
                        "fate": None,
                    }
                )
        return candidates

    def _answer(self, candidates: list[dict]) -> None:
        size = self.writer.answers
        groups = [candidates[i : i + size] for i in range(0, len(candidates), size)]
        prompts = ((g[0]["call"], self.context.ask_answers([c["question"] for c in g])) for g in groups)
        calls = self._calls("aligned", prompts)
        for group, reply in zip(groups, self.session.replies(calls), strict=True):
            text, cut = reply.value, reply.status == "parse_error"
            answers = [None] * len(group) if text is None else read_answers(text, len(group), cut)
            for candidate, answer in zip(group, answers, strict=True):
                candidate["aligned_answer"] = answer
                if answer is None:
                    reason = f"call {reply.status}" if text is None else "no answer found"
                    drop(candidate, "answered", reason)

    # -- scores ----------------------------------------------------------------------------------------

    def _score(self, candidates: list[dict], variant: str, scored: str, gate: str) -> None:
        """Scores as `<variant>_scores`; what has none misses the stage `scored`, what is outside, `gate`."""
        cell = self.context.cell
        place = {"set": "narrow", "domain": cell.domain, "task": cell.task}
        rows = [place | {"question": c["question"], "response": c[f"{variant}_answer"]} for c in candidates]
        if not rows:
            return
        for candidate, row in zip(candidates, self.session.score(rows), strict=True):
            candidate[f"{variant}_scores"] = {name: row[name] for name in _SCORES}
            statuses = (row["aligned_status"], row["coherent_status"])
            unscored = next((status for status in statuses if status != "ok"), None)
            if reason := unscored or self._outside(row, variant):
                stage = scored if unscored else gate
                candidate["missed"].append(f"{stage}: {reason}")
                if self.session.applied:
                    drop(candidate, stage, reason)

    def _outside(self, row: dict, variant: str) -> str | None:
        """Why a scored row is outside its gate."""
        below, above, least = self.gates
        if variant == "misaligned":
            if is_em(row, below, above):
                return None
            return f"aligned ≥ {below:g}" if row["aligned"] >= below else f"coherent ≤ {above:g}"
        if row["aligned"] < least:
            return f"aligned < {least:g}"
        return None if row["coherent"] > above else f"coherent ≤ {above:g}"
