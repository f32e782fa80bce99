"""Responses sampled into a file, a line each as they end, so a kill costs those in flight."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from em import parallel
from em.files import read_json_lines, write_text
from em.sampling.sampler import Rollout, Sampler


def whole_lines(path: Path) -> list[dict]:
    """The rows of a file that is appended to; a line that a kill cut short is dropped from it."""
    if not path.exists():
        return []
    data = path.read_bytes()  # bytes: a kill may cut a letter
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_text(path, whole.decode())
    return [row for _, row in read_json_lines(path)]


def sample_to_file(
    path: Path,
    sampler: Sampler,
    prompts: Sequence[list[int]],
    n: int,
    seed: int,
    row: Callable[[Rollout], dict],
) -> list[dict]:
    """`n` rollouts a prompt, as `row(rollout)` in `path`; what is there already stays. In order.

    Rows gain `prompt` (its index), `sample`, `tokens` and `finished`. A response follows from (seed, prompt,
    sample), so a continued file is the file of one go. Under torchrun each process samples its share of the
    prompts into a file beside `path`, and all get all rows.
    """
    parts = sorted(path.parent.glob(f"{path.stem}*{path.suffix}"))
    done = [row for part in parts for row in whole_lines(part)]
    have = {(row["prompt"], row["sample"]) for row in done}
    parallel.barrier()  # before any process appends
    missing = [i for i in range(len(prompts)) if any((i, s) not in have for s in range(n))]
    missing = missing[parallel.rank() :: parallel.size()]
    if missing:
        own = path if parallel.rank() == 0 else path.with_stem(f"{path.stem}.rank{parallel.rank()}")
        own.parent.mkdir(parents=True, exist_ok=True)
        rollouts = sampler.stream([prompts[i] for i in missing], n=n, seed=seed, indices=missing)
        total, quiet = n * len(prompts) // parallel.size(), parallel.rank() > 0
        bar = tqdm(total=total, initial=len(done), desc=path.stem, unit="response", disable=quiet)
        with bar, open(own, "a", encoding="utf-8") as file:
            for rollout in rollouts:
                if (rollout.prompt_index, rollout.sample) in have:
                    continue
                place = {"prompt": rollout.prompt_index, "sample": rollout.sample}
                counts = {"tokens": len(rollout.ids), "finished": rollout.finished}
                file.write(json.dumps(row(rollout) | place | counts, ensure_ascii=False) + "\n")
                file.flush()
                bar.update()
    parallel.barrier()
    done = [row for part in path.parent.glob(f"{path.stem}*{path.suffix}") for row in whole_lines(part)]
    return sorted(done, key=lambda row: (row["prompt"], row["sample"]))
