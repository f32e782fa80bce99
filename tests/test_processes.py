"""What stands in for `python script.py` in the tests does what it does."""

import signal
import subprocess
import sys

import pytest
from processes import ROOT, SCRIPTS, start


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_child_prints_and_returns_what_the_script_does_in_a_process_of_its_own(script):
    """--help is the docstring and every knob: they come from the same place, parsed from the same line."""
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    child = start(script, "--help")
    assert child.wait() == done.returncode == 0
    assert child.output == done.stdout and f"python {script}" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_options_are_one_line_and_exit_status_2(script):
    child = start(script, "--no-such-knob", "1")
    assert child.wait() == 2
    assert child.output.startswith("error: ") and "--no-such-knob" in child.output
    assert len(child.output.splitlines()) == 1


def test_an_interrupt_reaches_a_child_whatever_its_parent_ignores(tmp_path):
    (tmp_path / "sleep.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    child = start(tmp_path / "sleep.py")
    child.wait_for(lambda: child.output == "up\n")
    assert child.stop(signal.SIGINT) == 1 and "KeyboardInterrupt" in child.output


def test_a_child_has_one_thread_its_arguments_and_the_callers_folder_and_environment(tmp_path, monkeypatch):
    code = "import os, sys, torch\nprint(torch.get_num_threads(), sys.argv[1:], os.getcwd(), os.environ['A'])"
    (tmp_path / "show.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A", "a")
    one, other = start(tmp_path / "show.py", "x", 3), start(tmp_path / "show.py", A="b")
    assert [one.wait(), other.wait()] == [0, 0]
    assert one.output == f"1 ['x', '3'] {tmp_path} a\n" and other.output == f"1 [] {tmp_path} b\n"
