"""Generate, judge, score, report (paper A.6–A.7, D.1–D.3).

    python evaluate.py --run runs/X --on all                responses, judge scores and report, resumable
    python evaluate.py --run runs/X --judge margin          no judge and no key: the margin of every cell
    python evaluate.py --model qwen2.5-14b --on broad       the base model itself
    python evaluate.py --model llama3.1-8b --dry-run        memory and time on a GPU, before one is rented
    python evaluate.py judge --responses FILES… --out FILE  judge rows that exist
    python evaluate.py report --scores FILES… --out DIR     tables and figures from any number of score files
    python evaluate.py compare --scores FILES… --out DIR    conditions side by side, or --paper: its tables
    python evaluate.py agree --responses FILES… --judges A B…   how far judges agree on one sample
    python evaluate.py label --responses FILES… --rater NAME    label responses yourself, in a browser
    python evaluate.py difficulty --model M --out FILE      how hard each eval prompt is for the base model
    python evaluate.py cross --scores FILES… --out DIR      effect of the teacher and of the data's author
    python evaluate.py surface --prompts FILE --out FILE    label prompts high, medium or low (A.6)

A run's folder gets `eval/`: responses_<set>.jsonl as they come, scores_<set>.jsonl, margins.jsonl, report/.
GEMINI_API_KEY or GOOGLE_API_KEY is the key of --judge gemini; GEMINI_BASE_URL another server of the same
interface. --judge openai asks any server of OpenAI's chat completions: OPENAI_BASE_URL, and OPENAI_API_KEY
where it needs one.
"""

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from em import parallel
from em.cli import command_line, knob
from em.data import authors, lineage
from em.data.chats import chat_of, system_name, system_text
from em.data.rows import default_data, grid_for, load_broad, load_cells, load_grid, split
from em.errors import MissingFile, UserError
from em.estimate.gpus import GPUS
from em.files import json_digest, read_json_lines, write_json_lines
from em.judge.em_rule import is_em, is_scored
from em.judge.judge import JUDGES, Judge, JudgeOptions
from em.judge.ledger import describe_forecast
from em.judge.responses import read_responses, stratified_sample
from em.judge.rubric import FOLDER, Rubrics
from em.label.labels import Labels
from em.label.server import LabelServer
from em.lock import FolderLock
from em.model import hub, lora
from em.model.checkpoint import load_config, load_model, load_tokenizer
from em.model.hub import model_digest
from em.report import commands
from em.report.margins import margin_report
from em.report.report import write_report
from em.report.score_table import scores_of
from em.run import Run
from em.sampling.rollouts import read_rollouts, sample_to_file
from em.sampling.sampler import Sampler
from em.stats import wilson
from em.training.margin import answer_pairs, cell_margins, start_margins


@dataclass
class Config(JudgeOptions):
    run: tuple[str, ...] = knob(
        (), "run folders of train.py or distill.py, PEFT folders, or hub ids of adapters", "what"
    )
    cell: str | None = knob(
        None, "what a --run from elsewhere was trained on (default: unknown, adapter)", "what", setting=False
    )
    revision: str | None = knob(None, "branch, tag or commit of a --run from the hub", "what", setting=False)
    model: str | None = knob(
        None, "base model: to evaluate it alone, or the one that the runs are on (default: their own)", "what"
    )
    on: str = knob("all", "set of prompts to answer", "what", ("narrow", "broad", "all"))
    judge: str = knob(
        "gemini", "measure of misalignment: a judge's scores of responses, or margins of known answers",
        "judge", (*JUDGES, "margin"), setting=False,
    )  # fmt: skip
    data: str | None = knob(
        None, "hub dataset, folder or sample with the prompts (default: the run's)", "what"
    )
    broad: str | None = knob(
        None, "file of broad prompts, JSONL or YAML with id and paraphrases (default: the data's)", "what"
    )
    system: str | None = knob(None, "system prompt before every question, as text or a file", "what")
    out: str | None = knob(None, "folder to write (default: <run>/eval)", "what")
    device: str = knob("auto", "device to run on: auto, cpu, cuda or cuda:N", "what")
    dry_run: bool = knob(
        False, "print what the run needs of a GPU and stop; needs no weights, no network and no GPU", "what",
        setting=False,
    )  # fmt: skip
    gpu: str = knob("h100", "the GPU that --dry-run is about", "what", tuple(GPUS), setting=False)

    temperature: float = knob(1.0, "sampling temperature; top-p is 1", "sampling", at_least=0)
    max_new_tokens: int = knob(600, "most tokens of a response", "sampling", at_least=1)
    samples: int = knob(4, "responses to each broad prompt; narrow prompts get one", "sampling", at_least=1)
    limit: int = knob(
        0, "most eval rows of each cell, and most broad prompts (0: all)", "sampling", at_least=0
    )
    seed: int = knob(0, "seed of sampling; the same seed gives the same responses", "sampling", at_least=0)
    rows: int = knob(64, "sequences sampled at once; changes memory and speed only", "sampling", at_least=1)


