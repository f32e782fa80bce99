"""Judges: rows a second of the pinned one beside transformers, and of one over HTTP at a loopback server.

    python bench/judge.py

local: the embedded model judges the sample's responses by the alignment rubric of a cell. Beside it, the same
prompts one by one through transformers' greedy `generate`, at most as many new tokens; rounds alternate, each
on prompts of its own. http: rows of two calls each with 32 workers; the server is a process of its own, and
shares the cores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import record  # noqa: E402
import torch  # noqa: E402

from em.cli import command_line, knob  # noqa: E402
from em.data.cells import CELLS  # noqa: E402
from em.data.rows import VARIANTS, load_cell  # noqa: E402
from em.judge.gemini import Gemini  # noqa: E402
from em.judge.judge import Judge  # noqa: E402
from em.judge.local import MAX_NEW_TOKENS, Local, LocalModel  # noqa: E402
from em.model import embedded  # noqa: E402
from em.model.checkpoint import load_model, load_tokenizer  # noqa: E402
from em.run import provenance  # noqa: E402


@dataclass
class Config:
    rounds: int = knob(3, "cells that both judge, one after the other", "what", at_least=1)
    peer_rows: int = knob(8, "prompts of a round that transformers is given", "what", at_least=1)
    http_rows: int = knob(10_000, "rows over HTTP", "what", at_least=1)


def rows_of(cell) -> list[dict]:
    """Both answers to every question of a cell of the sample, as rows to be judged."""
    place = {"set": "narrow", "domain": cell.domain, "task": cell.task}
    rows = load_cell("sample", cell)
    return [
        place | {"question": row["question"], "response": row[f"{v}_answer"]}
        for row in rows
        for v in VARIANTS
    ]


def local(cfg: Config, folder: Path) -> dict:
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    peer = AutoModelForCausalLM.from_pretrained(embedded.folder(), dtype=torch.float32).eval()
    judge = Judge(Local("smollm2-135m"), cache=folder / "cache.jsonl")
    ours = LocalModel(model, tokenizer)
    rates = {"ours": [], "transformers": []}
    for cell in CELLS[: cfg.rounds]:
        rows = rows_of(cell)
        prompts = [
            tokenizer.prompt_ids(
                judge.rubrics.of(row, "aligned").ask(row["question"], row["response"]).prompt
            )
            for row in rows
        ]
        start = time.perf_counter()
        for members, shared in ours.sharing(prompts):
            ours.replies([prompts[i] for i in members], shared)
        rates["ours"].append(len(prompts) / (time.perf_counter() - start))
        some = prompts[:: len(prompts) // cfg.peer_rows][: cfg.peer_rows]
        start = time.perf_counter()
        with torch.inference_mode():
            for ids in some:
                ids = torch.tensor([ids])
                peer.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
                    pad_token_id=tokenizer.pad_id,
                )  # fmt: skip
        rates["transformers"].append(len(some) / (time.perf_counter() - start))
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    return {
        "prompts_per_s": rates,
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def http(cfg: Config, folder: Path) -> dict:
    server = subprocess.Popen(
        [sys.executable, str(record.ROOT / "tests" / "judge_server.py"), "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in server.stdout:
            words = dict(word.split("=", 1) for word in line.split() if "=" in word)
            os.environ.update({name: value for name, value in words.items() if name.startswith("GEMINI_")})
            if "GEMINI_BASE_URL" in words:
                break
        row = rows_of(CELLS[0])[0]
        judge = Judge(Gemini("gemini-2.5-flash", accept_routed=True), cache=folder / "http.jsonl")
        start = time.perf_counter()
        n = sum(1 for _ in judge.score([row | {"response": f"{i}"} for i in range(cfg.http_rows)], False))
        return {"rows_per_s": n / (time.perf_counter() - start)}
    finally:
        server.kill()


def main(cfg: Config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "command": "python bench/judge.py",
            "made_with": provenance("cpu") | {"transformers": record.installed("transformers")},
            "local": local(cfg, Path(folder)),
            "http": http(cfg, Path(folder)),
        }
    ratio, rate = result["local"]["ratio"]["median"], result["http"]["rows_per_s"]
    result["goals"] = [
        record.goal("local judge beside transformers' generate", ratio, "×", at_least=5),
        record.goal("judge over HTTP, loopback server", rate, "rows/s", at_least=500),
    ]
    record.save(result, record.RESULTS / "judge_cpu.json")


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
