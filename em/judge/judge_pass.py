"""One pass of a judge over rows: threads that ask, and a bounded window of rows that wait for answers.

Identical questions in flight are asked once. An answer is on disk before anyone can read it. What ends a pass
in a thread (a refusal by the API, a full disk) is raised in the one that reads the answers.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait

from tqdm import tqdm

from em.errors import UserError
from em.judge.answer_cache import Answer, AnswerCache
from em.judge.gemini import Cancelled, Gemini
from em.judge.ledger import BudgetReached, Ledger
from em.judge.rubric import Question

WINDOW = 1024  # rows between the oldest without an answer and the newest that is asked about


class Pass:
    """One use of a client and its cache, on one account. A pass is over when its `answers` are."""

    def __init__(self, client: Gemini, ledger: Ledger, cache: AnswerCache, workers: int, bar: tqdm):
        """workers: calls in flight at most. bar: shows how many rows are answered."""
        self.client, self.ledger, self.cache, self.workers, self.bar = client, ledger, cache, workers, bar
        self._window: deque[tuple[dict, dict[str, Future]]] = deque()
        self._pending: dict[bytes, Future] = {}
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._fatal: BaseException | None = None
        self._failed_in_a_row = 0
        self._given = 0
        self._shown = time.monotonic()

    def answers(
        self, rows: Iterable[tuple[dict, dict[str, Question | None]]]
    ) -> Iterator[tuple[dict, dict[str, Answer]]]:
        """(row, field → answer) of each (row, field → question), in order; no question is answered `empty`.

        Rows are read at most WINDOW ahead of the one given out. BudgetReached after all rows before the one
        whose call could pass the cap. Its end, early or not, ends the threads without waiting for calls in
        flight.
        """
        stopped = None
        try:
            for row, questions in rows:
                try:
                    self._window.append((row, {field: self._ask(q) for field, q in questions.items()}))
                except BudgetReached as error:
                    stopped = error
                    break
                while self._window and (len(self._window) >= WINDOW or _is_done(self._window[0])):
                    yield self._oldest()
            while self._window:
                yield self._oldest()
            if stopped:
                raise stopped
        finally:
            self._show()
            self._ended.set()
            for _ in self._threads:
                self._jobs.put(None)

    def _ask(self, question: Question | None) -> Future:
        """A future with the Answer; of no question, `empty`. BudgetReached where it could pass the cap."""
        self._check()
        if question is None:
            return _known(Answer("empty"))
        ledger, cache = self.ledger, self.cache
        future = self._pending.get(question.key)  # before the cache, which has it before it leaves `_pending`
        if future is None and (answer := cache.get(question.key)) is not None:
            future = _known(answer)
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
        self._pending[question.key] = future = Future()
        self._jobs.put((question, reserved, future))
        if len(self._threads) < self.workers:
            thread = threading.Thread(target=self._work, daemon=True)  # a daemon: Ctrl-C need not wait for it
            self._threads.append(thread)
            thread.start()
        return future

    def _oldest(self) -> tuple[dict, dict[str, Answer]]:
        """The first row of the window, once it is answered."""
        row, futures = self._window[0]
        answers = {field: self._wait(future) for field, future in futures.items()}
        self._window.popleft()
        self._given += 1
        return row, answers

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
        self.bar.update(self._given + sum(map(_is_done, self._window)) - self.bar.n)

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

    def _answer(self, question: Question, reserved: float, future: Future) -> None:
        ledger = self.ledger
        reply = self.client.generate(question.prompt, self._ended, ledger.retry)
        if reply.status == "error":
            answer = Answer("error")
            ledger.fail(reserved, reply.text)
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= max(8, self.workers):
                raise UserError(
                    f"{self._failed_in_a_row} calls to the judge failed one after another (the last: "
                    f"{reply.text}); what is done is kept, try again later or with fewer --workers"
                )
        else:
            self._failed_in_a_row = 0
            answer = Answer(*question.parse(reply.text)) if reply.status == "ok" else Answer(reply.status)
            tokens = ledger.settle(reserved, question.prompt, reply.prompt_tokens, reply.output_tokens)
            notes = {"judge": ledger.model, "rubric": question.rubric, "reply": reply.text[:200]}
            self.cache.add(question.key, answer, prompt_tokens=tokens[0], output_tokens=tokens[1], **notes)
        del self._pending[question.key]
        future.set_result(answer)


def _is_done(entry: tuple[dict, dict[str, Future]]) -> bool:
    """Whether a row of the window has all its answers."""
    return all(future.done() for future in entry[1].values())


def _known(answer: Answer) -> Future:
    future = Future()
    future.set_result(answer)
    return future
