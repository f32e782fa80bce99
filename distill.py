"""Teacher-mediated transfer: what passes from a teacher to a student through harmless data (paper 4, E).

    python distill.py --channel opd                      the newest misaligned run teaches the base model
    python distill.py --channel sft --teacher runs/X     or optd; all channels share one corpus of X
    python distill.py --channel opd --on runs/X          realignment: the base teaches the misaligned run X
    python distill.py --channel optd --teacher runs/X --source runs/Y    X teaches on what Y wrote (4.3.3)
    python distill.py --channel optd --lr 3e-6,1e-5,3e-5,1e-4            a run each, one corpus
    python distill.py --channel opd --world demo         the same on a synthetic world, scored exactly
    torchrun --nproc-per-node 4 distill.py --channel opd
    python distill.py --channel opd --prompts math --model qwen2.5-14b --dry-run     memory and time on a GPU

Each epoch leaves an adapter that evaluate.py takes. A killed run goes on when its command is given again.
"""

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from em import parallel
from em.cli import banner, command_line, knob, outcome_settings
from em.data import lineage
from em.data.math_problems import MIRROR
from em.data.rows import default_data, subset
from em.distillation import chat_corpus, world_transfer
from em.distillation.corpus import passing
from em.distillation.diagnose import log_distance
from em.distillation.loop import Channel, OnPolicy, finish, run_folder, train_student
from em.distillation.pair import ChatPair
from em.errors import UserError
from em.estimate.gpus import GPUS
from em.files import RECORD, json_digest, read_json, write_json
from em.judge.judge import JudgeOptions
from em.model import hub, lora
from em.model.checkpoint import load_config, load_model, load_tokenizer, save_tokenizer
from em.run import Run
from em.training.memory import CPU_TOKENS, cache_bytes, micro_tokens
from em.world.world import WORLDS

# -- the channels ------------------------------------------------------------------------------------------
# What is differentiated, and sums over the batch's tokens for the log.


def sft(pair, batch):
    """−log πs of frozen responses, as if somebody had written them."""
    loss = -pair.log_probs(batch).sum()
    return loss, {"loss": loss}


def optd(pair, batch):
    """KL(πT‖πs) over the whole vocabulary, at every token of the same frozen responses."""
    loss = pair.forward_kl(batch)
    return loss, {"loss": loss}


def opd(pair, batch):
    """On the student's own responses, Σ stopgrad(log πs − log πT) · log πs (E.1, token by token).

    The gradient's expectation is that of KL(πs‖πT) at each position. `loss` in the log is k1, which estimates
    that KL, as k3 does with less noise.
    """
    log_s, log_t = pair.log_probs(batch), pair.teacher_log_probs(batch)
    k1 = log_s.detach() - log_t
    logged = {"loss": k1.sum(), "k3": (torch.expm1(-k1) + k1).sum(), "entropy": -log_s.sum()}
    return (k1 * log_s).sum(), logged


def opd_exact(pair, batch):
    """The control arm of opd: on the student's own responses, KL(πs‖πT) over the whole vocabulary."""
    loss = pair.reverse_kl(batch)
    return loss, {"loss": loss}


CHANNELS = {
    "sft": Channel(sft),
    "optd": Channel(optd),
    "opd": Channel(opd, logged=("loss", "k3", "entropy")),
    "opd exact": Channel(opd_exact),
}


NO_RUN = (None, "base", *chat_corpus.SAMPLED, *chat_corpus.WRITTEN)  # what names none


def channel_of(cfg) -> Channel:
    """The channel with its estimator: of opd there are two."""
    return CHANNELS["opd exact" if cfg.estimator == "exact" else cfg.channel]


# -- the settings ------------------------------------------------------------------------------------------

PAPER_RECIPE = dict(lr=(1e-4,), rollouts=5, max_new_tokens=256, probes=16)  # E.2
MATH_RECIPE = PAPER_RECIPE | dict(rollouts=1, max_new_tokens=1024)  # E.4.1
WORLD_RECIPE = dict(lr=(1e-4,), rollouts=1, probes=16, micro_tokens=CPU_TOKENS)
# The embedded model's: minutes on a laptop.
SAMPLE_RECIPE = dict(lr=(5e-4,), rollouts=1, max_new_tokens=128, probes=6)


