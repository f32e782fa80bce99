"""How a bench ends: goals beside what was measured, on the screen and in one JSON file."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from em.files import write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "bench"


def goal(what: str, measured: float, unit: str, at_most: float | None = None, at_least: float | None = None):
    """A row of a result's `goals`, with a bound or none; `what` names it in bench/calibrate.py as well."""
    row = {"what": what, "measured": measured, "unit": unit}
    if at_most is not None:
        row |= {"at_most": at_most, "met": measured <= at_most}
    if at_least is not None:
        row |= {"at_least": at_least, "met": measured >= at_least}
    return row


def installed(package: str) -> str:
    """Its version, or that it is not there: a peer that was not measured is named in the result."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def save(result: dict, path: str | Path) -> None:
    """Write the result; print the machine, every goal with what was measured, and where the result is."""
    write_json(Path(path), result)
    print(f"on {result['made_with']['device']}, torch {result['made_with']['torch']}: {result['command']}")
    for row in result["goals"]:
        line = f"  {row['what']}: {row['measured']:.4g} {row['unit']}"
        for relation in {"at_most", "at_least"} & row.keys():
            verdict = "met" if row["met"] else "MISSED"
            line += f", goal {relation.replace('_', ' ')} {row[relation]:g}: {verdict}"
        print(line)
    print(path)
