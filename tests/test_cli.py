from dataclasses import dataclass

import pytest

from em.cli import command_line, knob, parse
from em.errors import UserError


@dataclass
class Config:
    steps: int = knob(10, "optimiser steps", "training")
    lr: float | None = knob(None, "peak rate", "training")
    tasks: tuple[str, ...] = knob(("T0",), "tasks", "what")
    seeds: tuple[int, ...] = knob((), "seeds", "what")
    world: str = knob("demo", "which 100 % world", "what", ("1", "demo"))
    micro_batch: int = knob(1, "rows at once", "training")
    fast: bool = knob(False, "skip things", "what")


def test_defaults_stand_where_nothing_is_said():
    assert parse(Config, []) == Config()


def test_every_kind_of_value_is_read():
    said = "--steps 3 --lr=1e-4 --tasks T1,T2 --seeds 1,2,3 --world 1 --micro-batch 8 --fast".split()
    expected = Config(3, 1e-4, ("T1", "T2"), (1, 2, 3), "1", 8, True)
    assert parse(Config, said) == expected
    assert parse(Config, "--tasks T1 T2,T3 --steps 3".split()) == Config(3, tasks=("T1", "T2", "T3"))
    assert parse(Config, ["--micro_batch", "8", "--fast", "false"]) == Config(micro_batch=8)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--stepz", "3"], "--stepz"),
        (["--step", "3"], "--step"),  # no abbreviations: a new knob must not change what an old command means
        (["--steps", "many"], "many"),
        (["--world", "9"], "invalid choice: '9'"),
        (["--seeds", "1,b"], "seeds"),
        (["--fast", "perhaps"], "perhaps"),
        (["stray"], "stray"),
    ],
)
def test_what_does_not_fit_is_a_one_line_user_error(argv, says):
    with pytest.raises(UserError) as error:
        parse(Config, argv)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_help_lists_every_knob_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"], "What this does.")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "What this does." in text
    for word in (
        "--steps",
        "(default: 10)",
        "--micro-batch",
        "{1,demo}",
        "100 % world",
        "training:",
        "what:",
    ):
        assert word in text


def test_status_is_0_when_done_2_with_one_line_for_a_user_error_and_130_when_interrupted(capsys):
    def fail(cfg):
        raise UserError("the disk is full; free some space")

    def stop(cfg):
        raise KeyboardInterrupt

    commands = {"": (lambda cfg: None, Config), "fail": (fail, Config), "stop": (stop, Config)}
    assert command_line(commands, argv=["--steps", "3"]) == 0
    assert command_line(commands, argv=["fail"]) == 2
    assert capsys.readouterr().err == "error: the disk is full; free some space\n"
    assert command_line(commands, argv=["stop"]) == 130
    assert command_line(commands, argv=["--nonsense", "3"]) == 2
    assert command_line(commands, argv=["unheard-of"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: unknown command 'unheard-of'")


def test_an_error_in_the_code_itself_is_not_hidden():
    def broken(cfg):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command_line({"": (broken, Config)}, argv=[])


def test_under_torchrun_another_rank_waits_for_rank_0_to_say_what_is_wrong(capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("em.cli.time.sleep", waited.append)  # torchrun would end the process meanwhile

    def refuse(cfg):
        raise UserError("no such run")

    def cut_off(cfg):
        raise RuntimeError("Connection closed by peer")

    commands = {"refuse": (refuse, Config), "cut": (cut_off, Config)}
    assert command_line(commands, argv=["refuse"]) == 2 and not waited
    assert capsys.readouterr().err == "error: no such run\n"
    monkeypatch.setenv("RANK", "1")
    assert command_line(commands, argv=["refuse"]) == 2 and waited == [2]
    assert capsys.readouterr().err == "error: rank 1: no such run\n"
    with pytest.raises(RuntimeError):  # its own trouble keeps its traceback
        command_line(commands, argv=["cut"])
    assert waited == [2, 2]