@dataclass
class Config(JudgeOptions):
    channel: str = knob("opd", "which channel", "what", ("sft", "optd", "opd"))
    teacher: str | None = knob(
        None, "run, PEFT folder or hub id of an adapter, or base (default: newest misaligned run)", "what"
    )
    cell: str | None = knob(
        None, "what a teacher, or an --on, from elsewhere was trained on (default: unknown, adapter)", "what",
        setting=False,
    )  # fmt: skip
    revision: str | None = knob(None, "branch, tag or commit of adapters from the hub", "what", setting=False)
    on: str | None = knob(None, "misaligned run that the student starts from; the teacher is base", "what")
    model: str | None = knob(
        None, "base model of teacher and student, by the name to load it by (default: the runs' own)", "what",
        setting=False,
    )  # fmt: skip
    estimator: str = knob("sampled", "opd: the reverse KL's gradient", "what", ("sampled", "exact"))
    filter: bool = knob(False, "opd: judge the student's rollouts before each update", "what")
    unfiltered: bool = knob(False, "use a misaligned generator's responses unjudged", "what", setting=False)
    out: str | None = knob(
        None, "run folder, of several rates the parent (runs/<teacher>_<channel>…)", "what", setting=False
    )
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", "what", setting=False)
    dry_run: bool = knob(
        False, "print what the run needs of a GPU and stop; needs no weights, no network and no GPU", "what",
        setting=False,
    )  # fmt: skip
    gpu: str = knob("h100", "the GPU that --dry-run is about", "what", tuple(GPUS), setting=False)

    source: str = knob(
        "teacher", "who wrote what sft and optd train on: teacher, student, gold, rows, a run", "data"
    )
    prompts: str | None = knob(None, "broad or math; worlds: cells or tasks, the teacher's excluded", "data")
    data: str | None = knob(
        None, "folder or hub id of the broad prompts and the cells' rows (default: the run's)", "data"
    )
    math: str = knob(MIRROR, "MATH: a folder, file, address or hub id", "data")
    limit: int = knob(0, "prompts at most, a random subset (0: all; rows: 800)", "data", at_least=0)
    rollouts: int | None = knob(
        None, "responses a prompt (5; math and the embedded model 1)", "data", at_least=1
    )
    max_new_tokens: int | None = knob(
        None, "longest response, in tokens (256; math 1024, embedded model 128)", "data", at_least=1
    )
    corpus: str | None = knob(
        None, "folder of the frozen corpus (default: named by its settings)", "data", setting=False
    )

    lr: tuple[float, ...] = knob(
        (), "peak learning rates, a run each (1e-4; embedded model 5e-4)", "training", setting=False, above=0
    )
    epochs: int = knob(3, "passes over the prompts", "training", at_least=1)
    batch: int = knob(8, "responses a step", "training", at_least=1)
    warmup: int = knob(5, "linear warm-up steps; then linear to 0", "training", at_least=0)
    weight_decay: float = knob(0.01, "AdamW's weight decay", "training", at_least=0)
    clip: float = knob(1.0, "largest gradient norm", "training", above=0)
    rank: int = knob(32, "LoRA rank", "training", at_least=1, at_most=4096)
    alpha: float = knob(64.0, "LoRA alpha; rsLoRA scales by alpha / √rank", "training", above=0)
    seed: int = knob(
        42, "seed of the adapter's start, the order and the sampled text", "training", at_least=0
    )

    world: str | None = knob(
        None, "a synthetic world instead of chat models", "world", tuple(WORLDS), setting=False
    )
    run: str | None = knob(None, "synth.py's folder (default: the world's newest)", "world", setting=False)
    task: str | None = knob(None, "the teacher's task (default: the run's)", "world", setting=False)
    seeds: int = knob(3, "teachers, each with a student and a control", "world", setting=False, at_least=1)

    probes: int | None = knob(
        None,
        "rollouts that measure the distance to the teacher, each epoch (16)",
        "memory and log",
        at_least=1,
    )
    micro_tokens: int | None = knob(
        None, "tokens in memory at once, a longer response alone; changes memory and speed only "
        f"(what fits on the GPU; CPU and worlds {CPU_TOKENS})", "memory and log", setting=False, at_least=1,
    )  # fmt: skip
    rows: int = knob(
        64,
        "sequences sampled at once for a corpus; changes memory only",
        "memory and log",
        setting=False,
        at_least=1,
    )
    recompute: bool = knob(
        False, "recompute activations in the backward pass", "memory and log", setting=False
    )
    save_minutes: float = knob(
        5.0, "minutes between saved states to resume from", "memory and log", setting=False, at_least=0
    )


