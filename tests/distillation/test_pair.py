"""Students and teachers, both kinds, against full logits in float64."""

import pytest
import torch
from pairs import (
    CHAT,
    END,
    EXAMPLES,
    PAIRS,
    VOCABULARY,
    Oracle,
    chat_pair,
    distance,
    gradients,
    make_pair,
    targets_of,
    world_pair,
)

import em.training.loss
from distill import CHANNELS
from em.distillation.pair import ChatPair
from em.model import lora
from em.model.decoder import Decoder, DecoderConfig
from em.model.tokenizer import Example
from em.training.optim import adamw

QUANTITIES = ("log_probs", "forward_kl", "reverse_kl")


@pytest.fixture(params=PAIRS)
def pair(request):
    return make_pair(request.param)


def weights(n: int) -> torch.Tensor:
    """So that no two tokens count alike."""
    return torch.linspace(-1, 2, n)


def exact(oracle: Oracle, quantity: str, examples=EXAMPLES) -> torch.Tensor:
    student = oracle.log_softmax("student", examples)
    if quantity == "log_probs":
        return student.gather(1, targets_of(examples)[:, None])[:, 0]
    p, q = student, oracle.log_softmax("teacher", examples)
    if quantity == "forward_kl":
        p, q = q, p
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_values_and_gradients_equal_full_logits_in_float64(pair, quantity):
    found, oracle = getattr(pair, quantity)(pair.batch(EXAMPLES)), Oracle(pair)
    expected = exact(oracle, quantity)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
    if quantity == "log_probs":
        w = weights(len(found))
        found, expected = found @ w, expected @ w.double()
    grad, expected_grad = gradients(found, pair.parameters), gradients(expected, oracle.leaves)
    assert expected_grad.norm() > 1 and distance(grad, expected_grad) < 1e-4


