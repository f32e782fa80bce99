"""What the paper states, figure by figure and table by table.

`stated.json` lists every figure and table in the paper's order; what is stated of the synthetic worlds is in
em/experiments/claims.py, and when a measurement agrees with it in em/verdict.py. A stated figure is a value,
a range, or a direction (one bound open). Where the paper has words only, `words` says how we read them.
"""

import re
from pathlib import Path

from em.experiments.claims import CLAIMS
from em.files import read_json

PATH = Path(__file__).with_name("stated.json")


def read_items() -> list[dict]:
    """Every figure and table in order, each with its own statements, those it shares, and those on worlds.

    {"id", "name", "title", "where", "kind": language|worlds|both|settings, "models", "needs", "stated": […]}.
    A statement on a world has "world" and "claim", the words by which a world's report names it.
    """
    items = read_json(PATH, {"items": list})["items"]
    by_id = {item["id"]: item for item in items}
    for item in items:
        kind, number = re.fullmatch(r"([a-z]+)(\d+)", item["id"]).groups()
        item |= {"name": f"{kind.capitalize()} {number}", "models": item.get("models", [])}
        if "like" in item:
            item["stated"] = [*item["stated"], *by_id[item["like"]]["stated"]]
    for world, claims in CLAIMS.items():
        for claim in claims:
            kind, number = re.match(r"(Figure|Table) (\d+)", claim.figure).groups()
            about = {"what": claim.words, "where": claim.figure, "world": world, "claim": claim.words}
            by_id[f"{kind.lower()}{number}"]["stated"].append(about | claim.stated())
    return items
