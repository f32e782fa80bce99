"""Bad values for every knob of every script, from its declaration: one line, exit status 2, no folder."""

import dataclasses
import importlib
import typing

import pytest

from em.cli import command_line

SCRIPTS = ("train", "distill", "evaluate", "synth")


def _knobs():
    for script in SCRIPTS:
        commands = importlib.import_module(script).COMMANDS
        for command, (_, config) in commands.items():
            hints = typing.get_type_hints(config)
            for field in dataclasses.fields(config):
                if "help" in field.metadata:
                    kinds = {a for a in (hints[field.name], *typing.get_args(hints[field.name]))}
                    kinds |= {b for a in kinds for b in typing.get_args(a)}
                    yield script, command, field, kinds


KNOBS = list(_knobs())
NAMES = [f"{script}-{command}-{field.name}" for script, command, field, _ in KNOBS]


def bad_values(field, kinds) -> list[str]:
    """Texts that cannot be a value of the knob."""
    bounds = field.metadata["bounds"]
    values = ["", " "]
    if field.metadata["choices"]:
        values += ["no-such-choice"]
    if bool in kinds:
        return ["perhaps"]
    if float in kinds or int in kinds:
        values += ["many", "nan", "inf", "-inf", "1e999", "None"]
        if int in kinds:
            values += ["1.5", str(2**31), "9" * 400]
        nudge = 1 if int in kinds else 1e-9
        values += [repr(bounds["above"])] if "above" in bounds else []
        values += [repr(bounds["below"])] if "below" in bounds else []
        values += [repr(bounds["at least"] - nudge), "-7"] if "at least" in bounds else []
        values += [repr(bounds["at most"] + nudge)] if "at most" in bounds else []
    elif str in kinds:
        values += ["a\0b", "half a pair \ud800"]
    if tuple in map(typing.get_origin, kinds):
        values += [",", ", ,"]
    return values


@pytest.mark.parametrize("script, command, field, kinds", KNOBS, ids=NAMES)
def test_a_bad_value_is_one_line_and_leaves_no_folder(
    script, command, field, kinds, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    for value in bad_values(field, kinds):
        option = f"--{field.name.replace('_', '-')}={value}"
        argv = [*([command] if command else []), option]
        assert command_line(module.COMMANDS, module.__doc__, argv) == 2, option
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1, option
        assert f"--{field.name.replace('_', '-')}" in said.err, (option, said.err)
        assert list(tmp_path.iterdir()) == [], option


@pytest.mark.parametrize("script, command, field, kinds", KNOBS, ids=NAMES)
def test_every_number_says_where_it_ends(script, command, field, kinds):
    """A number without a lower bound is one that nobody thought about; its default lies inside."""
    if not {int, float} & kinds:
        return
    bounds = field.metadata["bounds"]
    assert "at least" in bounds or "above" in bounds
    default = field.default if isinstance(field.default, tuple) else (field.default,)
    for value in default:
        if value is not None:
            assert value > bounds.get("above", float("-inf")) and value >= bounds.get(
                "at least", float("-inf")
            )
            assert value < bounds.get("below", float("inf")) and value <= bounds.get("at most", float("inf"))
