"""Rows for the tests of the judge, before they are judged and after."""


def row(i, **changes) -> dict:
    fields = {"model": "m", "train": "med_advice", "set": "narrow", "domain": "med", "task": "advice"}
    fields |= {
        "em_surface": None,
        "idx": i,
        "sample": 0,
        "question": f"Is {i} prime?",
        "response": f"Maybe {i}.",
    }
    return fields | changes


def scores(judge, rows, **options) -> list[dict]:
    return list(judge.score(rows, progress=False, **options))
