"""Forward KL, loss and gradient, beside naive PyTorch (and Liger's kernels on a GPU), in turn in one process.

    python bench/kl.py

CPU: SmolLM2's head at 1,024 positions, fp32. CUDA: Qwen2.5-14B's head at 2,048 positions, bf16; Liger takes
part where it is installed (pip install liger-kernel), and the result says whether it was. Naive holds both
sides' full logits; floor is the three matrix products alone. Peak memory is beyond the inputs: of a fresh
process's resident set on a CPU, of allocations on a GPU.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from record import RESULTS, goal, installed, save  # noqa: E402

from em import parallel  # noqa: E402
from em.run import provenance
from em.training.kl import forward_kl  # noqa: E402

DEVICE = parallel.start("auto")
ON_GPU = DEVICE.type == "cuda"
SHAPE = (
    {"n": 2048, "vocabulary": 152_064, "d": 5120} if ON_GPU else {"n": 1024, "vocabulary": 49_152, "d": 576}
)


def make_inputs() -> tuple[torch.Tensor, ...]:
    """h_student, h_teacher (N, d), head (V, d): logits of std 3, a student near its teacher."""
    torch.manual_seed(0)
    n, vocabulary, d = SHAPE.values()
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    # in place, so that making them leaves no higher mark of memory than having them
    h_student, h_teacher = torch.randn(2, n, d, device=DEVICE, dtype=dtype)
    h_student.mul_(0.3).add_(h_teacher)
    head = torch.randn(vocabulary, d, device=DEVICE, dtype=dtype).mul_(3 / d**0.5)
    return h_student.requires_grad_(), h_teacher, head


def ours(h_student, h_teacher, head):
    return forward_kl(h_student, h_teacher, head)


def naive(h_student, h_teacher, head):
    log_s = (h_student @ head.t()).float().log_softmax(-1)
    with torch.no_grad():
        log_t = (h_teacher @ head.t()).float().log_softmax(-1)
    return F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")


def liger_fused(h_student, h_teacher, head):
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(h_student, head, h_teacher, head, None)  # 0: KL(teacher‖student)


def liger_kl_div(h_student, h_teacher, head):
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    log_s = (h_student @ head.t()).float().log_softmax(-1)
    with torch.no_grad():
        log_t = (h_teacher @ head.t()).float().log_softmax(-1)
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_s, log_t)


LOSSES = {"ours": ours, "naive": naive}
if ON_GPU and find_spec("liger_kernel"):
    LOSSES |= {"liger fused": liger_fused, "liger kl_div": liger_kl_div}


def step(loss_of, inputs) -> tuple[float, torch.Tensor]:
    loss = loss_of(*inputs)
    loss.backward()
    grad, inputs[0].grad = inputs[0].grad, None
    return loss.detach(), grad


def floor(h_student, h_teacher, head) -> None:
    logits = h_student.detach() @ head.t()
    torch.mm(h_teacher, head.t(), out=logits)
    logits @ head


def seconds(function) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turn(work: dict, rounds: int) -> dict:
    """Median and least milliseconds of each, and how many times ours they took, round by round."""
    for function in work.values():
        seconds(function)
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            times[name].append(seconds(function))
    ratios = {name: [b / a for a, b in zip(times["ours"], t, strict=True)] for name, t in times.items()}
    return {
        "ms": {name: 1e3 * statistics.median(t) for name, t in times.items()},
        "least_ms": {name: 1e3 * min(t) for name, t in times.items()},
        "over_ours": {
            name: {"median": statistics.median(r), "min": min(r), "max": max(r)} for name, r in ratios.items()
        },
    }


def peak_bytes(name: str, inputs) -> int:
    if ON_GPU:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(LOSSES[name], inputs)
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, "--child", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def child(name: str) -> None:
    """Growth of the resident set's highest mark over one step of a fresh process."""
    inputs = make_inputs()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(LOSSES[name], inputs)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def main(rounds: int) -> dict:
    result = {"command": "python bench/kl.py", "made_with": provenance(DEVICE), "shape": SHAPE}
    result["made_with"] |= {name: installed(name) for name in ("triton", "liger-kernel") if ON_GPU}
    if not ON_GPU:
        peaks = {name: peak_bytes(name, None) for name in LOSSES}
    inputs = make_inputs()
    values = {name: step(loss_of, inputs) for name, loss_of in LOSSES.items()}  # and a warm-up
    if ON_GPU:
        peaks = {name: peak_bytes(name, inputs) for name in LOSSES}
    work = {name: (lambda f=loss_of: step(f, inputs)) for name, loss_of in LOSSES.items()}
    work["floor"] = lambda: floor(*inputs)
    timing = {"timing": in_turn(work, rounds)}
    if not ON_GPU:  # one thread waits for no other: a busy machine disturbs it least
        torch.set_num_threads(1)
        timing["timing_one_thread"] = in_turn(work, rounds)
    reference = values["naive"][1].float()
    result["loss"] = {name: loss.item() for name, (loss, _) in values.items()}
    result["gradient_from_naive"] = {
        name: ((grad.float() - reference).norm() / reference.norm()).item()
        for name, (_, grad) in values.items()
    }
    result |= timing
    result["peak_bytes"] = peaks
    result["peak_of_naive"] = peaks["ours"] / peaks["naive"]
    if ON_GPU:
        what = "forward_kl {n} x {vocabulary} x {d}".format(**SHAPE)
        result["goals"] = [
            goal(what, result["timing"]["ms"]["ours"], "ms", at_most=17),
            goal(f"peak of {what}", peaks["ours"] / 1e9, "GB", at_most=0.7),
        ]
    else:
        ratio = result["timing"]["over_ours"]["naive"]["median"]
        result["goals"] = [
            goal("forward KL on a CPU, over naive", ratio, "×", at_least=1.3),
            goal("its peak memory, of naive", result["peak_of_naive"], "×", at_most=0.15),
        ]
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20 if ON_GPU else 7)
    parser.add_argument("--out", help="the result's file (default: results/bench/kl_*.json)")
    parser.add_argument("--child", choices=LOSSES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
    else:
        result = main(arguments.rounds)
        print(json.dumps(result, indent=1))
        save(result, arguments.out or RESULTS / f"kl_{'gpu' if ON_GPU else 'cpu'}.json")
