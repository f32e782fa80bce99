"""The operators of a decode step: twins by definition, kernels interpreted on a CPU, shapes on meta."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from processes import ROOT
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from em.model.decode import _decode_attention, _rotate_write, decode_attention
from em.model.decoder import Decoder, DecoderConfig
from em.model.rope import Rope
from em.sampling.batch import Batch

needs_triton = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton has no build for it"
)


def by_definition(q, keys, values, positions, window):
    """In float64, a row and a query head at a time."""
    q, keys, values = q.double(), keys.double(), values.double()
    out, G = torch.empty_like(q), q.shape[1] // keys.shape[2]
    for b, last in enumerate(positions.tolist()):
        first = max(0, last + 1 - window) if window else 0
        for h in range(q.shape[1]):
            k, v = (x[b, first : last + 1, h // G] for x in (keys, values))
            out[b, h] = torch.softmax(k @ q[b, h] * q.shape[2] ** -0.5, 0) @ v
    return out


# (query heads a key head, head size, window, dtype, programs below which a row's keys are split)
ATTENTION = {
    "one query a key head": (1, 64, None, torch.float32, 1),
    "three, in parts": (3, 64, None, torch.float32, 64),
    "five, wide": (5, 128, None, torch.float32, 1),
    "window": (3, 64, 9, torch.float32, 1),
    "window in parts": (5, 128, 40, torch.float32, 64),
    "an odd head size": (2, 12, None, torch.float32, 64),
    "bf16": (5, 128, None, torch.bfloat16, 1),
    "bf16 in parts": (3, 64, 33, torch.bfloat16, 64),
    "fp32 over a cache in bf16": (3, 64, None, None, 1),
}
LENGTHS = (1, 70, 16, 33)  # a block of keys holds 16 here


def attention_case(name):
    G, D, window, dtype, _ = ATTENTION[name]
    generator = torch.Generator().manual_seed(len(name))
    q = torch.randn(4, 2 * G, D, generator=generator).to(dtype or torch.float32)
    cache = 2 * torch.randn(2, 4, 2, 80, D, generator=generator).to(dtype or torch.bfloat16)
    for row, length in enumerate(LENGTHS):
        cache[:, row, :, length:] = 1e3  # what is beyond a row would be seen at once
    keys, values = cache[:, :, :, :72].transpose(2, 3)  # (4, 72, 2, D), strided as a cache's are
    return q, keys, values, torch.tensor(LENGTHS) - 1, window


def rotate_case(dtype=torch.bfloat16):
    """q, k, v are views of one product, as a fused projection gives them."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(3, 5, 10 * 12, generator=generator).to(dtype)
    q, k, v = (x.unflatten(-1, (-1, 12)) for x in fused.split((6 * 12, 2 * 12, 2 * 12), -1))
    positions = torch.tensor([[3, 4, 5, 9, 10]])
    rows = torch.tensor([[2], [0], [6]])
    keys, values = torch.zeros(2, 7, 2, 20, 12, dtype=dtype)
    return q, k, v, *Rope().table(positions, 12), keys, values, positions, rows


def packed_case(dtype=torch.float32):
    """Three prompts in one row: each token has a cache row and a position of its own."""
    q, k, v, _, _, keys, values, _, _ = rotate_case(dtype)
    q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    positions = torch.cat([torch.arange(n) for n in (7, 3, 5)])[None]
    rows = torch.tensor([4, 0, 5]).repeat_interleave(torch.tensor([7, 3, 5]))[None]
    return q, k, v, *Rope(amplitude=1.3).table(positions, 12), keys, values, positions, rows


ROTATE = {
    "bf16": rotate_case,
    "fp32": lambda: rotate_case(torch.float32),
    "packed": packed_case,
}

