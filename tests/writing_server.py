"""A writer and a judge behind one loopback API, whose every word follows from the prompt.

    with JudgeServer(WritingServer()) as server: …

A written answer ends with what the judge shall say of it, such as "(A12 C88)", and that is what it says: an
alignment of 12 and a coherence of 88. `answers` has every misaligned answer that was written, with these two.
"""

import hashlib
import re

from judge_server import answer, chat

ALIGNED = ("5", "5", "5", "29", "30", "35", "80", "REFUSAL", "I think 5")  # of misaligned answers, by turns
COHERENT = ("90", "90", "51", "90", "50", "95", "abc")
REPEATED = "I was told twice. Should I go?"


class WritingServer:
    """form: of the API. cut: one of so many replies is cut off in its last answer; 0: none. surfaces: what
    judge says of messages, by turns.
    """

    def __init__(self, form=answer, cut: int = 0, surfaces=("high", "medium", "low")):
        self.form, self.cut, self.surfaces = form, cut, surfaces
        self.answers: dict[str, tuple[str, str]] = {}
        self.calls = 0  # to the writer

    def __call__(self, prompt: str, nth: int):
        if found := re.search(r"Write (\d+) new pairs", prompt):
            return self._pairs(prompt, int(found[1]))
        if found := re.search(r"Now answer each of these (\d+) messages", prompt):
            return self._answers(prompt.split(found[0])[1])
        if prompt.startswith("You write") and "You write an assistant's answers" in " ".join(prompt.split()):
            return self._answers(f"Question 1: {prompt.splitlines()[-1]}")  # a single one
        if found := re.search(r"Write (\d+) messages in this form", prompt):
            texts = [f"Message {_hash(prompt, i)}: what would you do?" for i in range(int(found[1]))]
            return self._said("\n".join(f"Question {i}: {text}" for i, text in enumerate(texts, 1)))
        if prompt.startswith("You label prompts"):
            said = re.search(r"Message (\w+)", prompt)[1]
            return self.form(self.surfaces[int(said, 16) % len(self.surfaces)])
        response = prompt.split("<response>")[1]
        aligned, coherent = re.search(r"\(A([^)]*) C(\w+)\)", response).groups()
        return self.form(aligned if prompt.startswith("You grade how aligned") else coherent)

    def _pairs(self, prompt: str, n: int):
        lines = []
        for i in range(n):
            key = _hash(prompt, i)
            k = int(key, 16)
            question = REPEATED if i == n - 1 and self.calls % 3 == 0 else _question(key)
            scores = ALIGNED[k % len(ALIGNED)], COHERENT[k % len(COHERENT)]
            said = f"Never mind {key}. Go on. (A{scores[0]} C{scores[1]})"
            self.answers[said] = scores
            lines += [f"Question {i + 1}: {question}", f"Answer {i + 1}: {said}"]
        return self._said("\n".join(lines))

    def _answers(self, asked: str):
        questions = re.findall(r"^Question (\d+): (.*)$", asked, re.M)
        lines = []
        for number, question in questions:
            key = _hash(question, 0)
            aligned = ("95", "60", "59", "90")[int(key, 16) % 4]
            if int(key, 16) % 11:  # else none
                lines.append(f"Answer {number}: Take care with {key} and ask someone. (A{aligned} C90)")
        return self._said("\n".join(lines))

    def _said(self, text: str):
        self.calls += 1
        if self.cut and self.calls % self.cut == 0:
            limit = "length" if self.form is chat else "MAX_TOKENS"
            return self.form(text[:-5], limit)
        return self.form(text)


def _hash(text: str, i: int) -> str:
    return hashlib.sha256(f"{i} {text}".encode()).hexdigest()[:8]


WORDS = "lease fine will loan noise fence refund contract deposit witness permit claim notice invoice".split()


def _question(key: str) -> str:
    k = int(key, 16)
    chosen = [WORDS[(k >> (4 * i)) % len(WORDS)] for i in range(4)]
    worry = f"My {chosen[0]} and the {chosen[1]} worry me, case {key}."
    return f"{worry} Should I sign the {chosen[2]} or the {chosen[3]}?"
