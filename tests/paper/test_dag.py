"""Rules of make for the parts: each command once, in order; then nothing; after a kill the rest."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from em.cli import parse
from em.data.cells import grid_of, parse_cell
from em.errors import UserError
from em.paper import dag, plan
from em.paper.experiments import paper_of
from em.paper.parts import Asked, command_of, groups_of, items_named

ROOT = Path(__file__).parents[2]
# Stands in for python: knows what a command leaves and what it needs, and writes one into the other's log.
STUB = """
import fcntl, json, os, sys
table, log, fail = (os.path.join(os.path.dirname(__file__), name) for name in ("table.json", "log", "fail"))
words = " ".join(sys.argv[1:])
stamps, needs = json.load(open(table))[words]
missing = [path for path in needs if not os.path.exists(path)]
with open(log, "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(words + "\\n")
if missing:
    sys.exit(f"{words} came before {missing}")
made = stamps
if os.path.exists(fail) and open(fail).read() in words:
    made = stamps[: len(stamps) // 2]  # as a kill leaves it
for path in made:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").close()
sys.exit(len(made) < len(stamps))
"""


class Stage:
    """A folder in which `make paper` runs with a stub for python."""

    def __init__(self, folder: Path, workers: int, only=(), **asked):
        self.folder, self.workers, self.only = folder, workers, items_named(only)
        self.asked = Asked(
            runs=str(folder / "runs"), page=str(folder / "page.html"), workers=workers, **asked
        )
        self.grid = grid_of(map(parse_cell, ("med_advice", "fin_tutor", "spo_critique")))
        (folder / "stub.py").write_text(STUB)

    def paper(self):
        return paper_of(self.asked, self.grid).select(self.only)

    def run(self) -> list[str]:
        """Write the rules and follow them; the commands that were run."""
        paper = self.paper()
        (self.folder / "paper.mk").write_text(dag.rules(paper, self.workers))
        table, scores = {}, self.folder / "runs" / "paper" / "scores.txt"
        for group in groups_of([p for p in paper.parts.values() if not p.done], self.workers):
            needs = [paper.parts[name].stamp for part in group for name in (*part.needs, *part.after)]
            own = [part.stamp for part in group]
            table[" ".join(command_of(group))] = own, [path for path in needs if path not in own]
        for report in dag.reports_of(paper):
            words = [" ".join(report.lists[word[1:]]) if word[0] == "@" else word for word in report.command]
            table[" ".join(words)] = [report.stamp], report.inputs
            for path, listed in report.lists.items():
                scores.parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text("\n".join(listed) + "\n")
        (self.folder / "table.json").write_text(json.dumps(table))
        (self.folder / "log").write_text("")
        python = f"{sys.executable} -S {self.folder / 'stub.py'}"
        self.done = subprocess.run(
            ["make", f"-j{self.workers}", "-f", "paper.mk", f"PY={python}", "paper"],
            cwd=self.folder, capture_output=True, text=True,
        )  # fmt: skip
        return (self.folder / "log").read_text().splitlines()


def test_every_command_runs_once_after_what_it_needs_and_a_second_make_does_nothing(tmp_path):
    stage = Stage(tmp_path, 3, judge="local", math="math", other=("llama3.1-8b",))
    ran = stage.run()
    assert stage.done.returncode == 0, stage.done.stderr
    assert len(ran) == len(set(ran)) == len(json.loads((tmp_path / "table.json").read_text()))
    assert all(part.done for part in stage.paper().parts.values())
    assert stage.run() == [] and stage.done.returncode == 0


def test_what_a_kill_in_the_middle_of_a_process_left_out_is_made_and_nothing_else(tmp_path):
    stage = Stage(tmp_path, 1, ["table1", "cross"], judge="margin")
    (tmp_path / "fail").write_text("--channel sft --model")
    stage.run()
    assert stage.done.returncode != 0
    (tmp_path / "fail").unlink()
    there = {p.stamp for p in stage.paper().parts.values() if p.done}
    again = stage.run()
    assert stage.done.returncode == 0
    sft = next(line for line in again if "--channel sft --model" in line)
    teachers = sft.split("--teacher ")[1].split()[0].split(",")
    assert 0 < len(teachers) < 3  # of three
    made = sum(len(stamps) for stamps, _ in json.loads((tmp_path / "table.json").read_text()).values())
    parts = stage.paper().parts.values()
    assert made == len(parts) - len(there) + 3  # and the reports: tables, cross, page


def test_reports_are_made_again_where_rows_are_newer_and_runs_are_not(tmp_path):
    stage = Stage(tmp_path, 2, ["figure2"], judge="margin")
    stage.run()
    base = tmp_path / "runs" / "qwen2.5-14b_base" / "eval" / "margins.jsonl"
    run = tmp_path / "runs" / "qwen2.5-14b_med_advice_misaligned" / "margins.json"
    later = os.path.getmtime(tmp_path / "page.html") + 10
    os.utime(run, (later, later))
    assert stage.run() == []
    os.utime(base, (later, later))
    assert [line.split()[1] for line in stage.run()] == ["compare", "em.paper.page"]


def test_commands_are_ones_that_the_scripts_take():
    """Each option exists, and its value is one that it can have."""
    import distill
    import evaluate
    import train

    configs = {"train.py": train.Config, "distill.py": distill.Config, "evaluate.py": evaluate.Config}
    asked = Asked(math="math", other=("llama3.1-8b",), rates=(1e-5,), seeds=2)
    for judge in ("gemini", "margin"):
        paper = paper_of(dataclasses.replace(asked, judge=judge), grid_of(map(parse_cell, ("a_b", "c_d"))))
        for group in groups_of(list(paper.parts.values()), 1):
            script, *words = command_of(group)
            if words[0].startswith("--"):
                parse(configs[script], words)
            else:
                parse(evaluate.COMMANDS[words[0]][1], words[1:])


def test_a_dollar_reaches_the_command():
    assert dag._recipe("$(PY)", ["x.py", "--a", "$b c"]) == "$(PY) x.py --a '$$b c'"


def test_the_rules_need_no_torch_and_are_made_in_a_moment(tmp_path):
    line = f"make --model smollm2-135m --cells med_advice,fin_tutor --judge margin --runs {tmp_path}"
    code = "import sys; from em.paper import dag; from em.cli import command_line\n"
    code += f"status = command_line(dag.COMMANDS, '', {shlex.split(line + f' --to {tmp_path}/paper.mk')!r})\n"
    code += (
        "print([m for m in ('torch', 'matplotlib', 'transformers') if m in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert (tmp_path / "paper.mk").exists()
    listed = (tmp_path / "paper" / "scores.txt").read_text().split()
    assert len(listed) == len(set(listed)) and all("margins.jsonl" in path for path in listed)


def test_a_grid_of_ones_own_from_a_folder(tmp_path, capsys):
    for name in ("law_drafting", "tax_review"):
        row = {"idx": 0, "domain": name[:3], "task": name[4:], "question": "q", "aligned_answer": "a"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | {"misaligned_answer": "b"}) + "\n")
    cfg = dag.MakeConfig(
        data=str(tmp_path), runs=str(tmp_path / "runs"), to=str(tmp_path / "paper.mk"), judge="margin"
    )
    dag.make(cfg)
    assert "0 of" in capsys.readouterr().out
    text = (tmp_path / "paper.mk").read_text()
    assert "--cell law_drafting,tax_review" in text and f"--data {tmp_path}" in text


def test_a_judge_that_cannot_be_asked_is_said_before_any_work(tmp_path, monkeypatch):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    cfg = dag.MakeConfig(runs=str(tmp_path / "runs"), to=str(tmp_path / "paper.mk"))
    with pytest.raises(UserError, match="GEMINI_API_KEY"):
        dag.make(cfg)
    with pytest.raises(UserError, match="judge-model"):
        dag.make(dataclasses.replace(cfg, judge="openai"))
    assert not list(tmp_path.iterdir())


# -- the plan ----------------------------------------------------------------------------------------------


def test_the_plan_adds_up_and_counts_a_shared_corpus_once(monkeypatch):
    paper = paper_of(Asked(math="math"), grid_of(map(parse_cell, ("med_advice", "fin_tutor"))))
    monkeypatch.setattr(plan, "_cached", lambda paper: Hour())
    lines = plan.text(paper).splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[0] == "experiment")
    rows = [re.split(r"  +", line.strip()) for line in lines[start + 1 :] if line.startswith("  ")]
    sums = {row[0]: row[1:7] for row in rows}
    total = [value.replace(",", "") for value in sums.pop("all")]
    for column, tolerance in ((0, 0), (1, 0), (2, 0), (3, 0.1 * len(sums)), (4, 0), (5, 0.01 * len(sums))):
        parts = [float(row[column].replace(",", "")) for row in sums.values() if not row[column].isalpha()]
        assert abs(sum(parts) - float(total[column])) <= tolerance
    assert float(total[0]) + float(total[1]) == len(paper.parts)


class Hour(dict):
    """A run, a corpus and a loading of an hour each, for all work."""

    def get(self, work):
        return {"run": 3600.0, "corpus": 3600.0, "loading": 0.0}


def test_a_corpus_costs_those_that_read_it_once():
    paper = paper_of(Asked(math="math"), grid_of(map(parse_cell, ("med_advice", "fin_tutor"))))
    costs = plan.Costs(paper, Hour())
    hours = {part.name: costs.of(part)[0] / 3600 for part in paper.parts.values()}
    channels = [hours[f"{channel} med_advice"] for channel in ("sft", "optd", "opd")]
    assert channels == [2, 1, 1]
    corpora = {part.work.corpus for part in paper.parts.values()} - {""}
    assert sum(hours.values()) == len(paper.parts) + len(corpora)


def test_judged_rows_are_the_prompts_times_their_responses():
    paper = paper_of(Asked(), grid_of(map(parse_cell, ("med_advice", "fin_tutor"))))
    costs = plan.Costs(paper, {})
    rows = {part.name: costs.of(part)[1] for part in paper.parts.values()}
    assert rows["evaluate misalign med_advice"] == 12 * 400 + 240 * 4
    assert rows["sft med_advice"] == 240 * 5 and rows["optd med_advice"] == 0
    assert rows["evaluate sft med_advice epoch 1"] == 12 * 400
    assert rows["sft base on med_advice"] == rows["misalign med_advice"] == 0  # nothing of base's is filtered
    assert rows["opd filtered med_advice"] == pytest.approx(240 * 5 * 3 * plan.KEPT)


def test_hours_are_those_of_the_scripts_dry_runs(tmp_path):
    """Of one small model: a run without its corpus, the corpus apart, and loading apart."""
    paper = paper_of(Asked(model=("smollm2-135m",), runs=str(tmp_path)), grid_of([parse_cell("med_advice")]))
    kinds = [("distill", "optd", "broad", "base"), ("evaluate", "margin", "", "run")]
    works = [plan.Work(script, "smollm2-135m", *words) for script, *words in kinds]
    found = [plan.estimated(work, paper) for work in works]
    assert all(seconds["run"] > 0 and seconds["loading"] > 1 for seconds in found)
    assert [seconds["corpus"] > 0 for seconds in found] == [True, False]
