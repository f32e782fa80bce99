"""What bench/gpu.sh measured beside what the dry run had estimated, in the file that the dry run reads.

    python bench/calibrate.py --results results/gpu --worlds results

calibration.json is a list of {what, estimate, measured, unit, gpu}; estimate is null where there is none.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from record import ROOT  # noqa: E402

from em.cli import command_line, knob  # noqa: E402
from em.errors import UserError  # noqa: E402
from em.files import read_json, write_json  # noqa: E402

GPUS = ("h100", "h200", "a100", "l40s", "rtx4090")  # as the dry run's --gpu names them


@dataclass
class Config:
    results: str = knob(str(ROOT / "results" / "gpu"), "folder of bench/gpu.sh's results", "what")
    worlds: str = knob(str(ROOT / "results"), "folder of its world1/ and world2/", "what")
    out: str | None = knob(None, "file to write (default: calibration.json among the results)", "what")


def short(device: str) -> str:
    name = device.lower().replace(" ", "")
    return next((gpu for gpu in GPUS if gpu in name), device)


def measured(results: Path, worlds: Path) -> list[dict]:
    """{what, measured, unit, gpu} of every bench, and of the worlds that were made in one go."""
    rows = []
    for path in sorted(results.glob("*.json")):
        if path.name != "calibration.json":
            found = read_json(path)
            gpu = short(found["made_with"]["device"])
            rows += [
                {k: row[k] for k in ("what", "measured", "unit")} | {"gpu": gpu} for row in found["goals"]
            ]
    for world in (1, 2):
        runs = {path.parent: read_json(path) for path in sorted(worlds.glob(f"world{world}/*/wall.json"))}
        seconds = {folder: wall["seconds"] for folder, wall in runs.items() if wall["from_nothing"]}
        if seconds:
            device = read_json(next(iter(seconds)) / "summary.json")["made_with"]["device"]
            what = f"World {world} from nothing"
            rows.append(
                {"what": what, "measured": median(seconds.values()), "unit": "s", "gpu": short(device)}
            )
    return rows


def estimates(gpu: str) -> dict[str, float]:
    """What the dry run's arithmetic says, by `what`; {} for a card that it does not know."""
    from estimates import estimates  # beside this file; it loads the scripts and takes seconds

    return estimates(gpu)


def main(cfg: Config) -> None:
    results = Path(cfg.results)
    rows = measured(results, Path(cfg.worlds))
    if not rows:
        raise UserError(f"{results} holds no result of a bench; run bench/gpu.sh first")
    expected = {gpu: estimates(gpu) for gpu in {row["gpu"] for row in rows}}
    table = [
        {
            "what": row["what"],
            "estimate": expected[row["gpu"]].get(row["what"]),
            "measured": row["measured"],
            "unit": row["unit"],
            "gpu": row["gpu"],
        }
        for row in rows
    ]
    path = Path(cfg.out) if cfg.out else results / "calibration.json"
    write_json(path, table)
    for row in table:
        estimate = "no estimate" if row["estimate"] is None else f"estimated {row['estimate']:.4g}"
        print(f"  {row['what']}: {row['measured']:.4g} {row['unit']}, {estimate}, {row['gpu']}")
    print(path)


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
