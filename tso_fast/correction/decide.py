"""Decisions: keep, swap or drop, with a reason for every pair.

A human label decides; otherwise the judges do, by the gap of their consensus scores or by the probability from
``correction.reliability.combine``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    scores: Sequence[float] | np.ndarray,
    config: PairingConfig,
    counts: Counts,
    probabilities: np.ndarray | None = None,
) -> list[Corrected]:
    """Decides every pair of responses to one prompt and returns the pairs that are not dropped.

    keep: the evidence confirms the prior, or there is only one of the two and it is accepted.
    swap: the evidence contradicts the prior. drop: there is no order, or it is too uncertain to train on.

    Args:
        evidence: evidence on every pair of responses.
        scores: [R of this prompt] consensus scores, NaN = no evidence.
        counts: receives every pair, including dropped ones.
        probabilities: [pairs of this prompt, 3] from ``beliefs.combined``; if given, they decide instead of scores.
    """
    decided = []
    for n, pair in enumerate(evidence):
        i, j = pair.responses
        p = None if probabilities is None else probabilities[n]
        gap, stated = _belief(pair, p, scores[i], scores[j])
        direction = pair.label or (pair.prior if np.isnan(gap) else gap)
        chosen, rejected = (i, j) if direction > 0 else (j, i)
        decision: Decision
        if pair.is_same_text:
            decision, reason = "drop", "same text"
        elif pair.labels:
            decision, reason = _decide_by_label(item.responses[chosen], pair.label, pair.prior)
        else:
            neither = 0.0 if p is None else float(p[2])
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


def _belief(
    pair: PairEvidence, probabilities: np.ndarray | None, score_i: float, score_j: float
) -> tuple[float, float | None]:
    """Gap in favour of the first response (NaN: no evidence), and the probability that it is better, if one is."""
    if probabilities is not None:
        first, second, _ = map(float, probabilities)
        stated = first / (first + second) if first + second > 0 else 0.5
        # Rounded, since two equally reliable voters that contradict each other should tie.
        return (round(first - second, 12) if pair.votes else np.nan), stated
    return float(score_i) - float(score_j), pair.stated


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
    elif abs(gap) <= config.min_margin or neither > 0.5:
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
