"""The forms that the paper's natural-language figures have: panels of bars or matrices, of one model's runs.

A form takes `Files` and gives its panels as "parts", tables of `em.report.conditions.table_of` with a "form".
"""

from collections.abc import Callable, Iterable

from em.data.condition import BASE, CHANNELS
from em.report.averages import Averages
from em.report.conditions import Column, columns_by, part_of, table_of
from em.report.outcomes import BROAD, MARGIN, NARROW, SURFACE, Outcomes
from em.report.paper_forms import Files, Needs, ruled
from em.report.score_table import ALL, SURFACES


def _grouped(o: Outcomes, runs: list[int], by: str, base: list[int]) -> dict[str, list[int]]:
    """Runs by their cell, its task or its domain, in the grid's order; base below."""
    names = {"task": o.grid.tasks, "domain": o.grid.domains}.get(by) or tuple(map(str, o.grid.cells))
    groups = {n: [r for r in runs if o.runs[r].cell and part_of(o.runs[r].cell, by) == n] for n in names}
    groups = {name: members for name, members in groups.items() if members}
    return groups | ({BASE: base} if base and groups else {})


def _asked(o: Outcomes, by: str) -> list[Column]:
    """Eval columns: cells, or these by task or domain; of broad prompts the tasks."""
    groups: dict[str, list[int]] = {}
    for c, name in enumerate(o.columns):
        groups.setdefault(part_of(name, by) if o.set == NARROW else name, []).append(c)
    names = {"task": o.grid.tasks, "domain": o.grid.domains}.get(by, ())
    order = [n for n in names if n in groups] + [n for n in groups if n not in names]
    columns = [Column(name, lambda run: True, groups[name]) for name in order]
    return [*columns, Column(ALL, lambda run: True, sorted(c for g in groups.values() for c in g))]


def _panel(averages: Averages, rows: dict, columns: list[Column], title: str, form: str, **more) -> dict:
    if not any(name != BASE for name in rows):
        raise Needs(more["lacking"])
    table = table_of(averages, rows, columns)
    return table | {"title": title, "form": form, "corner": "trained on", "across": "evaluated on"} | more


def _panels(makers: Iterable[Callable[[], dict]]) -> dict:
    """The panels that can be made; Needs where none can."""
    panels, needs = [], []
    for make in makers:
        try:
            panels.append(make())
        except Needs as lack:
            needs += [str(lack)] * (str(lack) not in needs)
    if not panels:
        raise Needs("; ".join(needs))
    for letter, panel in zip("abcdefgh", panels, strict=False):
        panel["part"] = letter
        panel.pop("lacking", None)
    return {"parts": panels, "needs": needs}


def _misaligned(files: Files, name: str, by: str, asked_by: str, title: str, form: str) -> dict:
    """Runs of train.py by what they were misaligned on, against what they were asked."""
    averages = files.averages(name)
    rows = _grouped(averages.outcomes, files.runs(name, "teacher"), by, files.runs(name, "base"))
    lacking = "misaligned runs of train.py"
    return _panel(averages, rows, _asked(averages.outcomes, asked_by), title, form, lacking=lacking)


def transfer(files: Files) -> dict:
    """Figures 2, 12, 13."""
    return _panels([
        lambda: _misaligned(files, BROAD, "task", "task", "broad prompts, by task", "bars"),
        lambda: _misaligned(files, NARROW, "task", "task", "narrow cells, by task", "bars"),
        lambda: _misaligned(files, NARROW, "domain", "domain", "narrow cells, by domain", "matrix"),
    ])  # fmt: skip


def surface(files: Files) -> dict:
    """Figures 3b, 17."""

    def panel() -> dict:
        averages = files.averages(SURFACE)
        o = averages.outcomes
        order = [s for s in SURFACES[:3] if s in o.columns]
        if not order:
            raise Needs("broad prompts with a label of their surface (evaluate.py surface)")
        columns = [Column(s, lambda run: True, [o.columns.index(s)]) for s in order]
        rows = {"misaligned": files.runs(SURFACE, "teacher"), BASE: files.runs(SURFACE, "base")}
        rows = {name: runs for name, runs in rows.items() if runs}
        lacking = "misaligned runs of train.py"
        return _panel(averages, rows, columns, "broad prompts, by EM surface", "bars", lacking=lacking)

    return _panels([panel])


