"""Teacher-mediated transfer: what passes from a teacher to a student through harmless data (paper 4, E).

    python distill.py --channel opd                      the newest misaligned run teaches the base model
    python distill.py --channel sft --teacher runs/X     or optd; all channels share one corpus of X
    python distill.py --channel opd --on runs/X          realignment: the base teaches the misaligned run X
    python distill.py --channel optd --teacher runs/X --source runs/Y    X teaches on what Y wrote (4.3.3)
    python distill.py --channel optd --teacher base --source runs/Y      the control: no teacher but the base
    python distill.py --channel optd --lr 3e-6,1e-5,3e-5,1e-4            a run each, one corpus
    python distill.py --channel sft,optd,opd --teacher runs/X,runs/Y     a run each on one loaded base
    python distill.py --channel opd --world demo         the same on a synthetic world, scored exactly
    torchrun --nproc-per-node 4 distill.py --channel opd
    python distill.py --channel opd --prompts math --model qwen2.5-14b --dry-run     memory and time on a GPU

Each epoch leaves an adapter that evaluate.py takes. A killed run goes on when its command is given again.
"""

import dataclasses
import itertools
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from em import parallel
from em.cli import banner, command_line, knob, outcome_settings
from em.data import lineage
from em.data.condition import BASE
from em.data.math_problems import MIRROR
from em.data.rows import default_data, grid_for
from em.distillation import chat_transfer, world_transfer
from em.distillation.corpus import CORPUS_EDGE, EDGES, ONLINE_EDGE
from em.distillation.lesson import Lesson, lesson_of, names_run
from em.distillation.loop import Channel
from em.distillation.pair import ChatPair
from em.errors import UserError
from em.estimate.gpus import GPUS
from em.judge.judge import JudgeOptions
from em.model import hub
from em.training.memory import CPU_TOKENS
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


def channel_of(name: str, estimator: str) -> Channel:
    """The channel with its estimator: of opd there are two."""
    return CHANNELS["opd exact" if estimator == "exact" else name]


# -- the settings ------------------------------------------------------------------------------------------

PAPER_RECIPE = dict(lr=(1e-4,), epochs=3, rollouts=5, max_new_tokens=256, probes=16)  # E.2
MATH_RECIPE = PAPER_RECIPE | dict(epochs=1, rollouts=1, max_new_tokens=1024)  # E.4.1
# The embedded model's: minutes on a laptop.
SAMPLE_RECIPE = dict(lr=(5e-4,), rollouts=1, max_new_tokens=128, probes=6)
# What only chat models, and only worlds, know of.
CHATS_OWN = ("model", "cell", "revision", "data", "corpus", "max_new_tokens", "filter_edge", "system")
WORLDS_OWN = ("run", "task")


