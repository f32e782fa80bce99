"""Batches prepared ahead on another thread, so that the device never waits for the generator."""

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch


def prefetch(
    batch_at: Callable[[int], tuple[np.ndarray, ...]],
    start: int,
    stop: int,
    device: torch.device,
    ahead: int = 8,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield `batch_at(i)` for i in [start, stop) as tensors on `device`, up to `ahead` batches early.

    An exception in the thread is raised here; leaving the loop early stops the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=ahead)
    leave = threading.Event()
    on_gpu = device.type == "cuda"

    def put(item) -> None:
        while not leave.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for i in range(start, stop):
                tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in batch_at(i)]
                if on_gpu:  # pinned, so that the copy below overlaps the running step
                    tensors = [t.pin_memory() for t in tensors]
                put(tensors)
                if leave.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield tuple(t.to(device, non_blocking=True) for t in item)
    finally:
        leave.set()
        thread.join()
