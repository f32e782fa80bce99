"""Score rows as the authors' own code writes them, read as ours.

Theirs name the fine-tuned cell by `ft_domain` and `ft_task`, the model by `model_key`, the prompt by
`question_id` and on narrow prompts `sample_index`, the sample by `sample_i`, and the training answers by
`variant`: "strong" or "subtle" misaligned ones, or "aligned". Their scores are Gemini 2.5 Flash's by their
own rubrics, so the judge is called theirs and not by the model's name alone.
"""

from em.data.chats import digest_number
from em.data.condition import FIELDS

JUDGE = "gemini-2.5-flash (the authors' rubrics)"
_THEIRS = ("model_key", "ft_domain", "ft_task", "question_id", "sample_i")


def score_row(row: dict) -> dict:
    """The row with our fields beside theirs; any other row as it is.

    A broad prompt's `idx` is a digest of its id, the same in every file. A variant but "strong" is part of
    the model's name.
    """
    if "model" in row or not all(name in row for name in _THEIRS):
        return row
    cell, variant = f"{row['ft_domain']}_{row['ft_task']}", row.get("variant") or "strong"
    narrow = row.get("sample_index") is not None
    ours = {
        "model": row["model_key"] if variant in ("strong", "aligned") else f"{row['model_key']} ({variant})",
        "train": f"base>{cell}" if variant == "aligned" else cell,
        "set": "narrow" if narrow else "broad",
        "idx": row["sample_index"] if narrow else digest_number(str(row["question_id"])),
        "sample": row["sample_i"],
        "em_surface": row.get("em_surface"),
    }
    row = {name: value for name, value in row.items() if name not in FIELDS}  # their `source` is not ours
    return row | ours | ({"judge": JUDGE} if "aligned" in row and "judge" not in row else {})