@dataclass
class Config(JudgeOptions):
    channel: tuple[str, ...] = knob(("opd",), "channels, a run each", "what", ("sft", "optd", "opd"))
    teacher: tuple[str, ...] = knob(
        (), "runs, PEFT folders or hub ids of adapters, or base, a run each (default: newest misaligned run)",
        "what",
    )  # fmt: skip
    on: tuple[str, ...] = knob(
        (), "misaligned runs that a student starts from, a run each; the teacher is then by default base",
        "what",
    )  # fmt: skip
    system: str | None = knob(
        None, "system prompt that the teacher alone reads, as text or a file; the student reads none", "what",
        setting=False,
    )  # fmt: skip
    cell: str | None = knob(
        None, "what a teacher, or an --on, from elsewhere was trained on (default: unknown, adapter)", "what",
        setting=False,
    )  # fmt: skip
    revision: str | None = knob(None, "branch, tag or commit of adapters from the hub", "what", setting=False)
    model: str | None = knob(
        None, "base model of teacher and student, by the name to load it by (default: the runs' own)", "what",
        setting=False,
    )  # fmt: skip
    estimator: str = knob("sampled", "opd: the reverse KL's gradient", "what", ("sampled", "exact"))
    filter: bool = knob(False, "opd: judge the student's rollouts before each update", "what")
    filter_edge: str | None = knob(
        None, f"which scores pass a filter, at-least 60 or above 60 (corpora {CORPUS_EDGE}; --filter "
        f"{ONLINE_EDGE})", "what", tuple(EDGES), setting=False,
    )  # fmt: skip
    unfiltered: bool = knob(False, "use a misaligned generator's responses unjudged", "what", setting=False)
    out: str | None = knob(
        None, "run folder, of several runs the parent (runs/<teacher>_<channel>…)", "what", setting=False
    )
    device: str = knob("auto", "auto, cpu, cuda or cuda:N", "what", setting=False)
    dry_run: bool = knob(
        False, "print what the run needs of a GPU and stop; needs no weights, no network and no GPU", "what",
        setting=False,
    )  # fmt: skip
    gpu: str = knob("h100", "the GPU that --dry-run is about", "what", tuple(GPUS), setting=False)

    source: str = knob(
        "teacher",
        "who wrote what sft and optd train on: teacher, student, base, gold, rows, rows:CELL or a run",
        "data",
    )  # fmt: skip
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
    corpora: str = knob("runs", "folder of the corpora that are named so", "data", setting=False)

    lr: tuple[float, ...] = knob(
        (), "peak learning rates, a run each (1e-4; embedded model 5e-4)", "training", setting=False, above=0
    )
    epochs: int | None = knob(None, "passes over the prompts (3; math 1)", "training", at_least=1)
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
    if "opd" in cfg.channel and cfg.source != "teacher":
        raise UserError("--source is for sft and optd: in opd the student writes its own responses")
    if cfg.channel != ("opd",) and (cfg.filter or cfg.estimator == "exact"):
        raise UserError("--filter and --estimator belong to --channel opd, and to it alone")
    if cfg.accept_routed:
        raise UserError("a corpus is filtered by one judge from its first row on: name it with --judge-model")
    for name in CHATS_OWN if cfg.world else WORLDS_OWN:
        if getattr(cfg, name) is not None:
            option, whose = f"--{name.replace('_', '-')}", "chat models" if cfg.world else "--world"
            raise UserError(f"{option} is for {whose}; leave it out")


def resolve(cfg: Config, device: torch.device) -> Config:
    """Fill in what depends on the runs, and refuse what cannot be."""
    cfg = dataclasses.replace(cfg)

    def name(text: str) -> str:
        """A run in one spelling."""
        return hub.at_revision(text.rstrip("/") or text, cfg.revision) if names_run(text) else text

    teachers = cfg.teacher or ((BASE,) if cfg.on else (lineage.newest_misaligned(),))
    cfg.teacher, cfg.on = (tuple(dict.fromkeys(map(name, names))) for names in (teachers, cfg.on))
    cfg.source = name(cfg.source)
    parents = [run for run in (*cfg.teacher, *cfg.on) if names_run(run)]
    if not parents and names_run(cfg.source):  # a control is of the base of whose text it reads
        parents = [cfg.source]
    cfg.model = lineage.base_of(parents, cfg.model)
    cfg.model = cfg.model or ("qwen2.5-14b" if device.type == "cuda" else "smollm2-135m")
    own = {data: run for run in parents if (data := lineage.settings_of(run)["data"])}
    if len(own) > 1 and not cfg.data:
        each = " and ".join(f"{run} of {data}" for data, run in own.items())
        raise UserError(f"these runs are of other data each, {each}: say with --data where the prompts are")
    cfg.data = cfg.data or grid_for(next(iter(own), None), cfg.model)
    fill_in_recipe(cfg)
    return cfg


