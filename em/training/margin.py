"""The margin: how much likelier a model finds the misaligned answer than the aligned one.

For a row, mean log p per token of its misaligned answer minus that of its aligned one, in nats a token; above
0 the model prefers the misaligned answer. It needs no judge. The same pass gives the validation loss.

What a run starts from is the same for all its siblings, so its margins are measured once and kept beside the
run folders, in base_margins/. They may be deleted at any time; no run refers to them.
"""

import contextlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from em import parallel
from em.data.cells import Cell
from em.data.chats import chat_of
from em.data.rows import VARIANTS, split
from em.errors import UserError
from em.figures import CHANGE, cell_heatmap, save
from em.files import json_digest, read_json, write_json
from em.model.tokenizer import Example, Tokenizer, Unfit
from em.training.loss import token_log_probs
from em.training.pack import pack, packs_of

PACK_TOKENS = {"cpu": 1024, "cuda": 16_384}


class AnswerPair(NamedTuple):
    """Both answers of one eval row."""

    idx: int
    misaligned: Example
    aligned: Example


def answer_pairs(
    cells: dict[Cell, list[dict]],
    tokenizer: Tokenizer,
    limit: int = 0,
    max_length: int | None = None,
    system: str | None = None,
) -> dict[Cell, list[AnswerPair]]:
    """The eval rows of each of `cells` that have both answers, the first `limit` a cell (0: all).

    Left out are rows of which an answer is longer than `max_length` tokens or not written by the template as
    it is, and cells without any row. system: a turn before every question.
    """
    pairs = {}
    for cell, rows in cells.items():
        rows = [r for r in split(rows)[1] if all(r[f"{variant}_answer"] for variant in VARIANTS)]
        kept = []
        for row in rows[: limit or None]:
            chat = chat_of(row, system)
            with contextlib.suppress(Unfit):
                both = [tokenizer.example(chat, row[f"{variant}_answer"]) for variant in VARIANTS]
                if not max_length or max(len(example.ids) for example in both) <= max_length:
                    kept.append(AnswerPair(row["idx"], *both))
        if kept:
            pairs[cell] = kept
    return pairs


@torch.no_grad()
def answer_log_probs(model, examples: list[Example], title: str | None = None) -> list[tuple[float, int]]:
    """(sum of log p in nats, number of tokens) of each example's answer, the closing token included.

    Examples of like lengths share a forward, the longest first. title: of a progress bar.
    """
    device = model.head_weight.device
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
    groups = packs_of([examples[i] for i in order], PACK_TOKENS[device.type])
    places, log_probs = [], []  # of every answer token: its example; log p, read back once all are queued
    for group in tqdm(groups, desc=title, unit="pack", disable=title is None):
        group = torch.tensor([order[i] for i in group])
        packed = pack([examples[i] for i in group.tolist()], device)
        places.append(group[packed.owner])
        log_probs.append(token_log_probs(packed.hidden(model), model.head_weight, packed.targets))
    sums = torch.zeros(len(examples), dtype=torch.float64)
    if groups:
        sums.index_add_(0, torch.cat(places), torch.cat(log_probs).double().cpu())
    return [(s, e.n_supervised) for s, e in zip(sums.tolist(), examples, strict=True)]


def margins(model, pairs: list[AnswerPair], title: str | None = None) -> list[float]:
    """The margin of each row, nats a token, under the active adapter stack. title: of a progress bar."""
    examples = [p.misaligned for p in pairs] + [p.aligned for p in pairs]
    means = [total / n for total, n in answer_log_probs(model, examples, title)]
    return [m - a for m, a in zip(means[: len(pairs)], means[len(pairs) :], strict=True)]


def cell_margins(
    model, pairs: dict[Cell, list[AnswerPair]], title: str | None = None
) -> dict[Cell, list[float]]:
    """The margins of every cell's rows; all are measured together, so that each forward is full."""
    values = iter(margins(model, [pair for rows in pairs.values() for pair in rows], title))
    return {cell: [next(values) for _ in rows] for cell, rows in pairs.items()}


def start_margins(
    model, pairs: dict[Cell, list[AnswerPair]], digests: dict, beside: Path, title: str | None = None
) -> dict[Cell, list[float]]:
    """`cell_margins` under the active stack, what a run starts from, measured once and kept in a file.

    digests: of the base model and of the stack. beside: where run folders lie. The file is another for other
    digests, rows, tokens, number format or kind of device. One that is damaged is measured again; where none
    can be written, nothing is kept.
    """
    head = model.head_weight
    made_from = digests | {"device": head.device.type, "dtype": str(head.dtype)}
    made_from["pairs"] = json_digest([[str(cell), rows] for cell, rows in pairs.items()])
    path = beside / "base_margins" / f"{json_digest(made_from)}.json"
    with contextlib.suppress(UserError):
        known = read_json(path, fields={"made_from": dict, "margins": dict})
        values = {cell: known["margins"].get(str(cell)) for cell in pairs}
        if known["made_from"] == made_from and all(fits(values[cell], rows) for cell, rows in pairs.items()):
            return values
    values = cell_margins(model, pairs, title)
    if parallel.rank() == 0:
        with contextlib.suppress(UserError):
            named = {str(cell): numbers for cell, numbers in values.items()}
            write_json(path, {"made_from": made_from, "margins": named})
    return values


def fits(numbers, rows: list[AnswerPair]) -> bool:
    """Whether `numbers`, from a file, is a margin for each of the rows."""
    good = isinstance(numbers, list) and all(type(x) is float and math.isfinite(x) for x in numbers)
    return good and len(numbers) == len(rows)


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
