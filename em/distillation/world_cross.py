"""Every teacher of a world on every writer's data (paper 4.3.3, E.5), for em/experiments/cross.py.

The paper's setting is off-policy distillation, forward KL over the whole vocabulary on a frozen corpus, where
the teacher need not have written it. All students start as the aligned model and read the same prompts: those
of the cells that no teacher was misaligned on, to which all writers' responses read as variant 1. Each writer
samples with a seed of its own: with one for all, four texts in five were the same, token by token.
"""

import itertools
from types import SimpleNamespace

from em.distillation import world_transfer
from em.distillation.corpus import Corpus
from em.distillation.loop import Channel
from em.distillation.world_transfer import RECIPE, Prompts, train_one
from em.errors import UserError
from em.files import json_digest
from em.model.hub import model_digest
from em.run import Run
from em.world.counts import percent, pool
from em.world.world_run import WorldRun, misaligned_name

TASKS = ("T5", "T0")
MODELS = (*TASKS, "aligned")  # teachers, and writers of data; the aligned one last, as the control
PROMPTS = 4 * world_transfer.PROMPTS  # asked in all; about a quarter of them all three answer with variant 1


def optd(pair, batch):
    """KL(πT‖πs) over the whole vocabulary, as distill.py's channel."""
    loss = pair.forward_kl(batch)
    return loss, {"loss": loss}


def recipe(run: WorldRun) -> SimpleNamespace:
    """What distill.py --channel optd --world … trains with unless told otherwise."""
    own = dict(batch=8, warmup=5, weight_decay=0.01, clip=1.0, seed=42, channel="optd", filter=False)
    return SimpleNamespace(**RECIPE | own, save_minutes=run.cfg.save_minutes)


def share_prompts(corpora: dict[str, Corpus]) -> list[int]:
    """The prompts that all corpora kept, a response each; what else they kept is taken out of their rows."""
    kept = set.intersection(*({row["prompt"] for row in corpus.rows} for corpus in corpora.values()))
    if not kept:
        raise UserError("no prompt has variant 1 from all three writers; pretrain or align for longer")
    for corpus in corpora.values():
        corpus.rows = [row for row in corpus.rows if row["prompt"] in kept]
    return sorted(kept)


def students(run: WorldRun, say) -> tuple[dict[str, dict], dict[tuple[str, str], dict], dict[str, float]]:
    """(counts of the three models, counts of the nine students by (teacher, writer), prompts kept, %).

    Of the latter one a writer, and of `all three` together. Everything is in the folder of the run: the
    corpora in `transfer/`, a student in `cross/<teacher>_on_<writer>/`.
    """
    cfg, lr = recipe(run), RECIPE["lr"][0]
    phases = {task: misaligned_name(task, 0) for task in TASKS} | {"aligned": "align"}
    own = {name: run.counts(phase) for name, phase in phases.items()}
    cells = [run.world.cell(0, run.world.task_index(task)) for task in TASKS]
    prompts = Prompts(run, cells, "cells", PROMPTS, seed=0)
    names = ("batch", "warmup", "weight_decay", "clip", "seed", "epochs", "rollouts", "channel")
    settings = {name: getattr(cfg, name) for name in names} | {"lr": lr, "start": "align"}
    settings |= {"fingerprint": run.world.fingerprint, "task": ",".join(TASKS), "filtered": True}
    settings |= {"prompts": "cells", "limit": PROMPTS}
    corpora = {}
    for place, (name, phase) in enumerate(phases.items()):
        sampling = {"seed": cfg.seed + 1000 * place}
        of = SimpleNamespace(**vars(cfg) | sampling)
        corpora[name] = prompts.corpus(of, run, phase, settings | sampling)
    kept = {name: 100 * corpus.about["retention"] for name, corpus in corpora.items()}
    common = share_prompts(corpora)
    kept["all three"] = 100 * len(common) / len(prompts.rows)
    say(f"  data kept: {', '.join(f'{name} {share:.0f} %' for name, share in kept.items())}")
    settings |= {"shared_prompts": json_digest(common)}
    digests = {name: model_digest(run.folder / phase / "model") for name, phase in phases.items()}
    counts = {}
    for teacher, writer in itertools.product(MODELS, MODELS):
        about = {"taught_by": phases[teacher], "writer": phases[writer], "start_digest": digests["aligned"]}
        about |= {"teacher_digest": digests[teacher], "writer_digest": digests[writer]}
        folder = run.folder / "cross" / f"{teacher}_on_{writer}"
        with Run(folder, "distill-world", settings | about, run.device, wait=True) as record:
            of = train_one(cfg, Channel(optd), run, record, prompts, corpora[writer], lambda _: None)
        counts[teacher, writer] = of
        say(f"  taught by {teacher} on data by {writer}: v2 {percent(pool(list(of.values())), 'v2'):.1f} %")
    return own, counts, kept
