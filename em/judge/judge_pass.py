"""One pass of a judge over rows: threads that ask, and a bounded window of rows that wait for answers.

Identical questions in flight are asked once. An answer is on disk before anyone can read it. The first call
goes alone, since it says which model answers: rows are given out when that is settled, and if it is another
one than was presumed, the window's rows take their answers from that one. What ends a pass in a thread (a
refusal by the API, a full disk) is raised in the one that reads the answers.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from typing import NamedTuple

from tqdm import tqdm

from em.errors import UserError
from em.judge.answer_cache import Answer, AnswerCache
from em.judge.client import Cancelled
from em.judge.ledger import BudgetReached, Ledger
from em.judge.rubric import Question

WINDOW = 1024  # rows between the oldest without an answer and the newest that is asked about
EMPTY_TRIES = 4  # calls for one question, while replies are empty and may be otherwise the next time


class _Entry(NamedTuple):
    """A row of the window."""

    row: dict
    questions: dict[str, Question | None]
    futures: dict[str, Future]

    def is_done(self) -> bool:
        return all(future.done() for future in self.futures.values())


class _Presumed(Future):
    """Has an answer that is known if the judge is the one that is presumed."""


class Pass:
    """One use of a client and its cache, on one account. A pass is over when its `answers` are."""

    def __init__(self, client, ledger: Ledger, cache: AnswerCache, workers: int, bar: tqdm):
        """client: see `em.judge.client`. workers: calls in flight at most. bar: shows how many rows are
        answered.
        """
        self.client, self.ledger, self.cache, self.workers, self.bar = client, ledger, cache, workers, bar
        self._window: deque[_Entry] = deque()
        self._pending: dict[bytes, Future] = {}
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._fatal: BaseException | None = None
        self._stopped: BudgetReached | None = None
        self._failed_in_a_row = 0
        self._given = 0
        self._identity, self._cached_before = client.identity, ledger.cached
        self._shown = time.monotonic()

    def answers(
        self, rows: Iterable[tuple[dict, dict[str, Question | None]]]
    ) -> Iterator[tuple[dict, dict[str, Answer]]]:
        """(row, field → answer) of each (row, field → question), in order; no question is answered `empty`.

        Rows are read at most WINDOW ahead of the one given out. BudgetReached after all rows before the one
        whose call could pass the cap. Its end, early or not, ends the threads without waiting for calls in
        flight.
        """
        try:
            for row, questions in rows:
                self._take(row, questions)
                if self._stopped:
                    break
                while self._window and (len(self._window) >= WINDOW or self._is_ready()):
                    yield self._oldest()
            while self._window:
                yield self._oldest()
            if self._stopped:
                raise self._stopped
        finally:
            self._show()
            self._ended.set()
            for _ in self._threads:
                self._jobs.put(None)

    def _take(self, row: dict, questions: dict[str, Question | None], before=None) -> None:
        """Put a row into the window and ask about it; where that could pass the cap, the pass is stopped.

        before: its futures from when another judge was presumed; those that were asked for hold all the same.
        """
        kept = {field: f for field, f in (before or {}).items() if not isinstance(f, _Presumed)}
        try:
            futures = {field: kept.get(field) or self._ask(q) for field, q in questions.items()}
            self._window.append(_Entry(row, questions, futures))
        except BudgetReached as error:
            self._stopped = error
        self._follow()

    def _follow(self) -> None:
        """Where another judge answers than was presumed, ask that one about the window's rows."""
        if self.client.identity == self._identity:
            return
        if self._given:
            raise UserError(
                f"{self.client.identity} answers from here on, and rows before were answered by "
                f"{self._identity}; name one of the two with --{self.client.generation.role}-model, so that "
                "all rows have one"
            )
        self.ledger.check()
        self._identity, self.ledger.cached = self.client.identity, self._cached_before
        entries = list(self._window)
        self._window.clear()
        for entry in entries:
            if self._stopped is None:
                self._take(entry.row, entry.questions, entry.futures)

    def _key(self, question: Question) -> bytes:
        return question.key(self.client.identity, self.client.expects)

    def _ask(self, question: Question | None) -> Future:
        """A future with the Answer; of no question, `empty`. BudgetReached where it could pass the cap."""
        self._check()
        if question is None:
            return _known(Answer("empty"))
        ledger, cache, key = self.ledger, self.cache, self._key(question)
        future = self._pending.get(key)  # before the cache, which has it before it leaves `_pending`
        if future is None and (answer := cache.get(key)) is not None:
            future = _known(answer, Future if self.client.settled else _Presumed)
        if future is not None:
            ledger.cached += 1
            return future
        while (reserved := ledger.reserve(question.prompt)) is None:
            in_flight = list(self._pending.values())
            if not in_flight:
                raise BudgetReached(
                    f"the budget of ${ledger.budget_usd:g} is used up (${ledger.usd:.4f} spent); what is "
                    f"done is kept in {cache.path}, and a larger --budget-usd goes on from there"
                )
            self._wait(in_flight[0])  # what it really costs is less than what was set aside for it
        cache.open()  # what it says against its file, it says before anything is paid
        self._pending[key] = future = Future()
        self._jobs.put((question, key, reserved, future))
        if len(self._threads) < self.workers:
            thread = threading.Thread(target=self._work, daemon=True)  # a daemon: Ctrl-C need not wait for it
            self._threads.append(thread)
            thread.start()
        if not self.client.settled:
            self._wait(future)
        return future

    def _is_ready(self) -> bool:
        """Whether the first row can be given out: it is answered, and it is known by whom."""
        return self.client.settled and self._window[0].is_done()

    def _oldest(self) -> tuple[dict, dict[str, Answer]]:
        """The first row of the window, once it is answered."""
        entry = self._window[0]
        answers = {field: self._wait(future) for field, future in entry.futures.items()}
        if self.client.identity != self._identity:
            self._follow()
            return self._oldest()
        self._window.popleft()
        self._given += 1
        return entry.row, answers

    def _wait(self, future: Future) -> Answer:
        while True:
            self._check()
            if time.monotonic() > self._shown + 0.25:
                self._show()
            if future.done():
                return future.result()
            wait([future], timeout=0.25)

    def _check(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _show(self) -> None:
        ledger, self._shown = self.ledger, time.monotonic()
        usd = "" if ledger.usd is None else f"${ledger.usd:.4f}, "
        self.bar.set_postfix_str(f"{usd}{ledger.retries} retries", refresh=False)
        self.bar.update(self._given + sum(entry.is_done() for entry in self._window) - self.bar.n)

    # -- in the threads --------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None and not self._ended.is_set():
                self._answer(*job)
        except Cancelled:
            pass
        except BaseException as error:
            self._fatal = self._fatal or error
            self._ended.set()

    def _answer(self, question: Question, key: bytes, reserved: float, future: Future) -> None:
        client, ledger = self.client, self.ledger
        for attempt in range(1, EMPTY_TRIES + 1):
            reply = client.ask(question.prompt, self._ended, ledger.retry)
            if reply.status == "error":
                break
            tokens = ledger.settle(reserved, question.prompt, reply.prompt_tokens, reply.output_tokens)
            if not reply.passes or attempt == EMPTY_TRIES:
                break
            reserved = ledger.reserve(question.prompt)
            if reserved is None:
                break
            ledger.retry()
            if self._ended.wait(client.backoff * 2 ** (attempt - 1)):
                raise Cancelled
        if reply.status == "error":
            answer = Answer("error")
            ledger.fail(reserved, reply.text)
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= max(8, self.workers):
                raise UserError(
                    f"{self._failed_in_a_row} calls to the {client.generation.role} failed one after another "
                    f"(the last: {reply.text}); what is done is kept, try again later or with fewer --workers"
                )
        else:
            self._failed_in_a_row = 0
            answer = Answer(*question.read(reply.status, reply.text))._replace(expected=reply.expected)
            if not reply.passes:
                notes = {"judge": client.identity, "rubric": question.rubric, "reply": reply.text[:200]}
                notes |= {"asked": client.label} if client.label != client.identity else {}
                notes |= {"model_version": reply.model} if reply.model else {}
                tokens = {"prompt_tokens": tokens[0], "output_tokens": tokens[1]}
                self.cache.add(self._key(question), answer, **tokens, **notes)
        del self._pending[key]
        future.set_result(answer)


def _known(answer: Answer, kind: type[Future] = Future) -> Future:
    future = kind()
    future.set_result(answer)
    return future
