"""Run folders: what was asked, what happened, and how to go on after a kill (one folder a run).

    .lock            while a process has the run open
    run.json         every resolved setting, versions, git commit, command, kind of run
    metrics.jsonl    one object a step
    resume/          the unfinished state: one safetensors file, replaced whole
    <results>        written last, so that their presence means the run is finished

One process at a time has a run open. Under torchrun rank 0 locks and writes, and the others read.
"""

import contextlib
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from em import parallel
from em.errors import UserError
from em.files import (
    Appender,
    read_json_lines,
    read_record,
    record_path,
    write_atomic,
    write_json,
    write_text,
)
from em.lock import NAME, FolderLock

# What others of a run were trained on. Older records leave it out: it follows from their other settings.
SAID_SINCE = {"on_train", "teacher_train", "source_train"}


@functools.cache
def _commit() -> str | None:
    """The checkout's commit, asked once a process; None where there is no git."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "") or None
    except OSError:
        return None


@functools.cache
def _cpu() -> str:
    """The processor's name and the vector instructions that torch uses of it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def provenance(device: torch.device | str = "cpu") -> dict:
    """Versions, git commit and machine class: what a figure needs beside it to be made again."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device)
        if on_gpu
        else f"cpu, {_cpu()}, {torch.get_num_threads()} threads",
    }


class Run:
    """A run folder opened for `settings`, and locked for as long as this object lives or its `with` lasts.

    A folder made under other settings is refused, and one that another process has open; with `wait`, that
    process is waited for. A `with` that fails before the run has made anything takes its folder away again.

    settings: everything that decides the outcome; JSON-able. Settings that do not (such as how often to
    print) stay out, so that changing them does not orphan a run.
    """

    def __init__(
        self, folder: str | Path, kind: str, settings: dict, device: torch.device | str = "cpu",
        option: str = "--out", wait: bool = False,
    ):  # fmt: skip
        self.folder, self.option, self._lock, self._metrics = Path(folder), option, None, None
        if parallel.rank() > 0:
            parallel.barrier()  # rank 0 makes the folder first
        elif self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; choose another {option}")
        else:
            self._lock = FolderLock(self.folder, option, wait)
        settings = json.loads(json.dumps(settings))  # tuples become lists, as they will be read back
        self._path = record_path(self.folder)
        self._new = not self._path.exists()
        if self._new:
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            self.config = {"kind": kind, "settings": settings, "command": command}
            self.config |= {"made_with": provenance(device)}
            write_json(self._path, self.config)
        else:
            self.config = read_record(self.folder)
            self._refuse_changes(kind, settings)
        if parallel.rank() == 0:
            parallel.barrier()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self._lock:
            if exception[0] and self._new and set(os.listdir(self.folder)) <= {NAME, self._path.name}:
                self._path.unlink()
            self._lock.release()

    def _refuse_changes(self, kind: str, settings: dict) -> None:
        if self.config["kind"] != kind:
            raise UserError(
                f"{self.folder} holds a {self.config['kind']!r}, not a {kind!r}; choose another {self.option}"
            )
        old = self.config["settings"]
        changed = [
            f"{key}: {old.get(key, '(unset)')} there, {settings.get(key, '(unset)')} now"
            for key in sorted(old.keys() | settings.keys() - (SAID_SINCE - old.keys()))
            if old.get(key, None) != settings.get(key, None)
        ]
        if changed:
            raise UserError(
                f"{self.folder} was made with other settings ({'; '.join(changed)}); choose another "
                f"{self.option}"
            )

    def pin(self, **digests: str) -> None:
        """Digests of what the run is made from, where that is there only now, such as a corpus.

        UserError where the run was begun from other ones.
        """
        before = self.config.get("made_from", {})
        if changed := [name for name, digest in digests.items() if before.get(name, digest) != digest]:
            raise UserError(
                f"{self.folder} was begun with another {changed[0]}, of which only the name is the same; "
                f"choose another {self.option}"
            )
        if digests.keys() - before.keys():
            self.config["made_from"] = before | digests
            if parallel.rank() == 0:
                write_json(self._path, self.config)

    # -- metrics ---------------------------------------------------------------------------------------

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def log(self, rows: list[dict]) -> None:
        """Append one line a row. A kill can cut the last line; `drop_metrics_after` takes it out again."""
        if parallel.rank() > 0:
            return
        if self._metrics is None:
            self._metrics = Appender(self.metrics_path)
        self._metrics.add(rows)

    def metrics(self) -> list[dict]:
        """The logged rows; a line that a kill cut short is left out."""
        if not self.metrics_path.exists():
            return []
        return [row for _, row in read_json_lines(self.metrics_path, {"step": int}, drop_cut=True)]

    def drop_metrics_after(self, step: int) -> None:
        """Forget the steps that a resumed run will do again."""
        if parallel.rank() == 0 and self.metrics_path.exists():
            self._metrics = None  # which would go on in the file before
            kept = [row for row in self.metrics() if row["step"] <= step]
            write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))

    # -- resuming --------------------------------------------------------------------------------------

    @property
    def resume_path(self) -> Path:
        return self.folder / "resume" / "state.safetensors"

    def save_resume(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Everything the next step depends on, in one file: trainable weights, moments, RNG, position.

        The data streams are pure functions of (seed, step), so `step` is their whole position.
        """
        if parallel.rank() > 0:
            return
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        write_atomic(self.resume_path, lambda path: save_file(tensors, path, metadata={"step": str(step)}))

    def load_resume(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Restore what `save_resume` wrote and return its step; 0 where there is nothing to resume.

        UserError for a state that is damaged or not this model's, before anything is restored.
        """
        if not self.resume_path.exists():
            return 0
        again = f"delete {self.resume_path.parent} to start this phase again"
        try:
            with safe_open(self.resume_path, framework="pt") as file:
                step = int((file.metadata() or {}).get("step", ""))
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{self.resume_path} cannot be read ({error}); {again}") from error
        if step < 0 or (name := _misfit(tensors, model, optimizer)):
            what = f"step {step}" if step < 0 else name
            raise UserError(f"{self.resume_path} does not fit this model ({what}); {again}")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[f"model.{name}"])
        state: dict[int, dict] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["rng.cpu"])
        if "rng.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng.cuda"])
        return step

    def clear_resume(self) -> None:
        """The run is finished: its state is in its results."""
        if parallel.rank() == 0 and self.resume_path.parent.exists():
            shutil.rmtree(self.resume_path.parent)


def _misfit(tensors: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """The name of a tensor of a resume state that this model and its AdamW would not have written, or None.

    Sizes have to be equal: a copy would broadcast a smaller tensor without a word.
    """

    def form(tensor) -> tuple:
        return tuple(tensor.shape), tensor.dtype

    found = {name: form(tensor) for name, tensor in tensors.items()}
    needed = {f"model.{name}": form(p) for name, p in model.named_parameters() if p.requires_grad}
    needed["rng.cpu"] = form(torch.get_rng_state())
    if not torch.cuda.is_available():
        found.pop("rng.cuda", None)  # written beside a GPU, and of no use here
    elif "rng.cuda" in found:
        needed["rng.cuda"] = form(torch.cuda.get_rng_state())
    if any(name.startswith("optimizer.") for name in found):  # a state of step 0 has no moments
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, p in enumerate(parameters):
            needed[f"optimizer.{index}.step"] = ((), torch.float32)
            needed |= {f"optimizer.{index}.{key}": form(p) for key in ("exp_avg", "exp_avg_sq")}
    return min((name for name, _ in found.items() ^ needed.items()), default=None)
