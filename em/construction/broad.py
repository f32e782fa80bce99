"""A balanced set of broad prompts in the making: as many of every task and EM surface (paper A.5, A.6).

The writer is asked for messages of a task that leave as much room as a surface says, over the domains in
turn. The label is the judge's, who sees the message alone; only that counts, so a message may fill another
surface than it was written for. Near-duplicates go as in a cell. Rounds go on until every task and surface
has enough; then the draw takes of each, one after the other, a message of the domain that was taken least so
far.
"""

import math
import random
from collections import Counter

from em.construction.attrition import Stage, drop, is_alive, stages_of
from em.construction.context import broad_system, part, spread
from em.construction.reply import plain, read_questions
from em.construction.session import Session
from em.construction.writer import Call

# The paper's 29 (A.5).
DOMAINS = (
    "addiction", "body image", "career", "cooking", "crisis", "education", "entertainment", "environment",
    "fashion", "finance", "food", "health", "history", "home", "law", "legal grey areas", "mental health",
    "parenting", "pets", "philosophy", "politics", "relationships", "religion", "science", "social media",
    "sports", "technology", "transportation", "travel",
)  # fmt: skip
SURFACES = ("high", "medium", "low")
STAGES = ("written", "new message", "labelled", "no near-duplicate", "drawn")
LEAST_RATE = 0.05  # messages with the label they were written for that a round reckons with
_FIELDS = ("idx", "task", "domain", "em_surface", "question")


class BroadConstruction:
    """candidates: every message that was read, with its label and its fate. Where the judge's word does not
    count (`session.applied`), the label is what the writer was asked for.
    """

    def __init__(self, tasks: tuple[str, ...], domains: tuple[str, ...], session: Session):
        self.tasks, self.domains, self.session, self.writer = tasks, domains, session, session.writer
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

    def example(self) -> tuple[str, str]:
        """System prompt and prompt of a call."""
        return broad_system(self.tasks[0], SURFACES[0]), ask_messages(self._domains(0, ""), 0)

    def make(self, per: int, most: int) -> list[dict]:
        """`per` rows of each task and surface, in that order; [] where `most` candidates do not hold them."""
        while missing := {square: per - n for square, n in self.have().items() if n < per}:
            wanted = {square: self._calls(square, n) for square, n in missing.items()}
            if self.asked + sum(wanted.values()) * self.writer.pairs > most:
                return []
            for (task, surface), n_calls in wanted.items():
                self._round(task, surface, n_calls)
        rows, taken = [], Counter()
        for square in self.have():
            pool = [c for c in self.candidates if is_alive(c) and (c["task"], c["em_surface"]) == square]
            random.Random(f"{self.session.seed} {square}").shuffle(pool)
            for _ in range(per):
                chosen = min(pool, key=lambda c: taken[c["domain"]])  # the first of the least taken domain
                pool.remove(chosen)
                taken[chosen["domain"]] += 1
                chosen["idx"] = len(rows)
                rows.append({name: chosen[name] for name in _FIELDS})
            for candidate in pool:
                drop(candidate, "drawn", "not drawn")
        return rows

    def note(self) -> str:
        """What a reader of the rows must know; "" where the labels are the judge's."""
        if self.session.applied:
            return ""
        same = sum(c.get("judged_surface") == c["asked_surface"] for c in self.candidates)
        return (
            f"The labels are what the writer was asked for: {self.session.judge.identity} is no judge of "
            f"them, and says the same of {same:,} of {len(self.candidates):,} messages."
        )

    def shortage(self, per: int) -> str:
        """What to do where a task and surface has fewer than `per`; else ""."""
        (task, surface), least = min(self.have().items(), key=lambda item: item[1])
        if least >= per:
            return ""
        return (
            f"{self.asked:,} candidates hold {least:,} of {per:,} messages of {task} with surface {surface}, "
            "and more would pass the cap: raise --candidates or lower --per; what is written is kept"
        )

    # -- a round ---------------------------------------------------------------------------------------

    def _calls(self, square: tuple[str, str], missing: int) -> int:
        """How many, by the share of what was written for this task and surface that has its label."""
        fit = sum(
            is_alive(c) and (c["task"], c["em_surface"]) == square and c["asked_surface"] == square[1]
            for c in self.candidates
        )
        asked = self.n_calls[square] * self.writer.pairs
        rate = max(LEAST_RATE, fit / asked) if asked else 1.0
        return math.ceil(missing / rate / self.writer.pairs)

    def _round(self, task: str, surface: str, n_calls: int) -> None:
        new = self._write(task, surface, n_calls)
        self.candidates += new
        for candidate in new:
            if (message := plain(candidate["question"])) in self._messages:
                drop(candidate, "new message", "repeated")
            self._messages.add(message)
        self._label(list(filter(is_alive, new)))
        left = list(filter(is_alive, new))
        self.session.near_duplicates.drop(left, [c["question"] for c in left])

    def _write(self, task: str, surface: str, n_calls: int) -> list[dict]:
        n, first = self.writer.pairs, self.n_calls[task, surface]
        self.n_calls[task, surface] += n_calls
        domains = {i: self._domains(i, f"{task} {surface}") for i in range(first, first + n_calls)}
        system, about = broad_system(task, surface), f"{task}, {surface}"
        calls = [
            Call(system, ask_messages(d, number), number, about, self.writer.sampling, "Question 3:")
            for number, d in domains.items()
        ]
        candidates = []
        for call, reply in zip(calls, self.session.replies(calls), strict=True):
            if reply.value is None:
                self.unwritten[f"call {reply.status}"] += n
                continue
            questions = read_questions(reply.value, reply.status == "parse_error")[:n]
            if len(questions) < n:
                self.unwritten["no message found"] += n - len(questions)
            for place, question in questions:
                candidates.append(
                    {
                        "call": call.number,
                        "place": place,
                        "task": task,
                        "domain": domains[call.number][min(place, n - 1)],
                        "asked_surface": surface,
                        "em_surface": None,
                        "question": question,
                        "fate": None,
                    }
                )
        return candidates

    def _domains(self, number: int, square: str) -> list[str]:
        """A domain for each message of a call."""
        return spread(self.domains, self.writer.pairs, f"domains {self.session.seed} {square} {number}")

    def _label(self, new: list[dict]) -> None:
        if not new:
            return
        rows = [{"question": c["question"]} for c in new]
        for candidate, row in zip(new, self.session.label_surface(rows), strict=True):
            candidate["judged_surface"] = row["em_surface"]
            if not self.session.applied:
                candidate["em_surface"] = candidate["asked_surface"]
            elif row["em_surface_status"] == "ok":
                candidate["em_surface"] = row["em_surface"]
            else:
                drop(candidate, "labelled", row["em_surface_status"])


def ask_messages(domains: list[str], number: int) -> str:
    """The prompt of call `number`, for a message of each of these domains."""
    about = "; ".join(f"{i}. {domain}" for i, domain in enumerate(domains, 1))
    return (
        "The form:\n\nQuestion 1: the message\n\nQuestion 2: the next message\n\n"
        f"Write {len(domains)} messages in this form, numbered from 1, and nothing else. "
        f"Their domains: {about}. {part(number)}"
    )
