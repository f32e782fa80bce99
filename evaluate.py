"""Generate, judge, score, report (paper A.6–A.7, D.1–D.3).

    python evaluate.py --run runs/X --on all                responses, judge scores and report, resumable
    python evaluate.py --run runs/X --judge margin          no judge and no key: the margin of every cell
    python evaluate.py --model qwen2.5-14b --on broad       the base model itself
    python evaluate.py judge --responses FILES… --out FILE  judge rows that exist
    python evaluate.py report --scores FILES… --out DIR     tables and figures from any number of score files
    python evaluate.py surface --prompts FILE --out FILE    label prompts high, medium or low (A.6)

A run's folder gets `eval/`: responses_<set>.jsonl as they come, scores_<set>.jsonl, margins.jsonl, report/.
GEMINI_API_KEY is the judge's key; GEMINI_BASE_URL another server of the same interface.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from em import data, lora, margin, parallel
from em.checkpoint import load_model, load_tokenizer
from em.config import knob, run
from em.errors import UserError
from em.judge import CACHE, MODEL, Judge
from em.ledger import describe_forecast
from em.margin_table import margin_report, read_margins
from em.report import write_report
from em.rubric import FOLDER
from em.run import Run, read_json, write_text
from em.sample import Sampler
from em.score import is_em, is_scored
from em.score_table import read_scores
from em.stats import wilson


@dataclass
class JudgeOptions:
    judge_model: str = knob(MODEL, "Gemini model", "judge")
    rubrics: str = knob(str(FOLDER), "folder of rubrics", "judge")
    cache: str = knob(str(CACHE), "file of the judge's answers, shared by all runs", "judge")
    workers: int = knob(32, "calls in flight", "judge")
    budget_usd: float | None = knob(None, "stop before spending more", "judge")
    price: tuple[float, ...] = knob((), "dollars a million input, output tokens, if unknown to us", "judge")


@dataclass
class Config(JudgeOptions):
    run: tuple[str, ...] = knob((), "run folders of train.py or distill.py", "what")
    model: str | None = knob(None, "with no --run: the base model to evaluate", "what")
    on: str = knob("all", "which prompts", "what", ("narrow", "broad", "all"))
    judge: str = knob("gemini", "what scores", "what", ("gemini", "margin"))
    data: str | None = knob(None, "hub dataset, folder or sample (default: the run's)", "what")
    out: str | None = knob(None, "folder (default: <run>/eval)", "what")
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", "what")

    temperature: float = knob(1.0, "of sampling; top-p is 1", "sampling")
    max_new_tokens: int = knob(600, "tokens a response at most", "sampling")
    samples: int = knob(4, "responses a broad prompt (narrow: 1)", "sampling")
    limit: int = knob(0, "eval rows a cell, broad prompts (0: all)", "sampling")
    seed: int = knob(0, "same seed, same text", "sampling")
    rows: int = knob(64, "sequences sampled at once; changes memory and speed only", "sampling")


# -- what a run is -----------------------------------------------------------------------------------------


def lineage(folder: str | Path) -> tuple[str, dict]:
    """(train label, settings) of a run: `med_advice`, or `med_advice>fin_tutor` where it was realigned."""
    settings = read_json(Path(folder) / "config.json").get("settings", {})
    if "cell" not in settings or "model" not in settings:
        raise UserError(f"{folder} is not a run of train.py or distill.py")
    if settings.get("on"):
        return f"{lineage(settings['on'])[0].split('>')[0]}>{settings['cell']}", settings
    return settings["cell"] if settings["variant"] == "misaligned" else f"base>{settings['cell']}", settings


def narrow_prompts(cfg, source: str) -> list[dict]:
    """The eval rows of every cell there is, as rows without a response."""
    prompts = []
    for cell in data.CELLS:
        try:
            rows = data.split(data.load_cell(source, cell))[1]
        except UserError:
            continue  # a folder may hold some cells only
        for row in rows[: cfg.limit or None]:
            place = {"set": "narrow", "domain": cell.domain, "task": cell.task, "em_surface": None}
            prompts.append(place | {"idx": row["idx"], "question": row["question"], "row": row})
    if not prompts:
        raise UserError(f"{source} has none of the twelve cells")
    return prompts


def broad_prompts(cfg, source: str) -> list[dict]:
    fields = ("domain", "task", "em_surface", "idx", "question")
    return [
        {"set": "broad"} | {k: row[k] for k in fields} for row in data.load_broad(source)[: cfg.limit or None]
    ]


# -- generate ----------------------------------------------------------------------------------------------


def whole_lines(path: Path) -> list[dict]:
    """The rows of a file that is appended to; a line that a kill cut short is dropped from it."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    kept = text[: text.rfind("\n") + 1]
    if kept != text:
        write_text(path, kept)
    return [json.loads(line) for line in kept.splitlines()]


