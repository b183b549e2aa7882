"""Decisions: keep, swap or drop, with a reason on every pair.

A person's label decides; else the judges do, by the gap of their consensus scores or by the combined probability of
``reliability.combine``.
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
    """A decided pair of responses of one prompt, by index."""

    chosen: int
    rejected: int
    prior: str
    decision: Decision
    reason: str
    gap: float
    """Consensus score of chosen less that of rejected, or its probability of being better less the other's; 0 without
    evidence, and where a person overruled it."""
    probability: float | None = None
    """That chosen is the better, if one is; None: the evidence says only which one."""
    is_human: bool = False
    """A person decided."""


@dataclass
class Counts:
    """How the pairs of a set of prompts were decided."""

    decisions: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (rule of the prior, decision)."""
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (decision, reason)."""

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
    """Decides every pair of responses to one prompt; keeps those that have an order.

    keep: the evidence confirms the prior, or is alone, or there is none and the prior is believed.
    swap: the evidence contradicts the prior. drop: no order, or nothing to learn from it.

    Args:
        evidence: of every two responses.
        scores: [R of this prompt] consensus, NaN = no evidence.
        counts: counts every pair, dropped ones included.
        probabilities: [pairs of this prompt, 3] of ``beliefs.combined``, which then decide instead of the scores.
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
    """Gap in favour of the first (NaN: no evidence), and the probability that it is the better, if one is."""
    if probabilities is not None:
        first, second, _ = map(float, probabilities)
        stated = first / (first + second) if first + second > 0 else 0.5
        # Rounded, as two equal voters that contradict each other are a tie.
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
