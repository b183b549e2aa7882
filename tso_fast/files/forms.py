"""Rows as other tools write them, with the names and forms of ours.

{"question": "2 + 3?"}                                        prompt_field: question
{"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
{"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}
    -> {"prompt": [{"role": "user", "content": "2 + 3?"}], "human_response": "5"}
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tso_fast.errors import InputError, did_you_mean
from tso_fast.files.sources import Row, kind_of, parse_value
from tso_fast.types import Message, Response

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""Names of turns beside ``ROLES``."""

CONVERSATIONS = ("messages", "conversations")
FIELDS = (
    "prompt", "human_response", "answer", "id", "constraints", "prefix", "responses", "instruction_id_list", "kwargs"
)  # fmt: skip
"""Fields of a row of prompts or responses that are read, beside ``CONVERSATIONS``."""
RESPONSE_FIELDS = tuple(Response.__dataclass_fields__)
NEAR = 0.8
"""How like a known name an unknown one must be to count as misspelt; ``reponses`` is like ``responses`` by 0.94."""


class RowSettings(Protocol):
    """``config.settings.RowsConfig``."""

    on_unknown_field: Any
    prompt_field: str | None
    human_response_field: str | None
    answer_field: str | None
    id_field: str | None


class Spelling:
    """Fields of the rows of one file that look like misspellings of ones that are read: counted, or refused.

    Args:
        on_unknown: ``raise``, ``warn`` or ``ignore``.
    """

    def __init__(self, path: str, on_unknown: str) -> None:
        self.path, self.on_unknown = path, on_unknown
        self.rows = 0
        self.misspelt: Counter[tuple[str, str]] = Counter()

    def check(self, row: Row, known: Iterable[str], where: str, *inside: tuple[str, Any, Iterable[str]]) -> None:
        """Looks at a row, and ``inside`` it at objects, each with what stands before its fields' names.

        Raises:
            InputError: a field looks misspelt, and that is not allowed.
        """
        self.rows += 1
        if self.on_unknown == "ignore":
            return
        objects = [("", row, known), *((prefix, item, names) for prefix, item, names in inside)]
        near = {
            f"{prefix}{name}": like
            for prefix, item, names in objects
            if isinstance(item, dict)
            for name in item
            if (like := _like(name, names, item))
        }
        if near and self.on_unknown == "raise":
            name, like = next(iter(near.items()))
            raise InputError(
                f"{where}: field {name!r} is not read; did you mean {like!r}? (--on_unknown_field ignore allows it)"
            )
        self.misspelt.update(near.items())

    def finish(self) -> None:
        """Warns of what was counted."""
        for (name, like), count in self.misspelt.items():
            logger.warning(
                "%s: %d of %d rows have a field %r, which is not read; did you mean %r? (--on_unknown_field raise "
                "refuses such rows, ignore says nothing)",
                self.path,
                count,
                self.rows,
                name,
                like,
            )


