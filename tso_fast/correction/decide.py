"""Decisions: keep, swap or drop, with a reason for every pair.

A human label decides; otherwise the judges do, by the gap of their consensus scores or by the probability from
``correction.reliability.combine``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tso_fast.config.settings import PairingConfig
from tso_fast.types import Candidates, Decision, PairEvidence, Response


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """A decided pair of responses to one prompt, as indices."""

    chosen: int
    rejected: int
    prior: str
    decision: Decision
    reason: str
    gap: float
    """Consensus score of chosen minus that of rejected, or the same for their probabilities of being better; 0 if there
    is no evidence or a person overruled it."""
    probability: float | None = None
    """Probability that chosen is better, given that one of them is; None: the evidence gives only the order."""
    is_human: bool = False
    """Whether a human label decided."""


class Belief(NamedTuple):
    """What is believed of a pair before people are asked: ``Belief(gap=0.6, first=0.8, neither=0.0)``."""

    gap: float
    """How much better the first response is, as a gap of scores or of probabilities; NaN: no evidence."""
    first: float | None
    """Probability that the first is better, given that one of them is; None: the evidence gives only the order."""
    neither: float = 0.0
    """Probability that neither is."""


def from_scores(evidence: Sequence[PairEvidence], scores: Sequence[float] | np.ndarray) -> list[Belief]:
    """Beliefs that follow from one consensus score a response of a prompt, NaN = no evidence."""
    return [Belief(float(scores[p.responses[0]]) - float(scores[p.responses[1]]), p.stated) for p in evidence]


@dataclass
class Counts:
    """Numbers of pairs by how they were decided."""

    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Pairs by (rule of the prior, decision)."""
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Pairs by (decision, reason)."""

    def add(self, prior: str, decision: str, reason: str) -> None:
        self.decisions[prior, decision] += 1
        self.reasons[decision, reason] += 1

    def to_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        def nested(counter: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
            out: dict[str, dict[str, int]] = {}
            for (first, second), count in sorted(counter.items()):
                out.setdefault(first, {})[second] = count
            return out

        return {"decisions": nested(self.decisions), "reasons": nested(self.reasons)}


def correct(
    item: Candidates,
    evidence: Sequence[PairEvidence],
    beliefs: Sequence[Belief],
    config: PairingConfig,
    counts: Counts,
) -> list[Corrected]:
    """Decides every pair of responses to one prompt and returns the pairs that are not dropped.

    keep: the evidence confirms the prior, or there is only one of the two and it is accepted.
    swap: the evidence contradicts the prior. drop: there is no order, or it is too uncertain to train on.

    Args:
        evidence: evidence on every pair of responses.
        beliefs: what follows from it for the same pairs.
        counts: receives every pair, including dropped ones.
    """
    decided = []
    for pair, (gap, stated, neither) in zip(evidence, beliefs, strict=True):
        i, j = pair.responses
        direction = pair.label or (pair.prior if np.isnan(gap) else gap)
        chosen, rejected = (i, j) if direction > 0 else (j, i)
        decision: Decision
        if pair.is_same_text:
            decision, reason = "drop", "same text"
        elif pair.labels:
            decision, reason = _decide_by_label(item.responses[chosen], pair.label, pair.prior)
        else:
            decision, reason = _decide(item.responses[chosen], pair.prior, gap, direction, neither, stated, config)
        counts.add(pair.rule, decision, reason)
        if decision == "drop":
            continue
        signed = gap if chosen == i else -gap
        if pair.label is not None:
            stated = (1 + abs(pair.label)) / 2
        elif stated is not None and chosen != i:
            stated = 1 - stated
        decided.append(
            Corrected(
                chosen=chosen,
                rejected=rejected,
                prior=pair.rule,
                decision=decision,
                reason=reason,
                gap=0.0 if np.isnan(gap) else max(signed, 0.0),
                probability=stated,
                is_human=bool(pair.labels),
            )
        )
    return decided


def _decide_by_label(chosen: Response, label: float | None, sign: int) -> tuple[Decision, str]:
    if label is None:
        return "drop", "human: bad"
    if label == 0:
        return "drop", "human: tie"
    if chosen.finish_reason == "length":
        return "drop", "chosen is cut off"
    if sign == 0:
        return "keep", "human alone"
    return ("keep", "human: confirmed") if sign * label > 0 else ("swap", "human: contradicted")


def _decide(
    chosen: Response,
    sign: int,
    gap: float,
    direction: float,
    neither: float,
    stated: float | None,
    config: PairingConfig,
) -> tuple[Decision, str]:
    if np.isnan(gap):
        if sign == 0:
            return "drop", "no order"
        if config.on_no_evidence == "drop":
            return "drop", "no evidence"
    elif abs(gap) <= config.min_margin or neither > config.max_tie_probability:
        return "drop", "tie"
    if stated is not None and (stated if direction > 0 else 1 - stated) < config.min_confidence:
        return "drop", "unsure"
    if chosen.finish_reason == "length":
        return "drop", "chosen is cut off"
    if np.isnan(gap):
        return "keep", "prior alone"
    if sign == 0:
        return "keep", "evidence alone"
    return ("keep", "confirmed") if sign * gap > 0 else ("swap", "contradicted")
