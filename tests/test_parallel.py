"""The settings of a process that uses CUDA, without one."""

import os

import pytest
import torch

from em import parallel


@pytest.fixture
def start(monkeypatch):
    """start(): `parallel.start` where there seems to be a CUDA device; the settings go back afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    yield parallel.start
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.set_float32_matmul_precision(before[1])


def test_cuda_attends_without_cudnn_and_its_memory_has_segments_that_grow(start):
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert start() == torch.device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_own_settings_of_the_allocator_stay(start, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    start("cuda:0")
    assert {key: value for key, value in os.environ.items() if key.endswith("ALLOC_CONF")} == {
        name: "max_split_size_mb:64"
    }


def test_on_a_cpu_nothing_is_set(start):
    start("cpu")
    assert not [key for key in os.environ if key.endswith("ALLOC_CONF")]
