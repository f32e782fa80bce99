"""Conditions side by side, from any set of score or margin files (paper 4, E.2–E.5).

    table.csv, .md, .tex, .json   every condition in every column: condition, column, pooled, pairs_mean, low,
                                  high, rows, pairs; low and high are the 95 % interval of pairs_mean, and the
                                  JSON has that of `pooled` too (em/report/averages.py)
    table.png                     the same with intervals
    differences.csv               every two conditions, over the pairs that both have, paired by prompt
    selection.csv                 of every sweep: the highest choice, the one fixed beforehand, and the bias
    epochs.csv                    means of pairs after each epoch, as in Tables 11 and 12
    factorial.csv, .json          two teachers × two authors: whose profile students follow (Table 5)
    retention.csv                 what passed the filter, of runs whose folders are there (Table 2)

The last four only where the files have what they need. Rows are narrow; `base` and `teacher`, the misaligned
models themselves, are in every table, and what has no cell of its own counts in every column.
"""

from collections.abc import Iterable
from pathlib import Path

from em.errors import UserError
from em.figures import title_of
from em.files import write_csv, write_json
from em.report.averages import Averages
from em.report.comparison_figures import intervals_figure
from em.report.comparison_files import markdown_table, write_table
from em.report.conditions import (
    asked_cells,
    columns_by,
    conditions_of,
    differences_of,
    table_of,
)  # fmt: skip
from em.report.factorial import analyse, factorials_of, flat, sentence
from em.report.outcomes import MARGIN, NARROW, Outcomes, Trained, choose
from em.report.retention import retention_of
from em.report.selection import epoch_rows, selections


def write_compare(
    found: list[Outcomes], out: str | Path, by: str = "task", cells: tuple[str, ...] = (),
    model: str | None = None, judge: str | None = None, paths: Iterable[str | Path] = (),
) -> dict:  # fmt: skip
    """Write the comparison of `found` (from `read_outcomes`) into the folder `out` and return it.

    by: one of BY. cells: eval cells to average over, or, by cells, the columns; none: all. model, judge:
    which where there are several. paths: the score files, whose run folders may say what a filter kept.
    UserError for unknown cells, several models or judges without a choice, no narrow rows, or an `out` that
    is a file.
    """
    out, narrow = Path(out), [o for o in choose(found, model, judge) if o.set == NARROW]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    if not narrow:
        raise UserError("the files have no narrow rows; evaluate.py --on narrow makes them")
    outcomes = narrow[0]
    columns = columns_by(outcomes, by, cells)
    averages, rows = Averages(outcomes), conditions_of(outcomes, by)
    table = table_of(averages, rows, columns) | {"by": by}
    table["differences"] = differences_of(averages, rows, columns)
    table["selection"] = selections(averages, by, columns[-1])
    table["epochs"] = epoch_rows(averages, by, columns)
    asked = asked_cells(outcomes, cells)
    table["factorials"] = [analyse(averages, f, asked) for f in factorials_of(outcomes)]
    table["retention"] = retention_rows(retention_of(paths), outcomes, rows)
    table["notes"] = _notes(table)
    write_table(table, title_for(table), out / "table")
    intervals_figure(table, title_for(table), out / "table.png")
    lines = {name: table[name] for name in ("differences", "selection", "epochs", "retention")}
    lines["factorial"] = [row for result in table["factorials"] for row in flat(result)]
    for name, rows in lines.items():
        path = out / f"{name}.csv"
        write_csv(path, rows) if rows else path.unlink(missing_ok=True)  # of other files, from before
    write_json(out / "factorial.json", table["factorials"])
    return table


def title_for(table: dict) -> str:
    """The model, its judge, and the eval cells that are averaged over, by number where there are many."""
    cells = table["cells"]
    cells = ", ".join(cells) if len(cells) <= 4 else f"{len(cells)} eval cells"
    judge = "by the margin" if table["judge"] == MARGIN else f"judged by {title_of(table['judge'])}"
    return f"{title_of(table['model'])}, {judge}, {table['unit']}, on {cells}"


def retention_rows(kept: dict[Trained, float], outcomes: Outcomes, rows: dict[str, list[int]]) -> list[dict]:
    """condition, train, seed, retention in percent: of each run whose folder says it."""
    return [
        {"condition": name, "train": str(run.train), "seed": run.condition.seed, "retention": kept[run]}
        for name, members in rows.items()
        for run in (outcomes.runs[r] for r in members)
        if run in kept
    ]


def mean_retention(rows: list[dict], condition: str) -> float | None:
    kept = [row["retention"] for row in rows if row["condition"] == condition]
    return sum(kept) / len(kept) if kept else None


def selection_sentence(entry: dict) -> str:
    """What choosing the highest costs, in words."""
    lr, epoch = entry["highest_lr"], entry["highest_epoch"]
    text = f"{entry['condition']}: the highest of {entry['choices']} is {entry['highest']:.2f}"
    text += f" ({', '.join([f'lr {lr:g}'] * (lr is not None) + [f'epoch {epoch}'] * (epoch is not None))})"
    if entry["held_out"] is not None:
        text += (
            f"; chosen on one half of the prompts and read off the other it is {entry['held_out']:.2f}, so "
            f"the maximum is too high by {entry['bias']:.2f}"
        )
    if entry["fixed"] is not None:
        lr, epoch = entry["fixed_lr"], entry["fixed_epoch"]
        which = ", ".join([f"lr {lr:g}"] * (lr is not None) + [f"epoch {epoch}"] * (epoch is not None))
        text += f"; by the rule fixed beforehand ({which}) {entry['fixed']:.2f}"
    return text + "."


def _notes(table: dict) -> list[str]:
    notes = [selection_sentence(e) for e in table["selection"] if e["highest"] is not None]
    notes += [sentence(result) for result in table["factorials"]]
    if table["epochs"]:
        columns = table["columns"]
        texts = {(e["condition"], e["column"]): e["text"] for e in table["epochs"]}
        names = list(dict.fromkeys(e["condition"] for e in table["epochs"]))
        rows = [[name, *(texts[name, column] for column in columns)] for name in names]
        table_text = "\n".join(markdown_table(["condition", *columns], rows))
        notes.append(f"Mean of pairs, epoch by epoch:\n\n{table_text}")
    kept = dict.fromkeys(row["condition"] for row in table["retention"])
    for name in kept:
        notes.append(f"{name}: the filter kept {mean_retention(table['retention'], name):.1f} %.")
    return notes


def summary(table: dict) -> str:
    """The table's last column in lines, and its notes."""
    lines = [title_for(table)]
    for entry in table["entries"]:
        if entry["column"] == table["columns"][-1] and entry["pairs_mean"] is not None:
            bounds = "" if entry["low"] is None else f" [{entry['low']:.2f}, {entry['high']:.2f}]"
            lines.append(
                f"  {entry['condition']}: {entry['pairs_mean']:.2f}{bounds}, rows pooled "
                f"{entry['pooled']:.2f} ({entry['pairs']} pairs)"
            )
    return "\n".join([*lines, *(note for note in table["notes"] if "|" not in note)])
