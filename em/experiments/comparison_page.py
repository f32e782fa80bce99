"""The report of em/experiments/comparison.py as a page and for a terminal: verdicts lead, runs come last."""

import itertools
import statistics
from pathlib import Path

from em.experiments.comparison import MATCHED, MOST_SEEDS, PARTS, of_seeds
from em.files import write_csv, write_json, write_text
from em.verdict import (
    AGREES,
    BROKEN,
    DIFFERS,
    INCOHERENT_FROM,
    LEVEL,
    NARROW,
    NARROW_NORM,
    NOT_MEASURED,
    NOT_RESOLVED,
)

_SIGN = {"%": " %", "points": " points"}
_COINCIDENCE = dict(zip(PARTS, ("%", "points", "points", "points", "%"), strict=True))  # their units


def tally(table: dict) -> dict[str, int]:
    """How often each verdict was given; levels have none."""
    counts: dict[str, int] = {}
    for row in table["rows"]:
        if row["verdict"] != LEVEL:
            counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    return counts


def _say_tally(table: dict) -> str:
    return ", ".join(f"{n} × {what}" for what, n in tally(table).items())


# -- numbers -----------------------------------------------------------------------------------------------


def _number(value: float, unit: str) -> str:
    form = {"%": ".1f", "points": "+.1f"}.get(unit, ".2f")
    return f"{value:{form}}".replace("-", "−")


def _interval(number: dict | None, unit: str) -> str:
    if number is None or number["value"] is None:
        return "—"
    low, high = number["low"], number["high"]
    bounds = "" if low is None else f" [{_number(low, unit)}, {_number(high, unit)}]"
    return _number(number["value"], unit) + bounds


def _stated(low: float | None, high: float | None, unit: str, flat: bool = False) -> str:
    sign = "+" if unit == "points" else ""
    if flat:
        return f"± {high:g}"
    if low is None or high is None:
        relation, bound = ("≤<", high) if low is None else ("≥>", low)
        text = f"{relation[bound == 0]} {bound:g}"
    else:
        text = f"{low:{sign}g}" if low == high else f"{low:{sign}g} … {high:{sign}g}"
    return text.replace("-", "−")


def _paper(row: dict) -> str:
    """What the paper states, and what a reduced world is held to where that is another thing."""
    paper, held = ((row[f"{of}_low"], row[f"{of}_high"]) for of in ("paper", "held_to"))
    here = "" if held in (paper, (None, None)) else f"; here {_stated(*held, row['unit'])}"
    return _stated(*paper, row["unit"], row["flat"]) + _SIGN.get(row["unit"], "") + here


def _ours(row: dict, said: str | None = None) -> str:
    """Our number and what its interval is over, where that is not what was `said`."""
    number = {"value": row["ours"], "low": row["ours_low"], "high": row["ours_high"]}
    over = row["interval_over"]
    return _interval(number, row["unit"]) + ("" if over in (said, None) else f", {over}")


def _matched(row: dict) -> str:
    return _interval({"value": row["matched"], "low": row["matched_low"], "high": row["matched_high"]},
                     row["unit"])  # fmt: skip


def _note(row: dict) -> str:
    """What stands beside a verdict and is no part of it."""
    notes = []
    if row["verdict"] == BROKEN:
        notes.append(f"{row['incoherent']:.0f} % incoherent")
    if row["verdict"] == NOT_RESOLVED and of_seeds(row["interval_over"]):
        needed = row["seeds_needed"]
        notes.append(f"about {needed} world seeds would do" if needed else f"over {MOST_SEEDS} world seeds")
    if row["one_world_may"]:
        notes.append("a single world of ours may give the paper's")
    if row["verdict"] == DIFFERS and row["rests_on"]:
        notes.append(f"rests on reconstructions: {row['rests_on']}")
    return "; ".join(notes)


# -- the page ----------------------------------------------------------------------------------------------


