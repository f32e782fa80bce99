"""Tokens from logits: the uniforms, the inversion, the distribution."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from goodness_of_fit import chi_squared
from processes import ROOT
from safetensors.torch import load_file

from em.sampling.draw import _invert, draw, row_key, uniforms

MASK = (1 << 64) - 1


def splitmix64(state: int, n: int) -> int:
    """Output number n of the generator seeded with `state`, in Python's integers."""
    z = (state + (n + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_uniforms_are_splitmix64s_bits_in_the_half_open_unit_interval():
    keys = [0, 1, -1, 2**63 - 1, -(2**63), row_key(1, 2, 3)]
    counts = [0, 5, 599, 1, 0, 77]
    u, v = uniforms(torch.tensor(keys), torch.tensor(counts))
    bits = [splitmix64(key & MASK, n) for key, n in zip(keys, counts, strict=True)]
    assert u.tolist() == [((b >> 40) + 1) / 2**24 for b in bits]
    assert v.tolist() == [((b >> 16 & 0xFFFFFF) + 1) / 2**24 for b in bits]


def test_seeds_prompts_samples_and_places_have_random_numbers_of_their_own():
    names = [(seed, prompt, sample) for seed in range(20) for prompt in range(20) for sample in range(20)]
    keys = torch.tensor([row_key(*name) for name in names])
    u, v = uniforms(keys[:, None], torch.arange(100))
    assert torch.cat((u, v)).mul(2**24).long().unique().numel() > 1_500_000 * 0.95  # of 1.6 M, few collide
    grid = torch.stack([u, v]).view(2, 20, 20, 20, 100) - 0.5
    n = grid[0].numel()
    neighbours = [grid[:, 1:] * grid[:, :-1], grid[:, :, 1:] * grid[:, :, :-1]]
    neighbours += [grid[..., 1:, :] * grid[..., :-1, :], grid[..., 1:] * grid[..., :-1], grid[0] * grid[1]]
    for product in neighbours:
        assert abs(product.mean() * 12) < 5 / n**0.5  # correlation, five standard errors
    assert abs(grid.mean()) < 5 * (1 / 12 / n) ** 0.5 and abs(grid.var() * 12 - 1) < 0.01


def test_inversion_takes_the_first_index_whose_cumulative_share_reaches_the_uniform():
    weights = torch.tensor([[0.0, 1, 0, 2, 0, 1, 0]])
    u = torch.tensor([2.0**-24, 0.25, 0.2500001, 0.75, 0.7500001, 1.0])
    assert _invert(weights.expand(6, 7), u).tolist() == [1, 1, 3, 3, 5, 5]


def test_inversion_never_takes_a_weight_of_zero_however_sums_round():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(4000, 64, generator=generator) * 10 ** torch.randint(-44, 30, (4000, 1)).float()
    weights *= torch.rand(4000, 64, generator=generator) < 0.2
    weights[:, 17] = weights[:, 17].clamp(min=1e-40)
    for u in (2.0**-24, 0.3, 1 - 2.0**-24, 1.0):
        picked = _invert(weights, torch.full((4000,), u))
        assert (weights.gather(1, picked[:, None]) > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("vocabulary", [50, 1000])
def test_frequencies_match_the_softmax(vocabulary, temperature):
    n = 50_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    keys = torch.tensor([row_key(3, i, 0) for i in range(n // 10)]).repeat_interleave(10)
    tokens, _ = draw(logits.expand(n, vocabulary), temperature, keys, torch.arange(n) % 10)
    p = (logits.double() / temperature).softmax(-1)
    assert abs(chi_squared(torch.bincount(tokens, minlength=vocabulary), n * p)) < 5


def test_rare_tokens_keep_their_share():
    """60,000 tokens, half of the probability on one of them; draws of the others hardly ever repeat."""
    V, n = 60_000, 2000
    logits = torch.zeros(V)
    logits[77] = torch.tensor(float(V - 1)).log()
    keys = torch.tensor([row_key(5, i, 0) for i in range(n)])
    drawn = [draw(logits.expand(250, V), 1.0, k, torch.zeros_like(k))[0] for k in keys.split(250)]
    tokens = torch.cat(drawn)
    share = (tokens == 77).double().mean()
    assert abs(share - 0.5) < 5 * (0.25 / n) ** 0.5
    rest = tokens[tokens != 77]
    assert (
        abs(chi_squared(torch.bincount(rest * 100 // V, minlength=100), torch.full((100,), len(rest) / 100)))
        < 5
    )
    assert rest.unique().numel() > 0.95 * len(rest)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_log_probabilities_are_those_of_the_distribution_drawn_from(temperature):
    logits = torch.randn(300, 1000, generator=torch.Generator().manual_seed(1)) * 30
    keys = torch.tensor([row_key(0, i, 0) for i in range(300)])
    tokens, log_probs = draw(logits, temperature, keys, torch.zeros(300, dtype=torch.long))
    expected = (logits.double() / (temperature or 1)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-4, rtol=1e-5)
    if temperature == 0:
        assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "vocabulary, temperature", [(514, 1.0), (100_278, 2.0), (152_064, 1.0), (49_152, 0.0)]
)
def test_a_gpu_draws_what_a_cpu_draws(vocabulary, temperature):
    logits, _, keys, counts = kernel_case(vocabulary, temperature, 3.0, n=128)
    tokens, log_probs = draw(logits, temperature, keys, counts)
    found, found_log_probs = draw(logits.cuda(), temperature, keys.cuda(), counts.cuda())
    same = found.cpu() == tokens
    assert same.double().mean() > 0.97  # a uniform may fall between two roundings of a border
    torch.testing.assert_close(found_log_probs.cpu()[same], log_probs[same], atol=1e-5, rtol=1e-5)


# -- the kernels, interpreted on a CPU ---------------------------------------------------------------------

# (vocabulary, temperature, spread of the logits)
KERNEL_CASES = [(50, 1.0, 3.0), (1000, 2.0, 10.0), (5000, 0.5, 1.0), (1024, 1.0, 30.0), (1000, 0.0, 3.0)]
CHILD = """
import sys
import interpreter
from safetensors.torch import save_file
import test_draw
from em.sampling import draw_triton
out = {}
for i, case in enumerate(test_draw.KERNEL_CASES):
    out[f"tokens{i}"], out[f"log_probs{i}"] = draw_triton.draw(*test_draw.kernel_case(*case))
save_file(out, sys.argv[1])
"""


def kernel_case(vocabulary, temperature, spread, n=12):
    """Logits with a stride as of a head with rows for nothing, and tokens that are impossible."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(n, vocabulary + 7, generator=generator) * spread
    logits[:, vocabulary:] = 1e4
    logits[: n // 2, : vocabulary // 3] = -torch.inf
    if temperature == 0:
        logits[:, 20] = logits[:, 900] = logits[:, :vocabulary].amax() + 1  # the first of two is taken
    keys = torch.tensor([row_key(seed, 4, 0) for seed in range(n)])
    return logits[:, :vocabulary], temperature, keys, torch.arange(n) * 50


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "out.safetensors"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "sampling")))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CHILD, file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(file)


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton has no build for it"
)
@pytest.mark.parametrize("i", range(len(KERNEL_CASES)))
def test_the_kernels_draw_what_torch_draws_with_the_same_keys(interpreted, i):
    case = kernel_case(*KERNEL_CASES[i])
    tokens, log_probs = draw(*case)
    assert torch.equal(interpreted[f"tokens{i}"], tokens) and len(set(tokens.tolist())) > (case[1] > 0) * 4
    exact = (case[0].double() / (case[1] or 1)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    twins = (log_probs - exact).abs().max()
    assert (interpreted[f"log_probs{i}"] - exact).abs().max() <= 1.2 * twins + 5e-6
