"""The commands of evaluate.py on files that are there: tables, comparisons, agreement, difficulty.

Each is a dataclass of options and a function of it; `COMMANDS` names them.
"""

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from em import parallel
from em.cli import knob
from em.data.chats import chat_of
from em.data.rows import default_data, load_cells, load_grid, split
from em.errors import UserError
from em.files import read_json_lines, write_json_lines
from em.judge.judge import JUDGES, Judge, JudgeOptions
from em.judge.ledger import describe_forecast
from em.judge.recorded import Recorded
from em.judge.responses import identity, read_responses, read_scored, stratified_sample
from em.model.checkpoint import load_model, load_tokenizer
from em.model.tokenizer import Unfit
from em.report.compare import summary, write_compare
from em.report.conditions import BY
from em.report.cross import cross_report
from em.report.cross_runs import corpus_digests, crosses_of_margins, crosses_of_scores
from em.report.difficulty import difficulty_report, difficulty_rows, read_difficulty
from em.report.judges import write_agreement
from em.report.margins import margin_report, read_margins
from em.report.outcomes import read_outcomes
from em.report.paper_tables import write_paper
from em.report.report import write_report
from em.report.score_table import read_scores, scores_of
from em.training.margin import answer_log_probs


def out_file(out: str, command: str, field: str) -> Path:
    """--out, where rows with `field` can be written. UserError for anything else that stands there."""
    if not out:
        raise UserError(f"{command} needs --out FILE")
    path = Path(out)
    if path.is_file():
        try:
            replaceable = all(field in row for _, row in read_json_lines(path))
        except UserError:
            replaceable = False
        if not replaceable:
            raise UserError(
                f"--out {path} is there and holds other things than `{command}` writes; name another"
            )
    elif path.exists():
        raise UserError(f"--out {path} is not a file; name one")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {path} cannot be written: {above} is not a folder that takes files")
    return path


# -- tables and figures ------------------------------------------------------------------------------------


@dataclass
class ReportConfig:
    scores: tuple[str, ...] = knob((), "JSONL or .jsonl.gz files of score rows, or of margin rows", "what")
    out: str = knob("runs/report", "folder to write", "what")
    data: str | None = knob(None, "grid whose order of names and short names tables have", "what")


