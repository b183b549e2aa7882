"""Judges and samplers by their kind: one of a table, or a class of the user's own, ``package.module:Class``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from tso_fast.errors import InputError, did_you_mean, import_named

T = TypeVar("T")


def make(config: Any, place: str, what: str, table: Mapping[str, type[T]], base: type) -> T:
    """An instance of the class that ``config.kind`` names, made from ``config`` and, as keywords, ``config.args``.

    Args:
        config: has fields ``kind``, ``name``, ``args`` and others, of which the class lists those that it ``takes``.
        place: what stands before a field's name in an error, such as ``judges[0].``.
        what: what it is, such as ``judge``.
        base: what a class of the user's own inherits.

    Raises:
        InputError: no class is called so, it is none of the kind, or a setting cannot be or has no effect.
    """
    made: Any = _class(config.kind, f"{place}kind", what, table, base)
    for field in dataclasses.fields(config):
        if field.name not in ("kind", "name", *made.takes) and getattr(config, field.name) != field.default:
            raise InputError(f"{place}{field.name}: it has no effect on a {what} of kind {config.kind!r}; leave it out")
    _check_args(made, config, f"{place}args", what)
    try:
        return cast(T, made(config, **(config.args or {})))
    except ValueError as error:  # an InputError is one
        raise InputError(f"{place}{error}") from error


def _class(kind: str, setting: str, what: str, table: Mapping[str, type[T]], base: type) -> type[T]:
    if kind in table:
        return table[kind]
    if ":" not in kind:
        raise InputError(
            f"{setting}: got {kind!r}, expected one of {', '.join(table)}, or package.module:Class"
            f"{did_you_mean(kind, table)}"
        )
    found: Any = import_named(kind, f"{setting}: {kind!r}", "Class")
    if not isinstance(found, type):
        raise InputError(f"{setting}: {kind!r} is {found!r:.60}; expected a class")
    needed = [name for name in vars(base) if not name.startswith("_")]
    lacking = [name for name in needed if not hasattr(found, name)] + sorted(getattr(found, "__abstractmethods__", ()))
    if lacking:
        raise InputError(
            f"{setting}: {kind!r} has no {lacking[0]!r}; expected a class that inherits "
            f"{base.__module__}.{base.__qualname__}"
        )
    return found


def _check_args(made: type[Any], config: Any, setting: str, what: str) -> None:
    signature, args = inspect.signature(made), config.args or {}
    takes = list(signature.parameters.values())[1:]  # after the configuration
    names = [p.name for p in takes if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for name in args:
        if name not in names and not any(p.kind is p.VAR_KEYWORD for p in takes):
            raise InputError(
                f"{setting}.{name}: {what} {config.kind!r} has no such argument; expected "
                f"{', '.join(names) or 'none'}{did_you_mean(name, names)}"
            )
    try:
        signature.bind(config, **args)
    except TypeError as error:
        raise InputError(f"{setting}: {what} {config.kind!r}: {error}") from error
