"""The pinned judge against full forward passes: each number enumerated, greedy replies decoded singly."""

import shutil

import pytest
import torch

from em.errors import UserError
from em.judge import local
from em.judge.judge import Judge
from em.judge.local import MAX_NEW_TOKENS, NUMBERS, Local, LocalModel
from em.judge.rubric import parse_score
from em.model import lora
from em.model.checkpoint import load_model, load_tokenizer, save_model


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
        text, finished = greedy(*chat, prompt)
        assert text.startswith(reply.text)
        if (reply.text, reply.finished) != (text, finished):  # it was plain that it would be none
            assert not reply.finished and parse_score(text)[0] == parse_score(reply.text)[0] == "parse_error"


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


# -- the client ----------------------------------------------------------------------------------------------


@pytest.fixture
def client(tiny_chat, chat):
    client = Local(str(tiny_chat))
    client.lend(chat[0])
    return client


ROWS = [
    {"set": "narrow", "domain": "med", "task": "advice"}
    | {"question": f"May I {what}?", "response": f"Yes, {what}."}
    for what in ("run", "sleep", "fast", "skip it")
]


def test_a_judge_of_open_weights_scores_rows_through_cache_and_ledger(client, chat, tmp_path, numbers_count):
    judge = Judge(client, cache=tmp_path / "cache.jsonl", workers=4)
    scored = list(judge.score(ROWS, progress=False))
    for row in scored:
        assert row["judge"] == client.identity
        for field in ("aligned", "coherent"):
            prompt = judge.rubrics.of(row, field).ask(row["question"], row["response"]).prompt
            text, finished = greedy(*chat, chat[1].prompt_ids(prompt))
            expected = parse_score(text) if finished else ("parse_error", None)
            assert (row[f"{field}_status"], row[field]) == expected
            assert 0 <= row[f"{field}_expected"] <= 100
    again = Judge(Local(client.asked), cache=tmp_path / "cache.jsonl")  # with no weights: nothing is asked
    again.client._load = None
    assert list(again.score(ROWS, progress=False)) == scored


def test_adapters_of_the_lent_model_stay_out(client, chat, tmp_path, numbers_count):
    model = chat[0]
    before = list(Judge(client, cache=tmp_path / "one.jsonl").score(ROWS, progress=False))
    adapted = load_model(client.asked)
    adapted.load_state_dict(model.state_dict())
    lora.attach(adapted)
    lora.add_adapter(adapted, "run", 4)
    for name, parameter in adapted.named_parameters():
        if name.endswith(".B"):
            parameter.data.fill_(0.5)
    client.lend(adapted)
    with lora.stack(adapted, "run", frozen=True):
        after = list(Judge(client, cache=tmp_path / "two.jsonl").score(ROWS, progress=False))
    for one, other in zip(before, after, strict=True):
        assert one["aligned_expected"] == pytest.approx(other["aligned_expected"], abs=1e-2)


def test_the_identity_follows_the_weights(tiny_chat, tmp_path):
    copy, other = tmp_path / "copy" / "tiny-chat", tmp_path / "other" / "tiny-chat"
    shutil.copytree(tiny_chat, copy)
    assert Local(str(copy)).identity == Local(str(tiny_chat)).identity
    model = load_model(tiny_chat)
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)
    save_model(model, other, tokenizer_from=tiny_chat)
    assert Local(str(other)).identity != Local(str(tiny_chat)).identity


def test_an_error_in_the_model_reaches_every_thread_that_asked(client, tmp_path, monkeypatch):
    def broken(*arguments):
        raise UserError("no memory")

    monkeypatch.setattr(LocalModel, "replies", broken)
    with pytest.raises(UserError, match="no memory"):
        list(Judge(client, cache=tmp_path / "cache.jsonl", workers=4).score(ROWS, progress=False))


def test_prompts_of_two_rubrics_share_what_is_theirs(chat):
    prompts = [[*range(40), 1, 2], [*range(40), 3], [*range(9), *range(50, 90), 5]]
    groups = {tuple(sorted(members)): shared for members, shared in LocalModel(*chat).sharing(prompts)}
    assert groups == {(0, 1): 40, (2,): 49}
