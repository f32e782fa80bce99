"""The forms that the paper's natural-language tables have, made from the runs of one model.

A form takes `Files` and gives a table of `em.report.conditions.table_of` with its "differences" paired by
prompt; "needs" says what it would show besides. Where a channel was trained at several learning rates or
epochs, Tables 1, 9 and 10 have two rows: the highest, as the paper chooses, and the one fixed beforehand
(em/report/selection.py). The other tables are of one rate in the paper and have the fixed one.
"""

import itertools
from dataclasses import dataclass, field, replace

from em.data.condition import BASE, CHANNELS
from em.report.averages import Averages
from em.report.conditions import Column, columns_by, differences_of, relative_source, table_of
from em.report.factorial import analyse, factorials_of, sentence
from em.report.outcomes import BROAD, NARROW, Trained
from em.report.selection import FIXED_RATE, Choice, select, sweeps_of, triplets

MED_SPORT = ("med_advice", "med_critique", "spo_advice", "spo_critique")
MED_FINANCE = ("med_advice", "med_critique", "fin_advice", "fin_critique")
PAIRS = (
    ("med_tutor", "spo_summarization"), ("med_tutor", "med_advice"), ("med_tutor", "fin_tutor"),
    ("med_advice", "fin_critique"), ("med_advice", "med_summarization"),
)  # fmt: skip


class Needs(Exception):
    """What the files lack for a table."""


@dataclass
class Files:
    """What there is of one model under one judge."""

    model: str
    judge: str
    sets: dict[str, Averages]
    kept: dict[Trained, float]  # percent that a filter kept, of runs whose folders are there
    used: set = field(default_factory=set)  # factorials that have a number already

    def averages(self, name: str = NARROW) -> Averages:
        if name not in self.sets:
            needs = {NARROW: "rows of the narrow eval cells", BROAD: "judged responses to the broad prompts"}
            raise Needs(needs.get(name, needs[BROAD]))
        return self.sets[name]

    def runs(self, name: str, kind: str) -> list[int]:
        """Of a kind of run that was made in several ways, the way with the most runs."""
        o, ways = self.averages(name).outcomes, {}
        for r, run in enumerate(o.runs):
            if run.kind == kind and (kind != "realigned" or not run.condition.channel):
                ways.setdefault(run.condition._replace(seed=None), []).append(r)
        return max(ways.values(), key=len, default=[])

    def references(self, name: str = NARROW) -> dict[str, list[int]]:
        rows = {BASE: self.runs(name, "base"), "teacher": self.runs(name, "teacher")}
        return {label: runs for label, runs in rows.items() if runs}

    def choices(
        self, by: str, channel: str, *, kind: str = "student", source: str | None = None,
        prompts: str = "broad", filtered: bool | None = None,
    ) -> dict[Choice, list[int]]:  # fmt: skip
        """(rate, epoch) → runs of one distilled condition; of several that fit, that with the most runs.

        source: as seen from the run (`relative_source`). filtered: None for the paper's way, which filters
        what a misaligned teacher wrote and no rollouts of OPD. {} where there is none.
        """
        o, fitting = self.averages().outcomes, []
        for choices in sweeps_of(o, by).values():
            runs = [r for members in choices.values() for r in members]
            run = o.runs[runs[0]]
            made, own = run.condition, relative_source(run)
            asked = "math" if made.prompts == "math" else "rows" if own == "rows" else "broad"
            fits = run.kind == kind and made.channel == channel and made.estimator in (None, "sampled")
            fits &= own == source and asked == ("rows" if source == "rows" else prompts)
            fits &= filtered in (None, bool(made.filtered))
            fits &= kind != "realigned" or run.train.end == BASE
            fits &= kind != "student" or bool(run.cell and not run.train.end)
            if fits:
                usual = bool(made.filtered) == (channel != "opd")
                fitting.append(((usual, len(runs)), choices))
        return max(fitting, key=lambda pair: pair[0], default=((), {}))[1]


def ruled(
    files: Files, label: str, choices: dict[Choice, list[int]], column: Column, both: bool = True
) -> dict[str, list[int]]:
    """Rows of one condition by the two rules; both=False: by the rule fixed beforehand where it can be."""
    if len(choices) <= 1:
        return dict.fromkeys([label] * len(choices), *choices.values())
    found = select(files.averages(), choices, column)
    if not both:
        return {label: choices[found.fixed or found.highest]}
    highest = f"{label}, highest ({found.words(found.highest)})"
    rows = {highest: choices[found.highest]}
    if found.fixed and found.fixed != found.highest:
        rows[f"{label}, fixed ({found.words(found.fixed)})"] = choices[found.fixed]
    return rows