def fill_in(cfg: Config, recipe: dict) -> None:
    """Give `cfg` the recipe's values where it has none."""
    for name, value in recipe.items():
        if getattr(cfg, name) in (None, ()):
            setattr(cfg, name, value)


def refuse_conflicts(cfg: Config) -> None:
    """UserError for options that contradict each other, on chat models and on worlds alike."""
    if cfg.channel == "opd" and cfg.source != "teacher":
        raise UserError("--source is for sft and optd: in opd the student writes its own responses")
    if cfg.channel != "opd" and (cfg.filter or cfg.estimator == "exact"):
        raise UserError("--filter and --estimator belong to --channel opd")
    if cfg.accept_routed:
        raise UserError("a corpus is filtered by one judge from its first row on: name it with --judge-model")


def resolve(cfg: Config) -> Config:
    """Fill in what depends on the runs, and refuse what cannot be."""
    cfg = dataclasses.replace(cfg)
    cfg.teacher = cfg.teacher or ("base" if cfg.on else lineage.newest_misaligned())
    cfg.teacher, cfg.on, cfg.source = (
        name if name in NO_RUN else hub.at_revision(name, cfg.revision)
        for name in (cfg.teacher, cfg.on, cfg.source)
    )
    parents = [folder for folder in (cfg.teacher, cfg.on) if folder not in NO_RUN]
    if not parents:
        raise UserError("teacher and student are both the base model: name a --teacher, or a run with --on")
    cfg.model = lineage.base_of(parents, cfg.model)
    if cfg.source not in chat_corpus.SAMPLED + chat_corpus.WRITTEN:
        lineage.settings_of(cfg.source)
    cfg.data = cfg.data or lineage.settings_of(parents[0])["data"] or default_data(cfg.model)
    fill_in_recipe(cfg)
    return cfg


def fill_in_recipe(cfg: Config) -> None:
    """Give a chat model's `cfg` its recipe's values. UserError for a source that its prompts do not have."""
    cfg.prompts = cfg.prompts or "broad"
    if cfg.source == "gold" and cfg.prompts != "math":
        raise UserError("--source gold are MATH's answers; add --prompts math")
    small = cfg.model == "smollm2-135m"
    fill_in(cfg, SAMPLE_RECIPE if small else MATH_RECIPE if cfg.prompts == "math" else PAPER_RECIPE)


def filtering(cfg, say) -> bool:
    """Whether the corpus is judged: where a misaligned run wrote it (E.2; no other is, E.3, E.4)."""
    by_misaligned = cfg.source not in chat_corpus.WRITTEN + ("student",) and not (
        cfg.source == "teacher" and cfg.teacher == "base"
    )
    if not by_misaligned or cfg.unfiltered:
        return False
    if cfg.can_ask():
        return True
    if cfg.model != "smollm2-135m":
        raise UserError(
            "a misaligned generator's responses are filtered by a judge: export GEMINI_API_KEY=…, name a "
            "server (--judge openai, OPENAI_BASE_URL), or say --unfiltered to train on all of them"
        )
    needs = "GEMINI_API_KEY" if cfg.judge == "gemini" else "OPENAI_BASE_URL or OPENAI_API_KEY"
    say(f'-- no judge ({needs}): going on unfiltered, and "filtered": false is in every config --')
    return False


