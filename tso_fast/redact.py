"""What must reach no file and no log: passwords in addresses, keys and tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
VARIABLES = ("OPENAI_API_KEY", "TSO_FAST_PASSWORD", "HF_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values are secret, wherever they are repeated."""
SHORTEST = 8
"""Fewest characters of a variable's value that is looked for; a shorter one would hide ordinary words."""

_IN_ADDRESS = re.compile(r"(?<=://)[^/?#\s'\"]+@")
_IN_QUERY = re.compile(r"([?&][\w.-]*(?:key|token|secret|password|sig|signature)=)[^&#\s'\"]+", re.I)
_NAME = r"(?:passw(?:or)?d|secret|credentials?|authorization|token|api_?key|access_?key)"
_KEY = re.compile(rf"(?:^|[_-]){_NAME}$", re.I)
_IN_DICT = re.compile(rf"""((['"])(?:\w*[_-])?{_NAME}\2\s*:\s*)(['"]).*?\3""", re.I)


def redact(text: str) -> str:
    """Text without user names and passwords in addresses, secrets in their queries, values of ``VARIABLES``, and those
    of what is called ``api_key`` or alike in a printed dict."""
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", _IN_ADDRESS.sub(f"{HIDDEN}@", text))
    text = _IN_DICT.sub(rf"\g<1>\g<3>{HIDDEN}\g<3>", text)
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return text


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets, ``--password VALUE`` among them."""
    out: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option, is_joined, _ = argument.partition("=")
        if before.startswith("--") and _KEY.search(before) and not argument.startswith("--"):
            out.append(HIDDEN)
        elif option.startswith("--") and is_joined and _KEY.search(option):
            out.append(f"{option}={HIDDEN}")
        else:
            out.append(redact(argument))
    return out


def redacted(value: Any) -> Any:
    """Settings without secrets: texts as by ``redact``, and nothing of what is called ``api_key`` or alike."""
    if isinstance(value, dict):
        return {
            key: HIDDEN if isinstance(item, str) and _KEY.search(str(key)) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value
