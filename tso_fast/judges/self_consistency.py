"""Agreement with the other responses: right answers coincide more often than wrong ones.

Self-consistency (Wang et al. 2022, arXiv 2203.11171) used to compare responses: it needs no known answer and no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tso_fast.judges.judge import Bench, Judge, Judged, Opinion, as_verdicts
from tso_fast.judges.verifier import final_number
from tso_fast.types import Candidates, Verdict


class SelfConsistencyJudge(Judge):
    """Judge of kind ``agreement``."""

    takes = ()

    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        return Judged(agree(candidates, self.name))


def agree(candidates: Sequence[Candidates], name: str) -> list[Verdict]:
    """One verdict a response: the share of the prompt's other model responses that end in the same number.

    It abstains on a response that ends in none, on a person's, and where there is no other.
    """
    return [verdict for item in candidates for verdict in as_verdicts(item, name, _opinions(item))]


def _opinions(item: Candidates) -> list[Opinion]:
    numbers = [None if r.is_human else final_number(r.text) for r in item.responses]
    votes = Counter(number for number in numbers if number is not None)
    others = sum(not r.is_human for r in item.responses) - 1
    opinions = []
    for response, number in zip(item.responses, numbers, strict=True):
        if response.is_human:
            opinions.append(Opinion(None, "a person's"))
        elif number is None:
            opinions.append(Opinion(None, "no number"))
        elif others == 0:
            opinions.append(Opinion(None, "no other response"))
        else:
            opinions.append(Opinion((votes[number] - 1) / others))
    return opinions
