"""What a task of the quickstart is: prompts with what a verifier needs to know, and the people who answer them."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

NAMES = ("Sam", "Ana", "Leo", "Mia", "Tom", "Zoe", "Max", "Eva")
"""People in the prompts."""


class Exercise(Protocol):
    """One prompt of a task."""

    @property
    def kind(self) -> str:
        """A part of its id, for the eye."""

    @property
    def prompt(self) -> str: ...

    @property
    def known(self) -> Mapping[str, Any]:
        """The fields of its row that a verifier needs, such as ``{"answer": "13"}``."""

    def demonstrate(self, r: random.Random) -> str:
        """The answer of the careless demonstrator, whom the models of the matrix learn from."""

    def respond(self, r: random.Random) -> str:
        """The answer of a person, where the data have one."""


Score = Callable[[Any, str], float]
"""What somebody thinks of an answer to an exercise of their task; higher is better."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """``Task(make=skills.make)``"""

    make: Callable[[random.Random, int], Exercise]
    """An exercise from random numbers and its number in the set; one prompt may come twice."""
    judges: Mapping[str, Score] = field(default_factory=dict)
    """Cells that only judge, by name: what those look at whose labels they learn from."""


def make_exercises(task: Task, count: int, seed: str, exclude: Collection[str] = ()) -> list[Exercise]:
    """Exercises of distinct prompts, none of them in ``exclude``."""
    r = random.Random(seed)
    seen = set(exclude)
    made: list[Exercise] = []
    while len(made) < count:
        exercise = task.make(r, len(made))
        if exercise.prompt not in seen:
            seen.add(exercise.prompt)
            made.append(exercise)
    return made
