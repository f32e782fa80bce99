"""Which of its two paths the code takes on a device: a CPU's, or a GPU's.

Tensors on `meta` have shapes and no values. They take the GPU's path, so that the dry run and the tests of
CUDA code follow on any machine what a GPU would do: nothing there can be read back on the host.
"""

import torch


def on_gpu(device: torch.device | torch.Tensor) -> bool:
    """Whether `device`, or the device of a tensor, takes the GPU's path: CUDA or meta."""
    device = device.device if isinstance(device, torch.Tensor) else device
    return device.type in ("cuda", "meta")
