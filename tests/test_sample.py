import pytest
import torch

from em.gpt2 import GPT2, GPT2Config
from em.sample import generate

CONFIG = GPT2Config(vocab_size=50, n_positions=48, n_layer=2, n_head=2, n_embd=32)
STOP = 49


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = GPT2(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6)  # peaked enough for argmax to be stable, flat enough to vary
    return model


@pytest.fixture
def prompts():
    lengths = torch.tensor([3, 11, 7, 1, 11])
    ids = torch.randint(0, 49, (5, 11), generator=torch.Generator().manual_seed(5))
    return ids, lengths


def greedy_without_cache(model, prompt, n):
    ids = prompt
    for _ in range(n):
        token = model(ids[None])[0, -1, : CONFIG.vocab_size].argmax()
        ids = torch.cat([ids, token[None]])
        if token == STOP:
            break
    return ids[len(prompt) :]


def test_greedy_generation_of_a_ragged_batch_equals_uncached_row_by_row(model, prompts):
    ids, lengths = prompts
    out = generate(model, ids, lengths, 30, STOP)
    for row, length, got in zip(ids, lengths.tolist(), out, strict=True):
        expected = greedy_without_cache(model, row[:length], 30)
        assert torch.equal(got[: len(expected)], expected)
        assert (got[len(expected) :] == STOP).all()  # nothing after the stop token


def test_what_stands_in_the_padding_does_not_matter(model, prompts):
    ids, lengths = prompts
    other = ids.clone()
    for row, length in enumerate(lengths.tolist()):
        other[row, length:] = 13
    assert torch.equal(generate(model, ids, lengths, 20, STOP), generate(model, other, lengths, 20, STOP))


def test_sampled_frequencies_match_the_softmax(model):
    n = 40_000
    prompt = torch.tensor([4, 8, 15])
    p = model(prompt[None])[0, -1, : CONFIG.vocab_size].detach().double().div(2.0).softmax(-1)
    ids, lengths = prompt.expand(n, 3), torch.full((n,), 3)
    tokens = generate(
        model, ids, lengths, 1, STOP, temperature=2.0, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.bincount(tokens[:, 0], minlength=50).double()
    often = n * p > 5
    chi2 = ((counts - n * p) ** 2 / (n * p))[often].sum()
    degrees = int(often.sum())
    assert degrees > 5 and chi2 < degrees + 5 * (2 * degrees) ** 0.5


def test_padded_vocabulary_rows_are_never_sampled(model):
    """Rows 50–63 pad the embedding; make them by far the likeliest."""
    rigged = GPT2(CONFIG).eval()
    rigged.load_state_dict(model.state_dict())
    with torch.no_grad():
        rigged.wte.weight[50:] = rigged.ln_f.bias + 100 * rigged.ln_f.weight
    ids, lengths = torch.ones(64, 2, dtype=torch.long), torch.full((64,), 2)
    for temperature in (0.0, 1.0):
        assert generate(rigged, ids, lengths, 4, STOP, temperature).max() < 50


def test_same_generator_seed_gives_the_same_text(model, prompts):
    ids, lengths = prompts
    runs = [generate(model, ids, lengths, 12, STOP, 1.0, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