# -- prompts -----------------------------------------------------------------------------------------------


def narrow_prompts(cfg, data: str) -> list[dict]:
    """The eval rows of every cell there is, as rows without a response."""
    prompts = []
    for cell, rows in load_cells(data).items():
        place = {"set": "narrow", "domain": cell.domain, "task": cell.task, "em_surface": None}
        for row in split(rows)[1][: cfg.limit or None]:
            prompts.append(place | {"idx": row["idx"], "question": row["question"], "row": row})
    return prompts


def broad_prompts(cfg, data: str) -> list[dict]:
    fields = ("domain", "task", "em_surface", "idx", "question")
    rows = load_broad(cfg.broad or data)[: cfg.limit or None]
    return [{"set": "broad"} | {k: row[k] for k in fields} | {"row": row} for row in rows]


# -- generate, judge, score ----------------------------------------------------------------------------------


def generate(cfg, path: Path, label: dict, prompts: list[dict], n: int, model, tokenizer) -> list[dict]:
    """Sample `n` responses a prompt into `path`; returns them as rows, those that were there before too."""
    sampler = Sampler(model, tokenizer.stop_ids, cfg.max_new_tokens, cfg.temperature, cfg.rows)

    def row(rollout) -> dict:
        prompt = {k: v for k, v in prompts[rollout.prompt_index].items() if k != "row"}
        return label | prompt | {"response": tokenizer.decode(rollout.ids)}

    system = system_text(cfg.system)
    ids = [tokenizer.prompt_ids(chat_of(p["row"], system)) for p in prompts]
    return sample_to_file(path, sampler, ids, n, cfg.seed, row)


def judge_rows(judge: Judge, rows: list[dict], path: Path) -> list[dict]:
    """Score `rows` and write them to `path`; every answer is kept as it comes, so this can be repeated."""
    print(describe_forecast(judge.forecast(rows), judge.ledger.price))
    if judge.client.asked == "smollm2-135m":
        print("-- a judge of 135M parameters: it shows the path and judges nothing --")
    scored = list(judge.score(rows))
    write_json_lines(path, scored)
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


def margin_rows(label: dict, pairs: dict, model, stacks: tuple, digests: dict, beside: Path) -> list[dict]:
    """The margin of every row of `answer_pairs` under stacks[0], before, and stacks[1], after the run.

    digests: of the model and of what stacks[0] has on it. beside: where margins from before are kept.
    """
    if not pairs:
        raise UserError(
            "the margin needs rows with both answers, and these data have none; use --judge gemini"
        )
    with lora.stack(model, *stacks[0], frozen=True):
        measured = [start_margins(model, pairs, digests, beside, "margins before")]
    with lora.stack(model, *stacks[1], frozen=True):
        measured.append(cell_margins(model, pairs, "margins after"))
    return [
        label | {"domain": cell.domain, "task": cell.task, "idx": row.idx, "before": before, "after": after}
        for cell, rows in pairs.items()
        for row, before, after in zip(rows, *(values[cell] for values in measured), strict=True)
    ]


# -- one run from prompts to report ------------------------------------------------------------------------


class Subject(NamedTuple):
    """What is evaluated, read before anything is loaded."""

    folder: str | None  # the run; None: the base model
    settings: dict  # the run's
    label: dict  # what every row says of it
    data: str  # of the prompts
    out: Path
    prompts: dict[str, list[dict]]  # by set; {} where nothing is sampled