def generate(cfg, path: Path, label: dict, prompts: list[dict], n: int, model, tokenizer) -> list[dict]:
    """Sample `n` responses a prompt into `path`, one line as each ends; what is there already stays.

    A response's text follows from (seed, prompt, sample), so a continued file is the file of one go.
    """
    done = whole_lines(path)
    have = {(row["prompt"], row["sample"]) for row in done}
    missing = [i for i in range(len(prompts)) if any((i, s) not in have for s in range(n))]
    if missing:
        sampler = Sampler(model, tokenizer.stop_ids, cfg.max_new_tokens, cfg.temperature, cfg.rows)
        ids = [tokenizer.prompt_ids(prompts[i]["question"]) for i in missing]
        path.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=len(prompts) * n, initial=len(done), desc=path.stem, unit="response")
        with bar, open(path, "a", encoding="utf-8") as file:
            for rollout in sampler.stream(ids, n=n, seed=cfg.seed, indices=missing):
                if (rollout.prompt_index, rollout.sample) in have:
                    continue
                prompt = {k: v for k, v in prompts[rollout.prompt_index].items() if k != "row"}
                row = label | prompt | {"sample": rollout.sample, "response": tokenizer.decode(rollout.ids)}
                row |= {
                    "prompt": rollout.prompt_index,
                    "tokens": len(rollout.ids),
                    "finished": rollout.finished,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                done.append(row)
                bar.update()
    return sorted(done, key=lambda row: (row["prompt"], row["sample"]))


# -- judge and score ---------------------------------------------------------------------------------------


def make_judge(cfg) -> Judge:
    return Judge(
        cfg.judge_model, cfg.rubrics, cfg.cache, cfg.workers, cfg.budget_usd, cfg.price or None
    )  # fmt: skip


def judge_rows(judge: Judge, rows: list[dict], path: Path) -> list[dict]:
    """Score `rows` and write them to `path`; every answer is kept as it comes, so this can be repeated."""
    print(describe_forecast(judge.forecast(rows), judge.ledger.price))
    scored = list(judge.score(rows))
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in scored))
    print(f"{judge.ledger}\n  {path}: {rate(scored)}")
    return scored


def rate(rows: list[dict]) -> str:
    """The EM rate with its interval, and what is not in its denominator."""
    scored, em = sum(map(is_scored, rows)), sum(map(is_em, rows))
    if not scored:
        return f"none of {len(rows)} rows could be scored"
    low, high = wilson(em, scored)
    interval = f"({100 * low:.1f}–{100 * high:.1f})"
    return f"EM {100 * em / scored:.1f} % {interval} of {scored} scored rows, {len(rows)} in all"


def margin_rows(label: dict, prompts: list[dict], model, tokenizer, stacks: tuple) -> list[dict]:
    """Margin rows of the prompts that have both answers, before (stacks[0]) and after (stacks[1])."""
    prompts = [p for p in prompts if p["row"]["misaligned_answer"] and p["row"]["aligned_answer"]]
    if not prompts:
        raise UserError(
            "the margin needs rows with both answers, and these data have none; use --judge gemini"
        )
    pairs = {}
    for p in prompts:
        both = pairs.setdefault(f"{p['domain']}_{p['task']}", ([], []))
        for variant, examples in zip(data.VARIANTS, both, strict=True):
            examples.append(tokenizer.example(p["question"], p["row"][f"{variant}_answer"]))
    values = []
    for names in stacks:
        with lora.stack(model, *names, frozen=True):
            scored = margin.margins(model, pairs)
        values.append([v for cell in pairs for v in scored[cell]])
    ordered = [p for cell in pairs for p in prompts if f"{p['domain']}_{p['task']}" == cell]
    return [
        label | {"domain": p["domain"], "task": p["task"], "idx": p["idx"], "before": before, "after": after}
        for p, before, after in zip(ordered, *values, strict=True)
    ]


# -- one run from prompts to report ------------------------------------------------------------------------


