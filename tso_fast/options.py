"""Configuration dataclasses from YAML and ``--key value``, with errors that name the key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import jsonargparse
import yaml

from tso_fast.config import CellConfig, check
from tso_fast.errors import InputError, did_you_mean

T = TypeVar("T")

BUILT_IN = ("config", "help", "print_config")


def is_given(arguments: Sequence[str], *names: str) -> bool:
    """Whether one of these options is among the arguments; a leading file name is ``config``."""
    given = {re.split(r"[=.+]", a[2:])[0] for a in arguments if a.startswith("--")}
    given |= {"help"} if "-h" in arguments else set()
    given |= {"config"} if arguments and not arguments[0].startswith("-") else set()
    return bool(given & set(names))


def parse(command: str, cls: type[T], arguments: Sequence[str]) -> T:
    """The configuration of a command; ``--help`` and ``--print_config`` print and exit.

    Raises:
        InputError: an unknown key, with the nearest known one, or a value that does not fit.
    """
    arguments = list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--config")
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for i, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            _check_known(re.split(r"[.+]", name)[0], [*known, *BUILT_IN], "")
            if name == "config":
                _check_file(Path(value or "".join(arguments[i + 1 : i + 2])), known)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=f"tso-fast {command}", description=cls.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of these settings.")
    parser.add_class_arguments(cls, as_group=False)
    try:
        values = parser.instantiate_classes(parser.parse_args(_join_booleans(cls, arguments)))
    except jsonargparse.ArgumentError as error:
        raise InputError(_plain(str(error), command)) from error
    config = cls(**{name: getattr(values, name) for name in known})
    check(config)
    return config


def _join_booleans(cls: type, arguments: list[str]) -> list[str]:
    """``--compare`` alone means ``--compare=true``."""
    switches = {f"--{f.name}" for f in dataclasses.fields(cls) if f.type in ("bool", bool)}
    out = []
    for i, argument in enumerate(arguments):
        is_last = i + 1 == len(arguments) or arguments[i + 1].startswith("--")
        out.append(f"{argument}=true" if argument in switches and is_last else argument)
    return out


def _check_known(name: str, known: Iterable[str], place: str) -> None:
    if name not in known:
        raise InputError(f"{place}unknown key {name!r}{did_you_mean(name, known)}")


def _check_file(path: Path, known: Sequence[str]) -> None:
    if not path.is_file():
        raise InputError(f"config: {str(path)!r} is no file; expected YAML")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: broken YAML: {error}") from error
    if content is None:
        return
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values, got a {type(content).__name__}")
    lines = path.read_text(encoding="utf-8").splitlines()
    for key in content:
        line = next((i for i, text in enumerate(lines, 1) if text.startswith(f"{key}")), 1)
        _check_known(str(key), known, f"{path}:{line}: ")
    cells = content.get("cells")
    for i, cell in enumerate(cells if isinstance(cells, list) else []):
        for key in cell if isinstance(cell, dict) else ():
            _check_known(str(key), [f.name for f in dataclasses.fields(CellConfig)], f"{path}: cells[{i}]: ")


def _plain(message: str, command: str) -> str:
    """jsonargparse's message in our words."""
    message = re.sub(r'^Parser key "([^"]+)":\s*', r"\1: ", message.strip())
    message = re.sub(
        r'Key "([^"]+)" is required.*', rf"\1: missing; see tso-fast {command} --help", message, flags=re.S
    )
    return re.sub(r"\s*\n\s*", " ", message).replace("<class '", "").replace("'>", "")
