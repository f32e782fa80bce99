"""The paper's stated figures beside ours, each with a verdict (`python synth.py report`).

A claim (em/experiments/claims.py) names an experiment and one of the `numbers` of its result
(em/world/counts.py), which holds our value with its interval.

    agrees           our interval (the value, where there is none) comes within MARGIN of the paper's range
    does not agree   it does not
    depends on reconstructed definitions (ours)
                     it does not, and the quantity rests on a definition that had to be reconstructed
    not measured     no run under the folder holds it

The margin stands for what the paper's one run leaves open: one seed, 100–130 prompts a cell. A reduced world
is compared in direction only: whether our interval lies on the paper's side of the neutral value.
"""

import math
import re
from pathlib import Path

from em.errors import UserError
from em.experiments.claims import CLAIMS, PAPER_WORLD, Claim
from em.files import check, read_json, write_csv, write_json, write_text
from em.stats import t_interval
from em.world.counts import entry, mean_rate

# By unit; `norm` (α*) is relative.
MARGIN = {"%": 5.0, "points": 5.0, "ratio": 0.05, "r": 0.05, "norm": 0.2}
RECONSTRUCTED = "depends on reconstructed definitions (ours)"


def verdict(claim: Claim, ours: dict | None) -> str:
    """By the rule above, at the paper's scale."""
    if ours is None:
        return "not measured"
    margin = MARGIN[claim.unit] * (claim.low if claim.unit == "norm" else 1)
    low, high = _ends(ours)
    if low <= claim.high + margin and high >= claim.low - margin:
        return "agrees"
    return RECONSTRUCTED if claim.rests_on else "does not agree"


def direction(claim: Claim, ours: dict | None) -> str:
    """For a reduced world: same, opposite or unresolved direction."""
    if ours is None:
        return "not measured"
    if claim.neutral is None:
        return "a level, not compared"
    side = 1 if claim.low + claim.high > 2 * claim.neutral else -1
    low, high = _ends(ours)
    if low <= claim.neutral <= high:
        return "direction not resolved"
    return "same direction" if side * (low - claim.neutral) > 0 else "opposite direction"


def _ends(ours: dict) -> tuple[float, float]:
    return (ours["value"], ours["value"]) if ours["low"] is None else (ours["low"], ours["high"])


# -- what our runs left ------------------------------------------------------------------------------------


_NUMBER = {"value": float | None, "low": float | None, "high": float | None, "over": str, "unit": str}
_RESULT = {"seeds": list[int], "seconds": float | None, "made_with": dict}


def result_files(folder: Path, world: str) -> dict[str, list[Path]]:
    """Result files by experiment: one, or of the main grid (grid_T5: misaligned on (D0, T5)) one a seed."""
    files: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        name, run = path.stem, path.parent.name
        seed = re.fullmatch(rf"world{world}-seed(\d+)", run)  # not that of a run of other settings
        if (seed and name.startswith("grid_")) or (name != "report" and run == f"{name}-world{world}"):
            files.setdefault(name, []).append((int(seed[1]) if seed else 0, path))
    return {name: [path for _, path in sorted(of_name)] for name, of_name in files.items()}


def read_numbers(path: Path) -> dict[str, dict]:
    result = read_json(path, optional={"numbers": dict})
    if "numbers" not in result:
        raise UserError(f"{path} was written by an older version; run its command again, models are reused")
    numbers = result["numbers"]
    check(numbers, path, dict.fromkeys(numbers, dict))
    for key, number in numbers.items():
        check(number, f"{path}, {key}", _NUMBER)
        if (number["low"] is None) != (number["high"] is None):
            raise UserError(f"{path}, {key}: an interval has two bounds or none")
    return numbers


def look_up(results: list[dict], key: str) -> dict | None:
    """The entry `key` of an experiment's `numbers`; None where there is none, or it has no value.

    results: one `numbers` a result file. Of several, one a world seed, the mean with its interval over them.
    """
    entries = [numbers[key] for numbers in results if key in numbers and numbers[key]["value"] is not None]
    if len(entries) < 2:
        return entries[0] if entries else None
    unit, values = entries[0]["unit"], [e["value"] for e in entries]
    return entry(unit, *(mean_rate if unit == "%" else t_interval)(values), seeds=len(entries))


def inventory(paths: list[Path]) -> list[dict]:
    """A row a result file: what ran, over which seeds, how long, on what."""
    rows = []
    for path in paths:
        result = read_json(path, optional=_RESULT)
        seeds = result.get("seeds", [path.parent.name.partition("-seed")[2]])
        made = result.get("made_with", {})
        check(made, f"{path}, made_with", optional={"device": str | None, "commit": str | None})
        rows.append(
            {
                "run": path.parent.name,
                "seeds": ", ".join(map(str, seeds)),
                "seconds": result.get("seconds"),
                "device": made.get("device"),
                "commit": (made.get("commit") or "—")[:12],
            }
        )
    return rows


