"""Questions and answers of the chat models' corpora: every writer of paper 4.3 and E.4.

What a model wrote is sampled at T = 1: the teacher's, the student's as it starts, the base's, that of another
run of the same base (P1/P2 factorial, E.5), or of another model family, whose text is then encoded by our
tokenizer (E.4.3). What is written already is taken as it is: MATH's own answers (E.4.2), or the misaligned
rows of a cell, 800 of them (E.4.4). A corpus is its writer's, whoever teaches on it.
"""

from pathlib import Path

from em.data import lineage
from em.data.cells import parse_cell
from em.data.chats import chat_of, system_text
from em.data.condition import BASE
from em.data.math_problems import load_math
from em.data.rows import answers, load_broad, load_cell, split, subset
from em.distillation.corpus import CORPUS_EDGE, Corpus, fingerprint, folder_digest, freeze, judged
from em.distillation.lesson import Lesson, names_run
from em.errors import UserError
from em.files import json_digest
from em.judge.em_rule import FIELDS
from em.model import hub, lora
from em.model.checkpoint import load_model, load_tokenizer
from em.model.tokenizer import Tokenizer, Unfit
from em.sampling.rollouts import sample_to_file
from em.sampling.sampler import Sampler

MAX_LENGTH = 2048  # tokens of a written example, as in D.1
ROWS = 800  # of a cell's own rows, unless --limit says otherwise (E.4.4)


def load_prompts(cfg) -> list[dict]:
    """The questions of `cfg.prompts`, broad or math, a row each; `cfg.limit` of them at random."""
    if cfg.prompts == "math":
        fields = ("idx", "question", "answer")
        rows = [
            {"prompts": "math", "domain": r["type"], "task": "math"} | {k: r[k] for k in fields}
            for r in load_math(cfg.math)
        ]
    elif cfg.prompts == "broad":
        fields = ("domain", "task", "em_surface", "idx", "question")
        fields += ("messages",)  # of a question with a system turn of its own
        rows = [
            {"prompts": "broad"} | {k: row[k] for k in fields if k in row} for row in load_broad(cfg.data)
        ]
    else:
        raise UserError(f"--prompts {cfg.prompts}: the prompts of chat models are broad or math")
    return subset(rows, cfg.limit, cfg.seed)


def cell_rows(cfg, writer: str) -> list[tuple[dict, str]]:
    """(question row, misaligned answer) of a cell's training rows, `cfg.limit` or 800 of them at random.

    writer: `rows:<cell>`.
    """
    rows = split(load_cell(cfg.data, parse_cell(writer.removeprefix("rows:"))))[0]
    rows = subset(rows, cfg.limit or ROWS, cfg.seed)
    fields = ("domain", "task", "idx", "question")
    about = [{"prompts": "rows"} | {k: row[k] for k in fields} for row in rows]
    return list(zip(about, answers(rows, "misaligned"), strict=True))


def corpus_settings(cfg, lesson: Lesson, judge, model_digest: str) -> dict:
    """All that decides the corpus of `make_corpus`, whose arguments these are. Reads every file behind it.

    model_digest: of cfg.model.
    """
    writer, rows = lesson.writer, lesson.rows
    sampled = names_run(writer) or writer == BASE
    told = {"system": system} if (system := _told(cfg)) else {}
    asked = cell_rows(cfg, writer) if rows else load_prompts(cfg)
    return {
        "model": hub.canonical(cfg.model),
        "model_digest": hub.model_digest(lesson.foreign) if lesson.foreign else model_digest,
        "source": lesson.source_train,
        "generator": str(Path(writer)),
        "adapters": [lineage.adapter_digest(writer)] if names_run(writer) else [],
        "prompts": None if rows else cfg.prompts,
        "prompts_from": cfg.math if cfg.prompts == "math" else cfg.data,
        "prompts_digest": json_digest(asked),
        "limit": cfg.limit,
        "rollouts": cfg.rollouts if sampled else None,
        "max_new_tokens": cfg.max_new_tokens if sampled else None,
        "seed": cfg.seed,
        "filtered": judge is not None,
        "edge": (cfg.filter_edge or CORPUS_EDGE) if judge else None,
        "judge": judge.client.label if judge else None,
        "rubrics": [judge.rubrics.of({"set": "broad"}, field).digest for field in FIELDS] if judge else None,
    } | told


