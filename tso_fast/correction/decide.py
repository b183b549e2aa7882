"""Decisions: keep, swap or drop, with a reason for every pair.

A human label decides; otherwise the judges do, by the gap of their consensus scores or by the probability from
``correction.reliability.combine``.

Letters in shapes: N pairs, R responses of all prompts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tso_fast.config.settings import PairingConfig
from tso_fast.correction.votes import Votes
from tso_fast.types import Candidates, Decision

REASONS: dict[str, Decision] = {
    "same text": "drop",
    "human: bad": "drop",
    "human: tie": "drop",
    "no order": "drop",
    "no evidence": "drop",
    "tie": "drop",
    "unsure": "drop",
    "judges disagree": "drop",
    "chosen is cut off": "drop",
    "human alone": "keep",
    "human: confirmed": "keep",
    "human: contradicted": "swap",
    "prior alone": "keep",
    "evidence alone": "keep",
    "confirmed": "keep",
    "contradicted": "swap",
}
"""Decisions by their reasons. The first reason that holds counts, see ``_reasons``."""


class Belief(NamedTuple):
    """What is believed of all pairs before people are asked, one row a pair."""

    gap_N: np.ndarray
    """How much better the first response is, as a gap of scores or of probabilities; NaN: no evidence."""
    first_N: np.ndarray
    """Probability that the first is better, given that one of them is; NaN: the evidence gives only the order."""
    neither_N: np.ndarray
    """Probability that neither is."""


def from_scores(votes: Votes, scores_R: np.ndarray) -> Belief:
    """Belief that follows from one consensus score a response, NaN = no evidence."""
    first, second = scores_R[votes.rows_of_pair.T].astype(np.float64)
    return Belief(first - second, np.full(len(first), np.nan), np.zeros(len(first)))


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


@dataclass(frozen=True, kw_only=True)
class Decided:
    """All pairs of all prompts, decided."""

    votes: Votes
    reason_N: np.ndarray
    """[N] int64: index into ``REASONS``."""
    chosen_N: np.ndarray
    """[N] int64: row of the response that is chosen, unless the pair is dropped."""
    rejected_N: np.ndarray
    """[N] int64"""
    gap_N: np.ndarray
    """[N] float64, see ``Corrected``; so is the next."""
    probability_N: np.ndarray
    """[N] float64, NaN = the evidence gives only the order."""

    @functools.cached_property
    def is_used(self) -> np.ndarray:
        """[N] bool: the pair is not dropped."""
        return np.array([decision != "drop" for decision in REASONS.values()])[self.reason_N]

    def pairs(self, numbers: np.ndarray) -> list[Corrected]:
        """Records of some pairs, by their numbers."""
        votes, reasons = self.votes, tuple(REASONS)
        start = votes.offsets[votes.prompt_of_pair[numbers]]
        columns = (
            self.chosen_N[numbers] - start,
            self.rejected_N[numbers] - start,
            votes.rules_N[numbers],
            self.reason_N[numbers],
            self.gap_N[numbers],
            self.probability_N[numbers],
            votes.is_labelled[numbers],
        )
        return [
            Corrected(
                chosen=chosen,
                rejected=rejected,
                prior=votes.rules[rule],
                decision=REASONS[reasons[reason]],
                reason=reasons[reason],
                gap=gap,
                probability=None if math.isnan(probability) else probability,
                is_human=is_human,
            )
            for chosen, rejected, rule, reason, gap, probability, is_human in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]

    def counts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Numbers of pairs: ``decisions`` by rule of the prior and decision, ``reasons`` by decision and reason."""
        shape = len(self.votes.rules), len(REASONS)
        cell = np.ravel_multi_index((self.votes.rules_N, self.reason_N), shape)
        table = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).tolist()
        decisions: dict[tuple[str, str], int] = {}
        reasons: dict[tuple[str, str], int] = {}
        for rule, row in zip(self.votes.rules, table, strict=True):
            for (reason, decision), count in zip(REASONS.items(), row, strict=True):
                if count:
                    decisions[rule, decision] = decisions.get((rule, decision), 0) + count
                    reasons[decision, reason] = reasons.get((decision, reason), 0) + count
        return {"decisions": _nested(decisions), "reasons": _nested(reasons)}


