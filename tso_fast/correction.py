"""Evaluation correction: the matrix's prior order of two responses against the evidence of the judges."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tso_fast.config import PairingConfig
from tso_fast.types import Candidates, Decision, Response


def prior_order(a: Response, b: Response) -> tuple[int, str]:
    """Which of two responses the matrix prefers: 1 the first, -1 the second, 0 neither; and by which rule.

    Human over model; newer over older and larger over smaller, where the two do not contradict each other.
    """
    if a.is_human != b.is_human:
        return (1 if a.is_human else -1), "human"
    if a.is_human:
        return 0, "none"
    newer = _compare(a.version_rank, b.version_rank)
    larger = _compare(a.size_b, b.size_b)
    if newer * larger < 0 or (newer == 0 and larger == 0):
        return 0, "none"
    return newer or larger, "+".join(rule for rule, sign in (("newer", newer), ("larger", larger)) if sign)


def _compare(a: float | None, b: float | None) -> int:
    return 0 if a is None or b is None else (a > b) - (a < b)


@dataclass(frozen=True, kw_only=True)
class Corrected:
    """A decided pair of responses of one prompt, by index."""

    chosen: int
    rejected: int
    prior: str
    decision: Decision
    reason: str
    gap: float
    """Consensus score of chosen less that of rejected; 0 without evidence."""


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
    item: Candidates, scores: Sequence[float] | np.ndarray, config: PairingConfig, counts: Counts
) -> list[Corrected]:
    """Decides every pair of responses to one prompt; keeps those that have an order.

    keep: the evidence confirms the prior, or is alone, or there is none and the prior is believed.
    swap: the evidence contradicts the prior. drop: no order, or nothing to learn from it.

    Args:
        scores: [R of this prompt] consensus, NaN = no evidence.
        counts: counts every pair, dropped ones included.
    """
    decided = []
    for i, j in itertools.combinations(range(len(item.responses)), 2):
        sign, rule = prior_order(item.responses[i], item.responses[j])
        gap = float(scores[i]) - float(scores[j])
        chosen, rejected = (i, j) if (sign if np.isnan(gap) else gap) > 0 else (j, i)
        decision, reason = _decide(item.responses[chosen], item.responses[rejected], sign, gap, config)
        counts.add(rule, decision, reason)
        if decision != "drop":
            size = 0.0 if np.isnan(gap) else abs(gap)
            decided.append(
                Corrected(chosen=chosen, rejected=rejected, prior=rule, decision=decision, reason=reason, gap=size)
            )
    return decided


def _decide(chosen: Response, rejected: Response, sign: int, gap: float, config: PairingConfig) -> tuple[Decision, str]:
    if chosen.text.strip() == rejected.text.strip():
        return "drop", "same text"
    if np.isnan(gap):
        if sign == 0:
            return "drop", "no order"
        if config.on_no_evidence == "drop":
            return "drop", "no evidence"
    elif abs(gap) <= config.min_margin:
        return "drop", "tie"
    if chosen.finish_reason == "length":
        return "drop", "chosen is cut off"
    if np.isnan(gap):
        return "keep", "prior alone"
    if sign == 0:
        return "keep", "evidence alone"
    return ("keep", "confirmed") if sign * gap > 0 else ("swap", "contradicted")