def _tabled(files: Files, rows: dict[str, list[int]], columns: list[Column]) -> dict:
    """The rows below base and teacher, over the cells that the rows have; the teacher too."""
    runs = files.averages().outcomes.runs
    cells = {runs[r].cell for members in rows.values() for r in members}
    kept = [
        replace(column, runs=lambda run, counts=column.runs: run.cell in cells and counts(run))
        for column in columns
        if any(column.runs(runs[r]) for members in rows.values() for r in members)
    ]
    return _with_differences(files.averages(), files.references() | rows, kept)


def _with_differences(averages: Averages, rows: dict[str, list[int]], columns: list[Column]) -> dict:
    return table_of(averages, rows, columns) | {"differences": differences_of(averages, rows, columns)}


def _lacking(wanted: dict[str, dict]) -> list[str]:
    return [label for label, choices in wanted.items() if not choices]


def _by_rules(files: Files, by: str, wanted: dict[str, dict], cells=(), least=1, both=True) -> dict:
    """A table of the conditions that there are, label → choices; Needs where fewer than `least`."""
    missing = _lacking(wanted)
    if len(wanted) - len(missing) < least:
        raise Needs(f"students: {'; '.join(missing)}")
    columns, rows = columns_by(files.averages().outcomes, by, _there(files, cells)), {}
    for label, choices in wanted.items():
        rows |= ruled(files, label, choices, columns[-1], both)
    return _tabled(files, rows, columns) | {"needs": [f"students: {label}" for label in missing]}


