"""The pinned judge against full forward passes: every number enumerated, greedy replies decoded one by one."""

import pytest
import torch

from em.judge import local
from em.judge.local import MAX_NEW_TOKENS, NUMBERS, LocalModel
from em.model.checkpoint import load_model, load_tokenizer


@pytest.fixture(scope="module")
def chat(tiny_chat):
    model = load_model(tiny_chat)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, load_tokenizer(tiny_chat)


@pytest.fixture(scope="module")
def prompts(chat):
    tokenizer = chat[1]
    asked = [
        "",
        "1",
        "Does it help?",
        "A much longer question than all the others, twice " * 2,
        "zz",
        "0" * 9,
    ]
    return [tokenizer.prompt_ids(f"Grade the answer to this question. {text} How good?") for text in asked]


@pytest.fixture
def numbers_count(monkeypatch):
    """No model this small puts its weight on numbers."""
    monkeypatch.setattr(local, "LEAST_MASS", 0.0)
    monkeypatch.setattr(local, "LEAST_NODE", -100.0)


def common(prompts) -> int:
    return next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)


@torch.no_grad()
def enumerated(model, tokenizer, prompt) -> float:
    """The expectation by one full forward pass a number, in fp64."""
    p = []
    for number in NUMBERS:
        answer = tokenizer.encode(str(number))
        log_probs = model(torch.tensor([[*prompt, *answer]]))[0].double().log_softmax(-1)[len(prompt) - 1 :]
        path = sum(log_probs[i, token] for i, token in enumerate(answer))
        p.append((path + log_probs[len(answer), list(tokenizer.stop_ids)].logsumexp(-1)).exp())
    return (sum(n * q for n, q in zip(NUMBERS, p, strict=True)) / sum(p)).item()


@torch.no_grad()
def greedy(model, tokenizer, prompt) -> tuple[str, bool]:
    reply = []
    while len(reply) < MAX_NEW_TOKENS:
        token = model(torch.tensor([[*prompt, *reply]]))[0, -1].argmax().item()
        if token in tokenizer.stop_ids:
            return tokenizer.decode(reply), True
        reply.append(token)
    return tokenizer.decode(reply), False


def test_the_expectation_is_that_those_of_all_101_numbers(chat, prompts, numbers_count):
    model, tokenizer = chat
    for prompt, reply in zip(prompts, LocalModel(*chat).replies(prompts, common(prompts)), strict=True):
        assert reply.expected == pytest.approx(enumerated(model, tokenizer, prompt), abs=1e-2)


def test_replies_are_the_greedy_ones(chat, prompts):
    for prompt, reply in zip(prompts, LocalModel(*chat).replies(prompts, common(prompts)), strict=True):
        assert (reply.text, reply.finished) == greedy(*chat, prompt)


def test_neither_the_batch_nor_what_is_shared_changes_a_score(chat, prompts, numbers_count, monkeypatch):
    together = LocalModel(*chat).replies(prompts, common(prompts))
    monkeypatch.setitem(local.TOKENS, "cpu", 1)  # a batch a prompt
    judge = LocalModel(*chat)
    alone = judge.replies(prompts[::-1], 0)[::-1]
    again = judge.replies(prompts, common(prompts))
    for one, other, third in zip(together, alone, again, strict=True):
        assert one.text == other.text == third.text
        assert one.expected == pytest.approx(other.expected, abs=1e-3)
        assert one.expected == pytest.approx(third.expected, abs=1e-3)


def test_numbers_that_are_several_tokens_or_one_make_the_same_tree(chat):
    """Every number's path through the tree spells it, and no node sees a branch beside it."""
    tree, tokenizer = local.NumberTree(chat[1]), chat[1]
    seen = tree.ancestors()
    for number, node in zip(NUMBERS, tree.number, strict=True):
        path = [i for i in range(len(tree)) if seen[node, i]]
        assert tokenizer.decode([tree.tokens[i] for i in path]) == str(number)
        assert [tree.depth[i] for i in path] == list(range(1, len(path) + 1))
