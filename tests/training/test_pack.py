import pytest
import torch

from em.model.decoder import Decoder, DecoderConfig
from em.model.tokenizer import Example
from em.training.loss import summed_cross_entropy
from em.training.pack import pack, packs_of

TINY = {
    "model_type": "qwen2", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig.from_hf(TINY))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture
def examples():
    generator = torch.Generator().manual_seed(1)
    shapes = [(9, 4), (23, 11), (5, 1), (14, 13)]
    return [Example(torch.randint(0, 97, (n,), generator=generator).tolist(), p) for n, p in shapes]


def test_exactly_the_answers_are_predicted_each_from_the_token_before(examples):
    packed = pack(examples, "cpu")
    assert packed.targets.tolist() == [t for e in examples for t in e.ids[e.n_prompt :]]
    assert packed.owner.tolist() == [i for i, e in enumerate(examples) for _ in e.ids[e.n_prompt :]]
    before = [e.ids[j - 1] for e in examples for j in range(e.n_prompt, len(e.ids))]
    assert packed.ids[0, packed.predictions].tolist() == before


def test_a_packed_row_gives_each_example_the_states_it_has_alone(model, examples):
    together = pack(examples, "cpu").hidden(model)
    alone = torch.cat([pack([e], "cpu").hidden(model) for e in examples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_an_example_is_not_moved_by_its_neighbours(model, examples):
    changed = [Example([(t + 1) % 97 for t in examples[0].ids], examples[0].n_prompt), *examples[1:]]
    packed, other = pack(examples, "cpu"), pack(changed, "cpu")
    rest = packed.owner > 0
    assert torch.equal(packed.hidden(model)[rest], other.hidden(model)[rest])


def test_one_pack_of_all_and_one_pack_each_give_the_same_gradient(model, examples):
    def gradient(groups):
        model.zero_grad()
        for group in groups:
            packed = pack(group, "cpu")
            summed_cross_entropy(packed.hidden(model), model.head_weight.detach(), packed.targets).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, alone = gradient([examples]), gradient([[e] for e in examples])
    for name in together:
        torch.testing.assert_close(together[name], alone[name], atol=1e-4, rtol=1e-4)


def test_an_example_without_prompt_or_answer_is_refused():
    for n_prompt in (0, 4):
        with pytest.raises(ValueError, match="a prompt and an answer"):
            pack([Example([1, 2, 3, 4], n_prompt)], "cpu")


def test_groups_keep_the_order_and_the_limit(examples):
    groups = packs_of(examples, 30)
    assert [i for group in groups for i in group] == [0, 1, 2, 3]
    assert all(sum(len(examples[i].ids) for i in g) <= 30 for g in groups) and len(groups) == 3
    assert packs_of(examples, 1) == [[0], [1], [2], [3]]
    assert packs_of(examples, 22) == [[0], [1], [2, 3]]  # the second, of 23 tokens, goes alone
