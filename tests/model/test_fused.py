"""SwiGLU and norms in one pass: against float64, their gradients, and the GPU's kernels interpreted."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from processes import ROOT
from safetensors.torch import load_file, save_file

import em.model.fused  # noqa: F401  (defines the operators)
from em.model.fused import add_rms_norm, rms_norm, swiglu

EPS = 1e-5
CPU = {
    name: getattr(torch.ops.em, name)
    for name in ("swiglu", "swiglu_backward", "rms_norm", "add_rms_norm", "rms_norm_backward")
}


def tensors(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Inputs of every operator, rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sizes = draw(rows, 1).exp()
    made = {
        "x": draw(rows, width) * sizes,
        "delta": draw(rows, width),
        "other": draw(rows, width),
        "grad": draw(rows, width),
        "weight": draw(width),
        "gate_up": 3 * draw(rows, 2 * width),
    }
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def outputs(op: dict, t: dict) -> dict[str, torch.Tensor]:
    """What the operators give; of the backward ones too."""
    total, normed, rstd = op["add_rms_norm"](t["x"], t["delta"], t["weight"], EPS)
    alone, _ = op["rms_norm"](t["x"], t["weight"], EPS)
    d_gate_up, again = op["swiglu_backward"](t["grad"], t["gate_up"])
    return {
        "swiglu": op["swiglu"](t["gate_up"]),
        "swiglu again": again,
        "swiglu, gradient": d_gate_up,
        "norm": alone,
        "sum": total,
        "norm of the sum": normed,
        "norm, gradient": op["rms_norm_backward"](t["grad"], total, rstd, t["weight"], None),
        "norm of the sum, gradient": op["rms_norm_backward"](t["grad"], total, rstd, t["weight"], t["other"]),
    }


def exact(t: dict, rounded: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same by definition in float64; the norm of a sum is of the sum as it was `rounded`."""
    t = {name: tensor.double() for name, tensor in t.items()}
    gate_up, total = t["gate_up"].requires_grad_(), rounded.double().requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    product = gate * torch.sigmoid(gate) * up

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * t["weight"]

    (d_gate_up,) = torch.autograd.grad((product * t["grad"]).sum(), gate_up)
    (d_total,) = torch.autograd.grad((norm(total) * t["grad"]).sum(), total)
    return {
        "swiglu": product.detach(),
        "swiglu again": product.detach(),
        "swiglu, gradient": d_gate_up,
        "norm": norm(t["x"]),
        "sum": t["x"] + t["delta"],
        "norm of the sum": norm(total).detach(),
        "norm, gradient": d_total,
        "norm of the sum, gradient": d_total + t["other"],
    }


def assert_within_budget(found: dict, expected: dict, rounding: float = 0.51) -> None:
    """One rounding of each output, in its ulps, and arithmetic in fp32: 8 ulps of the largest of its row."""
    for name, tensor in found.items():
        ulp = torch.finfo(tensor.dtype).eps
        largest = expected[name].abs().amax(-1, keepdim=True)
        budget = rounding * ulp * expected[name].abs() + 8 * torch.finfo(torch.float32).eps * largest + 1e-30
        worst = ((tensor.double() - expected[name]).abs() / budget).max()
        assert worst <= 1, (name, worst)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_output_is_rounded_once(dtype):
    t = tensors(37, 200, dtype)
    found = outputs(CPU, t)
    assert_within_budget(found, exact(t, found["sum"]))


def test_the_norm_is_torchs():
    t = tensors(9, 40)
    expected = F.rms_norm(t["x"], (40,), t["weight"], EPS)
    torch.testing.assert_close(rms_norm(t["x"], t["weight"], EPS), expected, rtol=1e-5, atol=1e-6)


def test_gradients_match_finite_differences_also_where_only_one_output_is_used():
    x, delta, weight, gate_up = (
        torch.randn(*shape, dtype=torch.double, requires_grad=True)
        for shape in ((3, 6), (3, 6), (6,), (3, 2, 8))
    )
    assert torch.autograd.gradcheck(swiglu, gate_up)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    for part in (slice(0, 2), slice(0, 1), slice(1, 2)):
        assert torch.autograd.gradcheck(lambda *a, part=part: add_rms_norm(*a, EPS)[part], (x, delta, weight))


