"""Data parallelism under torchrun: each process takes its rows of the batch, gradients are summed.

Losses are normalised by the counts of the whole batch before the sum, so that the update is that of one
process on the same batch, up to the order of additions.
"""

import os
import re

import torch
import torch.distributed as dist

from em.errors import UserError


def start(device: str = "auto") -> torch.device:
    """The device of this process; joins the process group where torchrun started several.

    device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`. UserError for another one, and for a GPU
    that is not here.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise UserError(f"--device {device!r} is not one of auto, cpu, cuda, cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device here; use --device cpu")
    if ":" in device and int(device.split(":")[1]) >= torch.cuda.device_count():
        raise UserError(
            f"--device {device}: there are {torch.cuda.device_count()} CUDA devices here, from cuda:0"
        )
    if "LOCAL_RANK" in os.environ:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    resolved = torch.device(device)
    if resolved.type == "cuda":
        _set_up_cuda(resolved)
    return resolved


def _set_up_cuda(device: torch.device) -> None:
    """The settings of a process that uses CUDA, before its first allocation there."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # Lengths differ from step to step: blocks of fixed size would leave gaps that nothing fits.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan for every new shape


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every process: what rank 0 wrote before is there after."""
    if dist.is_initialized():
        dist.barrier()


def sum_(tensors: list[torch.Tensor]) -> None:
    """Sum each tensor over the processes, in place, with one message."""
    if size() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
