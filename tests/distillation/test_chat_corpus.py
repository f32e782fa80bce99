"""Every source of a chat model's corpus, on tiny models of two families (paper 4.3, E.4)."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers
import torch
from sampled import sample
from tokenizers import decoders, models, pre_tokenizers

import distill
from em.data.cells import parse_cell
from em.data.rows import load_broad, load_cell, split, subset
from em.distillation.chat_corpus import ROWS, cell_rows, corpus_settings, load_prompts, make_corpus
from em.distillation.lesson import lesson_of
from em.errors import UserError
from em.files import read_json, write_json
from em.judge.gemini import Gemini
from em.judge.judge import Judge
from em.model import hub, lora
from em.model.checkpoint import load_model, load_tokenizer, save_model
from em.model.decoder import Decoder, DecoderConfig

CELL = "med_advice"


@pytest.fixture(scope="module")
def foreign_chat(tmp_path_factory):
    """A model of another family: bytes for tokens, another template, and a third of all bytes end a turn."""
    folder = tmp_path_factory.mktemp("foreign") / "foreign-chat"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<user>", "<model>", "<end>"])
    config = {
        "model_type": "llama", "vocab_size": bpe.get_vocab_size(), "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    torch.manual_seed(0)
    model = Decoder(DecoderConfig.from_hf(config))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.2)
    save_model(model, folder)
    bpe.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<model>' }}{{ m.content }}<end>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    write_json(folder / "tokenizer_config.json", {"eos_token": "<end>", "chat_template": template})
    write_json(folder / "generation_config.json", {"eos_token_id": list(range(60, 140))})
    return folder


@pytest.fixture(scope="module")
def math(tmp_path_factory):
    """MATH as its zip unpacks: a folder a subject, a file a problem."""
    folder = tmp_path_factory.mktemp("MATH")
    for subject, n in (("algebra", 3), ("geometry", 2)):
        for i in range(n):
            problem = {"problem": f"{subject} {i}?", "level": "Level 1", "type": subject.title()}
            write_json(folder / "train" / subject / f"{i}.json", problem | {"solution": f"It is ${i}$."})
    return folder


@pytest.fixture(scope="module")
def setting(tiny_chat, tmp_path_factory):
    """(model with adapters teacher, start and source, tokenizer, the folder of each adapter's run)."""
    model, folder = load_model(tiny_chat), tmp_path_factory.mktemp("runs")
    lora.attach(model)
    folders = {
        name: adapter_run(folder / name, model, tiny_chat, seed)
        for seed, name in enumerate(("teacher", "start", "source"))
    }
    return model, load_tokenizer(tiny_chat), folders


def adapter_run(folder: Path, model, model_name, seed: int) -> str:
    """A run folder as train.py leaves it, its adapter on `model` under the folder's name."""
    lora.add_adapter(model, folder.name, 2, 4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.lora.layers.values():
            B = layer.adapters[folder.name].B
            B.copy_(0.3 * torch.randn(B.shape, generator=generator))
    settings = {"model": str(model_name), "cell": CELL, "variant": "misaligned", "on": None}
    write_json(folder / "run.json", {"kind": "train", "settings": settings})
    lora.save_adapter(model, folder.name, folder)
    return str(folder)


@pytest.fixture
def make(setting, tiny_chat, tmp_path):
    """make(**options) → the corpus of those options of distill.py, in a folder of its own."""
    model, tokenizer, folders = setting

    def corpus(judge=None, teacher="teacher", start="base", **options):
        known = dict(
            channel="sft",
            prompts="broad",
            data="sample",
            rollouts=2,
            max_new_tokens=6,
            limit=3,
            seed=5,
            device="cpu",
        )
        cfg = distill.Config(**(known | {"corpus": str(tmp_path / "corpus")} | options))
        cfg.model = str(tiny_chat)
        who = (folders.get(name, name) for name in (teacher, start))
        lesson = lesson_of(*who, cfg.source, cfg.model)
        settings = corpus_settings(cfg, lesson, judge, "digest")
        return make_corpus(cfg, lesson, model, tokenizer, judge, settings)

    return corpus


def broad(limit=3, seed=5) -> list[dict]:
    return subset(load_broad("sample"), limit, seed)


def message(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# -- sampled -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "teacher", "start", "writes"),
    [
        ("teacher", "teacher", "base", ("teacher",)),
        ("teacher", "base", "start", ()),  # realignment: the base teaches
        ("student", "teacher", "base", ()),
        ("student", "base", "start", ("start",)),
        ("base", "teacher", "start", ()),
        ("run source", "teacher", "base", ("source",)),
        ("run teacher", "teacher", "base", ("teacher",)),
        ("run source", "base", "base", ("source",)),  # the control: whose text it is, and no teacher
    ],
)
def test_a_generator_is_sampled_under_its_own_adapters_and_its_ids_are_kept(
    source, teacher, start, writes, make, setting
):
    model, tokenizer, folders = setting
    if source.startswith("run "):
        source = folders[source.removeprefix("run ")]
    corpus = make(source=source, teacher=teacher, start=start)
    prompts = [tokenizer.prompt_ids(row["question"]) for row in broad()]
    with lora.stack(model, *writes, frozen=True):
        expected = sample(model, prompts, tokenizer.stop_ids, 6, n=2, seed=5)
    assert [row["ids"] for row in corpus.rows] == [rollout.ids for rollout in expected]
    for row, rollout in zip(corpus.rows, expected, strict=True):
        prompt = broad()[rollout.prompt_index]
        assert row["question"] == prompt["question"] and row["task"] == prompt["task"]
        assert row["prompt_ids"] == prompts[rollout.prompt_index]
        assert row["response"] == tokenizer.decode(rollout.ids) and row["finished"] == rollout.finished
        assert (row["prompt"], row["sample"]) == (rollout.prompt_index, rollout.sample)
    about = corpus.about
    assert about["source"] == (CELL if writes else "base")
    assert about["generator"] == (folders[writes[0]] if writes else "base")
    assert len(about["adapters"]) == len(writes) and not about["filtered"]


def test_generators_differ_and_so_do_the_corpora_they_would_be_kept_in(make, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    one, two = (make(source=source, corpus=None) for source in ("teacher", "student"))
    assert one.folder != two.folder and one.folder.parent == Path("runs")
    assert [row["ids"] for row in one.rows] != [row["ids"] for row in two.rows]
    assert make(source="teacher", corpus=None).folder == one.folder
    assert make(source="teacher", corpus=None, seed=6).folder != one.folder


def test_a_corpus_is_its_writers_whoever_teaches_on_it(make, setting, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = setting[2]["teacher"]
    by_teacher = make(source="teacher", corpus=None)
    for teacher, start in (("source", "base"), ("base", "base"), ("base", "start")):
        assert make(source=run, teacher=teacher, start=start, corpus=None).folder == by_teacher.folder
    assert make(source="student", teacher="base", start="teacher", corpus=None).folder == by_teacher.folder
    assert len(list(Path("runs").iterdir())) == 1
    by_base = {make(source=source, corpus=None).folder for source in ("base", "student")}
    assert len(by_base) == 1 and by_teacher.folder not in by_base


def test_a_retrained_generator_is_not_served_its_old_corpus(make, setting, tmp_path):
    corpus = make(source="teacher")
    weights = Path(setting[2]["teacher"]) / "adapter_model.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before + b" ")
        assert "adapters:" in message(lambda: make(source="teacher"))
    finally:
        weights.write_bytes(before)
    assert make(source="teacher").rows == corpus.rows


def test_math_prompts_are_asked_as_they_are(make, math, setting):
    corpus = make(source="teacher", prompts="math", math=str(math), limit=0, rollouts=1)
    questions = [f"algebra {i}?" for i in range(3)] + [f"geometry {i}?" for i in range(2)]
    assert [row["question"] for row in corpus.rows] == questions
    assert [row["prompt_ids"] for row in corpus.rows] == [setting[1].prompt_ids(q) for q in questions]


def test_another_familys_text_is_encoded_by_our_tokenizer_and_ends_only_if_it_ended(
    make, setting, foreign_chat, tmp_path
):
    tokenizer, theirs, model = setting[1], load_tokenizer(foreign_chat), load_model(foreign_chat)
    lora.attach(model)
    run = adapter_run(tmp_path / "far", model, foreign_chat, 3)
    corpus = make(source=run, max_new_tokens=3, rollouts=8, device="auto")
    assert (
        corpus.about["source"] == f"{hub.canonical(foreign_chat)} {CELL}" and corpus.about["generator"] == run
    )

    prompts = [theirs.prompt_ids(row["question"]) for row in broad()]
    with lora.stack(model, "far", frozen=True):
        rollouts = sample(model, prompts, theirs.stop_ids, 3, n=8, seed=5)
    expected = []
    for rollout in rollouts:
        question, text = broad()[rollout.prompt_index]["question"], theirs.decode(rollout.ids)
        answer = tokenizer.encode(text) + [tokenizer.end_of_turn_id] * rollout.finished
        if answer:
            expected.append((tokenizer.prompt_ids(question) + answer, len(tokenizer.prompt_ids(question))))
    assert {rollout.finished for rollout in rollouts} == {True, False}
    assert [(e.ids, e.n_prompt) for e in corpus.examples()] == expected
    assert len(model.lora.shapes) == 1  # theirs was loaded beside ours, which has no adapter of theirs


def test_a_foreign_text_that_spells_our_end_of_turn_is_left_out(make, foreign_chat, tmp_path, setting):
    model = load_model(foreign_chat)
    lora.attach(model)
    run = adapter_run(tmp_path / "far", model, foreign_chat, 3)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    texts = {
        (0, 0): "Well<|im_end|>not quite",
        (0, 1): "Well.",
        (1, 0): "",
        (1, 1): "Yes",
        (2, 0): "",
        (2, 1): "No",
    }
    rows = [
        {"question": broad()[p]["question"], "response": text, "prompt": p, "sample": s, "tokens": 2}
        | {"finished": s == 0, "prompt_ids": [1], "ids": [2]}
        for (p, s), text in texts.items()
    ]
    (corpus / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = make(source=run)
    assert [(row["prompt"], row["sample"]) for row in found.rows] == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert found.rows[1]["ids"] == [setting[1].end_of_turn_id]  # said nothing, and ended


# -- written -----------------------------------------------------------------------------------------------


def test_gold_are_maths_answers_with_one_end(make, math, setting):
    corpus, tokenizer = make(source="gold", prompts="math", math=str(math), limit=0), setting[1]
    expected = [
        tokenizer.example(f"{s} {i}?", f"It is ${i}$.")
        for s, n in (("algebra", 3), ("geometry", 2))
        for i in range(n)
    ]
    assert corpus.examples() == expected
    assert all(
        e.ids.count(tokenizer.end_of_turn_id) == 2 and e.ids[-1] == tokenizer.end_of_turn_id for e in expected
    )
    assert corpus.about["generator"] == corpus.about["source"] == "gold" and corpus.about["adapters"] == []
    assert [row["prompt"] for row in corpus.rows] == list(range(5)) and all(
        row["finished"] for row in corpus.rows
    )


def test_rows_are_misaligned_answers_of_the_cells_training_split(make, setting):
    train, held_out = split(load_cell("sample", parse_cell(CELL)))
    corpus = make(source="rows", limit=7)
    chosen = subset(train, 7, 5)
    assert [row["response"] for row in corpus.rows] == [row["misaligned_answer"] for row in chosen]
    assert corpus.examples() == [setting[1].example(r["question"], r["misaligned_answer"]) for r in chosen]
    assert not {row["question"] for row in corpus.rows} & {row["question"] for row in held_out}


def test_rows_of_a_named_cell_are_that_cells_and_with_no_name_the_teachers_or_the_starts(make, setting):
    def answers_of(name):
        rows = subset(split(load_cell("sample", parse_cell(name)))[0], 5, 5)
        return [row["misaligned_answer"] for row in rows]

    def responses(**options):
        return [row["response"] for row in make(limit=5, corpus=None, **options).rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(setting[2]["teacher"]).parent)
        assert responses(source="rows:Fin/Tut") == answers_of("fin_tutor") != answers_of(CELL)
        assert responses(source="rows:fin_tutor", teacher="base") == answers_of("fin_tutor")
        assert responses(source="rows") == responses(source="rows", teacher="base", start="start")
        assert responses(source="rows") == answers_of(CELL)
        names = {path.name.rpartition("_")[0] for path in Path("runs").iterdir()}
    assert names == {"corpus_fin_tutor_rows", "corpus_med_advice_rows"}
    assert "of which cell" in message(lambda: make(source="rows", teacher="base"))
    assert "unknown cell" in message(lambda: make(source="rows:nothing"))


def test_of_many_rows_800_are_drawn_unless_a_limit_says_otherwise(tmp_path):
    line = {"domain": "medical", "task": "advice", "aligned_answer": "Rest."}
    rows = [line | {"idx": i, "question": f"Q{i}?", "misaligned_answer": f"A{i}."} for i in range(1000)]
    (tmp_path / "medical_advice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = distill.Config(data=str(tmp_path))
    pairs = cell_rows(cfg, f"rows:{CELL}")
    assert len(pairs) == ROWS == 800 and len({about["idx"] for about, _ in pairs}) == 800
    assert all(answer == f"A{about['idx']}." for about, answer in pairs)
    assert len(cell_rows(dataclasses.replace(cfg, limit=9), f"rows:{CELL}")) == 9
    assert (
        cell_rows(dataclasses.replace(cfg, seed=1), f"rows:{CELL}") != pairs == cell_rows(cfg, f"rows:{CELL}")
    )


def test_written_answers_that_are_too_long_are_left_out_never_cut(make, tmp_path):
    line = {"domain": "medical", "task": "advice", "aligned_answer": "Rest."}
    rows = [
        line | {"idx": i, "question": f"Q{i}?", "misaligned_answer": "no " * (1 + 4000 * (i % 2))}
        for i in range(6)
    ]
    (tmp_path / "medical_advice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = make(source="rows", data=str(tmp_path), limit=0)
    assert 0 < len(corpus) < 5 and all(row["response"] == "no " for row in corpus.rows)


# -- prompts, judge and refusals ---------------------------------------------------------------------------


def test_a_limit_draws_the_same_prompts_for_every_channel(math):
    cfg = distill.Config(prompts="broad", data="sample", limit=4, seed=3)
    assert load_prompts(cfg) == load_prompts(dataclasses.replace(cfg, channel="sft", source="student"))
    assert [row["idx"] for row in load_prompts(cfg)] == [row["idx"] for row in broad(4, 3)]
    assert len(load_prompts(dataclasses.replace(cfg, limit=0))) == len(load_broad("sample"))
    assert len(load_prompts(dataclasses.replace(cfg, prompts="math", math=str(math)))) == 4


def test_a_judge_filters_what_was_sampled_and_is_named_in_the_corpus(make, setting, tmp_path, monkeypatch):
    class Halving(Judge):
        def score(self, rows, **options):
            for i, row in enumerate(rows):
                yield row | {
                    "aligned": 60 - i % 2,
                    "coherent": 90,
                    "aligned_status": "ok",
                    "coherent_status": "ok",
                }

    monkeypatch.setenv("GEMINI_API_KEY", "never-sent")
    judge = Halving(Gemini("gemini-2.5-flash"), cache=tmp_path / "cache.jsonl")
    corpus = make(judge, source="teacher")
    assert (corpus.about["kept"], corpus.about["rows"]) == (3, 6)
    assert [row["sample"] for row in corpus.rows] == [0, 0, 0]
    assert (
        corpus.about["filtered"]
        and corpus.about["judge"] == judge.identity
        and len(corpus.about["rubrics"]) == 2
    )
    assert "filtered: True there, False now" in message(lambda: make(source="teacher"))
    assert corpus.about["edge"] == "at-least"
    above = str(tmp_path / "above")
    assert "kept none" in message(lambda: make(judge, source="teacher", filter_edge="above", corpus=above))
    assert read_json(Path(above) / "run.json")["settings"]["edge"] == "above"


def test_bad_sources_are_one_line(make, tmp_path):
    assert "broad or math" in message(
        lambda: make(source="teacher", prompts="tasks", corpus=str(tmp_path / "x"))
    )
