"""What must reach no file and no log: passwords in addresses, keys and tokens."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
VARIABLES = ("OPENAI_API_KEY", "TSO_FAST_PASSWORD", "HF_TOKEN", "WANDB_API_KEY")
"""Environment variables whose values are secret, wherever they are repeated."""
SHORTEST = 8
"""Fewest characters of a variable's value that is looked for; a shorter one would hide ordinary words."""

_IN_ADDRESS = re.compile(r"(?<=://)[^/?#\s'\"]+@")
_IN_QUERY = re.compile(r"([?&][\w.-]*(?:key|token|secret|password|sig|signature)=)[^&#\s'\"]+", re.I)
_KEY = re.compile(r"(?:^|[_-])(?:passw(?:or)?d|secret|credentials?|authorization|token|api_?key|access_?key)$", re.I)


def redact(text: str) -> str:
    """Text without user names and passwords in addresses, secrets in their queries, and values of ``VARIABLES``."""
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", _IN_ADDRESS.sub(f"{HIDDEN}@", text))
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    return text


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
