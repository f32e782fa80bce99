"""The report: every table and figure of the paper's natural-language results, from score rows.

One folder for each model and way of training (em/data/condition.py), and for each judge where there are
several, holds as CSV, JSON and PNG

    narrow_cells, broad_cells            12×12 and 12×4, Figures 14–16
    narrow_tasks, narrow_domains         aggregates of the first, Figures 2b, 2c, 12, 13
    broad_tasks, broad_domains           aggregates of the second, Figure 2a; `transfer.png`: Figure 2
    surface                              broad EM by surface, Figures 3b, 17
    realigned_cells, realigned_tasks     broad EM after realignment, Figures 19–21, 3c, 18
    realigned_narrow_tasks               narrow EM after realignment, Figures 5, 25, 26
    effects                              task match against domain match (em/report/effects.py)
    thresholds                           the EM rate at other cut-offs
    status                               each run's rows: scored, EM, incoherent, not scored and why; lengths
    agreement                            the judge against every other on the same responses, by set

and beside them `judges` (where responses have two), `summary.md` and `browse.html`. Where a model has
several judges, every matrix says how far the others agree and what its rate would be under them. Rates are in
percent and pool rows (em/report/panel.py); a table for which there are no rows is not written, an entry
without scored rows is null in JSON, empty in CSV and n/a in a figure. `base`, where present, is a row below
the trained cells.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from em.data.cells import Grid, parse_cell
from em.data.condition import BASE, ways_in_words
from em.errors import UserError
from em.figures import title_of
from em.files import unique_name, write_csv, write_json, write_text
from em.report import figures
from em.report.agreement import agreement_of, judge_pairs, thresholds
from em.report.browse import write_page
from em.report.effects import match_effects
from em.report.panel import DRAWS, Panel, broad_panel, narrow_panel
from em.report.score_table import ALL, SURFACES, ScoreTable, without_gc
from em.report.text import agreement_lines, sentences, share_sentences, status_tables, summary_text


@without_gc()
def write_report(table: ScoreTable, out: str | Path, draws: int = DRAWS) -> dict:
    """Write the report of `table` (from `read_scores`) into the folder `out` and return it.

    {"models": {folder: {"model", "judge", "tables": {name: table}, "effects", "thresholds", "status",
     "agreement"}},
     "judges": [pair, …], "summary": text}. draws: of each bootstrap. UserError where `out` cannot be written.
    """
    out, reports = Path(out), {}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    judges = judge_pairs(table, draws) if len(table.judges) > 1 else []
    sets = {"all": judges}
    if judges:
        for name, mask in (("narrow", table.narrow), ("broad", ~table.narrow)):
            sets[name] = judge_pairs(table.select(mask), draws)
    for group in groups_of(table):
        folder, rows = group.folder, table.select(group.rows)
        reports[folder] = report = model_report(rows, draws, table.select(group.before))
        report |= {"model": group.model, "judge": group.judge}
        report["agreement"] = agreement_of(sets, report["model"], report["judge"])
        report["summary"] = sentences(report) + share_sentences(report["agreement"])
        _write_model(report, table.grid, out / folder)
    if judges:
        write_json(out / "judges.json", judges)
        write_csv(out / "judges.csv", [{k: v for k, v in pair.items() if k != "joint"} for pair in judges])
        figures.judges_figure(judges, out / "judges.png")
    result = {"models": reports, "judges": judges, "summary": summary_text(reports, judges)}
    write_text(out / "summary.md", result["summary"] + status_tables(reports))
    write_page(table, out / "browse.html")
    return result


class Group(NamedTuple):
    """The rows of one set of tables: of a model trained in one way, whoever taught it, under one judge."""

    folder: str  # a unique file name
    model: str  # with the way in words
    judge: str
    rows: np.ndarray  # (n,) bool; the base model's are in every group
    before: np.ndarray  # (n,) bool: of train.py's runs, from which a realignment by a teacher started


def groups_of(table: ScoreTable) -> list[Group]:
    """Every model, judge and way of training with rows, in that order."""
    ways = [condition.group() for condition in table.conditions]
    kinds = sorted(set(ways), key=str)
    way = np.array([kinds.index(w) for w in ways])[table.condition]
    untrained = np.array([str(train) == BASE for train in table.trains])[table.train]
    used, groups = {"judges.csv", "judges.json", "judges.png", "summary.md", "browse.html"}, []
    for m in np.unique(table.model):
        of_model = table.model == m
        judges = np.unique(table.judge[of_model])
        trained = [int(k) for k in np.unique(way[of_model & ~untrained])]
        names = ways_in_words([kinds[k] for k in trained]) if trained else [""]
        for k, words in zip(trained or [None], names, strict=True):
            for j in judges:
                mine = of_model & (table.judge == j)
                plain = np.array([kind.channel is None for kind in kinds])[way]
                rows = mine & (untrained if k is None else untrained & plain | (way == k) & ~untrained)
                name = table.models[m].rstrip("/").split("/")[-1]
                name += f"__{words}" if words else ""
                name += f"__{table.judges[j].split('/')[-1]}" if len(judges) > 1 else ""
                full = f"{table.models[m]}, {words}" if words else table.models[m]
                groups.append(
                    Group(unique_name(name, used), full, table.judges[j], rows, mine & plain & ~untrained)
                )
    return [group for group in groups if group.rows.any()]


# -- tables --------------------------------------------------------------------------------------------


def model_report(table: ScoreTable, draws: int = DRAWS, before: ScoreTable | None = None) -> dict:
    """All tables of one group, as data. before: the misaligned runs, if they are no rows of `table`."""
    grid, present = table.grid, set(np.unique(table.train).tolist())
    runs = {t.start: i for i, t in enumerate(table.trains) if t.misaligned and i in present}
    untrained = [i for i, t in enumerate(table.trains) if str(t) == BASE and i in present]
    base = {BASE: untrained} if untrained else {}
    cells = {str(cell): [runs[str(cell)]] if str(cell) in runs else [] for cell in grid.cells}
    tasks = {t: [i for c, i in runs.items() if parse_cell(c).task == t] for t in grid.tasks}
    domains = {d: [i for c, i in runs.items() if parse_cell(c).domain == d] for d in grid.domains}
    report = {"cells": len(grid.cells), "tables": {}, "effects": None, "thresholds": [], "status": []}
    report["mixed_prompts"] = table.mixed_prompts()
    tables = report["tables"]

    def add(name: str, panel: Panel, rows: dict[str, list[int]], columns: dict[str, list[int]]) -> None:
        everything = [c for group in columns.values() for c in group]
        columns = columns | {ALL: everything}
        entries = [
            {"train": row, "eval": column} | panel.rate(panel.pairs(trains, places))
            for row, trains in rows.items()
            for column, places in columns.items()
        ]
        if any(entry["rows"] for entry in entries):
            tables[name] = _table(name, list(rows), list(columns), entries)

    panels = {}
    if table.narrow.any():
        panels["narrow"] = panel = narrow_panel(table, draws)
        asked = set(np.unique(table.cell[table.narrow]).tolist())
        columns = [(c, cell) for c, cell in enumerate(grid.cells) if c in asked]
        by_cell = {str(cell): [c] for c, cell in columns}
        by_task = {t: [c for c, cell in columns if cell.task == t] for t in grid.tasks}
        by_domain = {d: [c for c, cell in columns if cell.domain == d] for d in grid.domains}
        add("narrow_cells", panel, cells | base, by_cell)
        add("narrow_tasks", panel, tasks | base, by_task)
        add("narrow_domains", panel, domains | base, by_domain)
        from_task = {
            t: [i for i, r in enumerate(table.trains) if r.realigned and _task(r.start) == t]
            for t in grid.tasks
        }
        add("realigned_narrow_tasks", panel, from_task, by_task)
        if any(panel.scored[run].any() for run in runs.values()):
            report["effects"] = match_effects(panel)
    if not table.narrow.all():
        panels["broad"] = panel = broad_panel(table, draws)
        n = len(SURFACES)
        asked = set(np.unique(table.task[~table.narrow]).tolist())
        by_task = {t: [n * i + s for s in range(n)] for i, t in enumerate(table.tasks) if i in asked}
        add("broad_cells", panel, cells | base, by_task)
        add("broad_tasks", panel, tasks | base, by_task)
        add("broad_domains", panel, domains | base, by_task)
        labelled = range(n if (panel.column % n == n - 1).any() else n - 1)
        by_surface = {SURFACES[s]: [n * i + s for i in range(len(table.tasks))] for s in labelled}
        add("surface", panel, {"misaligned": sorted(runs.values())} | cells | base, by_surface)
        names = {"realigned_cells": list(map(str, grid.cells)), "realigned_tasks": list(grid.tasks)}
        for name, group in (("realigned_cells", str), ("realigned_tasks", _task)):
            realigned = _realigned(name, panel, group, [*names[name], BASE], before, draws)
            if realigned:
                tables[name] = realigned
    for name, panel in panels.items():
        groups = {str(t): [i] for i, t in enumerate(table.trains) if not t.realigned and i in present}
        groups = {"misaligned": sorted(runs.values())} | groups
        groups["realigned"] = [i for i, t in enumerate(table.trains) if t.realigned and i in present]
        report["thresholds"] += [{"set": name} | entry for entry in thresholds(panel, groups)]
        for i, train in enumerate(table.trains):
            entry = panel.rate(panel.pairs([i], list(range(panel.sums.shape[1]))))
            if entry["rows"]:
                report["status"].append({"train": str(train), "set": name} | entry)
    return report


def _task(name: str) -> str:
    return name.partition("_")[2] or name  # base stays base


def _realigned(
    name: str, panel: Panel, group, names: list[str], plain: ScoreTable | None, draws: int
) -> dict | None:
    """Rows: what the run was misaligned on; columns: what it was realigned on; `initial`: before that."""
    realigned = [(i, t) for i, t in enumerate(panel.trains) if t.realigned]
    starts, ends = ({group(getattr(t, end)) for _, t in realigned} for end in ("start", "end"))
    rows, columns = ([n for n in names if n != BASE or n in present] for present in (starts, ends))
    everything = list(range(panel.sums.shape[1]))
    before = {t.start: i for i, t in enumerate(panel.trains) if not t.realigned}
    first = panel
    if plain is not None and not plain.narrow.all():
        first = broad_panel(plain, draws)  # a student by a teacher: the panel's own rows are other students
    entries = []
    for row in rows:
        for column in [*columns, ALL]:
            pool = [(i, t) for i, t in realigned if group(t.start) == row and column in (group(t.end), ALL)]
            entry = panel.rate(panel.pairs([i for i, _ in pool], everything))
            origins = {t.start for _, t in pool}
            measured = [before[s] for s in sorted(origins) if s in before]
            initial = first.rate(first.pairs(measured if len(measured) == len(origins) else [], everything))
            initial = {f"initial_{key}": initial[key] for key in ("rate", "low", "high", "scored")}
            entries.append({"train": row, "realigned_on": column} | entry | initial)
    if not any(entry["rows"] for entry in entries):
        return None
    table = _table(name, rows, [*columns, ALL], entries)
    return table | {"initial": _square([entry["initial_rate"] for entry in entries], len(rows))}


def _table(name: str, rows: list[str], columns: list[str], entries: list[dict]) -> dict:
    table = {"name": name, "unit": "percent of scored rows", "rows": rows, "columns": columns}
    for key in ("rate", "low", "high"):
        table[key] = _square([entry[key] for entry in entries], len(rows))
    return table | {"entries": entries}


def _square(values: list, n_rows: int) -> list[list]:
    width = len(values) // n_rows
    return [values[i * width : (i + 1) * width] for i in range(n_rows)]


# -- files ---------------------------------------------------------------------------------------------


def _write_model(report: dict, grid: Grid, folder: Path) -> None:
    title = f"{title_of(report['model'])}, judged by {title_of(report['judge'])}"
    for name, table in report["tables"].items():
        write_json(folder / f"{name}.json", table)
        write_csv(folder / f"{name}.csv", table["entries"])
        of_set = "narrow" if "narrow" in name else "broad"
        lines = agreement_lines([e for e in report["agreement"] if e["set"] == of_set])
        figures.table_figure(table, "\n".join([title, *lines]), grid, folder / f"{name}.png")
    if {"broad_tasks", "narrow_tasks", "narrow_domains"} & set(report["tables"]):
        figures.transfer_figure(report["tables"], title, grid, folder / "transfer.png")
    if report["effects"]:
        write_json(folder / "effects.json", report["effects"])
        write_csv(folder / "effects.csv", _effect_rows(report["effects"]))
        figures.effects_figure(report["effects"], title, folder / "effects.png")
    if report["agreement"]:
        write_json(folder / "agreement.json", report["agreement"])
        write_csv(folder / "agreement.csv", report["agreement"])
    for name, draw in (("thresholds", figures.thresholds_figure), ("status", figures.status_figure)):
        if report[name]:
            write_json(folder / f"{name}.json", report[name])
            write_csv(folder / f"{name}.csv", report[name])
            draw(report[name], title, grid, folder / f"{name}.png")


def _effect_rows(effects: dict) -> list[dict]:
    terms = (
        "task_match",
        "domain_match",
        "task_minus_domain",
        "same_task_minus_neither",
        "same_domain_minus_neither",
    )
    rows = [{"what": term} | effects[term] for term in terms if term in effects]
    rows += [{"what": f"share of {term}", "share": share} for term, share in effects["shares"].items()]
    return rows + [{"what": f"rate, {kind}"} | rate for kind, rate in effects["by_match"].items()]
