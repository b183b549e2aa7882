"""Agreement with the other responses: right answers coincide more often than wrong ones.

Self-consistency (Wang et al. 2022, arXiv 2203.11171) used to compare responses: it needs no known answer and no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tso_fast.judges.verifier import final_number
from tso_fast.types import Candidates, Verdict


def agree(candidates: Sequence[Candidates], name: str) -> list[Verdict]:
    """One verdict a response: the share of the prompt's other model responses that end in the same number.

    It abstains on a response that ends in none, on a person's, and where there is no other.
    """
    verdicts = []
    for item in candidates:
        numbers = [None if r.is_human else final_number(r.text) for r in item.responses]
        votes = Counter(number for number in numbers if number is not None)
        others = sum(not r.is_human for r in item.responses) - 1
        for i, number in enumerate(numbers):
            score = (votes[number] - 1) / others if number is not None and others > 0 else None
            reason = (
                ""
                if score is not None
                else "a person's"
                if item.responses[i].is_human
                else "no number"
                if number is None
                else "no other response"
            )
            verdicts.append(Verdict(prompt_id=item.prompt.id, response=i, judge=name, score=score, reason=reason))
    return verdicts