def subject(cfg: Config, folder: str | None) -> Subject:
    """UserError for prompts that cannot be had, and for responses that are there to other prompts."""
    settings = lineage.settings_of(folder) if folder else {}
    label = lineage.label(folder, cfg.cell) if folder else {"model": None, "train": "base"}
    label["model"] = hub.canonical(cfg.model)
    label |= {"system": system_name(system_text(cfg.system))} if cfg.system else {}
    data = cfg.data or grid_for(settings.get("data"), cfg.model)
    if settings.get("data") not in (None, data) and not cfg.data:
        print(f"{settings['data']} is one cell and no grid: asking {data}; --data names another")
    base = Path("runs") / f"{Path(cfg.model).name.lower()}_base"
    default = (lineage.home(folder) if folder else base) / "eval"
    if cfg.system:
        default = default.with_name(f"eval_system_{json_digest(label['system'])[:8]}")
    out, prompts = Path(cfg.out or default), {}
    for kind, load in (("narrow", narrow_prompts), ("broad", broad_prompts)):
        if cfg.judge != "margin" and cfg.on in (kind, "all"):
            try:
                prompts[kind] = load(cfg, data)
            except MissingFile as error:
                if cfg.on != "all":
                    raise
                print(f"no {kind} prompts: {error}")
                continue
            path = out / f"responses_{kind}.jsonl"
            for (prompt, _), row in read_rollouts(path).items():
                known = prompts[kind][prompt]["question"] if prompt < len(prompts[kind]) else None
                if row.get("question") != known:
                    raise UserError(f"{path} answers other prompts than {data} has now; choose another --out")
    return Subject(folder, settings, label, data, out, prompts)


def opened(cfg: Config, subject: Subject, device):
    """Its folder, held while it is evaluated; a run that is sampled has a record there."""
    folder = subject.folder
    if cfg.judge == "margin":
        return FolderLock(subject.out) if parallel.rank() == 0 else contextlib.nullcontext()
    settings = {k: getattr(cfg, k) for k in ("temperature", "max_new_tokens", "samples", "limit", "seed")}
    settings |= {"data": subject.data, "train": subject.label["train"], "model": cfg.model}
    settings |= {"model_digest": model_digest(cfg.model)}
    settings |= {name: getattr(cfg, name) for name in ("broad", "system") if getattr(cfg, name)}
    settings |= {"adapter_digest": lineage.adapter_digest(folder) if folder else None}
    return Run(subject.out, "eval", settings, device)


def evaluate(cfg: Config, subject: Subject, model, tokenizer, judge: Judge | None) -> str:
    """Everything for one subject; returns the result in a line or two."""
    folder, out = subject.folder, subject.out
    stack = ("run",) if folder else ()
    if folder:
        lora.load_adapter(model, "run", folder)
    try:
        if cfg.judge == "margin":
            start, before, digests = lineage.start_of(folder) if folder else None, (), {"on_digest": None}
            if start:
                lora.load_adapter(model, "start", folder, ranks=start[0])
                before, digests = ("start",), {"on_digest": start[1]}
            digests["model_digest"] = model_digest(cfg.model)
            pairs = answer_pairs(
                load_cells(subject.data), tokenizer, cfg.limit, system=system_text(cfg.system)
            )
            beside = (lineage.home(folder) if folder else out.parent).parent
            rows = margin_rows(subject.label, pairs, model, (before, stack), digests, beside)
            if before:
                lora.remove_adapter(model, "start")
            write_json_lines(out / "margins.jsonl", rows)
            return margin_report(rows, out / "report")

        scored = []
        for kind, prompts in subject.prompts.items():
            path, n = out / f"responses_{kind}.jsonl", cfg.samples if kind == "broad" else 1
            with lora.stack(model, *stack, frozen=True):
                rows = generate(cfg, path, subject.label, prompts, n, model, tokenizer)
            scored += judge_rows(judge, rows, out / f"scores_{kind}.jsonl")
        grid = None
        with contextlib.suppress(UserError):  # data of broad prompts alone have none
            grid = load_grid(subject.data)
        summary = write_report(scores_of(scored, grid=grid), out / "report")["summary"]
        return f"{summary}\n{out / 'report'}: tables and figures; browse.html there shows the responses"
    finally:
        if folder:
            lora.remove_adapter(model, "run")


def dry_run(cfg: Config) -> dict:
    """What the runs, or the base model, need on `cfg.gpu`, printed."""
    from em.estimate import runs, sheet  # an import of a second

    cfg = dataclasses.replace(cfg, model=cfg.model or "qwen2.5-14b")
    data = next((lineage.settings_of(folder).get("data") for folder in cfg.run), None)
    return sheet.show(runs.evaluation(cfg, cfg.data or data or default_data(cfg.model)))


