"""What `make plan` prints: runs, GPU hours and judge dollars of every experiment, and what is done.

Hours are those of the dry runs (em/estimate) on an H100: of one run of each kind, less loading, times the
runs there are; a process loads the base once. Sampled corpora count once. A judge's tokens are two rubrics a
row with its question and a response as long as the cells' answers; answers that are cached already are not
known here. Both are arithmetic; nothing is run and nothing is asked.
"""

import contextlib
import io
import runpy
from pathlib import Path

from em.cli import parse
from em.data.condition import BASE
from em.data.rows import default_data, split
from em.errors import UserError
from em.estimate import runs
from em.estimate.lengths import cells_of, prompts_of
from em.files import file_digest, read_json, write_json
from em.judge.client import TYPICAL_TOKENS
from em.judge.em_rule import FIELDS
from em.judge.gemini import thinking_of
from em.judge.judge import MODEL
from em.judge.ledger import CHARACTERS_PER_TOKEN
from em.judge.models import known, known_price
from em.judge.rubric import Rubrics
from em.paper.parts import EPOCHS, EXPERIMENTS, Paper, Part, Work, groups_of, is_sample, stem_of

ROOT = Path(__file__).parents[2]
ESTIMATED_BY = sorted((ROOT / "em" / "estimate").glob("*.py")) + [ROOT / "train.py", ROOT / "distill.py"]
LOADING = "start, load weights"
ROLLOUTS, SAMPLES, MATH_ROLLOUTS = 5, 4, 1  # the scripts' defaults: responses a prompt (E.2, A.7, E.4.1)
KEPT = 0.8  # of rollouts, at least, in the paper's filtered OPD (4.1)


def text(paper: Paper) -> str:
    """The plan in lines."""
    asked, lines = paper.asked, []
    judge = asked.judge_model or (MODEL if asked.judge == "gemini" else "")
    models = ", ".join(map(stem_of, asked.model))
    size = f"{len(paper.grid.cells)} cells, {asked.seeds} seed{'s' * (asked.seeds > 1)}"
    judge = asked.judge + (f" ({judge})" if judge else "")
    lines.append(f"{models}: {size}, judge {judge}, runs in {asked.runs}")
    small = [model for model in asked.model if is_sample(asked, model)]
    if small:
        lines.append(f"{', '.join(small)} on the sample: a demonstration, whose numbers claim nothing")
    costs = Costs(paper, {} if small else _cached(paper))
    lines += _table(paper, costs, not small)
    lines += [f"left out: {', '.join(items)}: {reason}" for reason, items in paper.left_out.items()]
    if not asked.rates:
        lines.append(
            "one learning rate, the recipe's; the paper sweeps RATES=3e-6,1e-5,3e-5,3e-4,1e-3 besides"
        )
    if small:
        return "\n".join([*lines, "all of it takes about 20 minutes on two cores"])
    lines.append(f"{costs.loads} processes load a base; that is in the hours. No run was timed on a card yet")
    return "\n".join(lines)


def _table(paper: Paper, costs: "Costs", hours: bool) -> list[str]:
    """A line an experiment, and the sum."""
    head = ["experiment", "runs", "evaluations", "done", *(["GPU hours"] if hours else [])]
    head += ["judged rows", "dollars", "for"]
    rows, sums = [], [0, 0, 0, 0.0, 0, 0.0]
    for name in EXPERIMENTS:
        parts = [part for part in paper.parts.values() if part.experiment == name]
        if not parts:
            continue
        trained = sum(part.kind != "evaluate" for part in parts)
        cost = [costs.of(part) for part in parts]
        values = [trained, len(parts) - trained, sum(part.done for part in parts)]
        values += [sum(c[0] for c in cost) / 3600, sum(c[1] for c in cost), sum(c[2] for c in cost)]
        sums = [a + b for a, b in zip(sums, values, strict=True)]
        rows.append([name, *values, " ".join(EXPERIMENTS[name])])
    rows.append(["all", *sums, ""])
    priced = costs.price is not None
    table = [head]
    for name, trained, evaluated, done, seconds, judged, dollars, items in rows:
        money = "" if not judged else f"{dollars:,.2f}" if priced else "?"
        row = [name, f"{trained}", f"{evaluated}", f"{done}", *([f"{seconds:.1f}"] if hours else [])]
        table.append([*row, f"{judged:,}", money, items])
    widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True))]
        lines.append("  " + "  ".join([*cells, row[-1]]).rstrip())
    return lines


