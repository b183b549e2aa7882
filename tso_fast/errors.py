"""Errors meant for the person at the keyboard; the command line prints them without a traceback."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input: the message says where, what was given, what was expected and what to do."""


class OutputError(OSError):
    """A file could not be written; what was complete before is kept."""


class TrainingError(RuntimeError):
    """Training was stopped because going on would waste the run."""


class Paused(Exception):  # noqa: N818
    """A run waits for people, as it was asked to; the same command goes on."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'beta'?`` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class EngineError(Exception):
    """A generation engine died or fell silent; another one may do its work."""


IMPORTING: list[str] = []
"""Modules of a user that are being imported, the last one now."""


def import_named(name: str, place: str, expected: str) -> Any:
    """What a user's ``package.module:name`` is.

    Args:
        place: start of the message of an error, such as ``loss 'mine:hinge'``.
        expected: what the name should be, such as ``function``.

    Modules of the current folder are found, after installed ones of the same name.

    Raises:
        InputError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)  # last: a folder there could have the name of a package
        importlib.invalidate_caches()
    IMPORTING.append(module)
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # importing a module can raise anything
        raise InputError(
            f"{place} cannot be imported: {type(error).__name__}: {error}; expected package.module:{expected}, with "
            "the package in the current folder or on PYTHONPATH"
        ) from error
    finally:
        IMPORTING.pop()
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        raise InputError(
            f"{place} cannot be imported: AttributeError: {error}; it is {getattr(found, '__file__', 'built in')}; "
            f"expected package.module:{expected}"
        ) from error