def cell_matrices(files: Files) -> dict:
    """Figures 14–16."""
    return _panels([
        lambda: _misaligned(files, NARROW, "teacher", "teacher", "narrow eval cells", "matrix"),
        lambda: _misaligned(files, BROAD, "teacher", "task", "broad prompts, by task", "matrix"),
    ])  # fmt: skip


def realigned(files: Files, by: str) -> dict:
    """Figures 3c, 18 by task and 19–21 by cell: broad EM after aligned rows, and before.

    Margins, which broad prompts have none of, are of the narrow cells.
    """
    asked = NARROW if files.judge == MARGIN else BROAD
    prompts = "narrow cells" if asked == NARROW else "broad prompts"

    def panel() -> dict:
        averages = files.averages(asked)
        o, before = averages.outcomes, files.runs(asked, "teacher")
        rows = _grouped(o, files.runs(asked, "realigned"), by, files.runs(asked, "base"))
        starts = _grouped(o, before, by, [])
        ends = {run.train.end for r in files.runs(asked, "realigned") for run in [o.runs[r]]}
        names = {"task": o.grid.tasks}.get(by) or tuple(map(str, o.grid.cells))
        all_asked = list(range(len(o.columns)))
        columns = [
            Column(n, lambda run, n=n: bool(run.train.end) and part_of(run.train.end, by) == n, all_asked)
            for n in names
            if n in {part_of(end, by) for end in ends if end != BASE}
        ]
        columns.append(Column("before", lambda run: not run.train.end, all_asked))
        joined = {name: runs + (starts.get(name, []) if name != BASE else []) for name, runs in rows.items()}
        lacking = "realignments of train.py (--on a misaligned run)"
        return _panel(
            averages, joined, columns, f"{prompts}, after realignment", "matrix", lacking=lacking,
            corner="misaligned on", across="realigned on",
        )  # fmt: skip

    return _panels([panel])


def realigned_by_teacher(files: Files) -> dict:
    """Figures 5, 25, 26: a panel a channel, and what it was before."""

    def panel(channel: str) -> dict:
        averages = files.averages()
        choices = files.choices("task", channel, kind="realigned")
        rows = ruled(files, channel, choices, columns_by(averages.outcomes, "task")[-1], both=False)
        runs = [r for members in rows.values() for r in members]
        rows = _grouped(averages.outcomes, runs, "task", files.runs(NARROW, "base"))
        return _panel(
            averages, rows, _asked(averages.outcomes, "task"), channel, "matrix",
            lacking=f"students of {channel} with --on a misaligned run", corner="misaligned on",
        )  # fmt: skip

    found = _panels([lambda channel=channel: panel(channel) for channel in CHANNELS])
    try:
        before = _misaligned(files, NARROW, "task", "task", "before", "matrix") | {"corner": "misaligned on"}
        before.pop("lacking")
        found["parts"].append(before | {"part": "abcd"[len(found["parts"])]})
    except Needs as lack:
        found["needs"].append(str(lack))
    return found


def student_matrices(files: Files) -> dict:
    """Figures 22–24: a panel a channel, the teacher's cell by the eval cell, the highest choice."""

    def panel(channel: str) -> dict:
        averages = files.averages()
        choices = files.choices("task", channel)
        rows = ruled(files, channel, choices, columns_by(averages.outcomes, "task")[-1])
        name, runs = next(iter(rows.items()), (channel, []))
        rows = _grouped(averages.outcomes, runs, "teacher", files.runs(NARROW, "base"))
        return _panel(
            averages, rows, _asked(averages.outcomes, "teacher"), name, "matrix",
            lacking=f"students of {channel}", corner="teacher misaligned on",
        )  # fmt: skip

    return _panels([lambda channel=channel: panel(channel) for channel in CHANNELS])
