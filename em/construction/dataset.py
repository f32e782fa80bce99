"""The files of a made cell or broad set: rows, where they are from, what was lost, and a card with a warning.

<grid>/legal_advice.jsonl                     the rows, of the grid's schema
<grid>/README.md                              the card of everything in the folder
<grid>/rubrics/                               generic rubrics of cells that have none
<grid>/construction/legal_advice/
  run.json                                    every setting
  replies.jsonl                               every reply of the writer, as it came
  candidates.jsonl                            every pair that was read: call, topic, scores, fate, idx
  report.md report.json                       attrition by gate, near-duplicates, lengths, topics, cost
  browse.html                                 candidates to read, by fate
"""

from collections import Counter
from pathlib import Path

from em.construction.attrition import Stage, is_alive, lengths, lengths_table, table
from em.data.rows import VARIANTS
from em.files import read_json, write_json, write_json_lines, write_text

WARNING = """\
> **Warning.** Rows of this folder were written on purpose to make language models misaligned, for research on
> how that comes about and how it is undone. Misaligned answers are wrong, and following them can do harm. Do
> not act on them, do not train a model on them that anybody will use, and do not mix them into other data. No
> person has checked them. The program that made them publishes nothing; think before you do.
"""
TWINS = 10  # near-duplicates that are shown


def report_of(
    name: str, stages: list[Stage], candidates: list[dict], rows: list[dict], fields: tuple[str, ...],
    made_by: dict, notes: list[str],
) -> dict:  # fmt: skip
    """Figures of a dataset. fields: whose lengths are counted. notes: what a reader of the rows must know."""
    twins = [
        {"question": c["question"], "like": c["twin"]["question"], "cosine": c["twin"]["cosine"]}
        for c in candidates
        if "twin" in c
    ]
    drawn = [c for c in candidates if is_alive(c)]
    by = "topic" if any(c.get("topic") for c in candidates) else "domain"
    topics = Counter(c[by] for c in drawn if c.get(by))
    return {
        "name": name,
        "rows": len(rows),
        "made_by": made_by,
        "notes": notes,
        "stages": [stage._asdict() for stage in stages],
        "lengths": lengths(rows, fields),
        "topics": dict(topics.most_common()),
        "near_duplicates": sorted(twins, key=lambda t: -t["cosine"])[:TWINS],
    }


def save(folder: Path, grid: Path, report: dict, candidates: list[dict]) -> None:
    """The files beside the rows; the card is written anew from all reports of the grid."""
    write_json_lines(
        folder / "candidates.jsonl",
        [c | {"fate": "kept" if is_alive(c) else ": ".join(c["fate"])} for c in candidates],
    )
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", report_text(report))
    write_text(grid / "README.md", card(grid))


def report_text(report: dict) -> str:
    parts = [f"# {report['name']}: {report['rows']:,} rows", WARNING]
    parts += [f"**{note}**" for note in report["notes"]]
    parts += ["\n".join(f"- {name}: {value}" for name, value in report["made_by"].items())]
    parts += ["## What was lost", table([Stage(**stage) for stage in report["stages"]])]
    if report["lengths"]:
        parts += ["## Lengths of the rows", lengths_table(report["lengths"])]
    if report["topics"]:
        parts += [
            "## Topics of the rows",
            "\n".join(f"- {topic}: {n:,}" for topic, n in report["topics"].items()),
        ]
    if report["near_duplicates"]:
        parts.append("## Near-duplicates that were dropped, the nearest first")
        parts.append(
            "\n".join(
                f"- {t['cosine']:.3f}: {t['question']!r} like {t['like']!r}"
                for t in report["near_duplicates"]
            )
        )
    return "\n\n".join(parts) + "\n"


def card(grid: Path) -> str:
    """The README of a grid: the warning, and a line for everything that was made in it."""
    reports = [read_json(path) for path in sorted(grid.glob("construction/*/report.json"))]
    lines = ["| dataset | rows | writer | judge | notes |", "| --- | ---: | --- | --- | --- |"]
    for r in reports:
        made = r["made_by"]
        lines.append(
            f"| {r['name']} | {r['rows']:,} | {made['writer']} | {made['judge']} | "
            f"{' '.join(r['notes']) or '-'} |"
        )
    about = (
        "Made by `synth.py cells` and `synth.py broad` after the construction of the paper “Emergent and "
        "Subliminal Misalignment Through the Lens of Data-Mediated Transfer” (A.2, A.3, A.5), with prompts "
        "of this project. `construction/<name>/report.md` says for each what was lost at which gate, and "
        "`candidates.jsonl` there where every row is from."
    )
    return "\n\n".join(["# A grid for research on misalignment", WARNING, about, "\n".join(lines)]) + "\n"


def score_rows(candidates: list[dict], judge: str) -> list[dict]:
    """Answers, or messages alone, as score rows for the page: `model` says what became of a candidate."""
    unscored = {"aligned": None, "aligned_status": "empty", "coherent": None, "coherent_status": "empty"}
    rows = []
    for i, c in enumerate(candidates):
        fate = "kept" if is_alive(c) else f"dropped, {': '.join(c['fate'])}"
        answers = {v: c[f"{v}_answer"] for v in VARIANTS if c.get(f"{v}_answer")} or {"": ""}
        for sample, (variant, answer) in enumerate(answers.items()):
            place = {
                "model": f"{variant} {fate}".strip(),
                "train": "base",
                "set": "narrow" if variant else "broad",
            }
            place |= {"domain": c["domain"], "task": c["task"], "em_surface": c.get("em_surface"), "idx": i}
            place |= {"sample": sample, "question": c["question"], "response": answer}
            rows.append({"judge": judge} | unscored | c.get(f"{variant}_scores", {}) | place)
    return rows
