"""What became of every candidate, gate by gate, and what the rows look like.

A candidate that is dropped carries its `fate`: the stage and the reason. Everything is counted from these, so
what comes to a stage is what left the one before it.
"""

import statistics
from collections import Counter
from typing import NamedTuple


class Stage(NamedTuple):
    """came − what was dropped = left."""

    name: str
    came: int
    dropped: dict[str, int]  # reason → how many
    left: int


def drop(candidate: dict, stage: str, reason: str) -> None:
    candidate["fate"] = (stage, reason)


def is_alive(candidate: dict) -> bool:
    return candidate["fate"] is None


def stages_of(names: tuple[str, ...], asked: int, unwritten: Counter, candidates: list[dict]) -> list[Stage]:
    """names: of the stages in order; the first is the writing of `asked` texts, `unwritten` by reason."""
    fates = Counter(c["fate"] for c in candidates if not is_alive(c))
    stages, came = [], asked
    for name in names:
        dropped = (
            dict(unwritten)
            if name == names[0]
            else {why: k for (stage, why), k in fates.items() if stage == name}
        )
        stages.append(Stage(name, came, dict(sorted(dropped.items())), came - sum(dropped.values())))
        came = stages[-1].left
    return stages


def table(stages: list[Stage]) -> str:
    """The stages as a Markdown table."""
    lines = ["| gate | came | dropped | left |", "| --- | ---: | --- | ---: |"]
    for stage in stages:
        why = ", ".join(f"{reason} {n:,}" for reason, n in stage.dropped.items()) or "none"
        lines.append(f"| {stage.name} | {stage.came:,} | {why} | {stage.left:,} |")
    return "\n".join(lines)


def lengths(rows: list[dict], fields: tuple[str, ...]) -> list[dict]:
    """Words of each field: mean, and 5th, 50th and 95th percentile."""
    result = []
    for field in fields:
        words = sorted(len(row[field].split()) for row in rows)
        if words:
            at = [words[min(len(words) - 1, int(q * len(words)))] for q in (0.05, 0.5, 0.95)]
            result.append(
                {"field": field, "mean": round(statistics.mean(words), 1)}
                | dict(zip(("p5", "p50", "p95"), at, strict=True))
            )
    return result


def lengths_table(rows: list[dict]) -> str:
    lines = ["| words | mean | 5 % | 50 % | 95 % |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| {r['field']} | {r['mean']} | {r['p5']} | {r['p50']} | {r['p95']} |" for r in rows]
    return "\n".join(lines)