# -- hours -------------------------------------------------------------------------------------------------


class Costs:
    """Seconds, judged rows and dollars of parts, each shared thing counted with the first that needs it."""

    def __init__(self, paper: Paper, seconds: dict[Work, dict]):
        """seconds: of each kind of work {"run", "corpus", "loading"}; {} where hours are not asked."""
        self.paper, self.seconds, self._corpora = paper, seconds, set()
        todo = [part for part in paper.parts.values()]
        self._first = {id(group[0]): len(group) for group in groups_of(todo, paper.asked.workers)}
        self.loads = len(self._first)
        asked = paper.asked
        self.judge = asked.judge_model or MODEL
        self.price = known_price(asked.judge, self.judge) if asked.judge in ("gemini", "openai") else None
        self._rows = {model: JudgedRows(asked.data or default_data(model), model) for model in asked.model}

    def of(self, part: Part) -> tuple[float, int, float]:
        """(seconds, judged rows, dollars)."""
        work, new = part.work, part.work.corpus not in self._corpora
        self._corpora.add(work.corpus)
        seconds = 0.0
        if kind := self.seconds.get(kind_of(work)):
            seconds = kind["run"] + (kind["corpus"] if new and work.corpus else 0)
            seconds += kind["loading"] if id(part) in self._first else 0
        if work.model not in self._rows:
            return seconds, 0, 0.0  # another model's misaligned runs, which are not evaluated
        n, tokens = self._rows[work.model].of(work, new) if self.paper.asked.judge != "margin" else (0, 0)
        thinking = 0
        if self.paper.asked.judge == "gemini":
            thinking = thinking_of(known("gemini", self.judge).get("thinking", "none")).typical
        output = n * len(FIELDS) * (TYPICAL_TOKENS + thinking)
        return seconds, n, self.price.usd(tokens, output) if self.price else 0.0


def kind_of(work: Work) -> Work:
    """Works of one cost. A rollout's cost is not the teacher's, and a judge's is not in the hours."""
    return work._replace(corpus="", judged=())


def _cached(paper: Paper) -> dict[Work, dict]:
    """Seconds of each kind of work, from a file in RUNS where the code that estimates them is the same."""
    path, code = Path(paper.asked.runs) / "paper" / "estimates.json", file_digest(*ESTIMATED_BY)
    stored = read_json(path) if path.exists() else {}
    stored = stored if stored.get("code") == code else {"code": code}
    kinds, found = dict.fromkeys(kind_of(part.work) for part in paper.parts.values()), {}
    for kind in kinds:
        key = " ".join(filter(None, [*kind[:5], paper.asked.data or ""]))
        if key not in stored:
            stored[key] = estimated(kind, paper)
            write_json(path, stored)
        found[kind] = stored[key]
    return found


