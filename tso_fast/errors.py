"""Errors meant for the person at the keyboard; the command line prints them without a traceback."""

from __future__ import annotations

import difflib
import importlib
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


def import_named(name: str, place: str, expected: str) -> Any:
    """What a user's ``package.module:name`` is.

    Args:
        place: start of the message of an error, such as ``loss 'mine:hinge'``.
        expected: what the name should be, such as ``function``.

    Raises:
        InputError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing a module can raise anything
        raise InputError(
            f"{place} cannot be imported: {type(error).__name__}: {error}; expected package.module:{expected}, with "
            "the package's folder on PYTHONPATH"
        ) from error
