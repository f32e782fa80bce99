"""Realignment on the worlds: the counterpart of the paper's Figure 3(c), which is on natural language.

Each misaligned model (D0, T) is trained on variant 1 of one single cell, every seen cell in turn, and then
asked everywhere. The question is whether realignment follows tasks and domains as misalignment does.

The paper has no such experiment on the worlds, so its recipe is ours: the misalignment's own number of
steps, batch size and learning rate, on examples of the alignment set. It starts from fine-tuning seed 0. Each
of the (tasks × cells) models is asked at most PROMPTS held-out prompts a cell, and only its counts are kept:
at paper scale the models of one world seed would be 60 GB.

Doses (ours): `removed` is the share of each source's own rise, which does not hold the flip equal. So sources
that are misaligned until their cell is at 30, 60, 90 % of v2 (em/world/doses.py) are realigned too, each on
CELLS_AT_FLIP cells of each group, drawn by world seed and source.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from em import parallel
from em.experiments.dose_curves import at_levels, flip_entries
from em.experiments.replication import (
    header,
    line_with_seeds,
    over_prompts,
    replicated,
    say_number,
    say_unit,
    shown,
    shown_interval,
    v2_draws,
)
from em.figures import frame, heatmap, save
from em.files import read_json, write_json
from em.model.gpt2 import GPT2
from em.run import Run
from em.stats import FLIPS
from em.world.counts import columns, incoherent, percent, pool, rate
from em.world.doses import misaligned_after, steps_to_flips
from em.world.generator import Dialogues
from em.world.world_run import WorldRun, train_phase

BEFORE = ("aligned", "misaligned")  # the two models that stand in a realignment cell's place in the rows
KEYS = ("task", "all")  # v2 of the trained task over its seen cells, and over all seen cells
CELLS_AT_FLIP = 2  # of each group, on which a source at a matched local flip is realigned
PROMPTS = 32  # a cell; the mean over a task's domains or over all cells rests on hundreds
GROUPS = {
    "same cell": (True, True),
    "same task, other domain": (True, False),
    "other task, same domain": (False, True),
    "other task, other domain": (False, False),
}  # (task matches, domain matches) between the misaligned and the realigned cell


def matches(source: str, cell: str) -> tuple[bool, bool]:
    """Whether (task, domain) of the realigned cell are those of (D0, `source`)."""
    domain, _, task = cell.partition("_")
    return task == source, domain == "D0"


def asked_once(
    run: WorldRun, name: str, dose: dict, make: Callable[[Run, str], GPT2], prompts: Dialogues
) -> dict:
    """Counts by cell of a model that is not kept. dose: what its misalignment hung on."""
    settings = run.misalign_settings() | dose | {"prompts": len(prompts)}
    with Run(run.folder / name, "world-phase", settings, run.device, wait=True) as record:
        path = record.folder / "counts.json"
        if not path.exists():
            model = make(record, name)
            if parallel.rank() == 0:
                write_json(path, run.ask(model, prompts))
            parallel.barrier()
        record.clear_resume()
        return read_json(path)


def realign(run: WorldRun, source: Callable[[], GPT2], cell: int, record: Run, name: str) -> GPT2:
    """A copy of the source, trained on v1 of `cell`."""
    cfg, model = run.cfg, copy.deepcopy(source())
    data = run.alignment.take(np.flatnonzero(run.alignment.examples.cell == cell))
    batches = run.batches(data, cfg.misalign_batch, cfg.seed)
    train_phase(cfg, record, model, batches, cfg.misalign_steps, cfg.misalign_lr, 0, "constant", title=name)
    return model


def _cells_at_flip(run: WorldRun, task: str, seen: list[str]) -> list[int]:
    """The cells on which a source at a matched local flip is realigned."""
    rng = np.random.default_rng([run.cfg.seed, run.world.task_index(task)])
    groups = [[c for c, name in enumerate(seen) if matches(task, name) == of] for of in GROUPS.values()]
    return [int(c) for of in groups for c in rng.choice(of, min(CELLS_AT_FLIP, len(of)), replace=False)]


def _at_flips(run: WorldRun, task: str, seen: list[str], aligned: dict, prompts: Dialogues) -> list[dict]:
    """Rows of the sources of one task at each local flip that it reaches, with `level` and `steps`."""
    rows = []
    for level, steps in steps_to_flips(run, task, 0).items():
        if steps is None:
            continue
        source = cache(partial(misaligned_after, run, task, 0, steps))
        folder, dose, found = f"realign_{task}_after{steps}", {"steps": steps}, {"aligned": aligned}
        makers = {"misaligned": lambda *_, source=source: source()}
        makers |= {seen[c]: partial(realign, run, source, c) for c in _cells_at_flip(run, task, seen)}
        for where, make in makers.items():
            found[where] = asked_once(run, f"{folder}/{where}", dose, make, prompts)
        about = {"level": level, "steps": steps}
        rows += [_row(run, task, where, counts) | about for where, counts in found.items()]
    return rows


def _row(run: WorldRun, task: str, realigned_on: str, counts: dict) -> dict:
    """Rates in %, pooled over the seen cells of the trained task (`task_…`) and over all (`all_…`)."""
    seen = [run.world.cell_name(int(cell)) for cell in run.world.seen_cells]
    of_task = [name for name in seen if name.endswith(f"_{task}")]
    row = {"seed": run.cfg.seed, "source": task, "realigned_on": realigned_on}
    for key, names in zip(KEYS, (of_task, seen), strict=True):
        total = pool([counts[name] for name in names])
        row |= {f"{key}_n": total["n"], f"{key}_v1": percent(total, "v1")}
        row |= columns(f"{key}_v2", rate(total, "v2")) | {f"{key}_incoherent": incoherent(total)}
    return row


def _pairs(rows: list[dict], match: tuple[bool, bool]) -> list[dict]:
    return [
        r for r in rows
        if r["realigned_on"] not in BEFORE and matches(r["source"], r["realigned_on"]) == match
    ]  # fmt: skip


def _groups(rows: list[dict], seeds: Sequence[int]) -> dict:
    """v2 after realignment by match of the two cells, and the share of the rise that is gone.

    A world seed's value is the mean over its pairs of cells; each number is one of
    em/experiments/replication.py.
    """
    draws = {}  # (row, task or all) → v2 drawn again from its posterior
    for place, row in enumerate(rows):
        counts = [{"v2": row[f"{key}_v2"] * row[f"{key}_n"] / 100, "n": row[f"{key}_n"]} for key in KEYS]
        draws |= zip(((id(row), key) for key in KEYS), v2_draws(counts, place), strict=True)

    def over(chosen: list[dict], key: str) -> tuple[float, np.ndarray]:
        """v2 averaged over the rows, and its draws."""
        return fmean(r[f"{key}_v2"] for r in chosen), np.mean([draws[id(r), key] for r in chosen], axis=0)

    out = {}
    for name, match in GROUPS.items():
        found = {key: [] for key in ("task_v2", "all_v2", "removed")}  # (value, draws) a seed
        for seed in seeds:
            of_seed = [r for r in rows if r["seed"] == seed]
            pairs = _pairs(of_seed, match)
            for key in KEYS:
                found[f"{key}_v2"].append(over(pairs, key))
            # Every task meets as many cells as any other, so a mean over tasks is one over pairs.
            before = [over([r for r in of_seed if r["realigned_on"] == model], "task") for model in BEFORE]
            found["removed"].append(_removed(*before, over(pairs, "task")))
        out[name] = {
            key: replicated(
                [value for value, _ in seen],
                [over_prompts(drawn) for _, drawn in seen],
                rate=key != "removed",  # which is below 0 where v2 rose further
            )
            for key, seen in found.items()
        } | {"pairs_a_seed": len(pairs)}
    return out


def _removed(aligned: tuple, misaligned: tuple, realigned: tuple) -> tuple[float | None, np.ndarray]:
    """% of the rise from aligned to misaligned that realignment took back, of (value, draws) each."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, drawn = (
            100 * (np.subtract(m, r) / np.subtract(m, a))
            for a, m, r in zip(aligned, misaligned, realigned, strict=True)
        )
    return (float(value) if misaligned[0] > aligned[0] else None), drawn


