"""Tokens a second of the pretraining stream on one core.

    python bench/stream.py

Prints JSON; `make bench` keeps it in results/bench/stream.json.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from em.files import write_json  # noqa: E402
from em.run import provenance
from em.world.generator import ExampleGenerator, PretrainStream  # noqa: E402
from em.world.world import WORLDS, build_world  # noqa: E402

OUT = Path(__file__).parent.parent / "results" / "bench" / "stream.json"


def tokens_per_second(name: str, repeats: int = 7, batches: int = 160) -> list[float]:
    stream = PretrainStream(ExampleGenerator(build_world(WORLDS[name], 0)), seed=0, batch=64, length=256)
    stream.tokens(0)
    rates = []
    for repeat in range(1, repeats + 1):
        began = time.perf_counter()
        n = sum(len(stream[repeat * batches + i][0].ravel()) for i in range(batches))
        rates.append(n / (time.perf_counter() - began))
    return rates


if __name__ == "__main__":
    result = {"command": "python bench/stream.py", "made_with": provenance(), "target": 10e6, "worlds": {}}
    for name in WORLDS:
        rates = tokens_per_second(name)
        result["worlds"][name] = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
        print(f"world {name:<5} {statistics.median(rates) / 1e6:6.1f} M tokens/s on one core (target 10)")
    write_json(OUT, result)
    print(OUT)
