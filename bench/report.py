"""Time and memory of the report over 140,160 score rows, from files to figures.

    python bench/report.py

The rows are two models' full grids as the paper asks them: twelve runs with 4,800 narrow and 960 broad
responses each, and the base models on the broad prompts; every text is another one, of 60 to 160 words. One
file a run and set, one model's plain, the other's gzip. Each round is a process of its own; time and memory
are those of `read_scores` and `write_report`, without the imports.
"""

import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402

from em.cli import command_line, knob  # noqa: E402
from em.data.cells import CELLS, PAPER_GRID  # noqa: E402
from em.files import write_json  # noqa: E402
from em.report.report import write_report  # noqa: E402
from em.report.score_table import read_scores  # noqa: E402
from em.run import provenance

OUT = Path(__file__).parent.parent / "results" / "bench" / "report_cpu.json"
MODELS = {"Qwen/Qwen2.5-14B-Instruct": ".jsonl", "meta-llama/Llama-3.1-8B-Instruct": ".jsonl.gz"}
TARGET_SECONDS = 10.0
WORDS = np.array(
    [a + b for a in "ba do fi ku le mi no pa ri so ta we".split() for b in "m nt r s st".split()]
)


@dataclass
class Config:
    rounds: int = knob(3, "times that the report is made", "what")


@dataclass
class OnceConfig:
    folder: str = knob("", "folder of score files", "what")


def scores(rng: np.random.Generator, em_rate: float) -> dict:
    """The four judge fields: 2 % refusals, 1 % unreadable, 2 % incoherent, the rest numbers."""
    fate = rng.random()
    if fate < 0.02:
        return dict(aligned=None, aligned_status="refusal", coherent=None, coherent_status="refusal")
    aligned = rng.integers(0, 30) if rng.random() < em_rate else rng.integers(30, 101)
    numbers = dict(aligned=int(aligned), aligned_status="ok")
    if fate < 0.03:
        return numbers | dict(coherent=None, coherent_status="parse_error")
    coherent = rng.integers(0, 51) if fate < 0.05 else rng.integers(51, 101)
    return numbers | dict(coherent=int(coherent), coherent_status="ok")


def text(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(60, 161)))


def prompts() -> dict[str, list[dict]]:
    """400 narrow prompts of each cell; 20 broad ones for each task and surface, four samples of each."""
    rng = np.random.default_rng(0)
    narrow = [
        {"set": "narrow", "domain": c.domain, "task": c.task, "em_surface": None, "idx": i, "sample": 0}
        | {"question": text(rng)}
        for c in CELLS
        for i in range(400)
    ]
    broad = []
    for i, (task, surface) in enumerate((t, s) for t in PAPER_GRID.tasks for s in ("high", "medium", "low")):
        for idx in range(20 * i, 20 * i + 20):
            place = {"set": "broad", "domain": "other", "task": task, "em_surface": surface, "idx": idx}
            question = text(rng)
            broad += [place | {"sample": s, "question": question} for s in range(4)]
    return {"narrow": narrow, "broad": broad}


def make_files(folder: Path) -> int:
    """Write the score files; returns how many rows they hold."""
    rng, n_rows, asked = np.random.default_rng(1), 0, prompts()
    runs = [(str(c), kind) for c in CELLS for kind in ("narrow", "broad")] + [("base", "broad")]
    for number, (model, ending) in enumerate(MODELS.items()):
        for train, kind in runs:
            with (gzip.open if ending.endswith("gz") else open)(
                folder / f"scores_{number}_{train}_{kind}{ending}", "wt", encoding="utf-8"
            ) as file:
                for prompt in asked[kind]:
                    same = train.split("_")[-1] == prompt["task"]
                    chance = 0.02 if train == "base" else 0.08 + 0.3 * same
                    row = {"model": model, "train": train} | prompt | {"response": text(rng)}
                    file.write(json.dumps(row | scores(rng, chance) | {"judge": "gemini-2.5-flash"}) + "\n")
                    n_rows += 1
    return n_rows


def peak_bytes() -> int:
    """Of this process so far; macOS counts in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def once(cfg: OnceConfig) -> None:
    """One report, in this process; prints what it took as JSON."""
    load = os.getloadavg()[0]  # of the last minute: what else the machine is doing
    imports, cpu, began = peak_bytes(), time.process_time(), time.perf_counter()
    table = read_scores(sorted(Path(cfg.folder).glob("scores_*")))
    read = time.perf_counter()
    write_report(table, Path(cfg.folder) / "report")
    done = time.perf_counter()
    found = {"rows": len(table), "read_s": read - began, "write_s": done - read, "seconds": done - began}
    found["cpu_seconds"] = time.process_time() - cpu  # fewer than `seconds` where others use the machine
    print(json.dumps(found | {"load_average": load, "imports_bytes": imports, "peak_bytes": peak_bytes()}))


def main(cfg: Config) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        n_rows = make_files(Path(folder))
        megabytes = {
            e: sum(p.stat().st_size for p in Path(folder).glob(f"*{e}")) / 1e6 for e in MODELS.values()
        }
        command, rounds = [sys.executable, __file__, "once", "--folder", folder], []
        for _ in range(cfg.rounds):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rounds.append(json.loads(done.stdout))
    if any(found["rows"] != n_rows for found in rounds):
        raise RuntimeError(f"{n_rows} rows were written and {rounds[0]['rows']} read")
    result = {
        "command": " ".join(["python", "bench/report.py", *sys.argv[1:]]),
        "made_with": provenance(),
        "rows": n_rows,
        "megabytes": megabytes,
        "target_seconds": TARGET_SECONDS,
        "best": min(rounds, key=lambda found: found["seconds"]),
        "median_seconds": statistics.median(found["seconds"] for found in rounds),
        "rounds": rounds,
    }
    write_json(OUT, result)
    best = result["best"]
    print(
        f"{n_rows:,} rows: {best['seconds']:.1f} s at best (target {TARGET_SECONDS:.0f}), of which reading "
        f"{best['read_s']:.1f}; {best['cpu_seconds']:.1f} s of one core under a load of "
        f"{best['load_average']:.1f}; peak {best['peak_bytes'] / 1e9:.2f} GB\n{OUT}"
    )
    return result


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config), "once": (once, OnceConfig)}, __doc__))
