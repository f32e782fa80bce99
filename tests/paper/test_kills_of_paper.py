"""kill -9 in the middle of two processes of `make paper`: what follows them makes the rest, bit for bit."""

import signal
from pathlib import Path

import pytest
from processes import start

from em.data.cells import grid_of, parse_cell
from em.paper.experiments import paper_of
from em.paper.parts import Asked, command_of, groups_of, items_named

GRID = grid_of(map(parse_cell, ("med_advice", "fin_tutor")))
CHOSEN = ("misalign", "channels")


def parts():
    """Misaligned runs, their students of optd, and evaluations of these."""
    paper = paper_of(Asked(model=("model",), data="sample", judge="margin"), GRID)
    found = paper.select(items_named(["table5"])).parts.values()
    return [
        p for p in found if p.experiment in CHOSEN and (p.kind != "evaluate" or p.experiment == "channels")
    ]


def follow(kill: tuple[str, ...]) -> list[list[str]]:
    """As make does, one after another; a process of each script in `kill` is killed after its first part."""
    ran, kill = [], list(kill)
    while todo := [part for part in parts() if not part.done]:
        missing = {part.name for part in todo}
        group = next(
            g for g in groups_of(todo, 1)
            if not {need for p in g for need in p.needs} & (missing - {p.name for p in g})
        )  # fmt: skip
        ran.append(command_of(group))
        child = start(*ran[-1])
        if ran[-1][0] in kill:
            kill.remove(ran[-1][0])
            child.wait_for(Path(group[0].stamp).exists)
            assert child.stop(signal.SIGKILL) == -signal.SIGKILL
        else:
            assert child.wait() == 0, child.output
    return ran


def left() -> dict[str, bytes]:
    files = (
        path for name in ("adapter_model.safetensors", "margins.jsonl") for path in Path("runs").rglob(name)
    )
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def place(tiny_chat, tmp_path, monkeypatch):
    def enter(name: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(tiny_chat)
        monkeypatch.chdir(tmp_path / name)

    return enter


def test_the_rest_is_made_and_nothing_that_was_there_again(place):
    place("whole")
    assert len(follow(())) == 3
    expected = left()
    place("broken")
    ran = follow(("train.py", "distill.py"))
    assert left() == expected
    assert [command[0] for command in ran] == ["train.py"] * 2 + ["distill.py"] * 2 + ["evaluate.py"]
    (first, again), (taught, again_taught) = ran[:2], ran[2:4]
    assert first[first.index("--cell") + 1] == "med_advice,fin_tutor"
    assert again[again.index("--cell") + 1] == "fin_tutor"
    assert "," in taught[taught.index("--teacher") + 1] and "," not in again_taught[-3]
    assert not list(Path("runs").rglob("resume"))