def estimated(work: Work, paper: Paper) -> dict:
    """Likely seconds on an H100 of one run, without sampling its corpus and without loading; of these two."""
    data = paper.asked.data or default_data(work.model)
    if work.script == "evaluate":
        config = runpy.run_path(str(ROOT / "evaluate.py"))["Config"]
        run, margin = () if work.source == BASE else ("run",), work.what == "margin"
        asked = {"judge": "margin"} if margin else {"on": work.what}
        plan = runs.evaluation(config(model=work.model, run=run, **asked), data)
        parts, n = {part.name: part.likely for part in plan.parts}, 1
    else:
        words, n = ["--model", work.model, "--data", data, "--dry-run"], 1
        if work.script == "train":
            n = len(paper.grid.cells)
            words += ["--cell", ",".join(map(str, paper.grid.cells))]
        else:
            words += ["--channel", work.what, "--prompts", work.prompts]
            words += ["--source", work.source] if work.source != "teacher" and work.what != "opd" else []
        sheet = _dry_run(f"{work.script}.py", words)
        sheet = sheet.get(work.what, sheet)  # of distill.py one a channel
        parts = {name: part["likely"] for name, part in sheet["parts"].items()}
    corpus = sum(seconds for name, seconds in parts.items() if name.startswith("corpus:"))
    loading = parts.pop(LOADING, 0)
    return {"run": (sum(parts.values()) - corpus) / n, "corpus": corpus, "loading": loading}


def _dry_run(script: str, words: list[str]) -> dict:
    """What a script's dry run returns; its sheet is not printed."""
    found = runpy.run_path(str(ROOT / script))
    with contextlib.redirect_stdout(io.StringIO()):
        return found["main"](parse(found["Config"], words))


# -- dollars -----------------------------------------------------------------------------------------------


class JudgedRows:
    """How many rows of a model's work are judged, and how many tokens their prompts have."""

    def __init__(self, data: str, model: str):
        self.data, self.model, self._rubrics, self._sets = data, model, Rubrics(), {}

    def of(self, work: Work, new: bool) -> tuple[int, int]:
        """(rows, prompt tokens). new: whether the corpus is made for this part."""
        sets = []
        if work.script == "evaluate" and work.what != "margin":
            sets += [("narrow", 1)] * (work.what in ("narrow", "all"))
            sets += [("broad", SAMPLES)] * (work.what in ("broad", "all"))
        each = MATH_ROLLOUTS if work.prompts == "math" else ROLLOUTS
        sets += [(work.prompts, each)] * ("corpus" in work.judged and new)
        sets += [(work.prompts, each * EPOCHS * KEPT)] * ("rollouts" in work.judged)
        for name, _ in sets:
            if name not in self._sets:
                self._sets[name] = self._set(name)
        found = [(times * n, times * tokens) for name, times in sets for n, tokens in [self._sets[name]]]
        return round(sum(n for n, _ in found)), round(sum(tokens for _, tokens in found))

    def _set(self, name: str) -> tuple[float, float]:
        """(rows, prompt tokens) of one response to each prompt of narrow, broad or math."""
        cells, _ = cells_of(self.data, self.model)
        answer = _mean([_mean(a) for lengths in cells.values() for a in lengths.answers.values()])
        if name == "narrow":
            rows, tokens = 0, 0.0
            for cell, lengths in cells.items():
                n = len(split(range(lengths.rows))[1])
                row = {"set": "narrow", "domain": cell.domain, "task": cell.task}
                rows, tokens = rows + n, tokens + n * self._tokens(row, _mean(lengths.prompt), answer)
            return rows, tokens
        lengths, _ = prompts_of(name, self.data, self.model)
        if "gold" in lengths.answers:
            answer = runs.MATH_TIMES * _mean(lengths.answers["gold"])
        return lengths.rows, lengths.rows * self._tokens({"set": "broad"}, _mean(lengths.prompt), answer)

    def _tokens(self, row: dict, question: float, answer: float) -> float:
        """Of both calls about one row."""
        try:
            texts = [self._rubrics.of(row, field).text for field in FIELDS]
        except UserError:  # a grid of one's own, whose rubrics are still to be written
            texts = [self._rubrics.of({"set": "broad"}, field).text for field in FIELDS]
        return sum(len(text) / CHARACTERS_PER_TOKEN + question + answer for text in texts)


def _mean(values: list) -> float:
    return sum(values) / max(1, len(values))