def train(cfg, lr: float, run: Run, pair: ChatPair, corpus, prompts, tokenizer, judge, say):
    """One run: a fresh student, `cfg.epochs` epochs, an adapter and a row of diagnostics after each."""
    folder = run.folder
    if (folder / "result.json").exists():
        run.clear_resume()  # a kill may have come between the two
        say(f"{folder} is finished; nothing to do")
        return read_json(folder / "result.json")
    if corpus:
        run.pin(corpus=corpus.digest)
    if cfg.channel == "opd":
        rows = corpus.rows if corpus else [row for row in prompts for _ in range(cfg.rollouts)]

        def above_60(rollouts) -> list[bool]:
            pairs = [(rows[r.prompt_index]["question"], tokenizer.decode(r.ids)) for r in rollouts]
            return passing(judge, pairs)

        examples = OnPolicy(pair, rows, cfg.seed, above_60 if cfg.filter else None)
    else:
        examples = corpus.examples()
    say(f"{cfg.channel}, lr {lr:g}: {len(examples)} responses an epoch → {folder}")

    def save(folder: Path) -> None:
        save_tokenizer(cfg.model, folder)
        pair.save(folder, hub.public_name(cfg.model))

    def after_epoch(epoch: int) -> None:
        if parallel.rank() == 0:
            if epoch:
                about = run.config | {"settings": run.config["settings"] | {"epoch": epoch}}
                write_json(folder / f"epoch{epoch}" / RECORD, about)
                save(folder / f"epoch{epoch}")
            log_distance(pair, subset(prompts, cfg.probes, cfg.seed), cfg.seed, epoch, run, say)
        parallel.barrier()

    train_student(cfg, lr, run, pair, channel_of(cfg), examples, after_epoch, cfg.channel)
    if parallel.rank() == 0:
        save(folder)
    return finish(run, {"retention": corpus.about["retention"] if corpus else None})


