"""Evaluation correction: the matrix's prior order of two responses against the evidence of judges and people.

    PairEvidence -> (consensus scores | reliabilities) -> keep, swap or drop, with a reason on every pair

A person's label decides; else the judges do, by the gap of their consensus scores or by the combined probability of
``reliability.combine``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tso_fast.config import PairingConfig
from tso_fast.errors import InputError
from tso_fast.reliability import Combination, LearnFrom, combine
from tso_fast.types import HUMAN, Candidates, Comparison, Decision, PairEvidence, Response, ScoreMatrix


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


def evidence_of(
    candidates: Sequence[Candidates], matrix: ScoreMatrix, comparisons: Iterable[Comparison]
) -> list[list[PairEvidence]]:
    """Prior order, votes and labels of every two responses of every prompt.

    Args:
        matrix: scores of the judges that look at single responses.
        comparisons: of the judges that look at two; those of judge ``human`` are labels.
    """
    votes: dict[tuple[str, int, int], dict[str, float]] = {}
    labels: dict[tuple[str, int, int], dict[str, float | None]] = {}
    for comparison in comparisons:
        (i, j), p = sorted(comparison.responses), comparison.probability
        # Negative where the responses are named the other way round.
        vote = None if p is None else (2 * p - 1) * (1 if comparison.responses == (i, j) else -1)
        if comparison.judge == HUMAN:
            labels.setdefault((comparison.prompt_id, i, j), {})[comparison.annotator or ""] = vote
        elif comparison.judge in matrix.scorers:
            raise InputError(f"verdicts: judge {comparison.judge!r} has verdicts on single responses and on two; "
                             "expected one kind")  # fmt: skip
        elif vote is not None:
            votes.setdefault((comparison.prompt_id, i, j), {})[comparison.judge] = vote
    out = []
    for p, item in enumerate(candidates):
        own = matrix.scores[matrix.offsets[p] : matrix.offsets[p + 1]].astype(np.float64)
        pairs = []
        for i, j in itertools.combinations(range(len(item.responses)), 2):
            sign, rule = prior_order(item.responses[i], item.responses[j])
            gaps = own[i] - own[j]
            seen = {name: float(gap) for name, gap in zip(matrix.scorers, gaps, strict=True) if not np.isnan(gap)}
            key = (item.prompt.id, i, j)
            compared = votes.get(key, {})
            stated = (1 + sum(compared.values()) / len(compared)) / 2 if compared else None
            pairs.append(PairEvidence(prompt_id=item.prompt.id, responses=(i, j), prior=sign, rule=rule, stated=stated,
                                      votes={**seen, **compared}, labels=labels.get(key, {})))  # fmt: skip
        out.append(pairs)
    return out


def label_of(labels: Mapping[str, float | None]) -> float | None:
    """What people say together: the mean of their labels; None: most of them call the pair bad."""
    given = [label for label in labels.values() if label is not None]
    if 2 * len(given) <= len(labels):
        return None
    return sum(given) / len(given)


def combined(
    candidates: Sequence[Candidates],
    evidence: Sequence[Sequence[PairEvidence]],
    given: Mapping[str, float],
    labelled: Iterable[tuple[str, tuple[int, int]]] = (),
    learn_from: LearnFrom = "all",
) -> Combination:
    """Reliabilities from all pairs of different texts, and their probabilities, in the order of ``evidence``.

    Args:
        given: accuracies that are not estimated, by judge or ``prior: RULE``.
        labelled: the pairs whose labels may be used.
        learn_from: of ``reliability.combine``.
    """
    flat = [(item, pair) for item, pairs in zip(candidates, evidence, strict=True) for pair in pairs]
    judges = sorted({name for _, pair in flat for name in pair.votes})
    column = {name: j for j, name in enumerate(judges)}
    votes = np.full((len(flat), len(judges)), np.nan)
    prior, of = np.zeros(len(flat), dtype=np.int64), np.zeros(len(flat), dtype=np.int64)
    labels = np.full(len(flat), np.nan)
    classes: dict[tuple[str, str], int] = {}
    visible = set(labelled)
    for n, (item, pair) in enumerate(flat):
        if is_same_text(item, pair.responses):
            continue
        for name, vote in pair.votes.items():
            votes[n, column[name]] = vote
        if pair.prior:
            prior[n] = pair.prior
            better, worse = pair.responses if pair.prior > 0 else pair.responses[::-1]
            name = f"{item.responses[better].model} > {item.responses[worse].model}"
            of[n] = classes.setdefault((pair.rule, name), len(classes))
        if pair.labels and (pair.prompt_id, pair.responses) in visible:
            label = label_of(pair.labels)
            labels[n] = np.nan if label is None else np.sign(label)
    return combine(votes, judges, prior_N=prior, classes_N=of, classes=list(classes), labels_N=labels,
                   given=given, learn_from=learn_from)  # fmt: skip


def is_same_text(item: Candidates, pair: tuple[int, int]) -> bool:
    i, j = pair
    return item.responses[i].text.strip() == item.responses[j].text.strip()


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
    scores: Sequence[float] | np.ndarray,
    config: PairingConfig,
    counts: Counts,
    *,
    evidence: Sequence[PairEvidence] = (),
    probabilities: np.ndarray | None = None,
) -> list[Corrected]:
    """Decides every pair of responses to one prompt; keeps those that have an order.

    keep: the evidence confirms the prior, or is alone, or there is none and the prior is believed.
    swap: the evidence contradicts the prior. drop: no order, or nothing to learn from it.

    Args:
        scores: [R of this prompt] consensus, NaN = no evidence.
        counts: counts every pair, dropped ones included.
        evidence: of every two responses, in the order of ``itertools.combinations``; for labels and comparisons.
        probabilities: [pairs of this prompt, 3] of ``combined``, which then decide instead of the scores.
    """
    decided = []
    for n, (i, j) in enumerate(itertools.combinations(range(len(item.responses)), 2)):
        sign, rule = prior_order(item.responses[i], item.responses[j])
        known = evidence[n] if evidence else None
        gap, stated = _belief(known, None if probabilities is None else probabilities[n], scores[i], scores[j])
        label = label_of(known.labels) if known and known.labels else None
        direction = label or (sign if np.isnan(gap) else gap)
        chosen, rejected = (i, j) if direction > 0 else (j, i)
        decision: Decision
        if is_same_text(item, (i, j)):
            decision, reason = "drop", "same text"
        elif known and known.labels:
            decision, reason = _decide_by_label(item.responses[chosen], label, sign)
        else:
            neither = 0.0 if probabilities is None else float(probabilities[n][2])
            decision, reason = _decide(item.responses[chosen], sign, gap, direction, neither, stated, config)
        counts.add(rule, decision, reason)
        if decision == "drop":
            continue
        is_human = bool(known and known.labels)
        signed = gap if chosen == i else -gap
        if is_human:
            assert label is not None
            stated = (1 + abs(label)) / 2
        elif stated is not None and chosen != i:
            stated = 1 - stated
        decided.append(
            Corrected(chosen=chosen, rejected=rejected, prior=rule, decision=decision, reason=reason,
                      gap=0.0 if np.isnan(gap) else max(signed, 0.0), probability=stated, is_human=is_human)
        )  # fmt: skip
    return decided


def _belief(
    known: PairEvidence | None, probabilities: np.ndarray | None, score_i: float, score_j: float
) -> tuple[float, float | None]:
    """Gap in favour of the first (NaN: no evidence), and the probability that it is the better, if one is."""
    if probabilities is not None:
        first, second, _ = map(float, probabilities)
        stated = first / (first + second) if first + second > 0 else 0.5
        # Rounded, as two equal voters that contradict each other are a tie.
        return (round(first - second, 12) if known is not None and known.votes else np.nan), stated
    return float(score_i) - float(score_j), known.stated if known is not None else None


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