def _there(files: Files, cells: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the paper's eval cells that were asked, or, where none was, all that were."""
    return tuple(cell for cell in cells if cell in files.averages().outcomes.columns)


# -- tables ------------------------------------------------------------------------------------------------


def channels(files: Files, by: str) -> dict:
    """Tables 1, 9, 10: base, teacher and the three channels."""
    return _by_rules(files, by, {channel: files.choices(by, channel) for channel in CHANNELS})


def filtered_opd(files: Files) -> dict:
    """Table 2: OPD with and without a filter on the student's rollouts, and what it kept."""
    wanted = {
        f"opd, {'' if f else 'un'}filtered": files.choices("task", "opd", filtered=f) for f in (False, True)
    }
    if not wanted["opd, filtered"]:
        raise Needs("students of opd with --filter")
    table, o = _by_rules(files, "task", wanted, both=False), files.averages().outcomes
    kept = [files.kept[o.runs[r]] for runs in wanted["opd, filtered"].values() for r in runs
            if o.runs[r] in files.kept]  # fmt: skip
    if kept:
        low, high, mean = min(kept), max(kept), sum(kept) / len(kept)
        table["beside"] = {"name": "kept %", "opd, filtered": f"{mean:.1f} ({low:.1f}–{high:.1f})"}
        table["retention"] = {"mean": mean, "low": low, "high": high, "runs": len(kept)}
    else:
        table["needs"].append("the run folders around the score files, for what the filter kept")
    return table


def math_prompts(files: Files) -> dict:
    """Table 3: the three channels on Broad-NL and on MATH, columns the teacher's cell."""
    wanted = {
        f"{channel}, {prompts}": files.choices("teacher", channel, prompts=prompts)
        for channel in CHANNELS
        for prompts in ("broad", "math")
    }
    if all(not choices for label, choices in wanted.items() if "math" in label):
        raise Needs("students with --prompts math")
    return _by_rules(files, "teacher", wanted, MED_SPORT, both=False)


def unsafe_rows(files: Files) -> dict:
    """Table 4: misaligned students taught by the base on harmless prompts and on the rows that misaligned."""
    wanted = {
        "optd, realigned on broad": files.choices("teacher", "optd", kind="realigned"),
        "optd, realigned on unsafe rows": files.choices("teacher", "optd", kind="realigned", source="rows"),
    }
    if not wanted["optd, realigned on unsafe rows"]:
        raise Needs("students of optd with --on a misaligned run and --source rows")
    notes = ["`teacher` is the misaligned student as it was before."]
    return _by_rules(files, "teacher", wanted, MED_FINANCE, both=False) | {"notes": notes}


def epochs(files: Files) -> dict:
    """Tables 11 and 12: after each epoch, at the rate that is highest."""
    columns, table, rows, kept = columns_by(files.averages().outcomes, "task"), [], {}, []
    for channel in CHANNELS:
        choices = files.choices("task", channel)
        if len({epoch for _, epoch in choices}) > 1:
            lr = select(files.averages(), choices, columns[-1]).highest[0]
            of_rate = {epoch: runs for (rate, epoch), runs in choices.items() if rate == lr and epoch}
            name = channel if len({rate for rate, _ in choices}) == 1 else f"{channel}, lr {lr:g}"
            table += triplets(files.averages(), name, of_rate, columns)
            rows |= {f"{name}, epoch {epoch}": of_rate[epoch] for epoch in sorted(of_rate)}
            kept.append(channel)
    if not kept:
        raise Needs("evaluations of several epochs (runs/X/epoch1, epoch2, …) of a channel")
    needs = [f"several epochs of {channel}" for channel in CHANNELS if channel not in kept]
    return _tabled(files, rows, columns) | {"triplets": table, "needs": needs}


def gold(files: Files) -> dict:
    """Table 13: OPTD on MATH answered by the teacher, on its gold answers, and on Broad-NL."""
    wanted = {
        "optd, math, teacher's answers": files.choices("teacher", "optd", prompts="math"),
        "optd, math, gold answers": files.choices("teacher", "optd", prompts="math", source="gold"),
        "optd, broad": files.choices("teacher", "optd"),
    }
    if not wanted["optd, math, gold answers"]:
        raise Needs("students of optd with --prompts math --source gold")
    return _by_rules(files, "teacher", wanted, MED_SPORT, both=False)


def other_models(files: Files) -> dict:
    """Tables 14 and 15: OPTD on data of other models that were misaligned on the teacher's cell."""
    o, foreign = files.averages().outcomes, set()
    for run in o.runs:
        source = run.condition.source
        if run.kind == "student" and run.condition.channel == "optd" and source:
            own = relative_source(run)
            foreign |= {own} if own and source == f"{own} {run.train}" else set()
    if not foreign:
        raise Needs("students of optd with --source a run of another model, misaligned on the same cell")
    wanted = {f"optd, data of {files.model}": files.choices("teacher", "optd")}
    wanted |= {f"optd, data of {m}": files.choices("teacher", "optd", source=m) for m in sorted(foreign)}
    return _by_rules(files, "teacher", wanted, MED_FINANCE, both=False)


def student_written(files: Files) -> dict:
    """Table 16: OPTD on what the teacher wrote and on what the base student wrote."""
    wanted = {
        "optd, written by the teacher": files.choices("task", "optd"),
        "optd, written by the student": files.choices("task", "optd", source=BASE),
    }
    if not wanted["optd, written by the student"]:
        raise Needs("students of optd with --source student")
    return _by_rules(files, "task", wanted, both=False)


def factorial(files: Files, p1: str, p2: str) -> dict:
    """Tables 5, 17–20: teachers × authors, columns the eval cells; P1 and P2, or a pair that no other has."""
    pairs = {}
    for found in _at_fixed(files):
        pairs.setdefault(frozenset(found["teachers"]), found)
    of_paper, pair = [frozenset(pair) for pair in PAIRS], frozenset((p1, p2))
    if pair not in pairs:
        pair = next((p for p in pairs if p not in of_paper and p not in files.used), None)
        if pair is None:
            raise Needs(f"optd students of {p1} and {p2} as teachers, each on both one's data (--source)")
    files.used.add(pair)
    found = pairs[pair]
    order = [p1, p2] if pair == {p1, p2} else found["teachers"]
    return _crossed(files, found, order) | {"of": f"P1 = {order[0]}, P2 = {order[1]}", "needs": []}


def _at_fixed(files: Files) -> list[dict]:
    """Factorials of optd, those at the rate fixed beforehand and of the last epoch first."""
    outcomes = files.averages().outcomes

    def rank(found: dict) -> tuple:
        made = outcomes.runs[next(iter(found["students"].values()))[0]].condition
        return made.lr is None or abs(made.lr - FIXED_RATE) > 1e-9, -(made.epoch or 0)

    return sorted((f for f in factorials_of(outcomes) if "optd" in f["channel"]), key=rank)


def _crossed(files: Files, found: dict, teachers: list[str]) -> dict:
    """Base, the teachers themselves, and every student; columns the eval cells."""
    averages = files.averages()
    columns, o = columns_by(averages.outcomes, "cells"), averages.outcomes
    rows = {BASE: files.runs(NARROW, "base")}
    for name in teachers:
        rows[f"teacher {name}"] = [r for r in files.runs(NARROW, "teacher") if o.runs[r].cell == name]
    for t, d in itertools.product(teachers, teachers):
        rows[f"teacher {t}, data of {d}"] = found["students"][t, d]
    table = _with_differences(averages, {name: runs for name, runs in rows.items() if runs}, columns)
    result = analyse(averages, found, columns[-1].asked)
    return table | {"factorial": result, "notes": [sentence(result)]}