def corpus_folder(cfg, settings: dict) -> Path:
    """Where the corpus of `corpus_settings` is kept."""
    writer = Path(settings["generator"]).name.lower().removeprefix("rows:")
    name = f"corpus_{writer}_{settings['prompts'] or 'rows'}_{folder_digest(settings)}"
    return Path(cfg.corpus or f"{cfg.corpora}/{name}")


def make_corpus(cfg, lesson: Lesson, model, tokenizer: Tokenizer, judge, settings: dict) -> Corpus:
    """The frozen corpus of a lesson, whose adapters are on `model`, found or made.

    judge: filters what is sampled, or None. settings: of `corpus_settings`, for all these.
    """
    writer = lesson.writer

    def rows(folder: Path) -> list[dict]:
        if lesson.rows:
            return _encoded(tokenizer, cell_rows(cfg, writer))
        prompts = load_prompts(cfg)
        if writer == "gold":
            return _encoded(tokenizer, [(p, p["answer"]) for p in prompts])
        if lesson.foreign:
            return _translated(cfg, lesson, tokenizer, prompts, model.head_weight.device, folder)
        with lora.stack(model, *lesson.stack(writer), frozen=True):
            return _sampled(cfg, model, tokenizer, prompts, folder, _told(cfg))

    keep = (lambda sampled: judged(judge, sampled, settings["edge"])) if judge else None
    return freeze(corpus_folder(cfg, settings), settings, fingerprint(tokenizer), rows, keep)


def _told(cfg) -> str | None:
    """The system prompt that the writer reads: a teacher's, and no other's that is the same model."""
    return system_text(cfg.system) if cfg.source == "teacher" else None


def _sampled(
    cfg, model, tokenizer, prompts: list[dict], folder: Path, system: str | None = None
) -> list[dict]:
    """Responses of `model` under its active stack, as token ids. system: what it alone reads before each."""
    sampler = Sampler(model, tokenizer.stop_ids, cfg.max_new_tokens, rows=cfg.rows)
    ids = [tokenizer.prompt_ids(chat_of(p)) for p in prompts]
    asked = ids if system is None else [tokenizer.prompt_ids(chat_of(p, system)) for p in prompts]

    def row(rollout) -> dict:
        i = rollout.prompt_index
        response = {"response": tokenizer.decode(rollout.ids), "prompt_ids": ids[i], "ids": rollout.ids}
        return prompts[i] | response

    return sample_to_file(folder / "rollouts.jsonl", sampler, asked, cfg.rollouts, cfg.seed, row)


def _translated(cfg, lesson: Lesson, tokenizer, prompts, device, folder: Path) -> list[dict]:
    """Responses of a run of another model family, its text in our token ids.

    What has no token, or spells our end of a turn, is left out.
    """
    theirs, model = load_tokenizer(lesson.foreign), load_model(lesson.foreign, device)
    lora.attach(model)
    lora.load_adapter(model, "source", lesson.writer)
    with lora.stack(model, "source", frozen=True):
        rows = _sampled(cfg, model, theirs, prompts, folder)
    encoded, end = [], tokenizer.backend.id_to_token(tokenizer.end_of_turn_id)
    for row in rows:
        if end in row["response"]:
            continue
        try:
            ids, n_prompt, _ = tokenizer.example(chat_of(row), row["response"])
        except Unfit:
            continue
        if not row["finished"]:
            ids = ids[:-1]  # a response that was cut off has no end of turn
        if len(ids) > n_prompt:
            encoded.append(row | {"prompt_ids": ids[:n_prompt], "ids": ids[n_prompt:]})
    return encoded


def _encoded(tokenizer, pairs: list[tuple[dict, str]]) -> list[dict]:
    """Rows of answers that exist as text: (question row, answer) pairs; longer ones are left out."""
    rows = []
    for prompt, (about, answer) in enumerate(pairs):
        try:
            ids, n_prompt, _ = tokenizer.example(about["question"], answer)
        except Unfit:
            continue
        if len(ids) <= MAX_LENGTH:
            place = {"prompt": prompt, "sample": 0, "prompt_ids": ids[:n_prompt], "ids": ids[n_prompt:]}
            rows.append(about | place | {"finished": True, "response": answer})
    if not rows:
        raise UserError(f"all {len(pairs)} answers are longer than {MAX_LENGTH} tokens")
    return rows
