"""Ranges that stand at a field: ``num_gpus: PositiveInt = 1``, ``top_p: Share | None = None``.

jsonargparse reads such a field as its bare type; ``check_ranges`` reads the rule.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Union

from tso_fast.errors import InputError


@dataclass(frozen=True)
class Range:
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


class Free:
    """Marks a setting that may differ when a run is resumed.

    It changes how and where something is done or shown, not what is asked for: responses of another engine or batch
    differ as those of another seed do, and complete stages are kept. Log-probs and gradients under another
    `attn_implementation`, `impl` or `use_cpu` may differ in their last bits, and so may what is trained from then on.
    """


FREE = Free()

PositiveInt = Annotated[int, Range("an integer >= 1", lambda n: n >= 1)]
Count = Annotated[int, Range("a finite number >= 0", lambda n: n >= 0)]
PositiveFloat = Annotated[float, Range("a finite number > 0", lambda x: 0 < x < math.inf)]
NonNegativeFloat = Annotated[float, Range("a finite number >= 0", lambda x: 0 <= x < math.inf)]
Bound = Annotated[float, Range("a number >= 0, .inf for no clip", lambda x: x >= 0)]
Probability = Annotated[float, Range("a probability in [0, 1]", lambda x: 0 <= x <= 1)]
Share = Annotated[float, Range("a number in (0, 1]", lambda x: 0 < x <= 1)]
Decay = Annotated[float, Range("a number in [0, 1)", lambda x: 0 <= x < 1)]
Reliability = Annotated[float, Range("a share of right verdicts in (0, 1)", lambda x: 0 < x < 1)]
Seed = Annotated[int, Range("an integer in [0, 2**32)", lambda n: 0 <= n < 2**32)]
Port = Annotated[int, Range("an integer in [0, 65535]", lambda n: 0 <= n < 2**16)]
Text = Annotated[str, Range("some text, or leave it out", lambda text: bool(text.strip()))]
Stop = Annotated[list[str], Range("texts that are not empty", all)]
Url = Annotated[
    str, Range("an address such as http://host:8000/v1", lambda text: text.startswith(("http://", "https://")))
]


def check_ranges(config: Any, place: str = "") -> None:
    """Checks every field against the ranges in its type, those of nested settings too.

    Args:
        place: what stands before a field's name in an error, such as ``cells[0].``.

    Raises:
        InputError: names the key, what was given and what was expected.
    """
    for name, hint in _hints(type(config)).items():
        _check(getattr(config, name), hint, f"{place}{name}")


def check_value(cls: type, name: str, value: Any, place: str = "") -> None:
    """Checks a value that is meant for a field, its type too.

    Raises:
        InputError: names the key, what was given and what was expected.
    """
    hint = _hints(cls)[name]
    if not _may_be(value, hint):
        raise InputError(f"{place}{name}: got {value!r}, expected {_spelled(hint)}")
    _check(value, hint, f"{place}{name}")


def without_free(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, as ``to_dict`` writes them, without those that are marked ``FREE``, in nested settings too."""
    hints = _hints(cls)
    return {
        name: _nested_without_free(value, hints.get(name))
        for name, value in settings.items()
        if FREE not in getattr(hints.get(name), "__metadata__", ())
    }


def _nested_without_free(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return [_nested_without_free(item, hint) for item in value]
    cls = class_in(hint)
    return without_free(cls, value) if isinstance(value, dict) and cls is not None else value


def class_in(hint: Any) -> type | None:
    """The settings that a type such as ``list[CellConfig] | None`` is made of."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    return next((cls for inner in typing.get_args(hint) if (cls := class_in(inner))), None)


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check(value: Any, hint: Any, name: str) -> None:
    if dataclasses.is_dataclass(value):
        check_ranges(value, f"{name}.")
    elif typing.get_origin(hint) is Annotated:
        inner, *metadata = typing.get_args(hint)
        for rule in metadata:
            if isinstance(rule, Range) and value is not None and not rule.holds(value):
                raise InputError(f"{name}: got {value!r}, expected {rule.expected}")
        _check(value, inner, name)
    elif typing.get_origin(hint) in (Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if _may_be(value, option)]
        if not options:
            raise InputError(f"{name}: got {value!r}, expected {_spelled(hint)}")
        _check(value, options[0], name)
    elif value is None and hint not in (None, type(None), Any):  # YAML's null also reaches fields without such a value
        raise InputError(f"{name}: got None, expected {_spelled(hint)}")
    else:
        for item, item_hint, item_name in _items(value, hint, name):
            _check(item, item_hint, item_name)


def _may_be(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if typing.get_origin(hint) is Annotated:
        return _may_be(value, typing.get_args(hint)[0])
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_may_be(value, option) for option in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if not isinstance(kind, type):  # Literal
        return value in typing.get_args(hint)
    return isinstance(value, (int, float) if kind is float else kind)


def _items(value: Any, hint: Any, name: str) -> Iterator[tuple[Any, Any, str]]:
    arguments = typing.get_args(hint)
    if isinstance(value, list) and arguments:
        yield from ((item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value))
    elif isinstance(value, dict) and arguments:
        yield from ((item, arguments[1], f"{name}.{key}") for key, item in value.items())


def _spelled(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        return _spelled(typing.get_args(hint)[0])
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