def _nested(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    out: dict[str, dict[str, int]] = {}
    for (first, second), count in sorted(counts.items()):
        out.setdefault(first, {})[second] = count
    return out


def correct(candidates: Sequence[Candidates], votes: Votes, belief: Belief, config: PairingConfig) -> Decided:
    """Decides every pair of responses.

    keep: the evidence confirms the prior, or there is only one of the two and it is accepted.
    swap: the evidence contradicts the prior. drop: there is no order, or it is too uncertain to train on.

    Args:
        votes: with the labels that count, and the prior order.
        belief: what follows from all other evidence.
    """
    is_known, label_N = ~np.isnan(belief.gap_N), votes.label
    direction_N = np.where(votes.has_direction, label_N, np.where(is_known, belief.gap_N, votes.prior_N))
    is_first = direction_N > 0
    first, second = votes.rows_of_pair.T
    chosen_N, rejected_N = np.where(is_first, first, second), np.where(is_first, second, first)
    stated_N = np.where(is_first, belief.first_N, 1 - belief.first_N)
    gap_N = np.where(is_first, belief.gap_N, -belief.gap_N)
    is_cut_R = np.array([r.finish_reason == "length" for item in candidates for r in item.responses], dtype=bool)
    return Decided(
        votes=votes,
        reason_N=_reasons(votes, belief, stated_N, direction_N, is_cut_R[chosen_N], config),
        chosen_N=chosen_N,
        rejected_N=rejected_N,
        gap_N=np.where(is_known, np.maximum(gap_N, 0.0), 0.0),
        probability_N=np.where(np.isnan(label_N), stated_N, (1 + np.abs(label_N)) / 2),
    )


def _reasons(
    votes: Votes,
    belief: Belief,
    stated_N: np.ndarray,
    direction_N: np.ndarray,
    is_cut_N: np.ndarray,
    config: PairingConfig,
) -> np.ndarray:
    """[N] index into ``REASONS``.

    Args:
        stated_N: probability that the chosen response is better, NaN = not stated.
        direction_N: positive where the first response is chosen.
        is_cut_N: whether the chosen response is unfinished.
    """
    gap_N, label_N, is_labelled, has_order = belief.gap_N, votes.label, votes.is_labelled, votes.prior_N != 0
    is_silent = np.isnan(gap_N)
    is_tie = (np.abs(gap_N) <= config.min_margin) | (belief.neither_N > config.max_tie_probability)
    holds = {
        "same text": votes.is_same_N,
        "human: bad": is_labelled & np.isnan(label_N),
        "human: tie": is_labelled & (label_N == 0),
        "no order": ~is_labelled & is_silent & ~has_order,
        "no evidence": ~is_labelled & is_silent & (config.on_no_evidence == "drop"),
        "tie": ~is_labelled & ~is_silent & is_tie,
        "unsure": ~is_labelled & (stated_N < config.min_confidence),
        "judges disagree": ~is_labelled & config.unanimous & votes.is_contradicted(direction_N),
        "chosen is cut off": is_cut_N,
        "human alone": is_labelled & ~has_order,
        "human: confirmed": is_labelled & (votes.prior_N * label_N > 0),
        "human: contradicted": is_labelled,
        "prior alone": is_silent,
        "evidence alone": ~has_order,
        "confirmed": votes.prior_N * gap_N > 0,
        "contradicted": np.ones(len(gap_N), dtype=bool),
    }
    assert tuple(holds) == tuple(REASONS)
    return np.stack(list(holds.values())).argmax(axis=0)
