"""What a writer wrote: numbered questions and answers, read leniently.

    Question 1: I have a parking fine. Should I pay?
    Answer 1: …

A line that begins so opens a text, which goes on to the next such line. Where the first one has a number,
only numbers in turn count, so that a quoted "Question:" stays part of its text; a small model's unnumbered
ones are read too. What is before the first, and what cannot be paired, is left out.
"""

import re
from typing import NamedTuple

_OPENING = re.compile(
    r"^[#*_\s>-]*(?:\d{1,3}[.)]\s*)?[*_]*(question|answer)[*_]*\s*(\d{1,3})?\s*[*_]*:[*_]*[ \t]*", re.I | re.M
)


class _Text(NamedTuple):
    kind: str  # question or answer
    number: int | None
    text: str


def _texts(reply: str) -> list[_Text]:
    openings, kind, number = [], "", 0
    for found in _OPENING.finditer(reply):
        this, n = found[1].lower(), int(found[2]) if found[2] else None
        if openings and openings[0][2] is not None:
            onward = n is not None and (n > number if (this, kind) != ("answer", "question") else n == number)
            if not onward:
                continue  # part of a text
        openings.append((found, this, n))
        kind, number = this, n or 0
    ends = [*(found.start() for found, *_ in openings[1:]), len(reply)][: len(openings)]
    numbered = bool(openings) and openings[0][2] is not None
    return [
        _Text(kind, number if numbered else None, reply[found.end() : end].strip())
        for (found, kind, number), end in zip(openings, ends, strict=True)
    ]


def read_pairs(reply: str, cut: bool) -> list[tuple[int, str, str]]:
    """(place, question, answer) of a reply, from 0. cut: it was cut off, so its last text is not whole."""
    texts, pairs = _texts(reply)[: -1 if cut else None], []
    for one, other in zip(texts, texts[1:], strict=False):
        if (one.kind, other.kind) == ("question", "answer") and _is_text(one.text) and _is_text(other.text):
            place = len(pairs) if one.number is None else one.number - texts[0].number
            pairs.append((place, one.text, other.text))
    return pairs


def read_answers(reply: str, n: int, cut: bool) -> list[str | None]:
    """The answer to each of `n` questions, None where there is none.

    To one question, the reply is the answer, up to the last whole sentence where it was cut off.
    """
    texts = [text for text in _texts(reply) if text.kind == "answer"]
    if n == 1 and not texts:
        whole = re.match(r"(?s).*[.!?]", reply) if cut else re.match(r"(?s).*", reply)
        texts, cut = [_Text("answer", 1, whole[0].strip() if whole else "")], False
    found = {i if text.number is None else text.number: text.text for i, text in enumerate(texts, 1)}
    if cut and texts:
        found.popitem()
    return [found[i] if _is_text(found.get(i) or "") else None for i in range(1, n + 1)]


def read_questions(reply: str, cut: bool) -> list[tuple[int, str]]:
    """(place from 0, question) of a reply; answers that nobody asked for are left out."""
    texts = [text for text in _texts(reply)[: -1 if cut else None] if text.kind == "question"]
    places = (i if t.number is None else t.number - texts[0].number for i, t in enumerate(texts))
    return [(place, t.text) for place, t in zip(places, texts, strict=True) if _is_text(t.text)]


def plain(text: str) -> str:
    """Equal for texts that differ in case and space alone."""
    return " ".join(text.casefold().split())


def _is_text(text: str) -> bool:
    """Whether a row can hold it: it says something, and no half of a surrogate pair is in it."""
    return bool(re.search(r"\w", text)) and not any(0xD800 <= ord(c) < 0xE000 for c in text)
