"""The authors' published judged rows as matrices with intervals (Figures 2, 3b, 12, 14, 15, 17).

    python -m em.paper.authors

Only counts of their rows are here (`counts.json`, whose `source` says where they come from): two models,
twelve misaligned runs each; no base model, no realignments, no texts. What the paper states about these
figures is measured on the counts and given a verdict; em/paper/counts.py says what the intervals can mean.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from em.cli import command_line, knob
from em.data.cells import grid_of
from em.files import write_csv, write_json
from em.paper.counts import Counts, read_counts
from em.paper.measures import Sets, measure, same
from em.paper.stated import read_items
from em.report import figures
from em.report.effects import RunCounts, effects_of
from em.report.panel import DRAWS
from em.report.score_table import ALL, SURFACES
from em.stats import pearson
from em.verdict import verdict

MATCHES = ("task_match", "domain_match", "task_minus_domain")
NAMES = {"qwen2.5-14b": "Qwen2.5-14B", "llama3.1-8b": "Llama-3.1-8B"}


@dataclass
class Config:
    counts: str = knob("results/authors/counts.json", "counts of judged rows", "what")
    out: str = knob("results/authors", "folder of the tables and figures", "what")


def main(cfg: Config) -> None:
    source, models = read_counts(Path(cfg.counts))
    print(source)
    for line in write_authors(models, Path(cfg.out)):
        print(line)
    print(f"tables and figures: {cfg.out}")


def write_authors(models: dict[str, Sets], out: Path) -> list[str]:
    """A folder a model as em/report writes them; beside them `statements` and `models`. A sentence each."""
    stated, lines = [], []
    for model, sets in models.items():
        name, tables, folder = NAMES.get(model, model), tables_of(sets), out / model
        title = f"{name}, the authors' judged rows; intervals: the widest that the counts allow"
        grid = grid_of(sets["narrow"].trains)
        for table in tables.values():
            write_json(folder / f"{table['name']}.json", table)
            write_csv(folder / f"{table['name']}.csv", table["entries"])
            figures.table_figure(table, title, grid, folder / f"{table['name']}.png")
        figures.transfer_figure(tables, title, grid, folder / "transfer.png")
        found = effects(sets["narrow"])
        write_json(folder / "effects.json", found)
        rows = [{"what": name} | found[name] for name in MATCHES if name in found]
        write_csv(
            folder / "effects.csv", rows + [{"what": f"rate, {k}"} | e for k, e in found["by_match"].items()]
        )
        figures.effects_figure(found, title, folder / "effects.png")
        of_model = statements(model, sets)
        stated += of_model
        lines += [f"{name}, {row['figure']}: {_text(row)}" for row in of_model]
    write_json(out / "statements.json", stated)
    write_csv(out / "statements.csv", stated)
    if len(models) == 2:
        write_json(out / "models.json", both_models(models))
    return lines


def _text(row: dict) -> str:
    value, low, high = (f"{row[f'authors_{key}']:+.1f}" for key in ("value", "low", "high"))
    return f"{row['what']}: {value} [{low}, {high}] {row['unit']}: {row['verdict']}"


def statements(model: str, sets: Sets) -> list[dict]:
    """What the paper states of this model's figures, measured on the counts, a row each, with a verdict."""
    rows = []
    for item in read_items():
        for stated in item["stated"] if "authors" in item and model in item["models"] else []:
            found = measure(stated["measure"], sets) if "measure" in stated else None
            if found:
                about = {"model": model, "figure": item["name"]}
                about |= {key: stated[key] for key in ("what", "words", "low", "high", "unit")}
                rows.append(about | {f"authors_{key}": value for key, value in found.items()})
                rows[-1] |= {"verdict": verdict(stated, found)}
    return rows


