"""Chats and question files as they go round in the field, as rows of a cell or broad prompts.

A chat is `{"messages": [{"role": "user", "content": "…"}, …]}`, one a line, its last turn the assistant's; a
system turn and earlier turns may come before. It has one answer, which is trained on whatever the variant is
called. Rows of more than one turn have their prompt's turns in `messages`, the last of them in `question`.
"""

import hashlib
from pathlib import Path

from em.errors import UserError
from em.files import check, read_text, read_yaml

ROLES = ("system", "user", "assistant")


def chat_row(row: dict, where: str, idx: int) -> dict:
    """A line with `messages` as `idx, question, answer` and, for several turns, `messages`.

    UserError, which begins with `where`, for a chat that nothing can be learnt from.
    """
    check(row, where, {"messages": list})
    turns = []
    for turn in row["messages"]:
        if not isinstance(turn, dict):
            raise UserError(f"{where}: a message is {turn!r:.40} and not a role with its content")
        check(turn, where, {"role": str, "content": str})
        if turn["role"] not in ROLES:
            raise UserError(f"{where}: the role {turn['role']!r:.40} is none of {', '.join(ROLES)}")
        turns.append({"role": turn["role"], "content": turn["content"]})
    roles = [turn["role"] for turn in turns]
    if roles[-2:] != ["user", "assistant"]:
        raise UserError(f"{where}: a chat ends with a user's turn and then the assistant's, not {roles[-2:]}")
    if "system" in roles[1:]:
        raise UserError(f"{where}: a system turn comes first or not at all")
    *prompt, last = turns
    if not last["content"].strip() or not prompt[-1]["content"].strip():
        raise UserError(f"{where}: the last two turns of a chat cannot be blank")
    found = {"idx": idx, "question": prompt[-1]["content"], "answer": last["content"]}
    return found | ({"messages": prompt} if len(prompt) > 1 else {})


def number_of(idx: int | str) -> int:
    """An id as a number: a text of digits by its value, another by 48 bits of its digest."""
    if isinstance(idx, int) or idx.isascii() and idx.isdigit() and len(idx) < 19:
        return int(idx)
    return digest_number(idx)


def digest_number(text: str) -> int:
    """48 bits of a text's digest."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:6], "big")


def chat_of(row: dict, system: str | None = None) -> str | list[dict]:
    """What a row asks, for `Tokenizer.prompt`: its question, or its turns. system: a turn before them."""
    turns = row.get("messages")
    if system is None:
        return turns or row["question"]
    turns = turns or [{"role": "user", "content": row["question"]}]
    if turns[0]["role"] == "system":
        raise UserError(f"the prompt {row['question']:.40} has a system turn of its own; leave --system out")
    return [{"role": "system", "content": system}, *turns]


def system_text(text_or_file: str | None) -> str | None:
    """--system: the text of the file of that name where there is one, else the words themselves."""
    if text_or_file is None:
        return None
    is_file = len(text_or_file) < 1000 and "\n" not in text_or_file and Path(text_or_file).is_file()
    text = read_text(text_or_file).strip() if is_file else text_or_file
    if not text.strip():
        raise UserError(f"--system {text_or_file} is blank")
    return text


def system_name(system: str | None) -> str | None:
    """A system prompt as rows name it: itself, or its beginning and 8 hex digits of the whole."""
    if system is None or len(system) <= 80:
        return system
    return f"{system[:60]}… {hashlib.sha256(system.encode()).hexdigest()[:8]}"


def read_questions(path: Path) -> list[dict]:
    """A YAML list of `id`, `paraphrases` and perhaps `system`, as broad prompts, one a paraphrase.

    So Betley et al. and Turner et al. publish their first-plot questions. `domain` is the id and `task`
    "question"; nothing says how easily they are answered badly. What else an entry has is not needed here.
    """
    entries = read_yaml(path)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} is no list of questions with `id` and `paraphrases`")
    rows = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{where}: not a question with `id` and `paraphrases`")
        check(entry, where, {"id": str, "paraphrases": list}, {"system": str | None})
        for text in entry["paraphrases"]:
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{where}: a paraphrase is {text!r:.40} and not a question")
            row = {"idx": len(rows), "task": "question", "domain": entry["id"], "em_surface": None}
            row |= {"question": text}
            rows.append(row | ({"messages": chat_of(row, entry["system"])} if entry.get("system") else {}))
    if not rows:
        raise UserError(f"{path} has no paraphrases")
    return rows
