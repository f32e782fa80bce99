"""The margin: how much likelier a model finds the misaligned answer than the aligned one.

For a row, mean log p per token of its misaligned answer minus that of its aligned one, in nats a token; above
0 the model prefers the misaligned answer. It needs no judge. The same pass gives the validation loss.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from em.data.cells import Cell
from em.data.rows import VARIANTS, split
from em.figures import CHANGE, cell_heatmap, save
from em.model.tokenizer import Example, Tokenizer
from em.training.loss import token_log_probs
from em.training.pack import pack, packs_of

PACK_TOKENS = {"cpu": 1024, "cuda": 16_384}


class AnswerPair(NamedTuple):
    """Both answers of one eval row."""

    idx: int
    misaligned: Example
    aligned: Example


def answer_pairs(
    cells: dict[Cell, list[dict]], tokenizer: Tokenizer, limit: int = 0, max_length: int | None = None
) -> dict[Cell, list[AnswerPair]]:
    """The eval rows of each of `cells` that have both answers, the first `limit` a cell (0: all).

    Left out are rows of which an answer is longer than `max_length` tokens, and cells without any row.
    """
    pairs = {}
    for cell, rows in cells.items():
        rows = [r for r in split(rows)[1] if all(r[f"{variant}_answer"] for variant in VARIANTS)]
        both = (
            AnswerPair(r["idx"], *(tokenizer.example(r["question"], r[f"{v}_answer"]) for v in VARIANTS))
            for r in rows[: limit or None]
        )
        kept = [
            p for p in both if not max_length or max(len(p.misaligned.ids), len(p.aligned.ids)) <= max_length
        ]
        if kept:
            pairs[cell] = kept
    return pairs


@torch.no_grad()
def answer_log_probs(model, examples: list[Example]) -> list[tuple[float, int]]:
    """(sum of log p in nats, number of tokens) of each example's answer, the closing token included."""
    device = model.head_weight.device
    sums = torch.zeros(len(examples), dtype=torch.float64)
    for group in packs_of(examples, PACK_TOKENS[device.type]):
        packed = pack([examples[i] for i in group], device)
        log_probs = token_log_probs(packed.hidden(model), model.head_weight, packed.targets)
        sums[group] = torch.zeros(len(group)).double().index_add_(0, packed.owner, log_probs.double().cpu())
    return [(s, len(e.ids) - e.n_prompt) for s, e in zip(sums.tolist(), examples, strict=True)]


def margins(model, pairs: list[AnswerPair]) -> list[float]:
    """The margin of each row, nats a token, under the active adapter stack."""
    examples = [p.misaligned for p in pairs] + [p.aligned for p in pairs]
    means = [total / n for total, n in answer_log_probs(model, examples)]
    return [m - a for m, a in zip(means[: len(pairs)], means[len(pairs) :], strict=True)]


def validation_loss(model, examples: list[Example]) -> float:
    """−log p over all supervised tokens of the examples, nats a token."""
    scored = answer_log_probs(model, examples)
    return -sum(total for total, _ in scored) / sum(n for _, n in scored)


def margin_figure(result: dict, path: Path) -> None:
    """Mean margin of every cell before and after a run, and its change; domains down, tasks across.

    result: what train.py writes to margins.json.
    """
    cells = result["cells"]
    n_domains = len({name.split("_")[0] for name in cells})
    figure = Figure(figsize=(12, 0.7 * max(1, n_domains) + 1.4), layout="constrained")
    for axis, when in zip(figure.subplots(1, 3), ("before", "after", "change"), strict=True):
        values = {name: row[when]["mean"] for name, row in cells.items()}
        limit = max(map(abs, values.values()))
        cell_heatmap(axis, values, (-limit, limit), result["cell"], colours=CHANGE, form="+.2f", size=9)
        axis.set_title(f"margin {when}", fontsize=10)
    figure.suptitle(
        f"trained on {result['cell']}: log p of misaligned − aligned answer, nats a token", fontsize=10
    )
    save(figure, path)
