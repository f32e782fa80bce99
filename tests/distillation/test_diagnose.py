"""Distances between student and teacher against float64, and their estimates by enumeration."""

import pytest
import torch
from pairs import EXAMPLES, PAIRS, Oracle, gpt2, make_pair

import em.distillation.diagnose
from em.distillation.diagnose import diagnose
from em.distillation.pair import WorldPair
from em.model.tokenizer import Example
from em.stats import mean_interval

NAMES = ("length", "k1", "k3", "kl", "entropy", "divergence")


@pytest.fixture(params=PAIRS)
def pair(request):
    return make_pair(request.param)


def by_response(pair) -> dict[str, list[float]]:
    """Every value of every example of EXAMPLES, from full logits in float64."""
    oracle, values = Oracle(pair), {name: [] for name in NAMES}
    for example in EXAMPLES:
        student, teacher, base = (
            oracle.log_softmax(who, [example]).detach() for who in ("student", "teacher", "base")
        )
        tokens = torch.tensor(example.ids[example.n_prompt :])[:, None]
        log_ratio = student.gather(1, tokens) - teacher.gather(1, tokens)
        means = (
            log_ratio.mean(),
            (torch.exp(-log_ratio) - 1 + log_ratio).mean(),
            (student.exp() * (student - teacher)).sum(-1).mean(),
            -(student.exp() * student).sum(-1).mean(),
            (teacher.argmax(-1) != base.argmax(-1)).double().mean(),
        )
        for name, value in zip(NAMES, (torch.tensor(len(tokens)), *means), strict=True):
            values[name].append(value.item())
    return values


@pytest.mark.parametrize("tokens", [2048, 16])  # all at once; one example or two
def test_values_are_means_over_responses_of_means_over_tokens(pair, tokens, monkeypatch):
    monkeypatch.setattr(em.distillation.diagnose, "TOKENS", tokens)
    found, values = diagnose(pair, EXAMPLES), by_response(pair)
    assert found.keys() == set(NAMES)
    for name in NAMES:
        assert found[name] == pytest.approx(mean_interval(values[name]), rel=2e-4, abs=1e-6), name
    assert found["length"]["mean"] == (8 + 1 + 8 + 1 + 6) / 5
    if not (isinstance(pair, WorldPair) or pair.stacks["teacher"]):
        assert found["divergence"]["mean"] == 0  # a teacher that is the base never differs from it
    else:
        assert 0 < found["divergence"]["mean"] < 1


def test_divergence_is_split_by_label(pair):
    labels = ["a", "b", "a", "c", "b"]
    found, each = diagnose(pair, EXAMPLES, labels), by_response(pair)["divergence"]
    for label in "abc":
        expected = mean_interval([value for value, of in zip(each, labels, strict=True) if of == label])
        assert found["divergence_by"][label] == pytest.approx(expected, abs=1e-9)
    assert found["divergence_by"].keys() == set(labels) and found["divergence_by"]["c"]["low"] is None


def test_divergence_counts_places_where_the_teachers_likeliest_token_is_not_the_bases():
    # One-token answers: whether the argmaxes differ depends on the prompt alone.
    pair = make_pair("world")
    differ = []
    for prompt in range(40):
        teacher, base = (
            pair.models[who](torch.tensor([[prompt]]))[0, -1, :50].argmax().item()
            for who in ("teacher", "base")
        )
        differ.append(teacher != base)
        found = diagnose(pair, [Example([prompt, 0], 1)])
        assert found["divergence"]["mean"] == float(differ[-1])
    assert any(differ) and not all(differ)


def test_k1_and_k3_average_to_the_kl_over_the_students_responses_and_to_less_over_the_teachers():
    vocabulary, prompt = 6, [1, 2, 3]
    pair = WorldPair(*(gpt2(seed, vocabulary, width=8) for seed in (3, 4, 5)), end=5, max_new_tokens=1)
    found = [diagnose(pair, [Example([*prompt, token], 3)]) for token in range(vocabulary)]
    ids = torch.tensor([prompt])
    p, q = (pair.models[who](ids)[0, -1, :vocabulary].softmax(-1).tolist() for who in ("student", "teacher"))
    for name in ("k1", "k3"):
        each = [f[name]["mean"] for f in found]
        assert sum(w * v for w, v in zip(p, each, strict=True)) == pytest.approx(
            found[0]["kl"]["mean"], rel=1e-4
        )
    assert all(f["k3"]["mean"] >= 0 for f in found) and any(f["k1"]["mean"] < 0 for f in found)
    k1_of_teachers = sum(w * f["k1"]["mean"] for w, f in zip(q, found, strict=True))
    assert k1_of_teachers < 0  # minus the other KL: it says nothing where the student did not write


def test_a_teacher_that_is_the_student_is_at_no_distance():
    pair = make_pair("adapters")
    pair.stacks["teacher"] = pair.stacks["student"]
    found = diagnose(pair, EXAMPLES)
    assert all(abs(found[name]["mean"]) < 1e-6 for name in ("k1", "k3", "kl"))
    assert found["entropy"]["mean"] > 0.1