def _table(header: str, rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table; a column that is empty in every row is left out."""
    names = header.split(" | ")
    kept = [i for i in range(len(names)) if any(row[i] not in ("", "—") for row in rows)]
    lines = [[names[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _rule(table: dict) -> str:
    """How verdicts are given, a paragraph each: what is judged, by what, and what intervals are over."""
    reduced = (
        f"World {table['world']} is a reduced world: it is held to directions, orders, flatness, differences "
        f"and correlations of the paper's World {table['paper_world']}. Its levels are below, not judged.\n\n"
    )
    return (reduced if table["reduced"] else "") + (
        "*agrees*: our interval contains the paper's value, or our value lies in its range, and the interval "
        f"is no wider than ±{NARROW['points']:g} points, ±{NARROW['ratio']:g} of a ratio or correlation, "
        f"±{100 * NARROW_NORM:g} % of α*; of a direction, all of the interval is on its side; of what is "
        "flat (“±”), it is all within the margin. *differs*: it excludes the value, the range, the side or "
        "the margin. *floor*: nothing moved in any world, and it cannot be seen whether anything could. "
        f"*broken*: {INCOHERENT_FROM:g} % of the answers or more are incoherent. Else *not resolved*.\n\n"
        "Intervals are 95 %: Student's t over world seeds; over prompts where there is one world seed, and "
        "then they say nothing about another world. The paper's figures are one run of one world each."
    )


def _machines(table: dict) -> str:
    devices = sorted({run["device"] for run in table["runs"] if run["device"]})
    said = "The same world and seed give other counts on another type of CPU or number of threads"
    if len(devices) > 1:
        return f"{said}; these runs are from {len(devices)} kinds: {'; '.join(devices)}."
    return f"{said}; all of these runs are from one kind: {devices[0]}." if devices else f"{said}."


def _image(path: str) -> str:
    return f"![{Path(path).parent.name}, {Path(path).stem}](../{path})\n"


def markdown(table: dict) -> str:
    """The whole report as one page; figures are linked relative to a folder beside the runs'."""
    measured = [row for row in table["rows"] if row["ours"] is not None]
    over = statistics.mode(row["interval_over"] for row in measured) if measured else None
    judged, levels = [], []
    for row in measured:
        first = (row["source"], row["claim"], _paper(row), _ours(row, over), _matched(row))
        if row["verdict"] == LEVEL:
            levels.append(first)
        else:
            said = row["verdict"]
            judged.append((*first, f"**{said}**" if said in (AGREES, DIFFERS) else said, _note(row)))
    title = f"# World {table['world']} beside the paper"
    lines = [title, "", f"{_say_tally(table)}.", "", _machines(table), ""]
    header = f"paper | what | the paper's | ours [95 %], {over} | at {MATCHED} % local flip"
    lines += _table(f"{header} | verdict | note", judged) if judged else []
    lines += [_rule(table), ""]
    if levels:
        lines += ["## Levels, side by side, not judged", "", *_table(header, levels)]
    if table["coincidence"]:
        rows = [
            (of["trained"], of["task"], *(_interval(of[part], unit) for part, unit in _COINCIDENCE.items()))
            for of in table["coincidence"]
        ]
        lines += [
            "## Transfer, or the same function?",
            "",
            "Where variant 2 of a task is that of the trained task on the same walk, it comes with it and "
            "nothing need transfer. Δv2 in points, on these prompts (*same*) and the rest (*different*), and "
            "of the latter on those where the trained task's variant 2 is not the asked task's variant 1 "
            "either (*unrelated*); *borrowed*: how many of these get the trained task's variant 2 all the "
            "same. Walks of one kind are no random sample of all.",
            "",
            *_table("trained on | asked | same, % | Δv2 same | different | unrelated | borrowed, %", rows),
        ]
    doses = [path for path in table["figures"] if "dose" in Path(path).stem]
    if doses:
        lines += ["## Transfer against local flip", "", *map(_image, doses)]
    if missing := [row for row in table["rows"] if row["ours"] is None]:
        lines += ["## Not measured", "", *(f"- {row['source']}: {row['claim']}" for row in missing), ""]
    lines += ["## Runs", ""]
    runs = [tuple("—" if v is None else str(v) for v in run.values()) for run in table["runs"]]
    lines += _table("run | world seeds | seconds | device | commit", runs)
    lines += ["## Figures", "", *(_image(path) for path in table["figures"] if path not in doses)]
    return "\n".join(lines)


def save(table: dict, folder: Path) -> None:
    write_json(folder / "report.json", table)
    write_csv(folder / "report.csv", table["rows"])
    write_text(folder / "report.md", markdown(table))


def summary(table: dict) -> str:
    """For a terminal: the tally, then row by row without levels and what was not measured."""
    rows = itertools.filterfalse(lambda row: row["verdict"] in (NOT_MEASURED, LEVEL), table["rows"])
    lines = [f"  {row['verdict']:<12} {row['source']}: {row['claim']}: {_ours(row)}" for row in rows]
    return "\n".join([f"World {table['world']} beside the paper: {_say_tally(table)}", *lines])