def test_the_teachers_log_probs_equal_full_logits_and_carry_no_gradient(pair):
    found = pair.teacher_log_probs(pair.batch(EXAMPLES))
    expected = Oracle(pair).log_softmax("teacher", EXAMPLES).gather(1, targets_of(EXAMPLES)[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
    assert not found.requires_grad


def test_teacher_base_and_head_get_no_gradient_even_if_they_could_take_one(pair):
    batch = pair.batch(EXAMPLES)
    if isinstance(pair, ChatPair):
        others = [p for n, p in pair.model.named_parameters() if ".adapters.teacher." in n]
        others.append(pair.model.lm_head.weight)
    else:
        others = [p for who in ("teacher", "base") for p in pair.models[who].parameters()]
    for p in others:
        p.requires_grad_()
    loss = pair.log_probs(batch).sum() + pair.forward_kl(batch) + pair.reverse_kl(batch)
    (loss - (pair.log_probs(batch) * pair.teacher_log_probs(batch)).sum()).backward()
    assert all(p.grad is None for p in others)
    assert all(p.grad.norm() > 0 for p in pair.parameters)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_ragged_batch_equals_its_examples_one_by_one(pair, quantity):
    def of(examples):
        return getattr(pair, quantity)(pair.batch(examples))

    together, apart = of(EXAMPLES), [of([example]) for example in EXAMPLES]
    apart = torch.cat(apart) if quantity == "log_probs" else sum(apart)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-5)
    if quantity == "log_probs":
        together, apart = (x @ weights(len(x)) for x in (together, apart))
    assert distance(gradients(together, pair.parameters), gradients(apart, pair.parameters)) < 1e-4


@pytest.mark.parametrize("name", CHANNELS)
def test_a_channel_on_the_gpus_path_reads_nothing_back(name):
    """On meta, where a value that the host asks for is an error."""
    with torch.device("meta"):
        model = Decoder(DecoderConfig.from_hf(CHAT)).to(torch.bfloat16)
    lora.attach(model)
    for adapter in ("start", "teacher", "student"):
        lora.add_adapter(model, adapter, 4)
    pair = ChatPair(model, ("start", "student"), ("teacher",), (END,), 8, rows=4)
    loss, sums = CHANNELS[name].loss(pair, pair.batch(EXAMPLES))
    (loss / 7).backward()
    assert tuple(sums) == CHANNELS[name].logged
    assert all(p.grad.shape == p.shape for p in pair.parameters)


def test_an_examples_supervised_tokens_are_its_answer_and_belong_to_it(pair):
    batch = pair.batch(EXAMPLES)
    assert batch.targets.tolist() == targets_of(EXAMPLES).tolist()
    owners = [i for i, e in enumerate(EXAMPLES) for _ in e.ids[e.n_prompt :]]
    assert batch.owner.tolist() == owners


def test_distributions_are_those_of_student_teacher_and_base(pair, monkeypatch):
    monkeypatch.setattr(em.training.loss, "CHUNK_BYTES", 1)  # chunks of as few rows as there can be
    batch, oracle = pair.batch(EXAMPLES), Oracle(pair)
    parts = list(pair.distributions(batch))
    assert (len(parts) > 1) == isinstance(pair, ChatPair)
    targets, *found = (torch.cat(x) for x in zip(*parts, strict=True))
    assert targets.tolist() == batch.targets.tolist()
    for who, log_p in zip(("student", "teacher", "base"), found, strict=True):
        assert log_p.shape == (len(targets), VOCABULARY) and not log_p.requires_grad
        torch.testing.assert_close(log_p.double(), oracle.log_softmax(who, EXAMPLES), atol=1e-4, rtol=1e-5)


def test_a_realigned_student_learns_its_last_adapter_and_not_a_bit_of_anything_else():
    pair = chat_pair(("start", "student"), ("teacher",))
    named = list(pair.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named}
    assert [id(p) for p in pair.parameters] == [id(p) for n, p in named if ".adapters.student." in n]
    optimizer = torch.optim.AdamW(pair.parameters, lr=0.01)
    batch = pair.batch(EXAMPLES)
    for _ in range(2):
        (pair.forward_kl(batch) - pair.log_probs(batch).sum()).backward()
        optimizer.step()
    changed = {name for name, p in named if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".adapters.student." in name}


def test_a_saved_stack_is_one_adapter_with_the_students_log_probs(tmp_path):
    pair = chat_pair(("start", "student"), ())
    pair.save(tmp_path, "some/model")
    lora.load_adapter(pair.model, "again", tmp_path)
    again = ChatPair(pair.model, ("again",), (), (0,), 8, rows=4)
    batch = pair.batch(EXAMPLES)
    torch.testing.assert_close(again.log_probs(batch), pair.log_probs(batch), atol=1e-5, rtol=1e-5)


def test_padded_rows_of_a_worlds_embedding_count_nowhere():
    plain, spoilt = world_pair(), world_pair()
    for model in spoilt.models.values():
        with torch.no_grad():
            model.wte.weight[VOCABULARY:] = 50.0
    batch = plain.batch(EXAMPLES)
    for quantity in (*QUANTITIES, "teacher_log_probs"):
        found, expected = getattr(spoilt, quantity)(batch), getattr(plain, quantity)(batch)
        assert torch.equal(found, expected)
        if found.requires_grad:
            found.sum().backward()
    for spoilt_part, part in zip(spoilt.distributions(batch), plain.distributions(batch), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(spoilt_part, part, strict=True))
    assert spoilt.model.wte.weight.grad[VOCABULARY:].count_nonzero() == 0
    assert all(token < VOCABULARY for r in spoilt.sample([[1], [2, 3]], [0, 1], 0) for token in r.ids)


def test_what_is_sampled_follows_the_student_as_it_learns(pair):
    prompts, indices = [e.ids[: e.n_prompt] for e in EXAMPLES], list(range(len(EXAMPLES)))
    before = pair.sample(prompts, indices, seed=3)
    assert pair.sample(prompts[2:4], [2, 3], seed=3) == before[2:4]
    assert pair.sample(prompts, indices, seed=4) != before
    pair.log_probs(pair.batch(EXAMPLES)).sum().backward()
    adamw(pair.model, 0.2, 0.0).step()  # which does not say that it has changed a weight
    after = pair.sample(prompts, indices, seed=3)
    assert after != before
    if isinstance(pair, ChatPair):  # a sampler that has never seen the weights of before
        fresh = ChatPair(pair.model, pair.stacks["student"], pair.stacks["teacher"], (7,), 8, rows=4)
    else:
        fresh = type(pair)(pair.model, *(pair.models[who] for who in ("teacher", "base")), 7, 8)
    assert fresh.sample(prompts, indices, seed=3) == after


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_teacher_that_is_told_more_scores_the_same_answers_after_its_own_prompt(quantity):
    pair = chat_pair()
    prompts = [tuple(e.ids[: e.n_prompt]) for e in EXAMPLES]
    pair.teacher_prompts = {prompt: [3, 1, 4, *prompt] for prompt in prompts}
    theirs = [Example([3, 1, 4, *e.ids], e.n_prompt + 3) for e in EXAMPLES]
    oracle, batch = Oracle(pair), pair.batch(EXAMPLES)
    student, teacher = oracle.log_softmax("student", EXAMPLES), oracle.log_softmax("teacher", theirs)
    expected = {
        "log_probs": student.gather(1, targets_of(EXAMPLES)[:, None])[:, 0],
        "forward_kl": (teacher.exp() * (teacher - student)).sum(),
        "reverse_kl": (student.exp() * (student - teacher)).sum(),
    }[quantity]
    torch.testing.assert_close(getattr(pair, quantity)(batch).double(), expected, atol=1e-4, rtol=1e-5)
    scored = teacher.gather(1, targets_of(EXAMPLES)[:, None])[:, 0]
    torch.testing.assert_close(pair.teacher_log_probs(batch).double(), scored, atol=1e-4, rtol=1e-5)
    assert distance(oracle.log_softmax("teacher", EXAMPLES), teacher) > 0.01
