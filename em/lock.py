"""One writer a folder: an advisory lock that ends with its process, however that ends.

    lock = FolderLock("runs/x")                   # UserError naming the process that holds it
    with FolderLock("runs/corpus", wait=True): …  # made once; who comes second waits, saying so

The lock is `flock` on `<folder>/.lock`, which names its holder. A killed process leaves the file and not the
lock. A folder that the lock made and that is still empty at its end is removed. Where the file system cannot
lock, a folder goes unguarded and a note says so.
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
SILENT = 1.0  # seconds of waiting that are not worth a line
_held: dict[str, int] = {}  # folder → how often this process has it: a lock is no guard against itself
_files: dict[str, tuple] = {}  # folder → (its open lock file, path, whether the lock made the folder)


class FolderLock:
    """Held until the object is gone, its `with` is left, or the process ends."""

    def __init__(self, folder: str | Path, option: str = "--out", wait: bool = False):
        """option: what the user may name another folder by. wait: for as long as another process has it."""
        key = os.path.realpath(folder)
        file, made = (None, False) if _held.get(key) else _acquire(Path(folder), option, wait)
        self._key, _held[key] = key, _held.get(key, 0) + 1
        if file is not None:
            _files[key] = file, Path(key), made
        self.release = weakref.finalize(self, _release, key)  # at exit too

    def hand_over(self) -> None:
        """Leave the lock to the program that this process becomes by exec, and to what that starts."""
        file, _, _ = _files.get(self._key, (None, None, False))
        if file is not None:
            os.set_inheritable(file.fileno(), True)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()


def _acquire(folder: Path, option: str, wait: bool):
    """(the open lock file or None where the file system has no locks, whether the folder is new)."""
    path, began, told = folder / NAME, time.monotonic(), False
    while True:
        made = not os.path.exists(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab+", buffering=0)
        except FileNotFoundError:
            continue  # its last holder has removed the folder between our two calls
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another {option}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            if not wait:
                raise UserError(f"{folder} is in use by {holder}; wait or choose another {option}") from None
            if not told and time.monotonic() - began > SILENT:
                print(f"waiting for {holder}, which writes {folder}", file=sys.stderr)
                told = True
            time.sleep(0.2)
            continue
        except OSError as error:
            file.close()
            print(
                f"note: {folder} cannot be locked ({error.strerror}); let one process use it", file=sys.stderr
            )
            return None, False
        if _same_file(file, path):
            break
        file.close()  # its last holder has removed it between our two calls
    command = shlex.join(getattr(sys, "orig_argv", sys.argv))
    about = {"pid": os.getpid(), "host": platform.node(), "command": command}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its holder's name
        file.truncate(0)
        file.write(json.dumps(about).encode())
    return file, made


def _release(key: str) -> None:
    """One user less; the last one gives the folder free and leaves nothing of the lock in it."""
    _held[key] -= 1
    if _held[key]:
        return
    del _held[key]
    file, folder, made = _files.pop(key, (None, None, False))
    if file is not None:
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
            if made:
                folder.rmdir()  # unless there is something in it
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
        about = json.loads(file.read())
        command = " ".join(about["command"].split())[:200]
        return f"process {about['pid']} on {about['host']} ({command})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "another process"