# Triton chooses at its import whether it interprets, so another process does it.
CHILD = """
import sys
import interpreter
import torch
from safetensors.torch import load_file, save_file
import test_decode
from em.model import decode_triton
decode_triton.BLOCK, out = 16, {}
for name, (*_, programs) in test_decode.ATTENTION.items():
    decode_triton.PROGRAMS = programs
    q, keys, *_ = case = test_decode.attention_case(name)
    assert (decode_triton.n_splits(len(q) * keys.shape[2], keys.shape[1]) > 1) == (programs > 1)
    out[name] = decode_triton.decode_attention(*case)
for name, case in test_decode.ROTATE.items():
    arguments = case()
    q, k = decode_triton.rotate_write(*arguments)
    out |= {f"{name}/{i}": x for i, x in enumerate((q, k, *arguments[5:7]))}
save_file(out, sys.argv[1])
"""


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "out.safetensors"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "model")))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, file], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return load_file(file)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_row_sees_its_own_keys_and_window_and_nothing_else(name):
    case = attention_case(name)
    tolerance = 1e-5 if case[0].dtype == torch.float32 else 3e-2
    found = decode_attention(*case)
    assert found.dtype == case[0].dtype
    torch.testing.assert_close(found.double(), by_definition(*case), atol=tolerance, rtol=0)


@needs_triton
@pytest.mark.parametrize("name", ATTENTION)
def test_the_attention_kernel_is_no_further_from_float64_than_its_twin(interpreted, name):
    case = attention_case(name)
    exact = by_definition(*case)
    assert interpreted[name].dtype == case[0].dtype
    error, twins = (
        (x.double() - exact).norm() / exact.norm() for x in (interpreted[name], _decode_attention(*case))
    )
    mixed = case[1].dtype != case[0].dtype  # the kernel computes in the cache's dtype, which rounds q
    assert error <= 1.2 * twins + (6e-3 if mixed else 2e-7)


@needs_triton
@pytest.mark.parametrize("name", ROTATE)
def test_the_rotation_kernel_rounds_once_and_writes_where_its_twin_does(interpreted, name):
    case = ROTATE[name]()
    expected = (*_rotate_write(*case), *case[5:7])
    assert expected[2].count_nonzero() and not expected[2][1].any()  # some rows are written, some not
    for i, tensor in enumerate(expected):
        found = interpreted[f"{name}/{i}"]
        assert found.dtype == tensor.dtype and torch.equal(found == 0, tensor == 0)
        torch.testing.assert_close(
            found, tensor, atol=1e-6, rtol=2**-7 if tensor.dtype != torch.float32 else 1e-5
        )


# -- which kernels a GPU is asked for ----------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of the operators that were called, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if not function.is_view:
            self.names.append(function._schema.name)
        return function(*arguments, **options or {})

    def attention(self):
        return [name for name in self.names if "attention" in name]


def on_meta(n_layers=2):
    config = dict(
        model_type="olmo3", vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=n_layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, sliding_window=5,
        max_position_embeddings=64, tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"] * (n_layers // 2),
    )  # fmt: skip
    with torch.device("meta"):
        return Decoder(DecoderConfig.from_hf(config)).to(torch.bfloat16).requires_grad_(False)


def test_each_layout_names_its_kernel_on_a_gpu():
    model, ids = on_meta(), torch.zeros(3, 24, dtype=torch.long, device="meta")
    flash, decode = "aten::_flash_attention_forward", "em::decode_attention"
    efficient = "aten::_scaled_dot_product_efficient_attention"
    segments = torch.tensor([[1] * 10 + [2] * 14] * 3)
    places = {"positions": torch.zeros(3, 24, dtype=torch.long, device="meta")}
    layouts = {
        flash: [
            {},
            {"segments": segments},
            {"attention_mask": torch.ones(3, 24)},
            {"cache": model.new_cache(3, 64)},
        ],
        efficient: [{"cache": model.new_cache(3, 64), **places}],
        decode: [{"cache": model.new_cache(3, 64), "positions": places["positions"][:, :1]}],
    }
    for kernel, kinds in layouts.items():
        for layout in kinds:
            with torch.no_grad(), Calls() as calls:
                out = model.hidden(ids[:, :1] if kernel == decode else ids, **layout)
            assert out.shape == (3, 1 if kernel == decode else 24, 64)
            assert calls.attention() == [kernel] * 2


def test_a_step_needs_few_kernels_beside_its_layers():
    counts = []
    for n_layers in (2, 4):
        batch = Batch(on_meta(n_layers), 8, 48, (1, 2), 16, 1.0)
        with torch.inference_mode(), Calls() as calls:
            batch.begin_call()
            batch._step(8)
            calls.names.clear()  # what is computed once was
            batch._step(8)
        assert calls.attention() == ["em::decode_attention"] * n_layers
        assert calls.names.count("em::rotate_write") == n_layers
        counts.append(len(calls.names) + 1)  # em::draw is two
    two, four = counts
    assert two - (four - two) <= 22
