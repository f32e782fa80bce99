"""Dataclass in, command line out: every knob of a script is a field of its `Config`.

    @dataclass
    class Config:
        steps: int = knob(3000, "optimiser steps", group="alignment")

    if __name__ == "__main__":
        sys.exit(command_line({"": (main, Config)}, __doc__))

`--steps 10` and `--steps=10` set a field, `--flag` alone sets a bool to true, `a,b,c` or `a b c` fills a
tuple. An unknown key, a value of the wrong type or a failing `main` is one line on stderr and exit status 2.
"""

import argparse
import dataclasses
import itertools
import math
import operator
import os
import sys
import time
import types
import typing

from em.errors import UserError


def knob(
    default, help: str, group: str = "settings", choices: tuple | None = None, setting: bool = True, *,
    above: float | None = None, at_least: float | None = None, below: float | None = None,
    at_most: float | None = None,
):  # fmt: skip
    """A dataclass field with one line of help.

    choices, or for numbers the bounds: what the command line accepts. Every number is finite, and whole ones
    fit in 31 bits.
    setting: whether the knob decides a run's outcome, so that another value needs another run folder.
    """
    metadata = {"help": help, "group": group, "choices": choices, "setting": setting}
    bounds = {"above": above, "at least": at_least, "below": below, "at most": at_most}
    metadata["bounds"] = {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata=metadata)


def outcome_settings(cfg) -> dict:
    """The values of the knobs that decide the outcome of a run."""
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.metadata.get("setting")}


def banner(cfg) -> str:
    """Every resolved value on one line."""
    return "  " + "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items())


_KEEPS = {"above": operator.gt, "at least": operator.ge, "below": operator.lt, "at most": operator.le}


def _refuse(name: str, value, bounds: dict[str, float]) -> None:
    """UserError where a value from the command line cannot be one of this knob's."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, tuple):
        if not value:
            raise UserError(f"{option} needs a value")
        for element in value:
            _refuse(name, element, bounds)
    elif isinstance(value, str):
        if not value.strip():
            raise UserError(f"{option} needs a value")
        if "\0" in value or any(0xD800 <= ord(c) < 0xE000 for c in value):
            raise UserError(f"{option} {ascii(value)} is no text")
    elif not isinstance(value, bool):
        bounds = {"at most": 2**31 - 1} | bounds if isinstance(value, int) else bounds
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{option} must be a finite number, not {value}")
        for relation, bound in bounds.items():
            if not _KEEPS[relation](value, bound):
                raise UserError(f"{option} must be {relation} {bound}, not {str(value):.40}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists every setting)")


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _converter(annotation, choices: tuple | None = None):
    """A function from command-line text to a value of the annotated type. choices: of a tuple's elements."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):  # `int | None`: the text is the int
        return _converter(next(a for a in arguments if a is not type(None)))
    if origin is tuple:  # `tuple[str, ...]`
        element = _converter(arguments[0])

        def convert(text: str) -> tuple:
            values = tuple(element(part.strip()) for part in text.split(",") if part.strip())
            for value in values:
                if choices and value not in choices:
                    known = ", ".join(map(repr, choices))  # as argparse has it
                    raise argparse.ArgumentTypeError(f"invalid choice: {value!r} (choose from {known})")
            return values

        convert.__name__ = f"comma-separated {element.__name__}"
        return convert
    return _boolean if annotation is bool else annotation


def _is_tuple(annotation) -> bool:
    return any(typing.get_origin(a) is tuple for a in (annotation, *typing.get_args(annotation)))


def parse(config_class, argv: list[str], description: str = ""):
    """`argv` (without the program's name) as an instance of the dataclass `config_class`.

    Raises UserError on an unknown key or a value that does not fit; `--help` prints and exits with 0.
    """
    parser = _Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    groups = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if "help" not in field.metadata:
            continue  # what a script fills in itself
        name, help, choices = field.metadata["group"], field.metadata["help"], field.metadata["choices"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        shape = None if choices else field.name.split("_")[-1].upper()
        options = {"nargs": "?", "const": True} if hints[field.name] is bool else {}
        if _is_tuple(hints[field.name]):
            options = {"nargs": "+", "action": "extend"}
            shape = "{" + ",".join(choices) + "}" if choices else shape
        flags = [f"--{field.name.replace('_', '-')}"]
        if "_" in field.name:
            flags.append(f"--{field.name}")
        groups[name].add_argument(
            *flags,
            dest=field.name,
            type=_converter(hints[field.name], choices),
            default=argparse.SUPPRESS,
            choices=None if _is_tuple(hints[field.name]) else choices,
            metavar=shape,
            help=(help + ("" if shown in (None, "") else f" (default: {shown})")).replace("%", "%%"),
            **options,
        )
    given = vars(parser.parse_args(argv))
    bounds = {field.name: field.metadata.get("bounds", {}) for field in dataclasses.fields(config_class)}
    for name, value in given.items():
        if _is_tuple(hints[name]):  # one tuple a word
            given[name] = tuple(itertools.chain.from_iterable(value))
        _refuse(name, given[name], bounds[name])
    return config_class(**given)


def command_line(commands: dict[str, tuple], description: str = "", argv: list[str] | None = None) -> int:
    """Run `program [command] --key value …`; returns the exit status.

    commands: name → (function, its dataclass); the name `""` is what runs when no command is given.
    """
    argv = sys.argv[1:] if argv is None else argv
    named = argv and not argv[0].startswith("-")
    try:
        if named and argv[0] not in commands:
            known = ", ".join(name for name in commands if name) or "none"
            raise UserError(
                f"unknown command {argv[0]!r} (there is: {known}; settings are written --key value)"
            )
        function, config_class = commands[argv[0] if named else ""]
        function(parse(config_class, argv[1:] if named else argv, description))
    except UserError as error:
        return _end(str(error))
    except OSError as error:  # the machine's: a full disk, a name too long, no permission
        place = f"{error.filename}: " if error.filename else ""
        return _end(f"{place}{error.strerror or error}")
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last saved state", file=sys.stderr)
        return 130
    except RuntimeError:  # such as a connection that another process has closed
        _leave_it_to_rank_0()
        raise
    return 0


def _end(message: str) -> int:
    """Say in one line why the program ends."""
    _leave_it_to_rank_0()
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"rank {rank}: "
    print(f"error: {where}" + " ".join(message.split()), file=sys.stderr)
    return 2


def _leave_it_to_rank_0() -> None:
    """Under torchrun, which ends the other processes at once where one has failed, rank 0 speaks for all."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(2)