def removed_at_flips(result: dict) -> dict[str, dict[float, dict]]:
    """{group: {level: % of the rise that is gone, over world seeds}}; a source that reaches it takes part."""

    def removed(match: tuple[bool, bool], seed: int, level: float) -> float | None:
        rows = [r for r in result["flips"] if (r["seed"], r["level"]) == (seed, level)]
        if not rows:
            return None
        aligned, misaligned = (
            fmean(r["task_v2"] for r in rows if r["realigned_on"] == model) for model in BEFORE
        )
        left = fmean(r["task_v2"] for r in _pairs(rows, match))  # every source has as many pairs
        return 100 * (misaligned - left) / (misaligned - aligned) if misaligned > aligned else None

    return {name: at_levels(partial(removed, match), result["seeds"]) for name, match in GROUPS.items()}


def measure(make: Callable[..., WorldRun], seeds: Sequence[int], say=print) -> dict:
    """Realign every misaligned model on every seen cell, for each world seed.

    Rows: one a (seed, misaligned task `source`, cell `realigned_on`), with `aligned` and `misaligned` in the
    cell's place for the two models before. `flips`: the same at each local flip, with `level` and `steps`.
    """
    rows, flips = [], []
    for seed in seeds:
        run = make(seed)
        each = run.cfg.eval_prompts
        seen = [run.world.cell_name(int(cell)) for cell in run.world.seen_cells]
        first = np.arange(len(run.prompts)) % each < PROMPTS  # of each cell
        prompts = run.prompts.take(
            np.flatnonzero(first & np.isin(run.prompts.examples.cell, run.world.seen_cells))
        )
        aligned = run.ask(run.align(), prompts)
        for task in run.world.tasks:
            source = cache(partial(run.misalign, task, 0))
            rows.append(_row(run, task, "aligned", aligned))
            rows.append(_row(run, task, "misaligned", run.ask(source(), prompts)))
            for cell, name in enumerate(seen):
                make_one = partial(realign, run, source, cell)
                counts = asked_once(run, f"realign_{task}/{name}", {}, make_one, prompts)
                rows.append(_row(run, task, name, counts))
            before, *after = (row["task_v2"] for row in rows[-len(seen) - 1 :])
            say(
                f"  {task}: v2 {before:.0f} % misaligned, {fmean(after):.0f} % realigned "
                f"({min(after):.0f} to {max(after):.0f} over {len(seen)} cells)"
            )
            flips += _at_flips(run, task, seen, aligned, prompts)
    note = "rows' intervals are over prompts"
    return header("realign", run, seeds, note, fine_tuning_seeds=1, prompts_a_cell=min(PROMPTS, each)) | {
        "tasks": list(run.world.tasks),
        "cells": seen,
        "groups": _groups(rows, seeds),
        "rows": rows,
        "flips": flips,
    }