def evaluate(cfg: Config, folder: str | None, model, tokenizer, device) -> str:
    """Everything for one run (None: the base model); returns what was found, in a line or two."""
    train, settings = lineage(folder) if folder else ("base", {"model": cfg.model})
    source = (
        cfg.data
        or settings.get("data")
        or ("sample" if cfg.model == "smollm2-135m" else "askinb/structured-emergent-misalignment")
    )
    out = Path(
        cfg.out or (Path(folder) / "eval" if folder else f"runs/{Path(cfg.model).name.lower()}_base/eval")
    )
    label = {"model": settings["model"], "train": train}
    stack = ("run",) if folder else ()
    if folder:
        lora.load_adapter(model, "run", folder)
    try:
        if cfg.judge == "margin":
            before = ("start",) if settings.get("on") else ()
            if before:
                lora.load_adapter(model, "start", settings["on"])
            rows = margin_rows(label, narrow_prompts(cfg, source), model, tokenizer, (before, stack))
            if before:
                lora.remove_adapter(model, "start")
            write_text(out / "margins.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            return margin_report(rows, out / "report")

        judge = make_judge(cfg)  # before sampling: a missing key is best said at once
        sampling = ("temperature", "max_new_tokens", "samples", "limit", "seed")
        Run(out, "eval", {k: getattr(cfg, k) for k in sampling} | {"data": source, "train": train}, device)
        files = []
        for kind, prompts, n in (("narrow", narrow_prompts, 1), ("broad", broad_prompts, cfg.samples)):
            if cfg.on in (kind, "all"):
                path = out / f"responses_{kind}.jsonl"
                with lora.stack(model, *stack, frozen=True):
                    rows = generate(cfg, path, label, prompts(cfg, source), n, model, tokenizer)
                files.append(out / f"scores_{kind}.jsonl")
                judge_rows(judge, rows, files[-1])
        return write_report(read_scores(files), out / "report")["summary"] + f"\n{out / 'report'}"
    finally:
        if folder:
            lora.remove_adapter(model, "run")


def main(cfg: Config) -> None:
    device = parallel.start(cfg.device)
    names = {folder: lineage(folder)[1]["model"] for folder in cfg.run}
    if len(set(names.values())) > 1:
        raise UserError(
            f"--run names runs of several models ({', '.join(sorted(set(names.values())))}); one at a time"
        )
    if cfg.run and cfg.model:
        raise UserError("--model evaluates a base model; with --run leave it out")
    if len(cfg.run) > 1 and cfg.out:
        raise UserError("--out is for one run; several write to <run>/eval each")
    default = "qwen2.5-14b" if device.type == "cuda" else "smollm2-135m"
    cfg = dataclasses.replace(cfg, model=next(iter(names.values()), cfg.model or default))
    tokenizer, model = load_tokenizer(cfg.model), load_model(cfg.model, device)
    lora.attach(model)
    for folder in cfg.run or (None,):
        print(f"evaluating {folder or cfg.model} on {device}")
        print(evaluate(cfg, folder, model, tokenizer, device))


# -- commands on files -------------------------------------------------------------------------------------


@dataclass
class JudgeConfig(JudgeOptions):
    responses: tuple[str, ...] = knob((), "JSONL files of score rows without scores", "what")
    out: str = knob("", "JSONL file to write", "what")


def read_rows(paths: tuple[str, ...], option: str) -> list[dict]:
    if not paths:
        raise UserError(f"{option} needs at least one file")
    rows = []
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
            rows += [json.loads(line) for line in lines if line.strip()]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise UserError(f"{path} has a line that is not JSON ({error})") from error
    return rows


def judge_files(cfg: JudgeConfig) -> None:
    """Judge rows that exist; what they carry besides is kept."""
    rows = read_rows(cfg.responses, "--responses")
    if not cfg.out:
        raise UserError("judge needs --out FILE")
    judge_rows(make_judge(cfg), rows, Path(cfg.out))


@dataclass
class SurfaceConfig(JudgeOptions):
    prompts: tuple[str, ...] = knob((), "JSONL files of rows with a `question`", "what")
    out: str = knob("", "JSONL file to write", "what")


def surface(cfg: SurfaceConfig) -> None:
    """Label prompts by EM surface (paper A.6): what the judge sees is the prompt alone."""
    rows = read_rows(cfg.prompts, "--prompts")
    if not cfg.out:
        raise UserError("surface needs --out FILE")
    judge = make_judge(cfg)
    labelled = list(judge.label_surface(rows))
    write_text(Path(cfg.out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labelled))
    print(f"{judge.ledger}\n  {cfg.out}")


@dataclass
class ReportConfig:
    scores: tuple[str, ...] = knob((), "JSONL or .jsonl.gz files of score rows, or of margin rows", "what")
    out: str = knob("runs/report", "folder to write", "what")


def report(cfg: ReportConfig) -> None:
    """Every table and figure from score rows, of one or many models, runs and judges."""
    if not cfg.scores:
        raise UserError("--scores needs at least one file, such as runs/*/eval/scores_*.jsonl")
    margins = [path for path in cfg.scores if Path(path).name.startswith("margins")]
    scores = [path for path in cfg.scores if path not in margins]
    if margins:
        print(margin_report(read_margins(margins), Path(cfg.out)))
    if scores:
        print(write_report(read_scores(scores), cfg.out)["summary"])
    print(cfg.out)


COMMANDS = {
    "": (main, Config),
    "judge": (judge_files, JudgeConfig),
    "report": (report, ReportConfig),
    "surface": (surface, SurfaceConfig),
}

if __name__ == "__main__":
    sys.exit(run(COMMANDS, __doc__))