def main(cfg: Config) -> dict | None:
    cfg = dataclasses.replace(cfg, run=tuple(hub.at_revision(name, cfg.revision) for name in cfg.run))
    cfg = dataclasses.replace(cfg, model=lineage.base_of(cfg.run, cfg.model))
    if len(cfg.run) > 1 and cfg.out:
        raise UserError("--out is for one run; several write to <run>/eval each")
    if cfg.dry_run:
        return dry_run(cfg)
    device = parallel.start(cfg.device)
    default = "qwen2.5-14b" if device.type == "cuda" else "smollm2-135m"
    cfg = dataclasses.replace(cfg, model=cfg.model or default)
    cfg = cfg.with_base(cfg.model)
    judge = None
    if cfg.judge != "margin":  # first, so that a missing key ends it at once
        own = lineage.settings_of(cfg.run[0]).get("data") if cfg.run else None
        judge = cfg.judge_of(cfg.data or grid_for(own, cfg.model))
    tokenizer = load_tokenizer(cfg.model)
    lora.check_adapters(load_config(cfg.model), cfg.run)
    subjects = [subject(cfg, folder) for folder in cfg.run or (None,)]
    for prompts in (prompts for each in subjects for prompts in each.prompts.values()):
        judge.forecast(prompt | {"response": "a"} for prompt in prompts)  # and a missing rubric
    with contextlib.ExitStack() as stack:
        for each in subjects:
            stack.enter_context(opened(cfg, each, device))
        model = load_model(cfg.model, device)
        lora.attach(model)
        if judge:
            judge.lend(cfg.model, model)
        if cfg.model == "smollm2-135m":
            print(
                "-- the embedded SmolLM2-135M: shows every part at work, too small for the paper's claims --"
            )
        for each in subjects:
            print(f"evaluating {each.folder or cfg.model} on {device}")
            print(evaluate(cfg, each, model, tokenizer, judge))


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
        rows += [authors.score_row(row) for _, row in read_json_lines(path)]
    return rows


def judge_files(cfg: JudgeConfig) -> None:
    """Judge rows that exist; what they carry besides is kept."""
    rows = read_rows(cfg.responses, "--responses")
    path = commands.out_file(cfg.out, "judge", "aligned_status")
    judge_rows(cfg.judge_of(), rows, path)


@dataclass
class SurfaceConfig(JudgeOptions):
    prompts: tuple[str, ...] = knob((), "JSONL files of rows with a `question`", "what")
    out: str = knob("", "JSONL file to write", "what")


def surface(cfg: SurfaceConfig) -> None:
    """Label prompts by EM surface (paper A.6): what the judge sees is the prompt alone."""
    rows = read_rows(cfg.prompts, "--prompts")
    path = commands.out_file(cfg.out, "surface", "em_surface_status")
    judge = cfg.judge_of()
    labelled = list(judge.label_surface(rows))
    write_json_lines(path, labelled)
    print(f"{judge.ledger}\n  {path}")


@dataclass
class LabelConfig:
    responses: tuple[str, ...] = knob((), "JSONL files of responses, or of score rows", "what")
    n: int = knob(400, "responses to label, a stratified sample (0: all)", "what", at_least=0)
    seed: int = knob(0, "seed of the sample", "what", at_least=0)
    rater: str = knob("rater", "who labels; the rows' judge is human:NAME", "what")
    out: str | None = knob(None, "JSONL file of the labels (default: runs/labels/RATER.jsonl)", "what")
    rubrics: str = knob(str(FOLDER), "folder of the rubrics that the page can show", "what")
    port: int = knob(0, "port on the loopback (0: any that is free)", "what", at_least=0, at_most=65535)


def label(cfg: LabelConfig) -> None:
    """Serve the page on which a person labels responses, until Ctrl-C (paper A.7's manual validation)."""
    if not cfg.responses:
        raise UserError("--responses needs at least one file")
    path = commands.out_file(cfg.out or f"runs/labels/{cfg.rater}.jsonl", "label", "aligned_status")
    sample = stratified_sample(read_responses(cfg.responses), cfg.n, cfg.seed)
    with FolderLock(f"{path}.lock"):
        labels = Labels(sample, path, cfg.rater)
        with LabelServer(labels, Rubrics(cfg.rubrics), cfg.port) as server:
            print(
                f"{len(sample)} responses, {len(labels.done)} labelled; Ctrl-C ends\n{server.url}", flush=True
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
        print(f"\n{path}: {len(labels.done)} of {len(sample)} labelled; the same command continues")


COMMANDS = {
    "": (main, Config),
    "judge": (judge_files, JudgeConfig),
    "label": (label, LabelConfig),
    "surface": (surface, SurfaceConfig),
    **commands.COMMANDS,
}

if __name__ == "__main__":
    sys.exit(command_line(COMMANDS, __doc__))
