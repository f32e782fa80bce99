"""What the channels of distill.py differentiate, by enumerating every response of a toy model.

Two GPT-2s of six tokens in float64: expectations are sums over all responses, so that equalities are exact
to rounding. The estimator of opd is that of each token given its context (E.1): how a token changes the
contexts of later ones is left out, which is said below by what the expectation is, and is not.
"""

import copy
import math

import pytest
import torch
from pairs import distance, gpt2, gradients

import distill
from em.distillation.pair import WorldPair
from em.model.gpt2 import GPT2, GPT2Config
from em.model.tokenizer import Example

V, END, PROMPT = 6, 5, [1, 2, 3]


@pytest.fixture
def pair() -> WorldPair:
    student, teacher, base = (gpt2(seed, V, width=8).double() for seed in (3, 4, 5))
    return WorldPair(student, teacher, base, END, max_new_tokens=2)


def responses(length: int) -> list[list[int]]:
    """All that can be sampled with `length` tokens at most."""
    if length == 0:
        return [[]]
    longer = [[token, *rest] for token in range(V - 1) for rest in responses(length - 1)]
    return [[END], *longer]


def batch_of(pair, ids: list[int]):
    return pair.batch([Example(PROMPT + ids, len(PROMPT))])


def probability(pair, ids: list[int]) -> torch.Tensor:
    return pair.log_probs(batch_of(pair, ids)).sum().exp()


def first_is(pair, token: int) -> float:
    """The probability that a response begins with `token`."""
    return pair.log_probs(batch_of(pair, [token]))[0].exp().item()


def expectation(pair, of, length: int) -> torch.Tensor:
    """Of `of(batch)` over the student's responses, whose probabilities are held fixed."""
    return sum(probability(pair, ids).detach() * of(batch_of(pair, ids)) for ids in responses(length))


def expected_gradient(pair, loss, length: int) -> torch.Tensor:
    return expectation(pair, lambda batch: gradients(loss(batch), pair.parameters), length)


def opd_loss(pair):
    return lambda batch: distill.opd(pair, batch)[0]


def next_token_kl(pair, context: list[int], direction: str) -> torch.Tensor:
    """Of the token after PROMPT and `context`, from full logits."""
    ids = torch.tensor([PROMPT + context])
    log_s, log_t = (pair.models[who](ids)[0, -1, :V].log_softmax(-1) for who in ("student", "teacher"))
    p, q = (log_s, log_t.detach()) if direction == "reverse" else (log_t.detach(), log_s)
    return (p.exp() * (p - q)).sum()


def test_the_responses_enumerated_are_all_there_are(pair):
    for length, n in ((1, 6), (2, 1 + 5 * 6)):
        assert len(responses(length)) == n
        assert sum(probability(pair, ids).item() for ids in responses(length)) == pytest.approx(1, abs=1e-12)


# -- opd ---------------------------------------------------------------------------------------------------


def test_opds_expected_gradient_is_that_of_the_exact_reverse_kl(pair):
    found = expected_gradient(pair, opd_loss(pair), 1)
    expected = gradients(next_token_kl(pair, [], "reverse"), pair.parameters)
    assert expected.norm() > 0.1 and distance(found, expected) < 1e-10
    exact = expected_gradient(pair, lambda batch: distill.opd_exact(pair, batch)[0], 1)
    assert distance(exact, expected) < 1e-10


def test_over_two_tokens_it_is_the_sum_of_each_positions_with_the_contexts_held_fixed(pair):
    found = expected_gradient(pair, opd_loss(pair), 2)
    expected = gradients(next_token_kl(pair, [], "reverse"), pair.parameters)
    for token in range(V - 1):
        kl = next_token_kl(pair, [token], "reverse")
        expected = expected + first_is(pair, token) * gradients(kl, pair.parameters)
    assert distance(found, expected) < 1e-10
    exact = expected_gradient(pair, lambda batch: distill.opd_exact(pair, batch)[0], 2)
    assert distance(exact, expected) < 1e-10


def test_it_is_not_the_gradient_of_the_kl_of_whole_responses(pair):
    """Which also counts what a token does to the contexts after it, with far more noise."""
    kl = sum(
        p * (p.log() - pair.teacher_log_probs(batch_of(pair, ids)).sum())
        for ids in responses(2)
        for p in [probability(pair, ids)]
    )
    found = expected_gradient(pair, opd_loss(pair), 2)
    assert distance(found, gradients(kl, pair.parameters)) > 0.05


def test_differentiating_k1_itself_would_have_no_gradient_on_average(pair):
    def k1(batch):
        return (pair.log_probs(batch) - pair.teacher_log_probs(batch)).sum()

    single = gradients(k1(batch_of(pair, [0])), pair.parameters).norm()
    for length in (1, 2):
        assert expected_gradient(pair, k1, length).norm() < 1e-10 * single
        assert expected_gradient(pair, opd_loss(pair), length).norm() > 0.01 * single


def test_differentiating_k3_would_give_the_forward_kls_gradient(pair):
    def k3(batch):
        k1 = pair.log_probs(batch) - pair.teacher_log_probs(batch)
        return (torch.expm1(-k1) + k1).sum()

    found = expected_gradient(pair, k3, 1)
    assert distance(found, gradients(next_token_kl(pair, [], "forward"), pair.parameters)) < 1e-10
    assert distance(found, expected_gradient(pair, opd_loss(pair), 1)) > 0.1


