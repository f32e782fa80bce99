"""The report: every table and figure of the paper's natural-language results, from score rows.

One folder for each model, or model and judge where a model has several judges, holds as CSV, JSON and PNG

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

import numpy as np

from em.data.cells import CELLS, DOMAINS, TASKS
from em.data.lineage import BASE, STARTS
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
    for folder, model, judge in folders_of(table):
        rows = table.select((table.model == model) & (table.judge == judge))
        reports[folder] = report = model_report(rows, draws)
        report |= {"model": table.models[model], "judge": table.judges[judge]}
        report["agreement"] = agreement_of(sets, report["model"], report["judge"])
        report["summary"] = sentences(report) + share_sentences(report["agreement"])
        _write_model(report, out / folder)
    if judges:
        write_json(out / "judges.json", judges)
        write_csv(out / "judges.csv", [{k: v for k, v in pair.items() if k != "joint"} for pair in judges])
        figures.judges_figure(judges, out / "judges.png")
    result = {"models": reports, "judges": judges, "summary": summary_text(reports, judges)}
    write_text(out / "summary.md", result["summary"] + status_tables(reports))
    write_page(table, out / "browse.html")
    return result


def folders_of(table: ScoreTable) -> list[tuple[str, int, int]]:
    """(folder, model, judge) for every model and judge with rows; the folders are unique file names."""
    present = np.unique(np.stack([table.model, table.judge], axis=1), axis=0).tolist()
    judges_of = {model: [j for m, j in present if m == model] for model, _ in present}
    used, folders = {"judges.csv", "judges.json", "judges.png", "summary.md", "browse.html"}, []
    for model, judge in present:
        name = table.models[model].rstrip("/").split("/")[-1]
        name += f"__{table.judges[judge].split('/')[-1]}" if len(judges_of[model]) > 1 else ""
        folders.append((unique_name(name, used), model, judge))
    return folders


# -- tables --------------------------------------------------------------------------------------------


def model_report(table: ScoreTable, draws: int = DRAWS) -> dict:
    """All tables of one model under one judge, as data."""
    runs = {t.start: i for i, t in enumerate(table.trains) if t.misaligned}
    untrained = [i for i, t in enumerate(table.trains) if str(t) == BASE]
    base = {BASE: untrained} if untrained else {}
    cells = {str(cell): [runs[c]] if c in runs else [] for c, cell in enumerate(CELLS)}
    tasks = {t: [runs[c] for c in runs if CELLS[c].task == t] for t in TASKS}
    domains = {d: [runs[c] for c in runs if CELLS[c].domain == d] for d in DOMAINS}
    report = {"tables": {}, "effects": None, "thresholds": [], "status": []}
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
        by_cell = {str(cell): [c] for c, cell in enumerate(CELLS)}
        by_task = {t: [c for c, cell in enumerate(CELLS) if cell.task == t] for t in TASKS}
        by_domain = {d: [c for c, cell in enumerate(CELLS) if cell.domain == d] for d in DOMAINS}
        add("narrow_cells", panel, cells | base, by_cell)
        add("narrow_tasks", panel, tasks | base, by_task)
        add("narrow_domains", panel, domains | base, by_domain)
        from_task = {
            t: [i for i, r in enumerate(table.trains) if r.end >= 0 and _task(r.start) == t] for t in TASKS
        }
        add("realigned_narrow_tasks", panel, from_task, by_task)
        if any(panel.scored[run].any() for run in runs.values()):
            report["effects"] = match_effects(panel)
    if not table.narrow.all():
        panels["broad"] = panel = broad_panel(table, draws)
        n = len(SURFACES)
        by_task = {t: [n * i + s for s in range(n)] for i, t in enumerate(TASKS)}
        add("broad_cells", panel, cells | base, by_task)
        add("broad_tasks", panel, tasks | base, by_task)
        add("broad_domains", panel, domains | base, by_task)
        labelled = range(n if (panel.column % n == n - 1).any() else n - 1)
        by_surface = {SURFACES[s]: [n * i + s for i in range(len(TASKS))] for s in labelled}
        add("surface", panel, {"misaligned": sorted(runs.values())} | cells | base, by_surface)
        for name, group in (("realigned_cells", _cell), ("realigned_tasks", _task)):
            realigned = _realigned(name, panel, group)
            if realigned:
                tables[name] = realigned
    for name, panel in panels.items():
        groups = {str(t): [i] for i, t in enumerate(table.trains) if t.end < 0}
        groups = {"misaligned": sorted(runs.values())} | groups
        groups["realigned"] = [i for i, t in enumerate(table.trains) if t.end >= 0]
        report["thresholds"] += [{"set": name} | entry for entry in thresholds(panel, groups)]
        for i, train in enumerate(table.trains):
            entry = panel.rate(panel.pairs([i], list(range(panel.sums.shape[1]))))
            if entry["rows"]:
                report["status"].append({"train": str(train), "set": name} | entry)
    return report


def _cell(place: int) -> str:
    return STARTS[place]


def _task(place: int) -> str:
    return STARTS[place].split("_")[-1]  # base stays base


def _realigned(name: str, panel: Panel, group) -> dict | None:
    """Rows: what the run was misaligned on; columns: what it was realigned on; `initial`: before that."""
    realigned = [(i, t) for i, t in enumerate(panel.trains) if t.end >= 0]
    starts, ends = ({group(getattr(t, end)) for _, t in realigned} for end in ("start", "end"))
    names = list(dict.fromkeys(map(group, range(len(STARTS)))))
    rows, columns = ([n for n in names if n != BASE or n in present] for present in (starts, ends))
    everything = list(range(panel.sums.shape[1]))
    before = {t.start: i for i, t in enumerate(panel.trains) if t.end < 0}
    entries = []
    for row in rows:
        for column in [*columns, ALL]:
            pool = [(i, t) for i, t in realigned if group(t.start) == row and column in (group(t.end), ALL)]
            entry = panel.rate(panel.pairs([i for i, _ in pool], everything))
            origins = {t.start for _, t in pool}
            measured = [before[s] for s in sorted(origins) if s in before]
            initial = panel.rate(panel.pairs(measured if len(measured) == len(origins) else [], everything))
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


def _write_model(report: dict, folder: Path) -> None:
    title = f"{title_of(report['model'])}, judged by {title_of(report['judge'])}"
    for name, table in report["tables"].items():
        write_json(folder / f"{name}.json", table)
        write_csv(folder / f"{name}.csv", table["entries"])
        of_set = "narrow" if "narrow" in name else "broad"
        lines = agreement_lines([e for e in report["agreement"] if e["set"] == of_set])
        figures.table_figure(table, "\n".join([title, *lines]), folder / f"{name}.png")
    if {"broad_tasks", "narrow_tasks", "narrow_domains"} & set(report["tables"]):
        figures.transfer_figure(report["tables"], title, folder / "transfer.png")
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
            draw(report[name], title, folder / f"{name}.png")


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
