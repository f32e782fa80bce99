"""Cards are lent to one process at a time, until it ends however it ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from em.paper import card

ROOT = Path(__file__).parents[2]
# Holds a file named by its card while it runs; a second one on the card finds the file.
WORK = """
import os, pathlib, sys, time
mine = pathlib.Path(sys.argv[1]) / ("card" + os.environ["CUDA_VISIBLE_DEVICES"])
mine.touch(exist_ok=False)
time.sleep(0.1)
mine.unlink()
"""


def launch(folder: Path, cards: str, *command: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "em.paper.card", cards, "--", *command]
    return subprocess.Popen(words, cwd=ROOT, env={"TMPDIR": str(folder), "PATH": "/usr/bin:/bin"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_no_card_has_two_processes(tmp_path):
    children = [launch(tmp_path, "0,1", sys.executable, "-S", "-c", WORK, str(tmp_path)) for _ in range(6)]
    ends = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0] * 6, ends


def test_a_killed_process_gives_its_card_back(tmp_path):
    sleeper = launch(tmp_path, "7", "sleep", "60")
    lock = tmp_path / f"em-cards-{__import__('os').getuid()}" / "card-7" / ".lock"
    deadline = time.monotonic() + 30
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    waiter = launch(
        tmp_path, "7", sys.executable, "-S", "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        waiter.wait(0.5)
    sleeper.kill()
    assert waiter.communicate(timeout=30)[0] == "7\n"


@pytest.mark.parametrize("words", [[], ["0"], ["0", "--"], ["0,,1", "--", "true"], ["../x", "--", "true"]])
def test_what_is_no_list_of_cards_is_one_line(words, capsys):
    assert card.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_folder_that_takes_no_locks_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(card, "FOLDER", tmp_path / "file")
    assert card.main(["0", "--", "true"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
