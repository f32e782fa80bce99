"""The paper's natural-language half as a plan, and as rules of make.

    python -m em.paper.dag plan --model qwen2.5-14b                 what there is to do, hours and dollars
    python -m em.paper.dag make --model qwen2.5-14b --to paper.mk   rules for `make -f paper.mk`

`make plan` and `make paper` call them. The rules are written anew each time, for the parts whose results are
not there; so what a kill interrupted is grouped and balanced again. A rule's target is the file that its
command writes last. A part waits for what it needs by its existence, not by its age; the reports at the end
are made again where a file of rows is newer.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from em.cli import command_line, knob
from em.data.cells import grid_of
from em.data.rows import default_data, load_grid
from em.errors import UserError
from em.files import write_text
from em.judge.judge import JudgeOptions
from em.paper.experiments import paper_of
from em.paper.parts import Asked, Paper, command_of, groups_of, items_named, stem_of


def asked_paper(asked: Asked) -> Paper:
    """The parts that were asked for. UserError for cells that the data do not have."""
    only = items_named(asked.only)
    grid = load_grid(asked.data or default_data(asked.model[0]))
    grid = grid_of(grid.select(asked.cells), grid.domains, grid.tasks, grid.drawn)
    return paper_of(asked, grid).select(only)


# -- reports -----------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What is made from files of rows. inputs: files made before; lists: files of words for `command`."""

    stamp: str
    inputs: list[str]
    command: list[str]
    lists: dict[str, list[str]] = {}


def reports_of(paper: Paper) -> list[Report]:
    """The paper's tables and figures, cross and difficulty where they were asked for, and the page."""
    asked, runs = paper.asked, Path(paper.asked.runs)
    parts = [part for part in paper.parts.values() if part.kind == "evaluate"]
    rows, listed, found = [part for part in parts if part.scores], str(runs / "paper" / "scores.txt"), []
    every = [path for part in rows for path in part.scores]
    compare = ["evaluate.py", "compare", "--paper", "--scores", f"@{listed}", "--out", str(runs / "paper")]
    found.append(Report(str(runs / "paper" / "index.md"), [p.stamp for p in rows], compare, {listed: every}))
    crossed = [part for part in parts if "cross" in part.items and part.option == "--run"]
    crossed = [part for part in crossed if paper.parts[part.needs[0]].kind == "distill"]
    if crossed and "cross" in paper.only:
        scores = [path for part in crossed for path in part.scores]
        students = [paper.parts[part.needs[0]].out for part in crossed]
        command = [
            "evaluate.py",
            "cross",
            "--scores",
            *scores,
            "--runs",
            *students,
            "--out",
            str(runs / "cross"),
        ]
        found.append(Report(str(runs / "cross" / "cross.md"), scores, command))
    for part in parts:
        if "difficulty" in part.command and "difficulty" in paper.only:
            model = part.command[part.command.index("--model") + 1]
            found.append(_difficulty(paper, model, part.stamp, runs / "difficulty" / stem_of(model)))
    page = ["-m", "em.paper.page", "--runs", asked.runs, "--model", asked.model[0], "--out", asked.page]
    return [*found, Report(asked.page, [report.stamp for report in found], page)]


def _difficulty(paper: Paper, model: str, measured: str, out: Path) -> Report:
    """What the difficulty of prompts, in the file `measured`, leaves of the effect of task match."""
    trained = {p.name for p in paper.parts.values() if p.experiment == "misalign" and model in p.command}
    runs = [p for p in paper.parts.values() if p.kind == "evaluate" and trained & set(p.needs) and p.option]
    scores = [path for part in runs for path in part.scores if "narrow" in path]
    command = ["evaluate.py", "difficulty", "--difficulty", measured, "--scores", *scores, "--out", str(out)]
    return Report(str(out / "difficulty.md"), [measured, *(part.stamp for part in runs)], command)


# -- rules of make -----------------------------------------------------------------------------------------

HEAD = """\
# Written by python -m em.paper.dag for `make paper`, which writes it anew each time.
PY ?= python
LAUNCH ?=
.PHONY: paper
"""


def rules(paper: Paper, workers: int) -> str:
    """The text of a makefile whose target `paper` makes what is not there."""
    todo = [part for part in paper.parts.values() if not part.done]
    stamps = {part.name: part.stamp for part in todo}
    groups, blocks, reports = groups_of(todo, workers), [], reports_of(paper)
    for group in groups:
        own = {part.name for part in group}
        needs = dict.fromkeys(name for part in group for name in (*part.needs, *part.after))
        before = [stamps[name] for name in needs if name in stamps and name not in own]
        first, *others = [part.stamp for part in group]
        recipe = _recipe("$(LAUNCH) $(PY)", command_of(group))
        blocks.append(f"{first}: |{''.join(f' {path}' for path in before)}\n\t{recipe}\n")
        blocks += [f"{other}: | {first} ;\n" for other in others]
    for report in reports:
        blocks.append(f"{report.stamp}: {' '.join(report.inputs)}\n\t{_recipe('$(PY)', report.command)}\n")
    targets = [*(group[0].stamp for group in groups), *(report.stamp for report in reports)]
    return f"{HEAD}paper: {' '.join(targets)}\n\n" + "\n".join(blocks)


def _recipe(launch: str, words: list[str]) -> str:
    """A command for make; @FILE are the words in a file, which a line of make could not hold."""
    quoted = [f"`cat {word[1:]}`" if word.startswith("@") else shlex.quote(word) for word in words]
    return f"{launch} {' '.join(quoted).replace('$', '$$')}"


def progress(paper: Paper) -> str:
    """How much is there, in a line, and what is left out, a line each."""
    parts = list(paper.parts.values())
    done = sum(part.done for part in parts)
    left = [f"left out: {', '.join(items)}: {reason}" for reason, items in paper.left_out.items()]
    return "\n".join([f"{done} of {len(parts)} results of training and evaluation are there", *left])


@dataclass
class MakeConfig(Asked):
    to: str = knob("", "makefile to write", "where")


def make(cfg: MakeConfig) -> None:
    """Write the rules, and the lists that they read."""
    if not cfg.to:
        raise UserError("--to FILE: the makefile to write")
    paper = asked_paper(cfg)
    if cfg.judge in ("gemini", "openai") and not all(part.done for part in paper.parts.values()):
        JudgeOptions(judge=cfg.judge, judge_model=cfg.judge_model).client_of()  # a key, before days of work
    for report in reports_of(paper):
        for path, words in report.lists.items():
            write_text(Path(path), "\n".join(words) + "\n")
    write_text(Path(cfg.to), rules(paper, cfg.workers))
    print(progress(paper))


def plan(cfg: Asked) -> None:
    """Print what there is to do, with hours and dollars."""
    from em.paper import plan  # torch, for the dry runs

    print(plan.text(asked_paper(cfg)))


COMMANDS = {"make": (make, MakeConfig), "plan": (plan, Asked)}

if __name__ == "__main__":
    sys.exit(command_line(COMMANDS, __doc__))