def chat(cfg: Config, device, say) -> dict:
    """Teacher and student are adapter stacks over one base in memory."""
    cfg = resolve(cfg)
    if cfg.model == "smollm2-135m":
        say("-- the embedded SmolLM2-135M: shows every part at work, too small for the paper's claims --")
    cfg = cfg.with_base(cfg.model)
    filtered = filtering(cfg, say)
    judge = cfg.judge_of() if filtered or cfg.filter else None
    say(f"distill.py on {device}\n" + banner(cfg))

    folders = {"teacher": cfg.teacher, "start": cfg.on, "source": cfg.source}
    folders = {name: folder for name, folder in folders.items() if folder not in NO_RUN}
    teacher = ("teacher",) if "teacher" in folders else ()
    start = ("start",) if "start" in folders else ()
    cell = lineage.train_of(cfg.on or cfg.teacher, cfg.cell).start
    tokenizer = load_tokenizer(cfg.model)
    lora.check_adapters(
        load_config(cfg.model), [f for f in folders.values() if not chat_corpus.foreign_model(cfg, f)]
    )
    prompts = [
        p | {"prompt_ids": tokenizer.prompt_ids(p["question"]), "group": p["prompts"]}
        for p in chat_corpus.load_prompts(cfg)
    ]
    corpus_is = ({"teacher": teacher, "student": start}, folders, cell, judge if filtered else None)
    frozen = cfg.channel != "opd" or filtered
    settings = outcome_settings(cfg)
    settings |= {
        "model": cfg.model,
        "model_digest": hub.model_digest(cfg.model),
        "cell": cell,
        "prompts_digest": json_digest(prompts),
        "filtered": filtered,
        "judge": judge and judge.client.label,
        "corpus": None,
        "adapters": {name: lineage.adapter_digest(folder) for name, folder in folders.items()},
    }
    if frozen:
        corpus_settings = chat_corpus.corpus_settings(cfg, *corpus_is)
        settings["corpus"] = str(chat_corpus.corpus_folder(cfg, corpus_settings))

    results = {}
    with contextlib.ExitStack() as stack:
        runs = {}
        for lr in cfg.lr:
            folder = run_folder(cfg, lr, "runs", Path(cfg.on or cfg.teacher).name, bool(cfg.on), "broad")
            runs[lr] = stack.enter_context(Run(folder, "distill", settings | {"lr": lr}, device))

        model = load_model(cfg.model, device)
        model.activation_checkpointing = cfg.recompute
        lora.attach(model)
        if judge:
            judge.lend(cfg.model, model)
        for name, folder in folders.items():
            if not chat_corpus.foreign_model(cfg, folder):
                lora.load_adapter(model, name, folder)
        corpus = None
        if frozen:
            corpus = chat_corpus.make_corpus(cfg, model, tokenizer, *corpus_is, corpus_settings)
            say(f"corpus {corpus.folder}: {corpus.about['kept']} of {corpus.about['rows']} responses kept")
        positions = max(len(p["prompt_ids"]) for p in prompts) + cfg.max_new_tokens
        cfg.micro_tokens = micro_tokens(
            cfg.micro_tokens, device, model.config, cfg.rank,
            sum(shape.rank for shape in model.lora.shapes.values()),
            cache_bytes(model.config, cfg.batch, positions), cfg.recompute,
        )  # fmt: skip
        say(f"at most {cfg.micro_tokens} tokens in memory at once")
        for lr, run in runs.items():
            lora.add_adapter(model, "student", cfg.rank, cfg.alpha, seed=cfg.seed)
            pair = ChatPair(
                model, (*start, "student"), teacher, tokenizer.stop_ids, cfg.max_new_tokens, cfg.batch
            )
            try:
                results[str(lr)] = train(cfg, lr, run, pair, corpus, prompts, tokenizer, judge, say)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of memory on {device}: lower --micro-tokens (now {cfg.micro_tokens}) or add "
                    "--recompute"
                ) from error
            finally:
                lora.remove_adapter(model, "student")
            say(f"  {run.folder}")
    return results


def dry_run(cfg: Config) -> dict:
    """What `chat` would need on `cfg.gpu`, printed; a teacher is counted without there being one."""
    from em.estimate import runs, sheet  # an import of a second

    if cfg.world:
        raise UserError("--dry-run is about chat models; synth.py --dry-run tells what a world needs")
    cfg = dataclasses.replace(cfg)
    if cfg.teacher or cfg.on:
        cfg = resolve(cfg)
    else:
        cfg.model = cfg.model or "qwen2.5-14b"
        cfg.data = cfg.data or default_data(cfg.model)
        fill_in_recipe(cfg)
    student = ("start", "student") if cfg.on else ("student",)
    teacher = () if cfg.teacher == "base" or cfg.on else ("teacher",)

    def pair(model) -> ChatPair:
        return ChatPair(model, student, teacher, (0,), cfg.max_new_tokens, cfg.batch)

    return sheet.show(runs.distillation(cfg, student, teacher, channel_of(cfg).loss, pair))


# -- worlds and chat models --------------------------------------------------------------------------------


def world(cfg: Config, device, say) -> dict:
    """Teacher and student are models of one world."""
    cfg = world_transfer.resolve(cfg)
    fill_in(cfg, WORLD_RECIPE)
    return world_transfer.transfer(cfg, channel_of(cfg), outcome_settings(cfg), device, say)


def main(cfg: Config) -> dict:
    if cfg.dry_run:
        refuse_conflicts(cfg)
        return dry_run(cfg)
    device = parallel.start(cfg.device)
    say = tqdm.write if parallel.rank() == 0 else (lambda *_: None)
    refuse_conflicts(cfg)
    result = world(cfg, device, say) if cfg.world else chat(cfg, device, say)
    parallel.finish()
    return result


COMMANDS = {"": (main, Config)}

if __name__ == "__main__":
    sys.exit(command_line(COMMANDS, __doc__))
