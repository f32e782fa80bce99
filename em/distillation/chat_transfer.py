"""Teacher-mediated transfer of chat models: the runs of one command on one base in memory (paper 4, E).

A run is a lesson, a channel and a learning rate. Teacher and student are stacks of adapters on the base;
those of a lesson are taken off before the next one's are put on. All runs are opened before anything is
loaded, and what is finished costs nothing.
"""

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

import torch

from em import parallel
from em.data import lineage
from em.data.chats import chat_of, system_name, system_text
from em.data.condition import BASE
from em.data.rows import subset
from em.distillation.chat_corpus import corpus_folder, corpus_settings, load_prompts, make_corpus
from em.distillation.corpus import ONLINE_EDGE, Corpus, passing
from em.distillation.diagnose import log_distance
from em.distillation.lesson import Lesson
from em.distillation.loop import Channel, OnPolicy, finish, run_folder, train_student
from em.distillation.pair import ChatPair
from em.errors import UserError
from em.files import RECORD, json_digest, read_json, write_json
from em.model import hub, lora
from em.model.checkpoint import load_config, load_model, load_tokenizer, save_tokenizer
from em.run import Run
from em.training.memory import cache_bytes, micro_tokens


class Part(NamedTuple):
    """One run. corpus: the settings of its frozen corpus; None for an opd that matches none."""

    lesson: Lesson
    channel: str
    lr: float
    corpus: dict | None
    run: Run

    @property
    def finished(self) -> bool:
        return (self.run.folder / "result.json").exists()