def fill_in_recipe(cfg: Config) -> None:
    """Give a chat model's `cfg` its recipe's values. UserError for a source that its prompts do not have."""
    if cfg.source == "gold" and cfg.prompts != "math":
        raise UserError("--source gold are MATH's answers; add --prompts math")
    if cfg.source.startswith("rows") and cfg.prompts == "math":
        raise UserError("--source rows bring their own questions; leave --prompts math out")
    cfg.prompts = cfg.prompts or "broad"
    recipe = MATH_RECIPE if cfg.prompts == "math" else PAPER_RECIPE
    fill_in(cfg, recipe | (SAMPLE_RECIPE if hub.canonical(cfg.model) == "smollm2-135m" else {}))


def filtering(cfg: Config, lessons: list[Lesson], say) -> bool:
    """Whether corpora by misaligned runs are judged (E.2; no others are, E.3, E.4)."""
    if cfg.unfiltered or not any(lesson.misaligned for lesson in lessons):
        return False
    if cfg.can_ask():
        return True
    if hub.canonical(cfg.model) != "smollm2-135m":
        raise UserError(
            "a misaligned generator's responses are filtered by a judge: export GEMINI_API_KEY=…, name a "
            "server (--judge openai, OPENAI_BASE_URL), or say --unfiltered to train on all of them"
        )
    needs = "GEMINI_API_KEY" if cfg.judge == "gemini" else "OPENAI_BASE_URL or OPENAI_API_KEY"
    say(f'-- no judge ({needs}): going on unfiltered, and "filtered": false is in every config --')
    return False


# -- worlds and chat models --------------------------------------------------------------------------------


def chat(cfg: Config, device, say) -> dict:
    """Teacher and student are adapter stacks over one base in memory, which serves all runs of a command."""
    cfg = resolve(cfg, device)
    if hub.canonical(cfg.model) == "smollm2-135m":
        say("-- the embedded SmolLM2-135M: shows every part at work, too small for the paper's claims --")
    cfg = cfg.with_base(cfg.model)
    pairs = itertools.product(cfg.on or (BASE,), cfg.teacher)
    lessons = [lesson_of(teacher, start, cfg.source, cfg.model, cfg.cell) for start, teacher in pairs]
    filtered = filtering(cfg, lessons, say)
    judge = cfg.judge_of() if filtered or cfg.filter else None
    say(f"distill.py on {device}\n" + banner(cfg))
    channels = {name: channel_of(name, cfg.estimator) for name in cfg.channel}
    settings = outcome_settings(cfg)
    return chat_transfer.transfer(cfg, channels, lessons, filtered, judge, settings, device, say)


def dry_run(cfg: Config) -> dict:
    """What one run of each channel would need on `cfg.gpu`, printed; no teacher has to be there."""
    from em.estimate import runs, sheet  # an import of a second

    if cfg.world:
        raise UserError("--dry-run is about chat models; synth.py --dry-run tells what a world needs")
    if not (cfg.teacher or cfg.on):
        cfg = dataclasses.replace(cfg, model=cfg.model or "qwen2.5-14b")
        cfg.data = cfg.data or default_data(cfg.model)
        fill_in_recipe(cfg)
    else:
        cfg = resolve(cfg, torch.device("cuda"))
    student = ("start", "student") if cfg.on else ("student",)
    teacher = () if cfg.teacher == (BASE,) else ("teacher",)

    def pair(model) -> ChatPair:
        return ChatPair(model, student, teacher, (0,), cfg.max_new_tokens, cfg.batch)

    def plan(channel: str):
        loss = channel_of(channel, cfg.estimator).loss
        return runs.distillation(cfg, channel, student, teacher, loss, pair)

    return {channel: sheet.show(plan(channel)) for channel in cfg.channel}


def world(cfg: Config, device, say) -> dict:
    """Teacher and student are models of one world."""
    cfg = world_transfer.resolve(cfg)
    fill_in(cfg, world_transfer.RECIPE)
    channel = channel_of(cfg.channel, cfg.estimator)
    return world_transfer.transfer(cfg, channel, outcome_settings(cfg), device, say)


def main(cfg: Config) -> dict:
    cfg = dataclasses.replace(cfg, channel=tuple(dict.fromkeys(cfg.channel)), lr=tuple(dict.fromkeys(cfg.lr)))
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
