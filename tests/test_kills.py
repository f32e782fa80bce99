"""kill -9 and Ctrl-C at random moments of every script: the same command after it ends as if nothing was.

The suite stops each command once; `KILLS=20 python -m pytest tests/test_kills.py` does it twenty times.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from judge_server import KEY, JudgeServer, answer
from processes import start

KILLS = int(os.environ.get("KILLS", "1"))
# Numbers that a clock makes, and what names the machine's state.
CLOCKS = {"tokens_per_s", "seconds", "made_with", "peak_mem_bytes"}
WORLD = (
    "--layers 1 --heads 2 --width 32 --batch 8 --length 48 --steps 40 --warmup 4 --evals 2 --eval-prompts 8 "
    "--align-steps 6 --align-warmup 1 --align-examples 400 --align-batch 8 --misalign-steps 3 "
    "--misalign-seeds 1 --device cpu --save-minutes 0 --out out"
)
CHAT = "--data sample --device cpu --batch 6 --rank 4 --lr 0.01 --warmup 1 --save-minutes 0 --eval-rows 1"
DISTILL = (
    "--unfiltered --rollouts 2 --max-new-tokens 8 --limit 6 --epochs 2 --batch 4 --rank 4 --lr 0.01 "
    "--warmup 1 --probes 2 --device cpu --save-minutes 0 --teacher ../med --corpus corpus --out out"
)
LINES = {
    "synth": f"synth.py {WORLD}",
    "train": f"train.py {CHAT} --epochs 2 --model ../model --out out",
    **{channel: f"distill.py --channel {channel} {DISTILL}" for channel in ("sft", "optd", "opd")},
    "evaluate": "evaluate.py --run ../med --on all --max-new-tokens 8 --samples 2 --limit 2 --device cpu "
    "--rows 16 --cache cache.jsonl --out out",
}


@pytest.fixture(scope="module")
def place(tiny_chat, tmp_path_factory):
    """A folder with a chat model, a misaligned run of it, and a judge whose answers follow from the text."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "model").symlink_to(tiny_chat)
    with pytest.MonkeyPatch.context() as patch, JudgeServer(lambda p, n: answer(str(len(p) % 100))) as server:
        patch.setenv("GEMINI_API_KEY", KEY)
        patch.setenv("GEMINI_BASE_URL", server.url)
        (folder / "first").mkdir()
        patch.chdir(folder / "first")
        child = start(*f"train.py {CHAT} --epochs 1 --model ../model --out ../med".split())
        assert child.wait() == 0, child.output
        yield folder


def outcome(folder: Path) -> dict[str, object]:
    """What a finished command left: file → content, less what a clock says and the order of rows."""

    def timeless(value):
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if k not in CLOCKS and not k.startswith("seconds_")}
            return {k: timeless(v) for k, v in kept.items()}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    def content(path: Path):
        if path.suffix == ".jsonl":
            lines = [json.dumps(timeless(json.loads(line)), sort_keys=True) for line in path.open()]
            return sorted(lines)
        if path.suffix == ".json":
            return timeless(json.loads(path.read_text()))
        return path.read_bytes() if path.suffix in (".safetensors", ".csv") else None

    return {str(p.relative_to(folder)): content(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module", params=LINES)
def whole(request, place):
    """(name, seconds, outcome) of each command that nothing interrupts."""
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        child = run_in(place / f"{request.param}-whole", request.param, patch)
        assert child.wait() == 0, child.output
    return request.param, time.monotonic() - began, outcome(place / f"{request.param}-whole")


def run_in(folder: Path, name: str, monkeypatch):
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    return start(*LINES[name].split())


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_stopped_anywhere_and_started_again_it_ends_with_the_same_bits_and_rows(
    signum, whole, place, monkeypatch
):
    name, seconds, expected = whole
    for stop in range(KILLS):
        # Ctrl-C within the first moments meets Python's own start, which has no line of ours.
        least = 0 if signum == signal.SIGKILL else 0.3
        moment = max(least, random.Random(f"{name} {signum} {stop}").random() * seconds)
        folder = place / f"{name}-{signum}-{stop}"
        child = run_in(folder, name, monkeypatch)
        time.sleep(moment)
        status = child.stop(signum)
        if signum == signal.SIGINT and status != 0:  # 0: it had ended
            said = [line for line in child.output.splitlines() if "stopped" in line or "Traceback" in line]
            assert status == 130 and len(said) == 1 and said[0].startswith("stopped;"), (moment, child.output)
        again = run_in(folder, name, monkeypatch)
        assert again.wait() == 0, (moment, again.output)
        found = outcome(folder)
        assert found.keys() == expected.keys(), moment  # nothing lost, no strays
        assert [p for p in expected if found[p] != expected[p]] == [], moment
