"""Responses sampled into a file, a line each as they end, so a kill costs those in flight."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from em import parallel
from em.errors import UserError
from em.files import Appender, read_json_lines, write_atomic
from em.sampling.sampler import Rollout, Sampler


def whole_lines(path: Path) -> list[dict]:
    """The rows of a file that is appended to; a line that a kill cut short is dropped from it."""
    if not path.exists():
        return []
    data = path.read_bytes()  # bytes: a kill may cut a letter
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_atomic(path, lambda temporary: temporary.write_bytes(whole))
    return [row for _, row in read_json_lines(path)]


def read_rollouts(path: Path) -> dict[tuple[int, int], dict]:
    """The rows of `sample_to_file` by (prompt, sample), each once and in order, whatever wrote it how often.

    UserError for a row without these two numbers.
    """
    rows = {}
    for part in sorted(path.parent.glob(f"{path.stem}*{path.suffix}")):
        for row in whole_lines(part):
            place = row.get("prompt"), row.get("sample")
            if not all(type(number) is int for number in place):
                raise UserError(f"{part}: prompt {place[0]!r:.20}, sample {place[1]!r:.20} is no response")
            rows.setdefault(place, row)
    return dict(sorted(rows.items()))


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
    sample), so a continued file is the file of one go. One process at a time: whoever calls holds the lock
    of the folder. Under torchrun each process samples its share of the
    prompts into a file beside `path`, and all get all rows.
    """
    have = read_rollouts(path)
    parallel.barrier()  # before any process appends
    missing = [i for i in range(len(prompts)) if any((i, s) not in have for s in range(n))]
    missing = missing[parallel.rank() :: parallel.size()]
    if missing:
        own = path if parallel.rank() == 0 else path.with_stem(f"{path.stem}.rank{parallel.rank()}")
        rollouts = sampler.stream([prompts[i] for i in missing], n=n, seed=seed, indices=missing)
        total, quiet = n * len(prompts) // parallel.size(), parallel.rank() > 0
        bar = tqdm(total=total, initial=len(have), desc=path.stem, unit="response", disable=quiet)
        with bar, Appender(own) as file:
            for rollout in rollouts:
                if (rollout.prompt_index, rollout.sample) in have:
                    continue
                place = {"prompt": rollout.prompt_index, "sample": rollout.sample}
                counts = {"tokens": len(rollout.ids), "finished": rollout.finished}
                file.add([row(rollout) | place | counts])
                bar.update()
    parallel.barrier()
    return list(read_rollouts(path).values())