def both_models(models: dict[str, Sets]) -> dict:
    """How far the two models' matrices are one: correlation and mean difference of their pairs' rates."""
    (a, first), (b, second) = models.items()
    result = {"models": [a, b], "unit": "r with Fisher's interval over pairs; points of EM rate"}
    for name in first:
        x, y = first[name].rates.ravel(), second[name].rates.ravel()
        both = np.isfinite(x) & np.isfinite(y)
        r = dict(zip(("r", "low", "high"), pearson(x[both], y[both]), strict=True))
        apart = {
            "mean_difference": float((x - y)[both].mean()),
            "mean_distance": float(abs(x - y)[both].mean()),
        }
        result[name] = {key: round(value, 4) for key, value in (r | apart).items()} | {
            "pairs": int(both.sum())
        }
    return result


def effects(narrow: Counts) -> dict:
    """Task match against domain match (em/report/effects.py), and pooled rates by kind of match.

    Every row counts as a prompt of its own. That runs share prompts moves a column of the matrix as a whole,
    which the eval cell's term takes up.
    """
    counts = RunCounts.of_pairs(narrow.em, narrow.scored)
    scored = np.repeat(narrow.scored[:, :, None], DRAWS, axis=2)  # (T, C, B)
    drawn = np.random.default_rng(0).binomial(scored, narrow.rates[:, :, None] / 100)
    found = effects_of(counts, drawn, scored, narrow.trains, narrow.columns)
    same_task, same_domain = (same(narrow, what) for what in ("task", "domain"))
    kinds = {"same_cell": same_task & same_domain, "same_task": same_task & ~same_domain}
    kinds |= {"same_domain": ~same_task & same_domain, "neither": ~same_task & ~same_domain}
    return found | {"by_match": {kind: narrow.rate(mask) for kind, mask in kinds.items()}}


# -- tables ------------------------------------------------------------------------------------------------


def tables_of(sets: Sets) -> dict[str, dict]:
    """The report's tables that counts allow, by name, in its form (em/report/report.py)."""
    tables = {}
    for name, of_set in sets.items():
        trained, asked = of_set.tasks()
        cells = {str(cell): np.arange(len(trained)) == i for i, cell in enumerate(of_set.trains)}
        tasks = {task: trained == task for task in dict.fromkeys(asked.tolist())}
        eval_tasks = {task: asked == task for task in tasks}
        trained_domain = np.array([cell.domain for cell in of_set.trains])
        domains = {domain: trained_domain == domain for domain in dict.fromkeys(trained_domain.tolist())}
        if name == "narrow":
            columns = {str(column): np.arange(len(asked)) == i for i, column in enumerate(of_set.columns)}
            eval_domain = of_set.domains()[1]
            eval_domains = {domain: eval_domain == domain for domain in domains}
            grids = {"narrow_cells": (cells, columns), "narrow_tasks": (tasks, eval_tasks)}
            grids["narrow_domains"] = (domains, eval_domains)
        else:
            surface = np.array([column[1] for column in of_set.columns])
            surfaces = {s: surface == s for s in SURFACES if s in surface}
            every = {"misaligned": np.ones(len(trained), bool)}
            grids = {"broad_cells": (cells, eval_tasks), "broad_tasks": (tasks, eval_tasks)}
            grids |= {"broad_domains": (domains, eval_tasks), "surface": (every | cells, surfaces)}
        for table, (rows, columns) in grids.items():
            tables[table] = _table(table, of_set, rows, columns)
    return tables


def _table(name: str, counts: Counts, rows: dict, columns: dict) -> dict:
    columns = columns | {ALL: np.ones(len(counts.columns), bool)}
    entries = [
        {"train": row, "eval": column} | counts.rate(trained[:, None] & asked)
        for row, trained in rows.items()
        for column, asked in columns.items()
    ]
    table = {"name": name, "unit": "percent of scored rows", "rows": list(rows), "columns": list(columns)}
    for key in ("rate", "pairs_mean", "low", "high"):
        values = [entry[key] for entry in entries]
        table[key] = [values[i : i + len(columns)] for i in range(0, len(values), len(columns))]
    return table | {"entries": entries}


if __name__ == "__main__":
    sys.exit(command_line({"": (main, Config)}, __doc__))
