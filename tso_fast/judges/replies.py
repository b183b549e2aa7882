"""What a judge's reply says: a label, a rating, or nothing that can be told. Never a guess.

A reply is read only where it is plain: ``[[A]]``, a label or a number alone, "Rating: 7/10". Prose, two different
verdicts in one place and ratings outside the range are abstentions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from tso_fast.types import TopLogprobs

MIN_LABEL_MASS = 0.5
"""Least probability of the labels A and B together: below it the model most likely goes on with something else than a
label, and how it divides what is left among A and B says little."""

Reading = tuple[float | None, str]
"""What the reply says, or None and why nothing can be told."""

_LABELS = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}
_BRACKETED_LABEL = re.compile(r"\[\[\s*(?:response|answer|assistant)?\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
_LONE_LABEL = re.compile(
    r"(?:(?:the|my) )?(?:(?:final|better|best|preferred) )*"
    r"(?:(?:answer|verdict|choice|winner|judge?ment|decision|response)(?: is|:| is:| :) ?)?"
    r"(?:the )?(?:(?:response|answer|assistant|option) ?)?[(\[]*(?P<label>A|B|(?:a )?tie)[)\]]*"
    r"(?: is (?:the )?(?:better|best|preferred)(?: one| response| answer)?)? ?[.!]?",
    re.IGNORECASE,
)
_LONGEST_LONE = 80

_NUMBER = r"[-+−]?[0-9]++(?:\.[0-9]++)?+"
_VALUE = rf"(?P<value>{_NUMBER})(?: *+(?:/|out of) *(?P<of>{_NUMBER}))?+"
_BRACKETED_RATING = re.compile(rf"\[\[(?: |rating\b|score\b|:)*+{_VALUE} *\]\]", re.IGNORECASE)
_NAMED_RATING = re.compile(
    rf"\b(?:rating|score|grade)\b(?: *\([^()\n]*\))?+(?: |is\b|of\b|:|=)*+{_VALUE}", re.IGNORECASE
)
_FRACTION = re.compile(rf"(?<![\w.,])(?P<value>{_NUMBER}) *(?:/|out of) *(?P<of>{_NUMBER})", re.IGNORECASE)
_LONE_RATING = re.compile(rf"{_VALUE}\.?")
# What makes a number a part of another one, of a range such as 7-8, of a date or a percentage.
_RANGE = r"(?:[-–—−~/]|to\b|or\b|and\b)"
_GOES_ON = re.compile(rf"[\w%]|[.,][0-9]| *{_RANGE} *[0-9]", re.IGNORECASE)
_BEGAN = re.compile(rf"[0-9] *{_RANGE} *$", re.IGNORECASE)


def read_logprobs(top: TopLogprobs, decode: Callable[[int], str]) -> float | None:
    """The probability of A among A and B as the first token; None: the model does not answer with a label.

    A label is a token that is A or B but for white space around it.
    """
    mass = {"A": 0.0, "B": 0.0}
    for token, logprob in top:
        label = (token if isinstance(token, str) else decode(token)).strip(" \t\r\n▁ĠĊ")
        if label in mass and math.isfinite(logprob):
            mass[label] += math.exp(logprob)
    total = mass["A"] + mass["B"]
    return mass["A"] / total if total >= MIN_LABEL_MASS else None


def read_label(text: str) -> Reading:
    """1 for A, 0 for B, 0.5 for a tie."""
    said = _after_thinking(text)
    if found := _last_line_of(_BRACKETED_LABEL, said):
        labels = {_LABELS[match[1].lower()] for match in found}
        return (labels.pop(), "") if len(labels) == 1 else (None, f"two verdicts in {_shown(said)}")
    plain = _plain(said)
    lone = _LONE_LABEL.fullmatch(plain) if len(plain) <= _LONGEST_LONE else None
    if lone is not None:
        return _LABELS[lone["label"].lower().removeprefix("a ")], ""
    return None, _nothing("verdict", said)


def read_rating(text: str, low: float, high: float) -> Reading:
    """The rating, from low to high."""
    said = _after_thinking(text)
    plain = _plain(said, keep_lines=True)
    found = _last_line_of(_BRACKETED_RATING, plain)
    if not found:
        fractions = [match for match in _FRACTION.finditer(plain) if float(_minus(match["of"])) == high]
        found = [*_NAMED_RATING.finditer(plain), *fractions]
        if not found and (lone := _LONE_RATING.fullmatch(plain)):
            found = [lone]
        if not all(map(_is_whole, found)):
            return None, f"an unclear rating in {_shown(said)}"
    ratings = {(float(_minus(m["value"])), float(_minus(m["of"] or str(high)))) for m in found}
    if not ratings:
        return None, _nothing("rating", said)
    if len(ratings) > 1:
        return None, f"{len(ratings)} different ratings in {_shown(said)}"
    value, of = ratings.pop()
    if of != high or not low <= value <= high:
        return None, f"a rating outside {low:g} to {high:g} in {_shown(said)}"
    return value, ""


def _after_thinking(text: str) -> str:
    """Verdicts that a reasoning model only considers are none."""
    said = text.rpartition("</think>")[2]
    return "" if "<think>" in said else said


def _last_line_of(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The matches of the last line that has any: lines before may repeat what was asked for."""
    lines = (list(pattern.finditer(line)) for line in reversed(text.splitlines()))
    return next(filter(None, lines), [])


def _plain(text: str, keep_lines: bool = False) -> str:
    """Without the marks of Markdown, quotes and needless white space."""
    bare = re.sub(r"[*_`\"'#“”‘’]", "", text)
    return (
        "\n".join(" ".join(line.split()) for line in bare.splitlines()).strip()
        if keep_lines
        else " ".join(bare.split())
    )


def _is_whole(found: re.Match[str]) -> bool:
    before = found.string[max(0, found.start("value") - 12) : found.start("value")]
    return not _BEGAN.search(before) and not _GOES_ON.match(found.string, found.end())


def _minus(number: str) -> str:
    return number.replace("−", "-")


def _nothing(what: str, said: str) -> str:
    return f"no {what} in {_shown(said)}" if said.strip() else "an empty reply"


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}")
