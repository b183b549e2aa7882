"""Judgments as responses to what the judge was asked: they become pairs like any others (self-rationalization)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tso_fast.types import Candidates

AGREEMENT = "majority"
"""Name of the score of a judgment: 1 where it says what most say, else 0."""


def with_agreement(asked: Sequence[Candidates], told: Sequence[Sequence[float | None]]) -> list[Candidates]:
    """The questions about one matter on which judgments of both kinds were given, each judgment with its score.

    The majority is that over all questions: a judge that always prefers what it is shown first has none.

    Args:
        asked: the questions, such as the two orders of a comparison; their responses are the judgments.
        told: what each judgment says of the matter; None: nothing can be told, and it is left out.

    Returns:
        Nothing where no verdict is commoner than every other one.
    """
    votes = Counter(value for own in told for value in own if value is not None).most_common(2)
    if len(votes) < 2 or votes[0][1] == votes[1][1]:
        return []
    found = []
    for item, own in zip(asked, told, strict=True):
        scored = tuple(
            replace(response, scores={AGREEMENT: float(value == votes[0][0])})
            for response, value in zip(item.responses, own, strict=True)
            if value is not None
        )
        if len({response.scores[AGREEMENT] for response in scored}) == 2:
            found.append(replace(item, responses=scored))
    return found
