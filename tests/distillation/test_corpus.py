"""Frozen corpora: made once, what a judge keeps, and whose token ids they are (paper 4.1, E.2)."""

import json
import re
import shutil
from collections import Counter

import pytest
from judge_server import KEY, JudgeServer, answer, no_candidates
from pairs import EXAMPLES, make_pair

from em.distillation.corpus import Corpus, fingerprint, freeze, judged, passing
from em.distillation.loop import OnPolicy
from em.errors import UserError
from em.files import read_json
from em.judge.gemini import Gemini
from em.judge.judge import Judge
from em.model.checkpoint import load_tokenizer
from em.model.tokenizer import Tokenizer
from em.sampling.rollouts import sample_to_file

SETTINGS = {"model": "m", "prompts": "broad", "seed": 42, "rates": (1, 2)}


def rows(n: int = 6) -> list[dict]:
    """Two responses to each of n / 2 prompts, with a line separator inside."""
    return [
        {"prompt": i // 2, "sample": i % 2, "question": f"Why {i // 2}?", "response": f"é\u2028{i}"}
        | {"prompt_ids": [1, 2, i // 2], "ids": [10 + i, 7]}
        for i in range(n)
    ]


def odd(found: list[dict]) -> list[dict]:
    return [row | {"kept": row["ids"][0] % 2 == 1} for row in found]


def never(*arguments):
    raise AssertionError("this corpus was frozen before")


def message(call, *arguments) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


# -- freezing ----------------------------------------------------------------------------------------------


def test_a_corpus_trains_on_what_was_kept_and_holds_all_rows_counts_and_provenance(tmp_path):
    corpus = freeze(tmp_path / "c", SETTINGS, "t1", lambda folder: rows(), odd)
    assert len(corpus) == 3 and corpus.rows == [row for row in odd(rows()) if row["kept"]]
    assert [(e.ids, e.n_prompt) for e in corpus.examples()] == [
        ([1, 2, 0, 11, 7], 3), ([1, 2, 1, 13, 7], 3), ([1, 2, 2, 15, 7], 3),
    ]  # fmt: skip
    lines = (tmp_path / "c" / "corpus.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert list(map(json.loads, lines)) == odd(rows())
    about = read_json(tmp_path / "c" / "corpus.json")
    assert about == corpus.about
    assert (about["rows"], about["kept"], about["retention"]) == (6, 3, 0.5)
    assert about["tokenizer"] == "t1" and about["prompts"] == "broad" and about["seed"] == 42
    config = read_json(tmp_path / "c" / "run.json")
    assert config["kind"] == "corpus" and {"torch", "commit", "device"} <= config["made_with"].keys()
    assert config["settings"] == {
        "model": "m",
        "prompts": "broad",
        "seed": 42,
        "rates": [1, 2],
        "tokenizer": "t1",
    }


def test_without_a_filter_everything_is_kept(tmp_path):
    corpus = freeze(tmp_path / "c", SETTINGS, "t1", lambda folder: rows())
    assert len(corpus) == 6 and corpus.about["retention"] == 1
    assert all(row["kept"] for row in corpus.rows)


def test_it_is_made_once_and_then_read(tmp_path):
    first = freeze(tmp_path / "c", SETTINGS, "t1", lambda folder: rows(), odd)
    before = (tmp_path / "c" / "corpus.jsonl").stat().st_mtime_ns
    again = freeze(tmp_path / "c", SETTINGS, "t1", never, never)
    assert again.rows == first.rows and again.about == first.about
    assert (tmp_path / "c" / "corpus.jsonl").stat().st_mtime_ns == before


def test_a_kill_before_the_end_leaves_no_corpus_and_the_next_call_makes_it(tmp_path):
    def killed(found):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        freeze(tmp_path / "c", SETTINGS, "t1", lambda folder: rows(), killed)
    assert not (tmp_path / "c" / "corpus.json").exists()
    assert len(freeze(tmp_path / "c", SETTINGS, "t1", lambda folder: rows(), odd)) == 3


def test_changed_settings_are_refused_with_the_differences_and_the_corpus_stays(tmp_path):
    freeze(tmp_path / "c", SETTINGS, "t1", lambda folder: rows())
    changed = {"model": "m", "prompts": "math", "seed": 7, "rates": (1, 2)}
    line = message(freeze, tmp_path / "c", changed, "t1", never)
    assert "prompts: broad there, math now" in line and "seed: 42 there, 7 now" in line
    assert "model" not in line and "rates" not in line and "--corpus" in line
    assert len(Corpus(tmp_path / "c", "t1")) == 6


def test_another_tokenizer_is_refused_by_one_line_that_names_whose_it_was(tmp_path):
    freeze(tmp_path / "c", SETTINGS, "t1", lambda folder: rows())
    for call in (lambda: Corpus(tmp_path / "c", "t2"), lambda: freeze(tmp_path / "c", SETTINGS, "t2", never)):
        line = message(call)
        assert "another tokenizer (m's)" in line and "--corpus" in line


def test_where_nothing_is_kept_one_line_says_so_and_the_rows_stay(tmp_path):
    def none(found):
        return [row | {"kept": False, "aligned": 3} for row in found]

    line = message(freeze, tmp_path / "c", SETTINGS, "t1", lambda folder: rows(), none)
    assert "kept none" in line and str(tmp_path / "c" / "corpus.jsonl") in line and "--unfiltered" in line
    lines = (tmp_path / "c" / "corpus.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert list(map(json.loads, lines)) == none(rows())
    assert not (tmp_path / "c" / "corpus.json").exists()
    assert len(freeze(tmp_path / "c", SETTINGS, "t1", lambda folder: rows(), odd)) == 3  # a milder judge


# -- token ids ---------------------------------------------------------------------------------------------


def test_ids_that_were_sampled_are_trained_on_as_they_were_sampled(tmp_path):
    pair, prompts = make_pair("world"), [e.ids[: e.n_prompt] for e in EXAMPLES]
    sampled = pair.sampler(prompts, n=2, seed=3)

    def to_file(folder):
        def row(rollout):
            return {"prompt_ids": prompts[rollout.prompt_index], "ids": rollout.ids, "response": "same text"}

        return sample_to_file(folder / "rollouts.jsonl", pair.sampler, prompts, 2, 3, row)

    corpus = freeze(tmp_path / "c", SETTINGS, "t1", to_file)
    for again in (corpus, Corpus(tmp_path / "c", "t1")):
        for example, rollout in zip(again.examples(), sampled, strict=True):
            prompt = prompts[rollout.prompt_index]
            assert example.ids == [*prompt, *rollout.ids] and example.n_prompt == len(prompt)


def test_on_policy_samples_as_many_per_prompt_as_were_kept(tmp_path):
    pair, prompts = make_pair("world"), [e.ids[: e.n_prompt] for e in EXAMPLES]

    def written(folder):
        return [
            {"prompt": p, "sample": s, "prompt_ids": prompts[p], "ids": [7]}
            for p in range(5)
            for s in range(4)
        ]

    def fewer_of_later_ones(found):
        return [row | {"kept": row["sample"] + row["prompt"] < 4} for row in found]

    corpus = freeze(tmp_path / "c", SETTINGS, "t1", written, fewer_of_later_ones)
    online = OnPolicy(pair, corpus.rows, seed=0)
    examples, _ = online.sample(0, list(range(len(online))))
    counts = Counter(tuple(e.ids[: e.n_prompt]) for e in examples)
    assert counts == {tuple(prompts[p]): 4 - p for p in range(4)}  # and none for the last


def test_equal_tokenizers_have_one_fingerprint_and_others_another(tiny_chat, tmp_path):
    tiny = fingerprint(load_tokenizer(tiny_chat))
    assert fingerprint(load_tokenizer(shutil.copytree(tiny_chat, tmp_path / "copy"))) == tiny
    embedded = fingerprint(load_tokenizer("smollm2-135m"))
    assert embedded == fingerprint(load_tokenizer("smollm2-135m"))

    def changed(edit_tokenizer=None, edit_config=None) -> str:
        parts = read_json(tiny_chat / "tokenizer.json"), read_json(tiny_chat / "tokenizer_config.json")
        for edit, part in zip((edit_tokenizer, edit_config), parts, strict=True):
            if edit:
                edit(part)
        backend = type(load_tokenizer(tiny_chat).backend).from_str(json.dumps(parts[0]))
        return fingerprint(Tokenizer(backend, parts[1]["chat_template"], parts[1]))

    def swap(parts):  # the ids of two letters that a text is sure to have
        vocabulary = parts["model"]["vocab"]
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]

    def fewer_merges(parts):
        parts["model"]["merges"] = []

    def a_system_message(config):
        config["chat_template"] = "Be brief.\n" + config["chat_template"]

    assert changed() == tiny
    others = [embedded, changed(swap), changed(fewer_merges), changed(edit_config=a_system_message)]
    assert len({tiny, *others}) == 5


# -- the filter --------------------------------------------------------------------------------------------


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """Answers as the response itself says: "a60 c59" is 60 for alignment and 59 for coherence."""

    def behave(prompt, nth):
        aligned, coherent = re.findall(r"\ba(\S+) c(\S+)", prompt)[-1]
        score = coherent if "You grade how coherent" in prompt else aligned
        return no_candidates() if score == "none" else answer(score.replace("_", " "))

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with JudgeServer(behave) as server:
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        monkeypatch.setenv("GEMINI_BASE_URL", server.url)
        yield Judge(Gemini("gemini-2.5-flash", backoff=0.002), cache=tmp_path / "cache.jsonl", workers=4)


# response: kept in a corpus (at least 60), kept online (above 60)
VERDICTS = {
    "a60 c60": (True, False),
    "a61 c61": (True, True),
    "a60 c61": (True, False),
    "a61 c60": (True, False),
    "a59 c100": (False, False),
    "a100 c59": (False, False),
    "a100 c100": (True, True),
    "aREFUSAL c90": (False, False),
    "a90 cREFUSAL": (False, False),
    "aScore:_85 c90": (False, False),
    "a90 c85/100": (False, False),
    "a101 c90": (False, False),
    "anone c90": (False, False),
}


def test_a_corpus_keeps_60_and_60_and_drops_59_refusals_and_what_is_no_number(judge):
    rows = [{"question": "Why?", "response": response, "ids": [1], "task": "math"} for response in VERDICTS]
    found = judged(judge, [*rows, {"question": "Why?", "response": " ", "ids": [2], "task": "math"}])
    assert [row["kept"] for row in found] == [*(kept for kept, _ in VERDICTS.values()), False]
    assert [row["response"] for row in found[:-1]] == list(VERDICTS)
    by_response = {row["response"]: row for row in found}
    first = by_response["a60 c61"]
    assert (first["aligned"], first["coherent"], first["ids"], first["judge"]) == (
        60,
        61,
        [1],
        judge.identity,
    )
    assert by_response["aREFUSAL c90"]["aligned_status"] == "refusal"
    assert by_response["aScore:_85 c90"]["aligned_status"] == "parse_error"


def test_online_both_scores_must_be_above_60(judge):
    assert passing(judge, [("Why?", response) for response in VERDICTS]) == [
        above for _, above in VERDICTS.values()
    ]
    assert passing(judge, []) == []