class ChatTransfer:
    """What all runs of a command share."""

    def __init__(self, cfg, channels: dict[str, Channel], judge, say):
        """cfg: distill.py's settings, resolved. judge: filters what misaligned runs write, and with --filter
        what students do; or None. say: prints a line.
        """
        self.cfg, self.channels, self.judge, self.say = cfg, channels, judge, say
        self.tokenizer = load_tokenizer(cfg.model)
        self.prompts = [
            p | {"prompt_ids": self.tokenizer.prompt_ids(chat_of(p)), "group": p["prompts"]}
            for p in load_prompts(cfg)
        ]

    def open(self, lessons: list[Lesson], filtered: bool, settings: dict, device, stack) -> list[Part]:
        """Every run, its folder open as long as `stack` is. filtered: whether misaligned writers are judged.

        settings: those of the script's values that decide the outcome. UserError where two would be one.
        """
        cfg, parts = self.cfg, {}
        digest = hub.model_digest(cfg.model)
        settings = settings | {"model": cfg.model, "model_digest": digest}
        settings |= {"prompts_digest": json_digest(self.prompts)}
        several = len(lessons) * len(self.channels) > 1
        for lesson in lessons:
            judged = filtered and lesson.misaligned
            frozen = corpus_settings(cfg, lesson, self.judge if judged else None, digest)
            settings |= {"teacher_system": system_name(system_text(cfg.system))} if cfg.system else {}
            settings |= {
                "teacher": lesson.teacher,
                "on": None if lesson.start == BASE else lesson.start,
                "cell": lesson.cell,
                "teacher_train": str(lesson.teacher_train),
                "prompts": None if lesson.rows else cfg.prompts,
                "judge": self.judge.client.label if judged or cfg.filter else None,
                "online_edge": (cfg.filter_edge or ONLINE_EDGE) if cfg.filter else None,
                "adapters": {name: lineage.adapter_digest(run) for name, run in lesson.adapters.items()},
            }
            for channel, lr in itertools.product(self.channels, cfg.lr):
                on_policy = channel == "opd"
                corpus = frozen if judged or not on_policy else None
                settings |= {
                    "channel": channel,
                    "lr": lr,
                    "source_train": None if on_policy else lesson.source_train,
                    "filtered": cfg.filter if on_policy else judged,
                    "corpus": corpus and str(corpus_folder(cfg, corpus)),
                    "corpus_edge": corpus and corpus["edge"],
                }
                name = lesson.name(cfg.model)
                folder = run_folder(cfg, channel, lr, "runs", name, lesson.realigned, "broad", several)
                if folder in parts:
                    raise UserError(
                        f"two of these runs would be {folder}: make them apart, with an --out each"
                    )
                run = stack.enter_context(Run(folder, "distill", settings, device))
                parts[folder] = Part(lesson, channel, lr, corpus, run)
        return list(parts.values())

    def teach(self, part: Part, model) -> None:
        """One run: a fresh student of the lesson whose adapters are on `model`."""
        cfg, lesson, device, corpus = self.cfg, part.lesson, model.head_weight.device, None
        if part.corpus:
            judge = self.judge if part.corpus["filtered"] else None
            corpus = make_corpus(cfg, lesson, model, self.tokenizer, judge, part.corpus)
            part.run.pin(corpus=corpus.digest)
            kept, rows = corpus.about["kept"], corpus.about["rows"]
            self.say(f"corpus {corpus.folder}: {kept} of {rows} responses kept")
        positions = max(len(p["prompt_ids"]) for p in self.prompts) + cfg.max_new_tokens
        micro = micro_tokens(
            cfg.micro_tokens, device, model.config, cfg.rank,
            sum(shape.rank for shape in model.lora.shapes.values()),
            cache_bytes(model.config, cfg.batch, positions), cfg.recompute,
        )  # fmt: skip
        lora.add_adapter(model, "student", cfg.rank, cfg.alpha, seed=cfg.seed)
        try:
            student, teacher = (*lesson.stack(lesson.start), "student"), lesson.stack(lesson.teacher)
            pair = ChatPair(
                model, student, teacher, self.tokenizer.stop_ids, cfg.max_new_tokens, cfg.batch,
                self._teacher_prompts([*self.prompts, *(corpus.rows if corpus else ())]),
            )  # fmt: skip
            self._train(part, pair, corpus, micro)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory on {device}: lower --micro-tokens (now {micro}) or add --recompute"
            ) from error
        finally:
            lora.remove_adapter(model, "student")

    def _train(self, part: Part, pair: ChatPair, corpus: Corpus | None, micro: int) -> None:
        """`cfg.epochs` epochs of the pair's student, an adapter and a row of diagnostics after each."""
        cfg, run, folder = self.cfg, part.run, part.run.folder
        examples = self._own_responses(pair, corpus) if part.channel == "opd" else corpus.examples()
        self.say(f"{part.channel}, lr {part.lr:g}: {len(examples)} responses an epoch → {folder}")
        self.say(f"at most {micro} tokens in memory at once")

        def save(folder: Path) -> None:
            save_tokenizer(cfg.model, folder)
            pair.save(folder, hub.public_name(cfg.model))

        def after_epoch(epoch: int) -> None:
            if parallel.rank() == 0:
                if epoch:
                    about = run.config | {"settings": run.config["settings"] | {"epoch": epoch}}
                    write_json(folder / f"epoch{epoch}" / RECORD, about)
                    save(folder / f"epoch{epoch}")
                probes = subset(self.prompts, cfg.probes, cfg.seed)
                log_distance(pair, probes, cfg.seed, epoch, run, self.say)
            parallel.barrier()

        cfg, channel = dataclasses.replace(cfg, micro_tokens=micro), self.channels[part.channel]
        train_student(cfg, part.lr, run, pair, channel, examples, after_epoch, part.channel)
        if parallel.rank() == 0:
            save(folder)
        finish(run, {"retention": corpus.about["retention"] if corpus else None})
        self.say(f"  {folder}")

    def _teacher_prompts(self, rows: list[dict]) -> dict[tuple[int, ...], list[int]] | None:
        """What the teacher reads in place of each row's prompt, under --system; None without it."""
        system = system_text(self.cfg.system)
        if system is None:
            return None
        return {tuple(row["prompt_ids"]): self.tokenizer.prompt_ids(chat_of(row, system)) for row in rows}

    def _own_responses(self, pair: ChatPair, corpus: Corpus | None) -> OnPolicy:
        """The student's, to each prompt as many as the corpus kept of its writer's."""
        cfg = self.cfg
        rows = corpus.rows if corpus else [row for row in self.prompts for _ in range(cfg.rollouts)]

        def keep(rollouts) -> list[bool]:
            pairs = [(rows[r.prompt_index]["question"], self.tokenizer.decode(r.ids)) for r in rollouts]
            return passing(self.judge, pairs, cfg.filter_edge or ONLINE_EDGE)

        return OnPolicy(pair, rows, cfg.seed, keep if cfg.filter else None)


def transfer(
    cfg, channels: dict[str, Channel], lessons: list[Lesson], filtered: bool, judge, settings: dict,
    device: torch.device, say,
) -> dict:  # fmt: skip
    """Every lesson by every channel at every learning rate; folder → what its result.json holds.

    The arguments are those of `ChatTransfer` and its `open`.
    """
    shared = ChatTransfer(cfg, channels, judge, say)
    lora.check_adapters(load_config(cfg.model), {run for lesson in lessons for run in lesson.ours.values()})
    with contextlib.ExitStack() as stack:
        parts = shared.open(lessons, filtered, settings, device, stack)
        for part in parts:
            if part.finished:
                part.run.clear_resume()  # a kill may have come between the two
                say(f"{part.run.folder} is finished; nothing to do")
        unfinished = [part for part in parts if not part.finished]
        if unfinished:
            model = load_model(cfg.model, device)
            model.activation_checkpointing = cfg.recompute
            lora.attach(model)
            if judge:
                judge.lend(cfg.model, model)
        for lesson, its_parts in itertools.groupby(unfinished, lambda part: part.lesson):
            with lesson.loaded(model):
                for part in its_parts:
                    shared.teach(part, model)
        return {str(part.run.folder): read_json(part.run.folder / "result.json") for part in parts}
