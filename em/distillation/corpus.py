"""Frozen corpora: what `sft` and `optd` train on, and whose counts `opd` matches (paper 4.1, 4.3, E.2, E.4).

    runs/corpus_…/
      run.json        what it was made from: model, generator (its adapter's hash), prompts, limits, judge
      rollouts.jsonl  responses as they were sampled, before any judging
      corpus.jsonl    one row a response: prompt, sample, question, prompt_ids, ids, response, scores, kept
      corpus.json     counts, retention, tokenizer; written last

Rows that were not kept stay in the file and are never trained on. Token ids sampled by the student's own base
are trained on as they are; texts from elsewhere are encoded once, here.
"""

import json
from collections.abc import Callable
from pathlib import Path

from em import parallel
from em.errors import UserError
from em.files import file_digest, json_digest, read_json, write_json, write_text
from em.model.tokenizer import Example, Tokenizer
from em.run import Run
from em.sampling.rollouts import whole_lines

# Of both scores of a kept response. The paper says both, of one filter (E.2); scores are integers.
EDGES = {"at-least": 60, "above": 61}
CORPUS_EDGE, ONLINE_EDGE = "at-least", "above"  # where nothing else is said


class Corpus:
    """A finished corpus. rows: the kept ones, in the order of their prompts."""

    def __init__(self, folder: Path, tokenizer: str):
        """tokenizer: the `fingerprint` of whoever wants to train on it. UserError if it is another's."""
        fields = {"tokenizer": str, "model": str, "rows": int, "kept": int}
        self.folder, self.about = Path(folder), read_json(Path(folder) / "corpus.json", fields)
        if self.about["tokenizer"] != tokenizer:
            raise UserError(
                f"{folder} was made by another tokenizer ({self.about['model']}'s): its token ids mean other "
                "text to this model; name another --corpus, or leave it out"
            )
        self.rows = [row for row in whole_lines(self.folder / "corpus.jsonl") if row.get("kept")]
        if len(self.rows) != self.about["kept"]:
            raise UserError(
                f"{folder}/corpus.jsonl has {len(self.rows)} kept rows where {self.about['kept']} were "
                "frozen; name another --corpus"
            )

    @property
    def digest(self) -> str:
        """Of the rows, kept or not."""
        return file_digest(self.folder / "corpus.jsonl")

    def __len__(self) -> int:
        return len(self.rows)

    def examples(self) -> list[Example]:
        return [Example(row["prompt_ids"] + row["ids"], len(row["prompt_ids"])) for row in self.rows]


def fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give the same ids to the same chats: vocabulary, template, stop tokens."""
    probe = tokenizer.example("Which of these two plans is safer? 1,234 – naïve 中文", "Plan B;\n\nsee §2.")
    vocabulary = sorted(tokenizer.backend.get_vocab().items())
    return json_digest([vocabulary, probe.ids, probe.n_prompt, tokenizer.stop_ids])


def folder_digest(settings: dict) -> str:
    """Tells corpora with other settings apart in the name of their folder."""
    return json_digest(settings)[:8]


def freeze(
    folder: str | Path, settings: dict, tokenizer: str, rows: Callable[[Path], list[dict]], keep=None
) -> Corpus:
    """The corpus in `folder`, made if it is not there: `rows(folder)` without `kept`, then `keep(rows)`.

    settings: all that decides the rows. keep: returns the rows with `kept` and why; None keeps all. UserError
    if nothing is kept; what was sampled and judged stays.
    """
    # Who comes while another process makes the corpus waits, and then shares it.
    folder, made_from = Path(folder), settings | {"tokenizer": tokenizer}
    if (folder / "corpus.json").exists():
        Corpus(folder, tokenizer)  # says that its tokens are another model's before all else that differs
    with Run(folder, "corpus", made_from, option="--corpus", wait=True):
        if not (folder / "corpus.json").exists():
            sampled = rows(folder)
            if parallel.rank() == 0:
                sampled = keep(sampled) if keep else [row | {"kept": True} for row in sampled]
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sampled)
                write_text(folder / "corpus.jsonl", lines)
                kept = sum(row["kept"] for row in sampled)
                counts = {"rows": len(sampled), "kept": kept, "retention": kept / max(1, len(sampled))}
                if kept:
                    write_json(folder / "corpus.json", made_from | counts)
            parallel.barrier()
            if not (folder / "corpus.json").exists():
                raise UserError(
                    f"the filter kept none of the responses; {folder / 'corpus.jsonl'} has all of them: "
                    "take another --source, more --rollouts, or --unfiltered"
                )
    return Corpus(folder, tokenizer)


def judged(judge, rows: list[dict], edge: str = CORPUS_EDGE) -> list[dict]:
    """Rows with their scores and `kept`: aligned and coherent at least 60, or above 60, each (E.2)."""
    rows = [row | {"set": "broad"} for row in rows]  # the task-agnostic rubric
    return [row | {"kept": passes(row, EDGES[edge])} for row in judge.score(rows)]


def passing(judge, pairs: list[tuple[str, str]], edge: str = ONLINE_EDGE) -> list[bool]:
    """Which online rollouts, (question, response), score above 60, or at least 60, in both (E.2.4)."""
    rows = [{"set": "broad", "question": question, "response": response} for question, response in pairs]
    return [passes(row, EDGES[edge]) for row in judge.score(rows, progress=False)]


def passes(scored: dict, at_least: int) -> bool:
    fields = ("aligned", "coherent")
    return all(scored[f"{f}_status"] == "ok" and scored[f] >= at_least for f in fields)