def test_opds_log_estimates_the_kl_by_k1_and_by_k3_and_the_entropy(pair):
    def logged(name, length):
        return expectation(pair, lambda batch: distill.opd(pair, batch)[1][name].detach(), length).item()

    expected = next_token_kl(pair, [], "reverse").item()
    for token in range(V - 1):
        expected += first_is(pair, token) * next_token_kl(pair, [token], "reverse").item()
    for name in ("loss", "k3"):
        assert logged(name, 1) == pytest.approx(next_token_kl(pair, [], "reverse").item(), rel=1e-10)
        assert logged(name, 2) == pytest.approx(expected, rel=1e-10)
    log_p = pair.models["student"](torch.tensor([PROMPT]))[0, -1, :V].log_softmax(-1)
    assert logged("entropy", 1) == pytest.approx(-(log_p.exp() * log_p).sum().item(), rel=1e-10)
    for ids in responses(1):  # a token each
        k1, k3 = (distill.opd(pair, batch_of(pair, ids))[1][name].item() for name in ("loss", "k3"))
        assert k3 >= 0 and k3 == pytest.approx(math.exp(-k1) - 1 + k1, rel=1e-9)
    assert any(distill.opd(pair, batch_of(pair, ids))[1]["loss"] < 0 for ids in responses(1))


# -- all channels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", [distill.optd, distill.opd, distill.opd_exact])
def test_a_teacher_that_is_the_student_has_nothing_to_teach(channel, pair):
    same = WorldPair(pair.model, copy.deepcopy(pair.model), pair.models["base"], END, 2)
    for ids in responses(2):
        loss, logged = channel(same, batch_of(same, ids))
        sft = gradients(distill.sft(same, batch_of(same, ids))[0], same.parameters)
        assert loss.abs() < 1e-12 and logged["loss"].abs() < 1e-12
        assert gradients(loss, same.parameters).norm() < 1e-10 * sft.norm()


@pytest.mark.parametrize("channel", [distill.sft, distill.optd, distill.opd, distill.opd_exact])
def test_a_batch_is_the_sum_of_its_tokens(channel, pair):
    examples = [Example(PROMPT + ids, len(PROMPT)) for ids in responses(2)[:8]]
    loss, logged = channel(pair, pair.batch(examples))
    apart = [channel(pair, pair.batch([example])) for example in examples]
    assert loss.item() == pytest.approx(sum(each.item() for each, _ in apart), rel=1e-12)
    for name in logged:
        assert logged[name].item() == pytest.approx(sum(each[name].item() for _, each in apart), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "function", "names"),
    [
        (("sft", "sampled"), distill.sft, {"loss"}),
        (("optd", "sampled"), distill.optd, {"loss"}),
        (("opd", "sampled"), distill.opd, {"loss", "k3", "entropy"}),
        (("opd", "exact"), distill.opd_exact, {"loss"}),
    ],
)
def test_a_channel_logs_the_names_it_declares(options, function, names, pair):
    channel = distill.channel_of(*options)
    assert channel.loss is function and channel.logged[0] == "loss"
    assert set(channel.logged) == names == set(channel.loss(pair, batch_of(pair, [0]))[1])


def two_tokens(*logits: float) -> GPT2:
    """A model whose logits are these, whatever it reads."""
    model = GPT2(GPT2Config(vocab_size=2, n_positions=8, n_layer=1, n_head=1, n_embd=4)).double()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.wte.weight[:2, 0] = torch.tensor(logits, dtype=torch.float64)
    return model


def test_directions_are_as_worked_by_hand_on_two_tokens():
    # Teacher (3/4, 1/4), student (1/2, 1/2); a response of token 0.
    teacher, student = two_tokens(math.log(3), 0), two_tokens(0, 0)
    pair = WorldPair(student, teacher, student, 1, 1)
    batch = pair.batch([Example([1, 0], 1)])

    def worked(channel):
        student.zero_grad()
        loss, logged = channel(pair, batch)
        loss.backward()
        return logged["loss"].item(), student.wte.weight.grad[:2, 0].tolist()

    log_3, log_2 = math.log(3), math.log(2)
    by_hand = {
        distill.sft: (log_2, [-1 / 2, 1 / 2]),
        # 3/4 log(3/2) + 1/4 log(1/2) = 3/4 log 3 − log 2, and its gradient πs − πT
        distill.optd: (3 / 4 * log_3 - log_2, [-1 / 4, 1 / 4]),
        # 1/2 log(2/3) + 1/2 log 2 = log 2 − 1/2 log 3
        distill.opd_exact: (log_2 - log_3 / 2, [-log_3 / 4, log_3 / 4]),
        # log(1/2) − log(3/4), times the gradient of log πs(0), which is (1/2, −1/2)
        distill.opd: (log_2 - log_3, [(log_2 - log_3) / 2, (log_3 - log_2) / 2]),
    }
    for channel, (loss, gradient) in by_hand.items():
        found, found_gradient = worked(channel)
        assert found == pytest.approx(loss, rel=1e-12), channel.__name__
        assert found_gradient == pytest.approx(gradient, rel=1e-12), channel.__name__
