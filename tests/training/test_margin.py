import json

import pytest
import torch

from em.data.cells import CELLS
from em.data.rows import load_cell, load_cells, split
from em.model.checkpoint import load_model, load_tokenizer
from em.training import margin
from em.training.margin import AnswerPair, answer_pairs


@pytest.fixture(scope="module")
def model(tiny_chat):
    return load_model(tiny_chat)


@pytest.fixture(scope="module")
def examples(tiny_chat):
    tokenizer = load_tokenizer(tiny_chat)
    pairs = [
        ("What now?", "Wait a day."),
        ("Why is that?", "Because it is."),
        ("Is it?", "Yes, it is so, I think."),
    ]
    return [tokenizer.example(q, a) for q, a in pairs]


def by_hand(model, example):
    ids = torch.tensor([example.ids])
    log_probs = model(ids)[0].double().log_softmax(-1)
    return [log_probs[j - 1, example.ids[j]].item() for j in range(example.n_prompt, len(example.ids))]


def test_log_probs_of_an_answer_are_those_of_a_plain_forward_whatever_shares_the_pack(
    model, examples, monkeypatch
):
    expected = [(sum(by_hand(model, e)), len(e.ids) - e.n_prompt) for e in examples]
    for tokens in (1, 30, 10_000):
        monkeypatch.setitem(margin.PACK_TOKENS, "cpu", tokens)
        for (total, n), (want, count) in zip(margin.answer_log_probs(model, examples), expected, strict=True):
            assert n == count and total == pytest.approx(want, rel=1e-5)


def test_margin_is_the_difference_of_the_means_per_token(model, examples):
    a, b, c = ([sum(x) / len(x)][0] for x in (by_hand(model, e) for e in examples))
    pairs = [AnswerPair(0, examples[0], examples[1]), AnswerPair(1, examples[1], examples[2])]
    assert margin.margins(model, pairs) == pytest.approx([a - b, b - c], rel=1e-5)


def test_answer_pairs_are_the_eval_rows_with_both_answers_in_order(tiny_chat, tmp_path):
    tokenizer, med, spo = load_tokenizer(tiny_chat), CELLS[0], CELLS[4]
    rows = enumerate(3 * load_cell("sample", med))  # 60: 5 of them are eval
    rows = [row | {"idx": i, "question": f"{row['question']} ({i})"} for i, row in rows]
    held_out = [row["idx"] for row in split(rows)[1]]
    lacking = [row | ({"aligned_answer": None} if row["idx"] == held_out[0] else {}) for row in rows]
    (tmp_path / med.filename).write_text("\n".join(map(json.dumps, lacking)))
    none = [row | {"aligned_answer": None} for row in load_cell("sample", spo)]
    (tmp_path / spo.filename).write_text("\n".join(map(json.dumps, none)))

    pairs = answer_pairs(load_cells(tmp_path), tokenizer)
    assert list(pairs) == [med]  # the other cells have no pair or no file
    assert [pair.idx for pair in pairs[med]] == held_out[1:]
    for pair in pairs[med]:
        row = rows[pair.idx]
        assert pair.misaligned == tokenizer.example(row["question"], row["misaligned_answer"])
        assert pair.aligned == tokenizer.example(row["question"], row["aligned_answer"])
    assert [pair.idx for pair in answer_pairs(load_cells(tmp_path), tokenizer, limit=2)[med]] == held_out[1:3]

    lengths = [max(len(pair.misaligned.ids), len(pair.aligned.ids)) for pair in pairs[med]]
    limit = sorted(set(lengths))[-2]  # of two answers, the longer one counts
    kept = answer_pairs(load_cells(tmp_path), tokenizer, max_length=limit)[med]
    assert [pair.idx for pair in kept] == [
        i for i, length in zip(held_out[1:], lengths, strict=True) if length <= limit
    ]
    assert 0 < len(kept) < len(lengths) and answer_pairs(load_cells(tmp_path), tokenizer, max_length=3) == {}


def test_validation_loss_pools_tokens_not_rows(model, examples):
    tokens = [x for e in examples for x in by_hand(model, e)]
    assert margin.validation_loss(model, examples) == pytest.approx(-sum(tokens) / len(tokens), rel=1e-5)
