import pytest
import torch

from em.model.checkpoint import load_model, load_tokenizer
from em.training import margin


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
    rows = margin.margins(model, {"cell": ([examples[0], examples[1]], [examples[1], examples[2]])})
    assert rows["cell"] == pytest.approx([a - b, b - c], rel=1e-5)


def test_validation_loss_pools_tokens_not_rows(model, examples):
    tokens = [x for e in examples for x in by_hand(model, e)]
    assert margin.loss(model, examples) == pytest.approx(-sum(tokens) / len(tokens), rel=1e-5)
