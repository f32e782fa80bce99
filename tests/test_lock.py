"""One writer a folder, with real processes: refused, waited for, freed by a kill, and nothing left behind."""

import os
import signal
import subprocess
import sys

import pytest

from em.errors import UserError
from em.lock import FolderLock

HOLDER = """
import sys, time
from em.lock import FolderLock
lock = FolderLock(sys.argv[1], wait=len(sys.argv) > 2)
print("held", flush=True)
time.sleep(0 if len(sys.argv) > 2 else 60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / "run" for a minute."""
    line = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_folder_in_use_is_refused_by_one_line_that_names_process_and_option(holder, tmp_path):
    with pytest.raises(UserError) as error:
        FolderLock(tmp_path / "run", "--corpus")
    text = str(error.value)
    assert f"in use by process {holder.pid} on " in text and "choose another --corpus" in text
    assert "\n" not in text and len(text) < 400 and sys.executable in text
    FolderLock(tmp_path / "other").release()


def test_a_kill_frees_the_folder_and_the_next_holder_leaves_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert os.listdir(tmp_path / "run") == [".lock"]
    (tmp_path / "run" / "result").touch()
    with FolderLock(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == ["result"]


def test_who_waits_gets_the_folder_when_it_is_free_and_says_for_whom_it_waited(holder, tmp_path):
    line = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), "wait"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(line, **pipes) as second:
        assert f"waiting for process {holder.pid} on".encode() in second.stderr.readline()
        assert second.poll() is None
        holder.kill()
        assert second.wait(timeout=30) == 0 and second.stdout.read() == b"held\n"


def test_within_a_process_a_folder_is_held_until_its_last_lock_is_gone(tmp_path):
    def others_are_refused() -> bool:
        line = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
        return b"in use" in subprocess.run(line[:-1] + [str(tmp_path / "run")], capture_output=True).stderr

    first = FolderLock(tmp_path / "run")
    second = FolderLock(str(tmp_path) + "/elsewhere/../run")
    (tmp_path / "run" / "file").touch()
    del first
    assert others_are_refused()
    second.release()
    assert os.listdir(tmp_path / "run") == ["file"]


def test_a_folder_that_the_lock_made_and_nobody_filled_goes_with_it_and_an_older_one_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with FolderLock(tmp_path / name):
            assert (tmp_path / name / ".lock").exists()
    assert os.listdir(tmp_path) == ["mine"]


def test_many_processes_at_once_hold_it_one_after_another(tmp_path):
    code = """
import os, sys, time
from em.lock import FolderLock
for _ in range(5):
    with FolderLock(sys.argv[1], wait=True):
        os.mkdir(sys.argv[1] + "/busy")  # fails where another one is in here
        time.sleep(0.002)
        os.rmdir(sys.argv[1] + "/busy")
"""
    crowd = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in crowd] == [0] * 4
    assert not (tmp_path / "run" / ".lock").exists()
