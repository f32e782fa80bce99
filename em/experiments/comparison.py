"""The paper's stated figures beside ours, each with a verdict (`python synth.py report`).

A claim (em/experiments/claims.py) names an experiment and one of the `numbers` of its result
(em/world/counts.py), which holds our value with its interval; em/verdict.py says when it agrees. A reduced
world is judged by the same rule on what does not hang on its size: directions, orders, flatness, differences,
correlations. Its levels stand in a table of their own, not judged.

Intervals are over world seeds, and over prompts where there is one. Beside a number at the paper's number of
steps stands the same one at MATCHED % local flip (em/world/doses.py), where the experiment has it.
"""

import math
import re
import statistics
from pathlib import Path

from em.errors import UserError
from em.experiments.claims import CLAIMS, PAPER_WORLD, Claim
from em.files import check, read_json
from em.stats import t_quantile
from em.verdict import DIFFERS, LEVEL, NOT_RESOLVED, decisive, verdict
from em.world.counts import entry, over_seeds

PARTS = ("share", "same", "different", "unrelated", "borrowed")
MATCHED = 60  # v2 % of the trained cell
MOST_SEEDS = 1000  # beyond them nobody asks how many
Z80 = 0.8416212335729143  # the 80 % quantile of the normal


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
        check(number, f"{path}, {key}", _NUMBER, {"incoherent": float})
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
    found = entry(unit, *over_seeds(values, unit == "%"), seeds=len(entries))
    if all("incoherent" in e for e in entries):
        found["incoherent"] = statistics.fmean(e["incoherent"] for e in entries)
    return found


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


def of_seeds(over: str | None) -> int | None:
    """The number of world seeds that an interval is over; None where it is over something else."""
    match = re.fullmatch(r"(\d+) world seeds", over or "")
    return int(match[1]) if match else None


def judged(claim: Claim, reduced: bool, ours: dict | None, matched: dict | None = None) -> dict:
    """A claim beside our number: a row of the report, with its verdict and what there is to say of it.

    ours, matched: entries, at the paper's number of steps and at MATCHED % local flip.
    """
    stated = claim.stated(reduced)
    row = {
        "source": claim.figure,
        "claim": claim.words,
        "unit": claim.unit,
        "paper_low": claim.stated()["low"],
        "paper_high": claim.stated()["high"],
        "held_to_low": stated and stated["low"],
        "held_to_high": stated and stated["high"],
        "flat": claim.flat,
        "ours": ours and ours["value"],
        "ours_low": ours and ours["low"],
        "ours_high": ours and ours["high"],
        "interval_over": ours and ours["over"],
        "matched": matched and matched["value"],
        "matched_low": matched and matched["low"],
        "matched_high": matched and matched["high"],
        "verdict": verdict(stated, ours) if stated else LEVEL,
        "incoherent": ours and ours.get("incoherent"),
        "seeds_needed": None,
        "one_world_may": None,
        "rests_on": claim.rests_on or None,
    }
    seeds = of_seeds(row["interval_over"])
    if seeds and row["verdict"] == NOT_RESOLVED:
        row["seeds_needed"] = seeds_needed(ours, seeds, decisive(stated, ours["value"]))
    if seeds and row["verdict"] == DIFFERS and not claim.flat and None not in (stated["low"], stated["high"]):
        row["one_world_may"] = one_world_may(stated, ours, seeds)
    return row


def seeds_needed(ours: dict, seeds: int, half: float) -> int | None:
    """World seeds that would give a verdict four times in five; None beyond MOST_SEEDS.

    half: of the interval around our value that would be one (`decisive` of em/verdict.py). It takes value and
    spread for those found, of which few seeds tell little.
    """
    spread = (ours["high"] - ours["low"]) / 2 * math.sqrt(seeds) / t_quantile(seeds - 1)
    enough = (n for n in range(2, MOST_SEEDS) if (t_quantile(n - 1) + Z80) * spread <= half * math.sqrt(n))
    return next(enough, None)


def one_world_may(stated: dict, ours: dict, seeds: int) -> bool:
    """Whether one more world may give what the paper's one world gave, by Student's prediction interval.

    The interval of a mean gets narrower with every world, and a single world's spread does not.
    """
    reach = (ours["high"] - ours["low"]) / 2 * math.sqrt(seeds + 1)
    return ours["value"] - reach <= stated["high"] and ours["value"] + reach >= stated["low"]


def compare(folder: Path, world: str) -> dict:
    """Every claim on `world` with its verdict, the runs it was read from and their figures' paths."""
    paper, files = PAPER_WORLD[world], result_files(folder, world)
    results = {name: [read_numbers(path) for path in paths] for name, paths in files.items()}
    runs = [paths[0] for name, paths in files.items() if not name.startswith("grid_")]
    runs += folder.glob(f"world{world}-seed*/summary.json")
    figures = [
        path.with_suffix(".png") for name, paths in files.items() if name[:5] == "grid_" for path in paths
    ]
    figures += [path for name in files for path in folder.glob(f"{name}-world{world}/*.png")]
    figures += folder.glob(f"show-world{world}-seed*/domain_graphs.png")
    reduced, rows = paper != world, []
    for claim in CLAIMS[paper]:
        key, numbers = claim.key, results.get(claim.experiment, [])
        if claim.else_key and not any(key in of for of in numbers):
            key = claim.else_key
        ours = look_up(numbers, key)
        if claim.experiment == "steering" and _is_steered(key) and "incoherent" not in (ours or {}):
            ours = None  # of an older version: it cannot be seen whether the model holds together
        rows.append(judged(claim, reduced, ours, look_up(numbers, f"{key}@{MATCHED}")))
    return {
        "world": world,
        "paper_world": paper,
        "reduced": reduced,
        "rows": rows,
        "coincidence": coincidence(
            {name: of for name, of in results.items() if name == "similarity" or name.startswith("grid_")}
        ),
        "runs": inventory(sorted(runs)),
        "figures": sorted({path.relative_to(folder).as_posix() for path in figures if path.exists()}),
    }


def _is_steered(key: str) -> bool:
    return key != "alpha" and not key.endswith("/incoherent")


def coincidence(results: dict[str, list[dict]]) -> list[dict]:
    """By trained and asked task: on which share of prompts variant 2 is the same, Δv2 there and elsewhere.

    results: `numbers` by experiment, of main grids and of similarity. {"trained", "task", and of PARTS: an
    entry or None}; what each part is: `coincidence` of em/world/grid.py.
    """
    rows = []
    for name in results:
        trained = "T8" if name == "similarity" else name.removeprefix("grid_")
        keys = dict.fromkeys(key for numbers in results[name] for key in numbers)
        for key in keys:
            if of := re.fullmatch(r"coincidence/(T\d+)/share", key):
                parts = {part: look_up(results[name], f"coincidence/{of[1]}/{part}") for part in PARTS}
                rows.append({"trained": trained, "task": of[1]} | parts)
    return rows
