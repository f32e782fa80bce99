"""The GPUs that a dry run can be asked about: what they have, and how much of it programs reach.

Sources of the first columns: NVIDIA's data sheets (H100 SXM5 80 GB, H200 SXM, A100 SXM4 80 GB, L40S) and the
Ada whitepaper (GeForce RTX 4090); dense bf16 with fp32 sums. Memory is what torch reports as a device's
total, below the number on the box. The reach columns are ours, from published figures of large products,
copies and FlashAttention-2 on these cards:

* products: an H100 or H200 loses a third of its peak to its power limit, an L40S a third to its 350 W; an
  A100 and an RTX 4090 run large products near their peak.
* copies: HBM gives 80–88 % of its rate, GDDR6 about as much.
* floor: from the start of one kernel to the start of the next, however small, launched from a full queue or
  from a CUDA graph.
"""

from typing import NamedTuple

from em.errors import UserError


class GPU(NamedTuple):
    name: str
    memory: float  # bytes
    flops: float  # bf16, a second
    bandwidth: float  # bytes a second
    cache: float  # bytes of L2
    products: float  # FLOP/s that large matrix products reach
    copies: float  # bytes/s that large copies reach
    attention: float  # FLOP/s that flash attention reaches
    floor: float  # seconds


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("h100", 85.0e9, 989e12, 3.35e12, 50e6, 680e12, 2.75e12, 350e12, 2.2e-6),
        GPU("h200", 150.1e9, 989e12, 4.80e12, 50e6, 680e12, 3.95e12, 350e12, 2.2e-6),
        GPU("a100", 85.0e9, 312e12, 2.04e12, 40e6, 255e12, 1.75e12, 190e12, 2.5e-6),
        GPU("l40s", 47.7e9, 362e12, 0.864e12, 96e6, 230e12, 0.73e12, 170e12, 2.0e-6),
        GPU("rtx4090", 25.3e9, 165e12, 1.008e12, 72e6, 150e12, 0.92e12, 135e12, 2.0e-6),
    )
}

CALL = 6e-6  # seconds that a host takes for one operator of eager PyTorch, its share of autograd included
CONTEXT = 1.0e9  # bytes of a CUDA process outside torch's allocator: context, modules, libraries' workspaces
SLACK = 0.03  # of what the allocator holds beyond what is in use, with expandable segments
GRAPH_NODE = 32e3  # bytes of a kernel in a captured CUDA graph
CAPTURE = 3  # times the host's work for a step, to capture it in a graph and to instantiate that
DISK = 2e9  # bytes/s of reading weights
START = 12.0  # seconds of importing, opening CUDA and reading rows
COMPILE = 40.0  # seconds of torch.compile for a GPT-2 and one shape


def gpu_of(name: str) -> GPU:
    """UserError for a name that is not in the table."""
    if name not in GPUS:
        raise UserError(f"--gpu {name}: the dry run knows {', '.join(GPUS)}")
    return GPUS[name]