def numbers(result: dict) -> dict[str, dict]:
    """Entries such as `other task, other domain/removed`: v2 that is left, and what is gone, in %.

    And `…/removed@60` of sources whose cell is at 60 %.
    """
    table = {
        f"{match}/{key}": shown("%", group[key])
        for match, group in result["groups"].items()
        for key in ("task_v2", "all_v2", "removed")
    }
    for match, by_level in removed_at_flips(result).items():
        table |= flip_entries(f"{match}/removed", "%", by_level)
    return table


def _matrix(result: dict, quantity: str, columns: list[str]) -> np.ndarray:
    """(tasks, columns), mean over world seeds."""
    return np.array(
        [
            [
                fmean(
                    r[quantity] for r in result["rows"] if r["source"] == task and r["realigned_on"] == column
                )
                for column in columns
            ]
            for task in result["tasks"]
        ]
    )


def figure(result: dict, path: Path) -> None:
    """Tasks down; the aligned, the misaligned and every realigned model across; and the four groups."""
    tasks = result["tasks"]
    cells = sorted(result["cells"], key=lambda name: (tasks.index(name.split("_")[1]), name))
    columns = [*BEFORE, *cells]
    chart = Figure(figsize=(3 + 0.42 * len(columns), 3.2 + 0.72 * len(tasks)), layout="constrained")
    axes = chart.subplot_mosaic(
        [["task_v2", "groups"], ["all_v2", "flips"]], width_ratios=[0.42 * len(columns), 4]
    )
    for quantity, title in (
        ("task_v2", "v2 % of the source task, mean over domains"),
        ("all_v2", "v2 %, mean over all cells"),
    ):
        axis, values = axes[quantity], _matrix(result, quantity, columns)
        names = [c.replace("_", " ") for c in columns]
        heatmap(axis, values, [f"D0 {t}" for t in tasks], names, (0, max(1.0, values.max())), size=7)
        for i, task in enumerate(tasks):
            frame(axis, i, columns.index(f"D0_{task}"), 1.6, "red")
        for j in range(1, len(columns)):
            if j == 1 or columns[j].startswith("D0_"):
                axis.axvline(j - 0.5 + (j == 1), color="white", linewidth=2)
        axis.set_xticks(range(len(columns)), names, rotation=90)
        axis.set_title(title, fontsize=9)
    bars, names = axes["groups"], list(GROUPS)
    for offset, (quantity, label) in enumerate((("task_v2", "source task"), ("all_v2", "all cells"))):
        stats = [result["groups"][name][quantity] for name in names]
        where = np.arange(len(names)) + 0.38 * (offset - 0.5)
        bars.bar(where, [s["mean"] for s in stats], 0.36, label=label, color=f"C{offset}", alpha=0.75)
        for x, s in zip(where, stats, strict=True):
            bars.plot([x] * len(s["by_seed"]), s["by_seed"], "k.", markersize=4)
            low, high = shown_interval(s)
            if low is not None:
                bars.plot([x, x], [low, high], "k-", linewidth=1)
    bars.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=7, rotation=30)
    bars.set_ylim(bottom=0)
    bars.set_ylabel("v2, %")
    bars.set_title(f"v2 % after realignment, by match\n(lines: {say_unit(result['seeds'])})", fontsize=9)
    bars.legend(fontsize=7, frameon=False)
    by_flip, levels = axes["flips"], list(FLIPS)
    for place, (name, curve) in enumerate(removed_at_flips(result).items()):
        line_with_seeds(by_flip, levels, list(curve.values()), f"C{place}", name, shift=place - 1.5)
    by_flip.set(xticks=levels, xlim=(20, 100), xlabel="v2 % of the source's cell")
    by_flip.set_ylabel("% of the rise that is gone")
    by_flip.set_title("at a matched local flip", fontsize=9)
    by_flip.legend(fontsize=7, frameon=False)
    chart.suptitle(
        f"World {result['world']}, seeds {', '.join(map(str, result['seeds']))}: misaligned on (D0, T), "
        "then realigned on one cell (red: the source itself)",
        fontsize=10,
    )
    save(chart, path)


def summary(result: dict) -> str:
    """How much v2 is left by match, and what share of the rise is gone."""
    before, after = (
        fmean(r["task_v2"] for r in result["rows"] if r["realigned_on"] == model) for model in BEFORE
    )
    lines = [
        f"World {result['world']}, {say_unit(result['seeds'])}: v2 of the misaligned task over all domains, "
        f"{before:.1f} % aligned and {after:.1f} % misaligned, after realignment"
    ]
    matched = removed_at_flips(result)
    for name in GROUPS:
        left, removed = result["groups"][name]["task_v2"], result["groups"][name]["removed"]
        lines.append(
            f"  on the {name}: {say_number(left, '.1f')} %, {say_number(removed, '.0f')} % of the rise gone"
        )
        found = ", ".join(f"{say_number(of, '.0f')} at {level:.0f} %" for level, of in matched[name].items())
        lines.append(f"    {found} local flip")
    return "\n".join(lines)
