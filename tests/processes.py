"""Scripts in processes of their own: started, waited for, killed and started again.

    child = start("train.py", "--cell", "med_advice", "--out", out)
    child.wait_for((out / "resume" / "state.safetensors").exists)
    child.stop(signal.SIGKILL)
    assert start("train.py", "--cell", "med_advice", "--out", out).wait() == 0

A child does what `python train.py …` does in the working directory and environment of the caller, but starts
in milliseconds: it is forked from a server that has imported torch and the scripts already. The server has
one thread, which is what makes the fork safe, and so has every child.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train.py", "distill.py", "evaluate.py", "synth.py")


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    preload = [__name__, "torch._dynamo", *(Path(name).stem for name in SCRIPTS)]  # AdamW needs the second
    context.set_forkserver_preload(preload)
    with pytest.MonkeyPatch.context() as patch:
        # Older Pythons look for what to preload elsewhere, and start without it where it is not found.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return context


def _run(path: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """What a child does: `python path arguments`, with stdout and stderr in the file `output`."""
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


class Child:
    """A script that runs; `output` is what it has printed so far."""

    def __init__(self, path: Path, arguments: list[str], environment: dict[str, str]):
        self._output = tempfile.NamedTemporaryFile()
        call = (str(path), arguments, environment, self._output.name)
        self._process = _server().Process(target=_run, args=call, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return Path(self._output.name).read_text()

    def wait(self, seconds: float = 180) -> int:
        """The exit status; a signal's number below zero."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.stop(signal.SIGKILL)
            pytest.fail(f"still running after {seconds} s:\n{self.output}")
        return self._process.exitcode

    def wait_for(self, sign: Callable[[], bool], seconds: float = 90) -> None:
        """Return once `sign()` is true; it is an error if the child ends before."""
        deadline = time.monotonic() + seconds
        while not sign():
            if self._process.exitcode is not None or time.monotonic() > deadline:
                self.stop(signal.SIGKILL)
                pytest.fail(f"ended, or waited for {seconds} s, without the sign:\n{self.output}")
            time.sleep(0.002)

    def stop(self, signum: int, seconds: float = 20) -> int:
        """Send the signal and return the exit status."""
        if self._process.exitcode is None:
            os.kill(self._process.pid, signum)
        return self.wait(seconds)


def start(script: str | Path, *arguments, **environment) -> Child:
    """`python script arguments` with more environment; a script's relative path is from the checkout."""
    return Child(ROOT / script, [str(a) for a in arguments], os.environ | environment)


def run_two(script: str | Path, *arguments) -> None:
    """What `torchrun --nproc-per-node 2 script arguments` starts, with its environment; both succeed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [start(script, *arguments, RANK=str(i), LOCAL_RANK=str(i), **shared) for i in range(2)]
    statuses = [child.wait() for child in ranks]
    assert statuses == [0, 0], "\n".join(child.output for child in ranks)
