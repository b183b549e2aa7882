"""A judge of one's own, as a user writes it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tso_fast.config.settings import JudgeConfig
from tso_fast.files.labels import Label, make_label
from tso_fast.judges.judge import Bench, Judge, Judged, Opinion, as_verdicts
from tso_fast.types import Candidates, Verdict


class Shortest(Judge):
    """The fewer letters, the better; it cannot tell of responses beyond ``longest``."""

    def __init__(self, config: JudgeConfig, *, longest: int = 1000) -> None:
        super().__init__(config)
        if longest < 1:
            raise ValueError(f"args.longest: got {longest}, expected an integer >= 1")
        self.longest = longest

    def num_steps(self, candidates: Sequence[Candidates]) -> int:
        return len(candidates)

    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        found = []
        for item in candidates:
            lengths = [len(response.text) for response in item.responses]
            found += as_verdicts(item, self.name, [Opinion(-n if n <= self.longest else None) for n in lengths])
            bench.advance(1)
        return Judged(found)


class Careless(Judge):
    """Gives a verdict that cannot be."""

    def __init__(self, config: JudgeConfig, **verdict: object) -> None:
        super().__init__(config)
        self.verdict = verdict

    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        good = {"prompt_id": candidates[0].prompt.id, "response": 0, "judge": self.name, "score": 1.0}
        return Judged([Verdict(**{**good, **self.verdict})])  # type: ignore[arg-type]


class Silent(Judge):
    """Forgot to judge."""


class Model(Shortest):
    needs_models = True


def function() -> None: ...


def two_tastes(candidates: Sequence[Candidates], seed: int) -> list[Label]:
    """Labels of two people on half of the pairs each: one likes long responses, the other short ones."""
    found = []
    for item in candidates:
        for i, j in itertools.combinations(range(len(item.responses)), 2):
            first, second = (len(item.responses[k].text) for k in (i, j))
            if first != second and (i + j) % 2 == 0:
                found.append(make_label(item, (i, j), "long", float(first > second)))
            elif first != second:
                found.append(make_label(item, (i, j), "short", float(first < second)))
    return found