@dataclass
class Forms:
    """Turns the rows of one file into ours, and counts the fields that look misspelt."""

    path: str
    settings: RowSettings
    names: dict[str, str] = field(init=False)
    """Their name of a field, by ours."""
    rows: int = 0
    found: Counter[str] = field(default_factory=Counter)
    """In how many rows a field of theirs was."""
    spelling: Spelling = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.spelling = Spelling(self.path, settings.on_unknown_field)
        names = {
            "prompt": settings.prompt_field,
            "human_response": settings.human_response_field,
            "answer": settings.answer_field,
            "id": settings.id_field,
        }
        self.names = {ours: theirs for ours, theirs in names.items() if theirs is not None}

    def ours(self, row: Row, where: str) -> Row:
        """Raises InputError where a conversation cannot be read, and, if asked to, for a field that looks misspelt."""
        self.rows += 1
        out = {name: value for name, value in row.items() if name not in self.names.values()}
        for ours, theirs in self.names.items():
            if theirs in row:
                self.found[theirs] += 1
                out[ours] = row[theirs]
            else:
                out.pop(ours, None)
        if "prompt" in self.names and "prompt" not in out:
            raise InputError(
                f"{where}: field {self.names['prompt']!r}, which prompt_field names, is missing"
                f"{did_you_mean(self.names['prompt'], row)}"
            )
        source = self.names.get("prompt")
        if source is None and out.get("prompt") is None:
            source = next((name for name in CONVERSATIONS if out.get(name) is not None), None)
            if source is not None:
                out["prompt"] = out.pop(source)
        for name in ("prompt", "constraints", "responses"):  # a cell of CSV holds a list as JSON
            if isinstance(out.get(name), str) and (name != "prompt" or source in CONVERSATIONS):
                out[name] = parse_value(out[name], f"{where}: field {source if name == 'prompt' else name!r}")
        if source is not None and isinstance(out.get("prompt"), list | dict):
            _split(out, f"{where}: field {source!r}")
        responses = out.get("responses")
        inside = responses if isinstance(responses, list) else ()
        self.spelling.check(out, FIELDS, where, *(("responses[].", item, RESPONSE_FIELDS) for item in inside))
        return out

    def finish(self) -> None:
        """Warns of fields that look misspelt; raises InputError where no row had a field that a setting names."""
        for ours, theirs in self.names.items():
            if self.rows and not self.found[theirs]:
                raise InputError(f"{self.path}: no row has the field {theirs!r}, which {ours}_field names")
        self.spelling.finish()


def _like(name: str, known: Iterable[str], row: Row) -> str | None:
    """The known field that is not in the row and of which ``name`` looks like a misspelling."""
    if name in known or len(name) < 4:
        return None
    return _nearest(name, tuple(other for other in known if other not in row))


@functools.lru_cache(10_000)
def _nearest(name: str, names: tuple[str, ...]) -> str | None:
    """Remembered, as the rows of a file have the same fields."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=NEAR)
    return close[0] if close else None


def _split(row: Row, place: str) -> None:
    """A conversation that ends with an answer is a prompt and a human response."""
    turns = row["prompt"]
    if isinstance(turns, dict):  # {"role": [...], "content": [...]}, as some versions of `datasets` give it
        columns = [column if isinstance(column, list) else [] for column in turns.values()]
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*columns, strict=False)]
        row["prompt"] = turns
    if turns and isinstance(turns[-1], dict) and _role(turns[-1]) == "assistant":
        row["prompt"] = turns[:-1]
        if row.get("human_response") is None:
            row["human_response"] = content_of(turns[-1], f"{place}[{len(turns) - 1}]")
        if not turns[:-1]:
            raise InputError(f"{place} is an answer alone; expected the turns before it")


def _role(turn: Row) -> Any:
    role = turn.get("role", turn.get("from"))
    return SHAREGPT.get(role, role) if isinstance(role, str) else role


def content_of(turn: Any, place: str) -> str:
    """The text of a turn: its ``content`` or ``value``, a string or parts of text."""
    given = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    parts = given if isinstance(given, list) else [{"type": "text", "text": given}]
    texts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise InputError(f"{place} has a part of type {kind!r}; expected text alone")
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InputError(
                f'{place} is {kind_of(turn)}; expected {{"role": ..., "content": ...}} with two strings, or parts '
                '{"type": "text", "text": ...} as the content'
            )
        texts.append(part["text"])
    return "".join(texts)


def messages_of(value: list[Any], where: str, name: str) -> tuple[Message, ...]:
    """Turns of a conversation: ``role`` and ``content``, or ShareGPT's ``from`` and ``value``."""
    messages = []
    for i, item in enumerate(value):
        place = f"{where}: field '{name}[{i}]'"
        content = content_of(item, place)
        role = _role(item)
        if not isinstance(role, str):
            raise InputError(f'{place} is {kind_of(item)}; expected {{"role": ..., "content": ...}} with two strings')
        if role not in ROLES:
            raise InputError(f"{place} has role {role!r}; expected one of {', '.join(ROLES)}")
        messages.append(Message(role=role, content=content))
    return tuple(messages)
