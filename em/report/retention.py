"""How much of what a student was to train on passed the filter, from the run folders that score files lie in.

Of a filtered OPD run it is the share of its rollouts up to the epoch that was evaluated (metrics.jsonl), of
an SFT or OPTD run the share of its corpus (result.json).
"""

from collections.abc import Iterable
from pathlib import Path

from em.data import lineage
from em.errors import UserError
from em.files import read_json, read_json_lines
from em.report.averages import rounded
from em.report.outcomes import Trained


def retention_of(paths: Iterable[str | Path]) -> dict[Trained, float]:
    """Run → percent kept, of the runs of distill.py that filtered; paths: score files in `<run>/eval/`."""
    found = {}
    for folder in dict.fromkeys(Path(path).parent.parent for path in paths):
        try:
            settings = lineage.settings_of(folder)
            run = Trained(lineage.train_of(folder), lineage.condition_of_run(folder))
        except UserError:
            continue  # the base model's, a run that was moved, or files that were put together by hand
        whole = folder if "epoch" not in settings else folder.parent
        kept = None
        if settings.get("filter"):
            kept = _of_rollouts(whole / "metrics.jsonl", settings.get("epoch"))
        elif settings.get("filtered") and (whole / "result.json").exists():
            kept = read_json(whole / "result.json").get("retention")
        if kept is not None:
            found[run] = rounded(100 * kept)
    return found


def _of_rollouts(path: Path, epoch: int | None) -> float | None:
    if not path.exists():
        return None
    steps = [row for _, row in read_json_lines(path, drop_cut=True) if "retention" in row]
    kept = [row["retention"] for row in steps if epoch is None or row.get("epoch", 0) <= epoch]
    return sum(kept) / len(kept) if kept else None
