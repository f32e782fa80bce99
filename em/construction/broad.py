"""A balanced set of broad prompts in the making: as many of every task and EM surface (paper A.5, A.6).

The writer is asked for messages of a task that leave as much room as a surface says, over the domains in turn. The
label is the judge's, who sees the message alone; only that counts, so a message may fill another surface than
it was written for. Near-duplicates go as in a cell. Rounds go on until every task and surface has enough; then
the draw takes of each, one after the other, a message of the domain that was taken least so far.
"""

import math
import random
from collections import Counter

from em.construction.attrition import Stage, drop, is_alive, stages_of
from em.construction.cell import LEAST_RATE, Budget
from em.construction.context import broad_system
from em.construction.dedup import THRESHOLD, NearDuplicates
from em.construction.reply import plain, read_questions
from em.construction.writer import Call, Writer
from em.judge.judge import Judge
from em.model.minilm import MiniLM

# The paper's 29 (A.5).
DOMAINS = (
    "addiction", "body image", "career", "cooking", "crisis", "education", "entertainment", "environment",
    "fashion", "finance", "food", "health", "history", "home", "law", "legal grey areas", "mental health",
    "parenting", "pets", "philosophy", "politics", "relationships", "religion", "science", "social media",
    "sports", "technology", "transportation", "travel",
)  # fmt: skip
SURFACES = ("high", "medium", "low")
STAGES = ("written", "new message", "labelled", "no near-duplicate", "drawn")


class BroadConstruction:
    """candidates: every message that was read, with its label and its fate. trusted: whether labels are the
    judge's; else they are what the writer was asked for.
    """

    def __init__(
        self, tasks: tuple[str, ...], domains: tuple[str, ...], writer: Writer, judge: Judge, encoder: MiniLM,
        seed: int, budget_usd: float | None = None, threshold: float = THRESHOLD, trusted: bool = True,
    ):  # fmt: skip
        self.tasks, self.domains, self.writer, self.judge = tasks, domains, writer, judge
        self.seed, self.trusted = seed, trusted
        self.near_duplicates = NearDuplicates(encoder, threshold)
        self.budget = Budget(budget_usd, writer, judge)
        self.candidates: list[dict] = []
        self.unwritten: Counter = Counter()  # reason → messages
        self.n_calls: Counter = Counter()  # (task, surface) → calls
        self._messages: set[str] = set()

    @property
    def asked(self) -> int:
        """Messages that were asked for."""
        return self.n_calls.total() * self.writer.pairs

    @property
    def stages(self) -> list[Stage]:
        return stages_of(STAGES, self.asked, self.unwritten, self.candidates)

    def have(self) -> dict[tuple[str, str], int]:
        """(task, surface) → messages that may be drawn."""
        have = Counter((c["task"], c["em_surface"]) for c in self.candidates if is_alive(c))
        return {(task, surface): have[task, surface] for task in self.tasks for surface in SURFACES}

    def agreeing(self) -> int:
        """Messages of which the judge says what the writer was asked for."""
        return sum(c.get("judged_surface") == c["asked_surface"] for c in self.candidates)

    def make(self, per: int, most: int) -> list[dict] | None:
        """`per` rows of each task and surface, in that order; None where `most` candidates do not hold them."""
        while missing := {square: per - n for square, n in self.have().items() if n < per}:
            wanted = {square: self._calls(square, n) for square, n in missing.items()}
            if self.asked + sum(wanted.values()) * self.writer.pairs > most:
                return None
            for (task, surface), n in wanted.items():
                self._round(task, surface, n)
        taken: Counter = Counter()
        rows = []
        for task, surface in self.have():
            pool = [
                c for c in self.candidates if is_alive(c) and (c["task"], c["em_surface"]) == (task, surface)
            ]
            random.Random(f"{self.seed} {task} {surface}").shuffle(pool)
            for _ in range(per):
                chosen = min(pool, key=lambda c: taken[c["domain"]])  # the first of the least used domain
                pool.remove(chosen)
                taken[chosen["domain"]] += 1
                chosen["idx"] = len(rows)
                rows.append(
                    {name: chosen[name] for name in ("idx", "task", "domain", "em_surface", "question")}
                )
            for candidate in pool:
                drop(candidate, "drawn", "not drawn")
        return rows

    def _calls(self, square: tuple[str, str], missing: int) -> int:
        """As many as the share of this square's own candidates that carry its label says."""
        own = [c for c in self.candidates if (c["task"], c["asked_surface"]) == square]
        asked = self.n_calls[square] * self.writer.pairs
        fit = sum(is_alive(c) and c["em_surface"] == square[1] for c in own)
        rate = max(LEAST_RATE, fit / asked) if asked else 1.0
        return math.ceil(missing / rate / self.writer.pairs)

    def _round(self, task: str, surface: str, n_calls: int) -> None:
        n, begin = self.writer.pairs, self.n_calls[task, surface]
        self.n_calls[task, surface] += n_calls
        system, domains = broad_system(task, surface), {}
        for number in range(begin, begin + n_calls):
            rng = random.Random(f"domains {self.seed} {task} {surface} {number}")
            domains[number] = (
                rng.sample(self.domains * n, n) if len(self.domains) < n else rng.sample(self.domains, n)
            )
        calls = [
            Call(system, _ask(chosen), number, f"{task}, {surface}", self.writer.sampling)
            for number, chosen in domains.items()
        ]
        new = []
        for call, reply in zip(calls, self.writer.replies(calls, self.budget.for_writer()), strict=True):
            if reply.value is None:
                self.unwritten[f"call {reply.status}"] += n
                continue
            questions = read_questions(reply.value, cut=reply.status == "parse_error")[:n]
            self.unwritten["no message found"] += n - len(questions)
            for place, question in questions:
                domain = domains[call.number][min(place, n - 1)]
                about = {
                    "call": call.number,
                    "place": place,
                    "task": task,
                    "domain": domain,
                    "asked_surface": surface,
                }
                new.append(about | {"question": question, "em_surface": None, "fate": None})
        self.unwritten += Counter()  # without zeros
        self.candidates += new
        for candidate in new:
            if (message := plain(candidate["question"])) in self._messages:
                drop(candidate, "new message", "repeated")
            self._messages.add(message)
        self._label([c for c in new if is_alive(c)])
        labelled = [c for c in new if is_alive(c)]
        self.near_duplicates.drop(labelled, [c["question"] for c in labelled])

    def _label(self, new: list[dict]) -> None:
        self.budget.open_to_judge()
        rows = [{"question": c["question"]} for c in new]
        for candidate, row in zip(new, self.judge.label_surface(rows) if rows else (), strict=True):
            candidate["judged_surface"] = row["em_surface"]
            candidate["em_surface"] = row["em_surface"] if self.trusted else candidate["asked_surface"]
            if self.trusted and row["em_surface_status"] != "ok":
                drop(candidate, "labelled", row["em_surface_status"])


def _ask(domains: list[str]) -> str:
    about = "; ".join(f"{i}. {domain}" for i, domain in enumerate(domains, 1))
    return (
        "The form:\n\nQuestion 1: the message\n\nQuestion 2: the next message\n\n"
        f"Write {len(domains)} messages in this form, numbered from 1, and nothing else. Their domains: {about}."
    )
