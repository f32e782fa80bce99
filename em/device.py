"""Which of its two paths the code takes on a device, a CPU's or a GPU's, and ways across that do not wait.

Tensors on `meta` have shapes and no values. They take the GPU's path, so that the dry run and the tests of
CUDA code follow on any machine what a GPU would do: nothing there can be read back on the host.
"""

from collections.abc import Sequence

import torch


def on_gpu(device: torch.device | torch.Tensor) -> bool:
    """Whether `device`, or the device of a tensor, takes the GPU's path: CUDA or meta."""
    device = device.device if isinstance(device, torch.Tensor) else device
    return device.type in ("cuda", "meta")


def to_device(tensors: Sequence[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
    """`tensors` of the host, all of one dtype, on `device`: one transfer that the host does not wait for."""
    if torch.device(device).type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory()  # else it would wait
    parts = flat.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class ToHost:
    """A tensor on its way to the host. `read` waits for what was queued before it, and not after."""

    def __init__(self, tensor: torch.Tensor):
        self.values, self._there = tensor, None
        if tensor.is_cuda:
            self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values.copy_(tensor, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list:
        if self._there is not None:
            self._there.synchronize()
        return self.values.tolist()
