"""What the paper states, figure by figure and table by table, and when a measured interval agrees with it.

`stated.json` lists every figure and table in the paper's order; what is stated of the synthetic worlds is in
em/experiments/claims.py. A stated figure is a value, a range, or a direction (one bound open). Where the
paper has words only, `words` says how we read them.

    agrees        the interval contains the stated value, or the value lies in the stated range, and the
                  interval is no wider than ±10 points (±0.1 of a ratio or a correlation); of a direction: the
                  whole interval is on that side
    differs       the interval excludes the value, the range or the side
    not resolved  anything else: too few rows to tell
    not measured  there is no interval; not stated: there is nothing to hold it to
"""

import math
import re
from pathlib import Path

from em.experiments.claims import CLAIMS
from em.files import read_json

PATH = Path(__file__).with_name("stated.json")
NOT_MEASURED = "not measured"
VERDICTS = ("agrees", "differs", "not resolved", NOT_MEASURED)
NARROW = {"%": 10.0, "points": 10.0, "ratio": 0.1, "r": 0.1}  # half of the widest interval that can agree


def verdict(stated: dict, ours: dict | None) -> str:
    """stated: "low" and "high", None where open, and "unit"; ours: "value", and "low", "high" around it."""
    low, high = stated.get("low"), stated.get("high")
    if ours is None or ours["low"] is None:
        return NOT_MEASURED
    if low is None and high is None:
        return "not stated"
    if (low is not None and ours["high"] < low) or (high is not None and ours["low"] > high):
        return "differs"
    if low is None or high is None:
        inside = ours["low"] >= low if high is None else ours["high"] <= high
        return "agrees" if inside else "not resolved"
    widest = NARROW.get(stated["unit"], 0.1 * abs(high))  # α*, a norm: relative
    inside = low == high or low <= ours["value"] <= high
    return "agrees" if inside and ours["high"] - ours["low"] <= 2 * widest else "not resolved"


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
            number = re.match(r"Figure (\d+)", claim.figure)[1]
            bounds = {"low": _bound(claim.low), "high": _bound(claim.high), "unit": claim.unit}
            about = {"what": claim.words, "where": claim.figure, "world": world, "claim": claim.words}
            by_id[f"figure{number}"]["stated"].append(about | bounds)
    return items


def _bound(value: float) -> float | None:
    return value if math.isfinite(value) else None
