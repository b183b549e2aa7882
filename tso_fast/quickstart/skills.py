"""Tasks for six small skills, each with four phrasings, an answer that a program can check, and a lazy answer.

A careless demonstrator writes the lazy answer (copy the input, the first number, the length of the list). Models
trained on such demonstrations know both behaviours, so preferences have something to select.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tso_fast.quickstart.task import NAMES, Task

THINGS = ("pears", "coins", "books", "cards", "shells", "stamps")
LETTERS = "abcdefghij"
LAZY_RATES = (0.3, 0.65)
"""Shares of lazy demonstrations; skill and phrasing decide which of the two applies."""


@dataclass(frozen=True, kw_only=True)
class Skill:
    """``Skill(kind="add", phrasing=1, prompt="Mia adds 4 and 9 pears.", answer="13", lazy="4")``."""

    kind: str
    phrasing: int
    prompt: str
    answer: str
    lazy: str

    @property
    def known(self) -> dict[str, str]:
        return {"answer": self.answer}

    def demonstrate(self, r: random.Random) -> str:
        rate = LAZY_RATES[(self.phrasing + list(SKILLS).index(self.kind)) % len(LAZY_RATES)]
        return self.lazy if r.random() < rate else self.answer

    def respond(self, r: random.Random) -> str:
        return self.answer


Made = tuple[list[str], str, str]  # phrasings, answer, lazy answer


def _add(r: random.Random, name: str, thing: str) -> Made:
    a, b = r.randint(2, 9), r.randint(2, 9)
    return (
        [
            f"{name} has {a} {thing} and gets {b} more. How many {thing} now?",
            f"{name} adds {a} and {b} {thing}.",
            f"What is {a} plus {b} {thing} for {name}?",
            f"{name} has {a} {thing} in one box and {b} in another. How many in all?",
        ],
        str(a + b),
        str(a),
    )


def _subtract(r: random.Random, name: str, thing: str) -> Made:
    b, rest = r.randint(2, 9), r.randint(1, 9)
    return (
        [
            f"{name} has {b + rest} {thing} and gives away {b}. How many {thing} are left?",
            f"{name} takes {b} from {b + rest} {thing}.",
            f"What is {b + rest} minus {b} {thing} for {name}?",
            f"{name} had {b + rest} {thing} but lost {b}. How many remain?",
        ],
        str(rest),
        str(b + rest),
    )


def _largest(r: random.Random, name: str, thing: str) -> Made:
    numbers = r.sample(range(10, 40), r.randint(2, 4))
    shown = ", ".join(map(str, numbers))
    return (
        [
            f"Which number is the largest: {shown}?",
            f"Pick the biggest of {shown}.",
            f"{name} wants the maximum of {shown}.",
            f"Of the numbers {shown}, which is the top one?",
        ],
        str(max(numbers)),
        str(numbers[0]),
    )


def _reverse(r: random.Random, name: str, thing: str) -> Made:
    letters = [r.choice(LETTERS) for _ in range(r.randint(2, 4))]
    shown = " ".join(letters)
    return (
        [
            f"{name} reverses the letters {shown}.",
            f"Write {shown} backwards for {name}.",
            f"{name} reads {shown} from right to left. What does {name} say?",
            f"Turn {shown} around for {name}.",
        ],
        " ".join(reversed(letters)),
        shown,
    )


def _sort(r: random.Random, name: str, thing: str) -> Made:
    letters = r.sample(LETTERS, r.randint(2, 4))
    shown = " ".join(letters)
    return (
        [
            f"{name} sorts the letters {shown}.",
            f"Put {shown} in order for {name}.",
            f"{name} arranges {shown} by alphabet. What is the result?",
            f"Which order from a to z do {shown} have, {name}?",
        ],
        " ".join(sorted(letters)),
        shown,
    )


def _count(r: random.Random, name: str, thing: str) -> Made:
    letter = r.choice(LETTERS)
    letters = [letter if r.random() < 0.45 else r.choice(LETTERS) for _ in range(r.randint(3, 6))]
    shown = " ".join(letters)
    return (
        [
            f"How many times does {letter} appear in {shown}?",
            f"Count the letter {letter} in {shown}.",
            f"{name} wrote {shown}. How many {letter} are there?",
            f"{name} wants the number of {letter} in {shown}.",
        ],
        str(letters.count(letter)),
        str(len(letters)),
    )


SKILLS: dict[str, Callable[[random.Random, str, str], Made]] = {
    "add": _add,
    "subtract": _subtract,
    "largest": _largest,
    "reverse": _reverse,
    "sort": _sort,
    "count": _count,
}


def make(r: random.Random, number: int) -> Skill:
    """The skills come in turns."""
    kind = list(SKILLS)[number % len(SKILLS)]
    phrasings, answer, lazy = SKILLS[kind](r, r.choice(NAMES), r.choice(THINGS))
    phrasing = r.randrange(len(phrasings))
    return Skill(kind=kind, phrasing=phrasing, prompt=phrasings[phrasing], answer=answer, lazy=lazy)


TASK = Task(make=make)
