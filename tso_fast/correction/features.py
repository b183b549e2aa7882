"""Properties of a response that a program can read off its text: what judges may reward beside its being right.

Agreement, hedging and confidence are counts of English phrases; of responses in other languages they are 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_MARKS = re.compile(r"^#{1,6} |\*\*[^*\n]+\*\*|`[^`\n]+`|^```|^\|.*\|$", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:[-*•+]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)


def _phrases(text: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(text.split(', '))})\b", re.IGNORECASE)


_HEDGES = _phrases(
    "may, might, could, perhaps, maybe, possibly, probably, likely, seems?, appears?, suggests?, roughly, "
    "approximately, in general, generally, usually, sometimes, I think, I believe, I guess, not sure, it depends"
)
_BOOSTERS = _phrases(
    "certainly, definitely, clearly, obviously, undoubtedly, absolutely, always, never, must, exactly, indeed, "
    "of course, without doubt, in fact, surely"
)
_AGREES = _phrases(
    "yes, right, correct, true, agree, agreed, exactly, absolutely, good point, great question, "
    "you are right, you're right"
)
_DISAGREES = _phrases(
    "no, not, wrong, incorrect, false, disagree, actually, however, mistaken, myth, misconception, isn['’]t, aren['’]t"
)
_OPENING = 25
"""Words of the beginning of a response in which it says whether it agrees."""


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _length(prompt: str, text: str) -> float:
    return math.log1p(len(_words(text)))


def _format(prompt: str, text: str) -> float:
    return math.log1p(len(_MARKS.findall(text)))


def _lists(prompt: str, text: str) -> float:
    return math.log1p(len(_ITEM.findall(text)))


def _share(pattern: re.Pattern[str], text: str) -> float:
    return 100 * len(pattern.findall(text)) / max(len(_words(text)), 1)


def _hedging(prompt: str, text: str) -> float:
    return _share(_HEDGES, text)


def _confidence(prompt: str, text: str) -> float:
    return _share(_BOOSTERS, text)


def _agreement(prompt: str, text: str) -> float:
    opening = " ".join(text.split()[:_OPENING])
    return float(len(_AGREES.findall(opening)) - len(_DISAGREES.findall(opening)))


def _similarity(prompt: str, text: str) -> float:
    asked, said = set(_words(prompt)), set(_words(text))
    return len(asked & said) / len(asked | said) if said else 0.0


FEATURES: dict[str, Callable[[str, str], float]] = {
    "length": _length,
    "format": _format,
    "lists": _lists,
    "hedging": _hedging,
    "confidence": _confidence,
    "agreement": _agreement,
    "similarity": _similarity,
}
"""Features by name, each a function of prompt and response: log(1 + words), log(1 + marks of Markdown), log(1 + list
items), hedging phrases and phrases of certainty in 100 words, phrases that agree with the prompt less those that do not
in the first 25 words, and words shared with the prompt (Jaccard)."""
