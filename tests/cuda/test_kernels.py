"""Every Triton kernel of the package, compiled for an H100 without one: registers, spills, widths of loads.

A case calls the function that launches a kernel, with blank tensors of real shapes on the CPU. In place of
the launch Triton compiles what it was handed for sm_90, so types, constants and alignments are those of the
call itself; nothing is computed. `cuobjdump`, which comes with Triton, reads the result.
"""

import ast
import importlib
import re
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from em.estimate.shapes import config_of
from em.model import head

if not find_spec("triton"):
    pytest.skip("no Triton here to compile its kernels for sm_90", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
if triton.knobs.runtime.interpret or not all((BIN / name).exists() for name in ("ptxas", "cuobjdump")):
    pytest.skip("this Triton has no compiler for sm_90", allow_module_level=True)

decode_triton, fused_triton = (importlib.import_module(f"em.model.{n}_triton") for n in ("decode", "fused"))
draw_triton = importlib.import_module("em.sampling.draw_triton")
kl_triton = importlib.import_module("em.training.kl_triton")

EM = Path(__file__).parents[2] / "em"
SHARED_BYTES = 227 << 10  # that a program may have on sm_90
BF16 = torch.bfloat16

# -- the launches --------------------------------------------------------------------------------------------


def blank(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def logits(rows: int, vocabulary: int) -> torch.Tensor:
    """(rows, V) as they lie on a GPU."""
    return head.empty_logits(rows, blank(vocabulary, 1))


def kl(direction: str, vocabulary: int) -> None:
    student, teacher = logits(8, vocabulary).chunk(2)
    getattr(kl_triton, f"{direction}_kl")(student, teacher, BF16)


def draw(vocabulary: int, temperature: float = 1.0) -> None:
    keys, counts = blank(2, 8, dtype=torch.long)
    draw_triton.draw(logits(8, vocabulary), temperature, keys, counts)


def shape_of(name: str) -> tuple[int, int, int]:
    """H, K and D of a named model, or of GPT-2."""
    if name == "gpt2":
        return 12, 12, 64
    config = config_of(name)
    return config.n_heads, config.n_kv_heads, config.head_dim


def attend(name: str, rows: int, window: int | None = None) -> None:
    H, K, D = shape_of(name)
    keys, values = (blank(rows, K, 1024, D).transpose(1, 2) for _ in range(2))  # as KVCache.read gives them
    decode_triton.decode_attention(blank(rows, H, D), keys, values, blank(rows, dtype=torch.long), window)


def rotate_write(name: str) -> None:
    H, K, D = shape_of(name)
    q, k, v = blank(8, 1, (H + 2 * K) * D).split([H * D, K * D, K * D], -1)  # of one product
    q, k, v = (x.unflatten(-1, (-1, D)) for x in (q, k, v))
    cos, sin = (blank(8, 1, 1, D, dtype=torch.float32) for _ in range(2))
    keys, values = (blank(8, K, 1024, D) for _ in range(2))
    positions, rows = (torch.zeros(8, 1, dtype=torch.long) for _ in range(2))
    decode_triton.rotate_write(q, k, v, cos, sin, keys, values, positions, rows)


def swiglu(name: str) -> None:
    gate_up = blank(1, 64, 2 * config_of(name).intermediate_size)
    fused_triton.swiglu_backward(fused_triton.swiglu(gate_up), gate_up)


def norms(width: int) -> None:
    """Those between blocks, with and without a sum."""
    x, weight = blank(1, 64, width), blank(width)
    total, out, rstd = fused_triton.add_rms_norm(x, x, weight, 1e-6)
    fused_triton.rms_norm(x, weight, 1e-6)
    fused_triton.rms_norm_backward(out, total, rstd, weight, x)
    fused_triton.rms_norm_backward(out, total, rstd, weight, None)


def head_norms(name: str) -> None:
    """Of the queries of one product, each head by itself."""
    H, K, D = shape_of(name)
    x = blank(1, 64, (H + 2 * K) * D)[..., : H * D].unflatten(-1, (-1, D))
    out, rstd = fused_triton.rms_norm(x, blank(D), 1e-6)
    fused_triton.rms_norm_backward(out, x, rstd, blank(D), None)


# -- the table -----------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """registers: of a thread. narrow: how many accesses of global memory may be of fewer than `bits` bits."""

    registers: int = 80  # three programs of eight warps on a multiprocessor
    narrow: int = 1  # a number of the row
    bits: int = 128


class Case(NamedTuple):
    launch: Callable[[], object]
    kernels: dict[str, Bound]  # all that it launches


ATTEND = Bound(registers=128)  # its four warps leave more room than the keys and values that it holds
# A warp has the halves of one head of one token: two elements of each a lane, or one.
ONE_HEAD = Bound(40, 16, 64)
# Numbers of a row, and the few hundred sums of its blocks, whose rows are of any length.
SWEEP, PICK = Bound(80, 2), Bound(80, 9, 64)
NORM, HEAD_NORM = Bound(64), Bound(64, bits=64)

VOCABULARIES = (152_064, 128_256, 100_278, 49_152)  # Qwen 2.5, Llama 3, Olmo 3, SmolLM2
CASES = {
    f"{direction} KL, V = {V}": Case(partial(kl, direction, V), {f"_{direction}_kl": Bound()})
    for direction in ("forward", "reverse")
    for V in VOCABULARIES
}
CASES |= {f"draw, V = {V}": Case(partial(draw, V), {"_sweep": SWEEP, "_pick": PICK}) for V in VOCABULARIES}
CASES |= {
    "draw, greedy": Case(partial(draw, 152_064, 0.0), {"_sweep": SWEEP, "_pick": PICK}),
    "attend, Qwen 2.5": Case(partial(attend, "qwen2.5-14b", 8), {"_attend": ATTEND}),
    "attend, Qwen 2.5, one row": Case(
        partial(attend, "qwen2.5-14b", 1), {"_attend": Bound(128, 2, 64), "_join": Bound(80, 10, 64)}
    ),
    "attend, Llama 3": Case(partial(attend, "llama3.1-8b", 40), {"_attend": ATTEND}),
    "attend, Olmo 3, a window": Case(partial(attend, "olmo3-7b", 8, 4096), {"_attend": ATTEND}),
    "attend, GPT-2": Case(partial(attend, "gpt2", 64), {"_attend": ATTEND}),
    "rotate and write, Qwen 2.5": Case(partial(rotate_write, "qwen2.5-14b"), {"_rotate_and_write": ONE_HEAD}),
    "rotate and write, SmolLM2": Case(partial(rotate_write, "smollm2-135m"), {"_rotate_and_write": ONE_HEAD}),
    "SwiGLU, Qwen 2.5": Case(
        partial(swiglu, "qwen2.5-14b"), {"_swiglu": Bound(64), "_swiglu_backward": Bound(64)}
    ),
    "norms, Qwen 2.5": Case(partial(norms, 5120), {"_norm": NORM, "_norm_backward": NORM}),
    "norms, Llama 3": Case(partial(norms, 4096), {"_norm": NORM, "_norm_backward": NORM}),
    "norms of heads, Qwen 3": Case(
        partial(head_norms, "qwen3-14b"), {"_norm": HEAD_NORM, "_norm_backward": HEAD_NORM}
    ),
}


# -- compilation ---------------------------------------------------------------------------------------------


class H100:
    """What Triton asks its driver on the way to a compilation."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "sm_90"  # a name of its own in the kernels' caches, beside the numbers of real devices

    def get_current_stream(self, device: str) -> int:
        return 0


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> list:
    """What is launched in the test, as (kernel's name, compiled kernel)."""
    found, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        found.append((self.fn.__name__, run(self, *arguments, grid=grid, warmup=True, **options)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(head, "on_gpu", lambda _: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton.runtime.driver.set_active(H100())
    yield found
    triton.runtime.driver.set_active(None)  # the next to ask finds the machine's own


def run(program: str, *arguments) -> str:
    command = [BIN / program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def written(binary, folder: Path) -> Path:
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    return path


def widths(ptx: str) -> list[int]:
    """Bits of each access of global memory, as the assembler is told to make them."""
    direct = re.findall(r"\b(?:ld|st)\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global [^;]*?\], (\w+)", ptx)
    return sorted([int(n or 1) * int(bits) for n, bits in direct] + [8 * int(n, 0) for n in copies])


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_keeps_within_its_registers_and_moves_whole_vectors(name, compiled, tmp_path):
    case = CASES[name]
    case.launch()
    assert {kernel for kernel, _ in compiled} == case.kernels.keys()
    for kernel, binary in compiled:
        bound, bits = case.kernels[kernel], widths(binary.asm["ptx"])
        usage = run("cuobjdump", "--dump-resource-usage", written(binary, tmp_path))
        usage = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        assert usage["REG"] <= bound.registers
        assert usage["STACK"] == usage["LOCAL"] == 0  # what does not fit registers would lie there
        assert sum(n < bound.bits for n in bits) <= bound.narrow and max(bits) >= bound.bits
        assert binary.metadata.shared <= SHARED_BYTES


def test_the_assembler_makes_the_accesses_as_it_is_told_and_no_others(compiled, tmp_path):
    kl("forward", 100_278)
    [(_, binary)] = compiled
    code = run("cuobjdump", "-sass", written(binary, tmp_path))
    opcodes = [opcode.split(".") for opcode in re.findall(r"\s((?:LD|ST)[GL](?:\.\w+)*)\s", code)]
    assert {opcode[0] for opcode in opcodes} == {"LDG", "STG"}
    assert sorted(128 if "128" in opcode else 32 for opcode in opcodes) == widths(binary.asm["ptx"])


def test_every_kernel_of_the_package_is_in_the_table():
    """Those that are launched; what they call is compiled into them."""
    kernels, called = set(), set()
    for path in EM.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        found = {f.name for f in functions if any("jit" in ast.unparse(d) for d in f.decorator_list)}
        assert not found or path.name.endswith("_triton.py")
        kernels |= found
        called |= {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert kernels - called == {kernel for case in CASES.values() for kernel in case.kernels}
