"""One writer a folder: an advisory lock that ends with its process, however that ends.

    lock = FolderLock("runs/x")                   # UserError naming the process that holds it
    with FolderLock("runs/corpus", wait=True): …  # made once; who comes second waits, saying so

The lock is `flock` on `<folder>/.lock`, which names its holder. A killed process leaves the file and not the
lock. Where the file system cannot lock, a folder goes unguarded and a note says so.
"""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import sys
import time
import weakref
from pathlib import Path

from em.errors import UserError

NAME = ".lock"
_held: dict[str, int] = {}  # folder → how often this process has it: a lock is no guard against itself


class FolderLock:
    """Held until the object is gone, its `with` is left, or the process ends."""

    def __init__(self, folder: str | Path, option: str = "--out", wait: bool = False):
        """option: what the user may name another folder by. wait: for as long as another process has it."""
        key = os.path.realpath(folder)
        file = None if _held.get(key) else _acquire(Path(folder), option, wait)
        _held[key] = _held.get(key, 0) + 1
        self.release = weakref.finalize(self, _release, key, Path(folder), file)  # at exit too

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()


def _acquire(folder: Path, option: str, wait: bool):
    """The open lock file; None where the file system has no locks."""
    path, told = folder / NAME, False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another {option}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            if not wait:
                raise UserError(f"{folder} is in use by {holder}; wait or choose another {option}") from None
            if not told:
                print(f"waiting for {holder}, which writes {folder}", file=sys.stderr)
            told = True
            time.sleep(0.2)
            continue
        except OSError as error:
            file.close()
            print(
                f"note: {folder} cannot be locked ({error.strerror}); let one process use it", file=sys.stderr
            )
            return None
        if _same_file(file, path):
            break
        file.close()  # its last holder has removed it between our two calls
    file.truncate(0)
    command = shlex.join(getattr(sys, "orig_argv", sys.argv))
    file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "command": command}))
    file.flush()
    return file


def _release(key: str, folder: Path, file) -> None:
    """One user less; the last one gives the folder free and leaves nothing in it."""
    _held[key] -= 1
    if _held[key]:
        return
    del _held[key]
    if file is not None:
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
        file.close()


def _same_file(file, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file) -> str:
    """Process, machine and command of the lock's holder, as it wrote them."""
    try:
        file.seek(0)
        said = json.loads(file.read())
        return f"process {said['pid']} on {said['host']} ({said['command'][:200]})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