# -- the two side by side ----------------------------------------------------------------------------------


def compare(folder: Path, world: str) -> dict:
    """Every claim on `world` with its verdict, the runs it was read from and their figures' paths."""
    paper, files = PAPER_WORLD[world], result_files(folder, world)
    results = {name: [read_numbers(path) for path in paths] for name, paths in files.items()}
    runs = [paths[0] for name, paths in files.items() if not name.startswith("grid_")]
    runs += folder.glob(f"world{world}-seed*/summary.json")
    figures = [path.with_suffix(".png") for paths in files.values() for path in paths]
    figures += folder.glob(f"show-world{world}-seed*/domain_graphs.png")
    reduced, rows = paper != world, []
    for claim in CLAIMS[paper]:
        ours = look_up(results.get(claim.experiment, []), claim.key)
        rows.append(
            {
                "source": claim.figure,
                "claim": claim.words,
                "unit": claim.unit,
                "paper_low": _finite(claim.low),
                "paper_high": _finite(claim.high),
                "ours": ours and ours["value"],
                "ours_low": ours and ours["low"],
                "ours_high": ours and ours["high"],
                "interval_over": ours and ours["over"],
                "verdict": (direction if reduced else verdict)(claim, ours),
                "rests_on": claim.rests_on or None,
            }
        )
    return {
        "world": world,
        "paper_world": paper,
        "reduced": reduced,
        "rows": rows,
        "runs": inventory(sorted(runs)),
        "figures": sorted(path.relative_to(folder).as_posix() for path in figures if path.exists()),
    }


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None


def tally(table: dict) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in table["rows"]:
        counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    return counts


def _number(value: float, unit: str) -> str:
    if unit in ("ratio", "r", "norm"):
        return f"{value:.2f}"
    return f"{value:+.1f}" if unit == "points" else f"{value:.1f}"


def _paper(row: dict) -> str:
    low, high, unit = row["paper_low"], row["paper_high"], row["unit"]
    if high is None:
        return f"> {_number(low, unit)}" if low == 0 else f"≥ {_number(low, unit)}"
    return _number(low, unit) if low == high else f"{_number(low, unit)} … {_number(high, unit)}"


def _ours(row: dict) -> str:
    if row["ours"] is None:
        return "—"
    text = _number(row["ours"], row["unit"])
    if row["ours_low"] is not None:
        text += f" [{_number(row['ours_low'], row['unit'])}, {_number(row['ours_high'], row['unit'])}]"
    return f"{text}, {row['interval_over']}"


def markdown(table: dict) -> str:
    """The whole report as one page; figures are linked relative to a folder beside the runs'."""
    world, margins = table["world"], MARGIN
    rule = (
        f"World {world} is a reduced world: only the direction is compared with the paper's World "
        f"{table['paper_world']}, by the side of the neutral value on which our 95 % interval lies."
        if table["reduced"]
        else f"*Agrees*: our 95 % interval comes within {margins['%']:.0f} points, {margins['r']} of a ratio "
        f"or correlation, {100 * margins['norm']:.0f} % of α* of the paper's range, which is from one run. "
        "Where it does not and the quantity rests on a definition that we had to reconstruct, we say so."
    )
    lines = [
        f"# World {world} beside the paper",
        "",
        f"{rule} Intervals: Student's t over world seeds, or over prompts where there is one seed, as said.",
        "",
        ", ".join(f"{n} × {what}" for what, n in tally(table).items()) + ".",
        "",
        "| paper | what | unit | the paper's | ours [95 %] | verdict | rests on, reconstructed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table["rows"]:
        cells = (row["source"], row["claim"], row["unit"], _paper(row), _ours(row), row["verdict"])
        lines.append(f"| {' | '.join(cells)} | {row['rests_on'] or '—'} |")
    lines += [
        "",
        "## Runs",
        "",
        "| run | world seeds | seconds | device | commit |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run in table["runs"]:
        lines.append("| " + " | ".join(str(value) for value in run.values()) + " |")
    lines += ["", "## Figures", ""]
    lines += [f"![{Path(path).parent.name}, {Path(path).stem}](../{path})\n" for path in table["figures"]]
    return "\n".join(lines)


def save(table: dict, folder: Path) -> None:
    write_json(folder / "report.json", table)
    write_csv(folder / "report.csv", table["rows"])
    write_text(folder / "report.md", markdown(table))


def summary(table: dict) -> str:
    """Row by row for a terminal, then the tally."""
    lines = [
        f"  {row['verdict']:<22} {row['source']}: {row['claim']}: {_ours(row)}"
        for row in table["rows"]
        if row["verdict"] != "not measured"
    ]
    counts = ", ".join(f"{n} × {what}" for what, n in tally(table).items())
    return "\n".join([f"World {table['world']} beside the paper: {counts}", *lines])