def test_autograd_keeps_the_input_of_a_swiglu_and_the_sum_of_a_norm_and_no_copy_of_them():
    t = tensors(50, 32)
    kept = []

    def keep(tensor):
        kept.append((tensor.data_ptr(), tuple(tensor.shape)))
        return tensor

    gate_up, x = t["gate_up"].requires_grad_(), t["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        swiglu(gate_up)
        total, _ = add_rms_norm(x, t["delta"], t["weight"], EPS)
    expected = [gate_up.data_ptr(), total.data_ptr(), t["weight"].data_ptr()]
    assert [pointer for pointer, shape in kept if shape != (50, 1)] == expected
    assert [shape for _, shape in kept].count((50, 1)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_meta_tensors_have_the_shapes_and_dtypes_of_the_values(dtype):
    t = tensors(5, 12, dtype)
    meta = outputs(CPU, {name: tensor.to("meta") for name, tensor in t.items()})
    for name, tensor in outputs(CPU, t).items():
        assert (meta[name].device.type, meta[name].shape) == ("meta", tensor.shape)
        assert (meta[name].dtype, meta[name].stride()) == (tensor.dtype, tensor.stride())


# -- the kernels, interpreted on a CPU ---------------------------------------------------------------------
# Triton chooses when it is first imported, so another process does it.

CHILD = """
import sys
sys.path.insert(0, "tests/model")
import torch
from safetensors.torch import load_file, save_file
from em.model import fused_triton
from test_fused import CPU, outputs
fused_triton.BLOCK = 64
stored, out = load_file(sys.argv[1]), {}
for case in sorted({key.split("/")[0] for key in stored}):
    t = {key.split("/")[1]: tensor for key, tensor in stored.items() if key.startswith(case + "/")}
    out |= {f"{case}/{k}": v for k, v in outputs({n: getattr(fused_triton, n) for n in CPU}, t).items()}
wide = torch.arange(4.0 * 3 * 50).sin().view(2, 2, 3 * 50)  # heads of 10, those in the middle of a wider row
heads = wide[..., 50:100].unflatten(-1, (5, 10))
out["heads"] = fused_triton.rms_norm(heads, torch.arange(10.0), 1e-5)[0]
save_file(out, sys.argv[2])
"""
CASES = {
    "one ragged block": (3, 37, torch.float32),
    "whole blocks": (4, 128, torch.float32),
    "ragged last block": (5, 200, torch.float32),
    "bf16": (7, 200, torch.bfloat16),
    "bf16, odd": (2, 51, torch.bfloat16),
}
needs_triton = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="Triton has no build for it"
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    stored = {f"{case}/{name}": x for case, sizes in CASES.items() for name, x in tensors(*sizes).items()}
    save_file(stored, folder / "in.safetensors")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", CHILD, folder / "in.safetensors", folder / "out.safetensors"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out.safetensors")


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_within_the_twins_budget(interpreted, case):
    t = tensors(*CASES[case])
    twins = outputs(CPU, t)
    found = {name: interpreted[f"{case}/{name}"] for name in twins}
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in twins.items()}
    # Triton's interpreter cuts an fp32 off where it makes a bf16 of it; a GPU rounds to the nearest.
    assert_within_budget(found, exact(t, found["sum"]), 0.51 if t["x"].dtype == torch.float32 else 1.01)


@needs_triton
def test_a_kernel_reads_heads_where_they_lie_in_a_wider_row(interpreted):
    wide = torch.arange(4.0 * 3 * 50).sin().view(2, 2, 3 * 50)
    expected = rms_norm(wide[..., 50:100].unflatten(-1, (5, 10)), torch.arange(10.0), 1e-5)
    torch.testing.assert_close(interpreted["heads"], expected, rtol=1e-5, atol=1e-6)