def scores_and_margins(paths: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The files of score rows, and those of margin rows by their name. UserError for no file."""
    if not paths:
        raise UserError("--scores needs at least one file, such as runs/*/eval/scores_*.jsonl")
    margins = [path for path in paths if Path(path).name.startswith("margins")]
    return [path for path in paths if path not in margins], margins


def report(cfg: ReportConfig) -> None:
    """Every table and figure from score rows, of one or many models, runs and judges."""
    scores, margins = scores_and_margins(cfg.scores)
    if margins:
        print(margin_report(read_margins(margins), Path(cfg.out)))
    if scores:
        grid = load_grid(cfg.data) if cfg.data else None
        print(write_report(read_scores(scores, grid), cfg.out)["summary"])
    print(f"{cfg.out}: tables and figures" + ("; browse.html there shows the responses" if scores else ""))


@dataclass
class CompareConfig:
    scores: tuple[str, ...] = knob((), "JSONL or .jsonl.gz files of score rows, or of margin rows", "what")
    out: str = knob("runs/compare", "folder to write", "what")
    columns: str = knob("task", "the teacher's task, domain or cell (teacher), or eval cells", "what", BY)
    cells: tuple[str, ...] = knob((), "eval cells to average over, or the columns (default: all)", "what")
    paper: bool = knob(False, "every table and figure of the paper that the files allow", "what")
    model: str | None = knob(None, "which, where the files have several", "what")
    judge: str | None = knob(None, "which, where the files have several; margin for margin rows", "what")


def compare(cfg: CompareConfig) -> None:
    """Conditions side by side, with both averages and differences paired by prompt; or the paper's tables."""
    rows = read_outcomes(cfg.scores)
    if cfg.paper and cfg.cells:
        raise UserError("--paper has the paper's own columns and cells; leave --cells out")
    if not cfg.paper:
        print(summary(write_compare(rows, cfg.out, cfg.columns, cfg.cells, cfg.model, cfg.judge, cfg.scores)))
        return print(f"{cfg.out}: table.csv, .md, .tex, .json and .png; differences.csv")
    for entry in write_paper(rows, cfg.out, cfg.model, cfg.judge, cfg.scores):
        lacks = f" (needs {'; '.join(entry['needs'])})" if entry["needs"] else ""
        print(f"{entry['number']}: {entry['status']}{lacks}")
    print(f"{cfg.out}: index.md lists them")


@dataclass
class CrossConfig:
    scores: tuple[str, ...] = knob((), "files of score rows, or of margin rows, of optd students", "what")
    runs: tuple[str, ...] = knob((), "the students' run folders, to check that they read one corpus", "what")
    out: str = knob("runs/cross", "folder to write", "what")


def cross(cfg: CrossConfig) -> None:
    """The effect of the teacher and of who wrote the data, on students that cross the two."""
    scores, margins = scores_and_margins(cfg.scores)
    digests = corpus_digests(cfg.runs)
    crosses = crosses_of_margins(read_margins(margins)) if margins else {}
    crosses |= crosses_of_scores(read_scores(scores)) if scores else {}
    print(cross_report(crosses, cfg.out, digests))
    print(f"{cfg.out}: cross.md, and tables and figures for each model")


@dataclass
class DifficultyConfig:
    scores: tuple[str, ...] = knob(
        (), "score rows: the base model's to measure its coherence, or with --difficulty the runs'", "what"
    )
    model: str | None = knob(None, "base model whose log-likelihood of aligned answers is measured", "what")
    data: str | None = knob(
        None, "hub dataset, folder or sample with the answers (default: the model's)", "what"
    )
    difficulty: str | None = knob(None, "what this command measured before, for the effect beside it", "what")
    out: str = knob("", "JSONL file of difficulties, or with --difficulty a folder", "what")
    limit: int = knob(0, "most eval rows of each cell (0: all)", "what", at_least=0)
    device: str = knob("auto", "device to run on: auto, cpu, cuda or cuda:N", "what")


def difficulty(cfg: DifficultyConfig) -> None:
    """How hard each eval prompt is for the base model; then, what that leaves of the effect of task match."""
    if cfg.difficulty:
        if cfg.model or cfg.data:
            raise UserError("with --difficulty, --scores alone is read; leave --model and --data out")
        if not cfg.scores:
            raise UserError("--difficulty needs --scores, the score rows of misaligned runs")
        if Path(cfg.out or "runs/difficulty").is_file():
            raise UserError(f"{cfg.out} is a file; with --difficulty --out is a folder")
        out, known = cfg.out or "runs/difficulty", read_difficulty(cfg.difficulty)
        print(difficulty_report(read_scores(cfg.scores), known, out))
        print(f"{out}: difficulty.md, and tables and figures for each model")
        return
    if not cfg.model and not cfg.scores:
        raise UserError("difficulty needs --model, --scores of the base model, or both")
    path = out_file(cfg.out, "difficulty", "coherence_mean")
    base = read_scores(cfg.scores) if cfg.scores else None
    measured = aligned_log_probs(cfg) if cfg.model else {}
    rows = difficulty_rows(cfg.model, measured, base)
    write_json_lines(path, rows)
    print(f"{path}: {len(rows):,} prompts, {len(measured):,} with a log-likelihood")


def aligned_log_probs(cfg: DifficultyConfig) -> dict[tuple, dict]:
    """(set, domain, task, idx) → question, log p per token of its aligned answer, and tokens."""
    cells, rows, examples = load_cells(cfg.data or default_data(cfg.model)), [], []
    device, tokenizer = parallel.start(cfg.device), load_tokenizer(cfg.model)
    for cell, every in cells.items():
        for row in split(every)[1][: cfg.limit or None]:
            with contextlib.suppress(Unfit):
                if row["aligned_answer"]:
                    examples.append(tokenizer.example(chat_of(row), row["aligned_answer"]))
                    rows.append((cell, row))
    if not rows:
        raise UserError("no eval row of --data has an aligned answer; --scores measures coherence alone")
    found = answer_log_probs(load_model(cfg.model, device), examples, "aligned answers")
    return {
        ("narrow", cell.domain, cell.task, row["idx"]): {
            "question": row["question"], "loglik_per_token": round(total / n, 6), "tokens": n
        }
        for (cell, row), (total, n) in zip(rows, found, strict=True)
    }  # fmt: skip


# -- judges ------------------------------------------------------------------------------------------------


@dataclass
class AgreeConfig(JudgeOptions):
    judge: str = "gemini"  # each of --judges names its own kind and model
    judge_model: str | None = None
    responses: tuple[str, ...] = knob((), "JSONL files of responses, or of score rows", "what")
    judges: tuple[str, ...] = knob(
        (),
        "two or more: gemini:MODEL, openai:MODEL, local:MODEL, human:FILE of labels, or a FILE of score rows "
        "with all its judges",
        "what",
    )
    limit: int = knob(400, "responses in the sample that all judges score (0: all)", "what", at_least=0)
    seed: int = knob(0, "seed of the sample", "what", at_least=0)
    out: str = knob("runs/agreement", "folder to write", "what")


def judges_named(spec: str, cfg: AgreeConfig) -> list[Judge | Recorded]:
    """What one word of --judges means. UserError for a judge that cannot run, or whose rows are none."""
    kind, colon, name = spec.partition(":")
    if colon and kind in JUDGES and name:
        return [dataclasses.replace(cfg, judge=kind, judge_model=name).judge_of()]
    path = name if colon and kind == "human" else spec
    if not Path(path).is_file():
        kinds = ", ".join(f"{kind}:MODEL" for kind in JUDGES)
        raise UserError(
            f"--judges {spec}: neither {kinds}, human:FILE, nor a FILE of score rows that is there"
        )
    found = {
        judge: placed
        for judge, placed in read_scored(path, unnamed=Path(path).stem).items()
        if kind != "human" or judge.startswith("human:")
    }
    for placed in found.values():
        scores_of([row for _, row in placed], [where for where, _ in placed])  # which checks them
    if not found:
        raise UserError(f"--judges {spec}: the file has no labels of a human judge")
    return [Recorded(judge, [row for _, row in placed]) for judge, placed in found.items()]


def agree(cfg: AgreeConfig) -> None:
    """Several judges on one sample of responses: rates, kappa, confusion, re-scaled rates."""
    if not cfg.responses:
        raise UserError("--responses needs at least one file")
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    judges = [judge for spec in cfg.judges for judge in judges_named(spec, cfg)]
    names = [judge.identity for judge in judges]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"--judges names {', '.join(names) or 'none'}; agree needs two or more, each once")
    recorded = [judge for judge in judges if isinstance(judge, Recorded)]
    responses = read_responses(cfg.responses)
    shared = [row for row in responses if all(judge.knows(row) for judge in recorded)]
    if not shared:
        raise UserError(f"none of the {len(responses):,} responses has been judged by {' and '.join(names)}")
    sample = stratified_sample(shared, cfg.limit, cfg.seed)
    about = (
        f"{len(sample):,} of {len(shared):,} responses"
        + ("" if len(shared) == len(responses) else f" that all files have, of {len(responses):,}")
        + f", stratified by model, training, set and cell of the prompt, seed {cfg.seed}."
    )
    print(about)
    asked = [judge for judge in judges if judge not in recorded]
    for judge in asked:
        print(describe_forecast(judge.forecast(sample), judge.ledger.price))
    rows = [row for judge in recorded for row in judge.score(responses)]
    for judge in asked:
        rows += judge.score(sample)
        print(judge.ledger)
    chosen = {identity(row) for row in sample}
    in_sample = np.array([identity(row) in chosen for row in rows])
    write_json_lines(
        out / "scores.jsonl", [row for row, inside in zip(rows, in_sample, strict=True) if inside]
    )
    print(write_agreement(scores_of(rows), in_sample, about, out)["text"])
    print(f"{out}: tables and agreement.png; scores.jsonl there has the sample's rows")


COMMANDS = {
    "agree": (agree, AgreeConfig),
    "compare": (compare, CompareConfig),
    "cross": (cross, CrossConfig),
    "difficulty": (difficulty, DifficultyConfig),
    "report": (report, ReportConfig),
}
