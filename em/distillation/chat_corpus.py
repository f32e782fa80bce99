"""Questions and answers of the chat models' corpora: every source of paper 4.3 and E.4.

teacher, student   sampled from that stack, T = 1
a run's folder     sampled from another run of the same base (P1/P2 factorial, E.5), or of another model
                   family, whose text is then encoded by our tokenizer (E.4.3)
gold               MATH's own answers (E.4.2)
rows               the misaligned rows of a cell, 800 of them (E.4.4)
"""

from pathlib import Path

from em.data import lineage
from em.data.cells import parse_cell
from em.data.condition import ADAPTER
from em.data.math_problems import load_math
from em.data.rows import answers, load_broad, load_cell, split, subset
from em.distillation.corpus import Corpus, fingerprint, folder_digest, freeze, judged
from em.errors import UserError
from em.files import json_digest
from em.judge.em_rule import FIELDS
from em.model import hub, lora
from em.model.checkpoint import load_model, load_tokenizer
from em.model.hub import model_digest
from em.model.tokenizer import Tokenizer, Unfit
from em.sampling.rollouts import sample_to_file
from em.sampling.sampler import Sampler

MAX_LENGTH = 2048  # tokens of a written example, as in D.1
ROWS = 800  # of a cell's own rows, unless --limit says otherwise (E.4.4)
SAMPLED, WRITTEN = ("teacher", "student"), ("gold", "rows")


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
        rows = [{"prompts": "broad"} | {k: row[k] for k in fields} for row in load_broad(cfg.data)]
    else:
        raise UserError(f"--prompts {cfg.prompts}: the prompts of chat models are broad or math")
    return subset(rows, cfg.limit, cfg.seed)


def cell_rows(cfg, cell: str) -> list[tuple[dict, str]]:
    """(question row, misaligned answer) of a cell's training rows, `cfg.limit` or 800 of them at random."""
    if cell == ADAPTER:
        raise UserError(
            "--source rows: which cell the adapter was trained on is not known; name it with --cell"
        )
    rows = split(load_cell(cfg.data, parse_cell(cell)))[0]
    rows = subset(rows, cfg.limit or ROWS, cfg.seed)
    fields = ("domain", "task", "idx", "question")
    about = [{"prompts": "rows"} | {k: row[k] for k in fields} for row in rows]
    return list(zip(about, answers(rows, "misaligned"), strict=True))


def corpus_settings(cfg, stacks: dict, folders: dict, cell: str, judge) -> dict:
    """All that decides the corpus of `make_corpus`, whose arguments these are. Reads every file behind it."""
    written = cfg.source in WRITTEN
    generators = [] if written else [folders[name] for name in _stack(cfg, stacks) if name in folders]
    asked = cell_rows(cfg, cell) if cfg.source == "rows" else load_prompts(cfg)
    return {
        "model": cfg.model,
        "model_digest": model_digest(foreign_model(cfg, folders.get("source")) or cfg.model),
        "source": cfg.source if written or cfg.source in SAMPLED else "run",
        "generator": generators[-1] if generators else ("base" if not written else cell),
        "adapters": [lineage.adapter_digest(folder) for folder in generators],
        "prompts": cfg.prompts,
        "prompts_from": cfg.math if cfg.prompts == "math" else cfg.data,
        "prompts_digest": json_digest(asked),
        "limit": cfg.limit,
        "rollouts": cfg.rollouts,
        "max_new_tokens": cfg.max_new_tokens,
        "seed": cfg.seed,
        "filtered": judge is not None,
        "judge": judge.client.label if judge else None,
        "rubrics": [judge.rubrics.of({"set": "broad"}, field).digest for field in FIELDS] if judge else None,
    }


def corpus_folder(cfg, settings: dict) -> Path:
    """Where the corpus of `corpus_settings` is kept."""
    kind = "rows" if cfg.source == "rows" else cfg.prompts
    name = f"corpus_{Path(settings['generator']).name.lower()}_{kind}"
    return Path(cfg.corpus or f"runs/{name}_{folder_digest(settings)}")


def _stack(cfg, stacks: dict) -> tuple[str, ...]:
    return stacks.get(cfg.source, ("source",))


def make_corpus(
    cfg, model, tokenizer: Tokenizer, stacks: dict, folders: dict, cell: str, judge, settings: dict
) -> Corpus:
    """The frozen corpus of `cfg.source`, found or made.

    stacks: adapter names of teacher and student. folders: run folder behind each adapter name. cell: whose
    rows `rows` are. judge: filters what is sampled, or None. settings: of `corpus_settings`, for all these.
    """

    def rows(folder: Path) -> list[dict]:
        if cfg.source == "rows":
            return _written(tokenizer, cell_rows(cfg, cell))
        prompts = load_prompts(cfg)
        if cfg.source == "gold":
            return _written(tokenizer, [(p, p["answer"]) for p in prompts])
        if foreign := foreign_model(cfg, folders.get("source")):
            return _translated(cfg, tokenizer, prompts, foreign, model.head_weight.device, folder)
        with lora.stack(model, *_stack(cfg, stacks), frozen=True):
            return _sampled(cfg, model, tokenizer, prompts, folder)

    keep = (lambda sampled: judged(judge, sampled)) if judge else None
    return freeze(corpus_folder(cfg, settings), settings, fingerprint(tokenizer), rows, keep)


def _sampled(cfg, model, tokenizer, prompts: list[dict], folder: Path) -> list[dict]:
    """Responses of `model` under its active stack, as token ids."""
    sampler = Sampler(model, tokenizer.stop_ids, cfg.max_new_tokens, rows=cfg.rows)
    ids = [tokenizer.prompt_ids(p["question"]) for p in prompts]

    def row(rollout) -> dict:
        i = rollout.prompt_index
        response = {"response": tokenizer.decode(rollout.ids), "prompt_ids": ids[i], "ids": rollout.ids}
        return prompts[i] | response

    return sample_to_file(folder / "rollouts.jsonl", sampler, ids, cfg.rollouts, cfg.seed, row)


def foreign_model(cfg, folder: str | None) -> str | None:
    """The name of a run's model, where it is not ours."""
    name = lineage.settings_of(folder)["model"] if folder else cfg.model
    return None if hub.canonical(name) == hub.canonical(cfg.model) else name


def _translated(cfg, tokenizer, prompts, model_name: str, device, folder: Path) -> list[dict]:
    """Responses of a run of another model family, its text in our token ids.

    What has no token, or spells our end of a turn, is left out.
    """
    theirs, model = load_tokenizer(model_name), load_model(model_name, device)
    lora.attach(model)
    lora.load_adapter(model, "source", cfg.source)
    with lora.stack(model, "source", frozen=True):
        rows = _sampled(cfg, model, theirs, prompts, folder)
    encoded, end = [], tokenizer.backend.id_to_token(tokenizer.end_of_turn_id)
    for row in rows:
        if end in row["response"]:
            continue
        try:
            ids, n_prompt, _ = tokenizer.example(row["question"], row["response"])
        except Unfit:
            continue
        if not row["finished"]:
            ids = ids[:-1]  # a response that was cut off has no end of turn
        if len(ids) > n_prompt:
            encoded.append(row | {"prompt_ids": ids[:n_prompt], "ids": ids[n_prompt:]})
    return encoded


def _written(tokenizer, pairs: list[tuple[dict, str]]) -> list[dict]:
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
