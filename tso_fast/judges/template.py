"""Templates of the LLM judge: what it is asked, and how its replies are read.

A template is a text with placeholders, which may begin with settings between two lines ``---``:

    ---
    read: label
    ---
    {prompt} ... {first} ... {second} ... Which one is better, A or B? Reply with the letter only.

Placeholders: ``{prompt}``; ``{first}`` and ``{second}``, the responses shown as A and B, or ``{response}``, one to be
rated; ``{own}``, the judge's own answer; ``{role}`` and ``{duties}``, in which role the responses were given and what
is expected of it. ``{{prompt}}`` stands for the text "{prompt}"; other braces are plain text.

Settings, of a comparison: ``read: label``, the reply begins with A or B, so that the log-probs of its first token tell
how sure the judge is; ``read: text`` (default), only the whole reply tells. Of a rating: ``range: 1-10`` (default),
what it may be.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from tso_fast.errors import InputError, did_you_mean
from tso_fast.files.atomic import sha256_file

FOLDER = Path(__file__).parent / "templates"
PLACEHOLDERS = ("prompt", "first", "second", "response", "own", "role", "duties")
EXPECTED = "{prompt} with {first} and {second}, or with {response}; {own} besides where it is wanted"

_HEADER = re.compile(r"---\n(.*?)^---(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_PLACEHOLDER = re.compile(r"\{(\{[A-Za-z_]\w*\})\}|\{([A-Za-z_]\w*)\}")
_RANGE = re.compile(r"(-?\d+(?:\.\d+)?)\s*-\s*(-?\d+(?:\.\d+)?)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Template:
    """``Template(text="{prompt} A: {first} B: {second}", read="label", placeholders=frozenset({"prompt", ...}))``"""

    text: str
    placeholders: frozenset[str]
    read: Literal["label", "text"] = "text"
    low: float = 1.0
    high: float = 10.0

    @property
    def is_comparison(self) -> bool:
        return "first" in self.placeholders

    def render(self, **values: str) -> str:
        """All placeholders are replaced at once: what stands in a response is not read again."""
        return _PLACEHOLDER.sub(lambda found: found[1] or values[found[2]], self.text)


def names(folder: Path = FOLDER) -> list[str]:
    """Names of the templates that come with the package."""
    return sorted(file.stem for file in folder.glob("*.txt"))


def load(name: str) -> Template:
    """A template of the package by its name, or one in a file.

    Raises:
        InputError: there is none; it lacks placeholders or has unknown ones; settings that are unknown or without
            effect.
    """
    return parse(*read(name, FOLDER))


def read(name: str, folder: Path) -> tuple[str, str]:
    """The text of a file, or of one in ``folder`` by its name, and what to call it in messages.

    Raises:
        InputError: there is none.
    """
    known = names(folder)
    file = folder / f"{name}.txt" if name in known else Path(name)
    if not os.path.isfile(file):
        raise InputError(
            f"template: {name!r} is neither a file nor one of {', '.join(known)}{did_you_mean(name, known)}"
        )
    try:
        return file.read_text(encoding="utf-8-sig"), f"template {file}"
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"template {file}: cannot be read: {error}; expected a text in UTF-8") from error


def inputs(name: str, folder: Path) -> dict[str, str]:
    """The hash of a template that is a file of the user's, which may be written anew; none for one in ``folder``."""
    return {} if name in names(folder) else {"template": sha256_file(Path(name))}


def parse(content: str, where: str) -> Template:
    """``where`` is for messages."""
    header = _HEADER.match(content)
    text = (content[header.end() :] if header else content).strip()
    found = placeholders_of(text, PLACEHOLDERS, EXPECTED, where)
    _check_placeholders(found, where)
    is_comparison = "first" in found
    settings = _settings(header[1] if header else "", "read" if is_comparison else "range", where)
    read = settings.get("read", "text")
    if read not in ("label", "text"):
        raise InputError(f"{where}: read: got {read!r}, expected label or text")
    low, high = _range(settings.get("range", "1-10"), where)
    return Template(
        text=text, placeholders=frozenset(found), read=cast(Literal["label", "text"], read), low=low, high=high
    )


def placeholders_of(text: str, known: Collection[str], expected: str, where: str) -> list[str]:
    """The placeholders in a text.

    Raises:
        InputError: one is not ``known``.
    """
    found = [match[2] for match in _PLACEHOLDER.finditer(text) if match[2]]
    for name in found:
        if name not in known:
            raise InputError(
                f"{where}: the placeholder {{{name}}} is unknown{did_you_mean(name, known)}; "
                f"expected {expected}; {{{{{name}}}}} stands for the text itself"
            )
    return found


def _check_placeholders(found: list[str], where: str) -> None:
    shown = ", ".join(f"{{{name}}}" for name in dict.fromkeys(found)) or "none"
    kinds = {"first", "second", "response"} & set(found)
    if "prompt" not in found or kinds not in ({"first", "second"}, {"response"}):
        raise InputError(f"{where}: it has the placeholders {shown}; expected {EXPECTED}")


def _settings(header: str, known: str, where: str) -> dict[str, str]:
    settings = {}
    for line in filter(None, map(str.strip, header.splitlines())):
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or name not in ("read", "range"):
            raise InputError(
                f"{where}: the setting {line!r} is unknown{did_you_mean(name, ('read', 'range'))}; "
                "expected read: label, read: text, or range: 1-10"
            )
        if name != known:
            kind = "comparison" if known == "read" else "rating"
            raise InputError(f"{where}: {name} has no effect on a {kind}; leave it out")
        settings[name] = value
    return settings


def _range(value: str, where: str) -> tuple[float, float]:
    found = _RANGE.fullmatch(value)
    low, high = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    if low >= high:
        raise InputError(f"{where}: range: got {value!r}, expected the lowest and the highest rating, such as 1-10")
    return low, high
