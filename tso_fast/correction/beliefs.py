"""Beliefs that follow from the evidence: one score per response, and one probability per pair.

ScoreMatrix, PairEvidence -> consensus of scores, or reliabilities of voters -> Beliefs
"""

from __future__ import annotations

import functools
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from tso_fast.config.settings import EvidenceConfig
from tso_fast.correction.evidence import Evidence
from tso_fast.correction.reliability import Combination, LearnFrom, combine
from tso_fast.errors import InputError
from tso_fast.scoring import Agreement, agreement, consensus
from tso_fast.types import Candidates, Comparison, PairEvidence, ScoreMatrix, Verdict

logger = logging.getLogger(__name__)

FOLDS = 5
MIN_LABELS = 50
"""Fewest human labels needed to choose how reliabilities are learned, or to fit a temperature."""
VERIFIER_RELIABILITY = {"verifier": 0.99}
"""Fixed, since judges that do not know the answer should not outvote a program that does."""


def consensus_of(matrix: ScoreMatrix, config: EvidenceConfig) -> np.ndarray:
    """Consensus score of each response, [R] float32, NaN = no evidence."""
    weights = None
    if config.score_weights is not None:
        if unknown := sorted(set(config.score_weights) - set(matrix.scorers)):
            raise InputError(
                f"score_weights: no scorer is called {unknown[0]!r}; the scorers are "
                f"{', '.join(matrix.scorers) or 'none'}"
            )
        weights = np.array([config.score_weights.get(name, 1.0) for name in matrix.scorers])
        if len(weights) and not weights.any():
            raise InputError(f"score_weights: {config.score_weights} leaves no scorer; expected a weight > 0")
    if not matrix.scorers:
        return np.full(matrix.scores.shape[0], np.nan, dtype=np.float32)
    result = consensus(
        matrix.scores, matrix.offsets, method=config.consensus, normalize=config.score_normalize, weights=weights
    )
    return result.scores


def combined(
    candidates: Sequence[Candidates],
    evidence: Sequence[Sequence[PairEvidence]],
    given: Mapping[str, float],
    labelled: Iterable[tuple[str, tuple[int, int]]] = (),
    learn_from: LearnFrom = "all",
) -> Combination:
    """Reliabilities and pair probabilities, in the order of ``evidence``, learned from all pairs of different texts.

    Args:
        given: fixed accuracies that are not estimated, by judge or ``prior: RULE``.
        labelled: pairs whose labels may be used.
        learn_from: see ``correction.reliability.combine``.
    """
    flat = [(item, pair) for item, pairs in zip(candidates, evidence, strict=True) for pair in pairs]
    judges = sorted({name for _, pair in flat for name in pair.votes})
    column = {name: j for j, name in enumerate(judges)}
    votes = np.full((len(flat), len(judges)), np.nan)
    prior, class_index = np.zeros(len(flat), dtype=np.int64), np.zeros(len(flat), dtype=np.int64)
    labels = np.full(len(flat), np.nan)
    classes: dict[tuple[str, str], int] = {}
    visible = set(labelled)
    for n, (item, pair) in enumerate(flat):
        if pair.is_same_text:
            continue
        for name, vote in pair.votes.items():
            votes[n, column[name]] = vote
        if pair.prior:
            prior[n] = pair.prior
            better, worse = pair.responses if pair.prior > 0 else pair.responses[::-1]
            name = f"{item.responses[better].model} > {item.responses[worse].model}"
            class_index[n] = classes.setdefault((pair.rule, name), len(classes))
        if pair.labels and (pair.prompt_id, pair.responses) in visible:
            labels[n] = np.nan if pair.label is None else np.sign(pair.label)
    return combine(
        votes,
        judges,
        prior_N=prior,
        classes_N=class_index,
        classes=list(classes),
        labels_N=labels,
        given=given,
        learn_from=learn_from,
    )


class Beliefs:
    """Scores and probabilities of a set of candidates; all lists are by prompt."""

    def __init__(
        self, candidates: Sequence[Candidates], evidence: Evidence, config: EvidenceConfig, matrix: ScoreMatrix
    ) -> None:
        self.candidates = candidates
        self.evidence = evidence
        self.config = config
        self.matrix = matrix
        self.combination: Combination | None = None
        self.probabilities: list[Any] = [None] * len(candidates)
        """[pairs of the prompt, 3], see ``Combination.probabilities``; None: scores decide."""
        bounds = matrix.offsets[1:-1]
        if config.evidence == "calibrated":
            self.learn_from = self._choose()
            self.combination = combined(candidates, evidence, self.given, _labelled(evidence), self.learn_from)
            _warn_of_misfits(self.combination)
            self.probabilities = by_prompt(self.combination, evidence)
            self.scores = [
                expected_win_rates(item, pairs, p)
                for item, pairs, p in zip(candidates, evidence, self.probabilities, strict=True)
            ]
            self.win_rates = self.scores
        else:
            self.scores = np.split(consensus_of(matrix, config), bounds) if len(candidates) else []
            self.win_rates = self.scores
            if matrix.scorers:
                rates = consensus(matrix.scores, matrix.offsets, method="win_rate", normalize="none").scores
                self.win_rates = np.split(rates, bounds) if len(candidates) else []

    @property
    def given(self) -> dict[str, float]:
        """Fixed reliabilities, which are not estimated."""
        return {**VERIFIER_RELIABILITY, **(self.config.judge_reliability or {})}

    def judges(self, verdicts: Sequence[Verdict | Comparison]) -> dict[str, dict[str, Any]]:
        """Facts about each judge: verdicts, abstentions, correlation with the other judges' ranks and, if evidence is
        calibrated, its reliability; also the reliability of the prior."""
        out: dict[str, dict[str, Any]] = {}
        for verdict in verdicts:
            row = out.setdefault(verdict.judge, {"verdicts": 0, "abstained": 0})
            row["verdicts"] += 1
            row["abstained"] += (verdict.score if isinstance(verdict, Verdict) else verdict.probability) is None
            if isinstance(verdict, Comparison):
                row["ties"] = row.get("ties", 0) + (verdict.probability == 0.5)
        if len(self.matrix.scorers) > 1:
            for name, value in zip(self.matrix.scorers, self._agreement.leave_one_out.tolist(), strict=True):
                out.setdefault(name, {})["correlation"] = None if math.isnan(value) else value
        if self.combination is not None:
            for name, found in self.combination.judges.items():
                if not found.num_votes:
                    continue
                out.setdefault(name, {}).update(
                    accuracy=found.accuracy, ties_share=found.tie_rate, pairs=found.num_votes, is_given=found.is_given
                )
            out |= {f"prior: {rule}": row for rule, row in _by_rule(self.combination).items() if row["pairs"]}
        return out

    @functools.cached_property
    def _agreement(self) -> Agreement:
        return agreement(self.matrix.scores, self.matrix.offsets)

    @property
    def concordance(self) -> float | None:
        """Mean Kendall's W over the prompts where it is defined; 1: all judges rank alike; None: never defined."""
        known = self._agreement.concordance[~np.isnan(self._agreement.concordance)]
        return float(known.mean()) if len(known) else None

    def _choose(self) -> LearnFrom:
        """Chooses what reliabilities are learned from: the option that predicts held-back labels best.

        Dependent judges agree with each other and so look reliable; enough human labels reveal this.
        """
        decided = [pair for pairs in self.evidence for pair in pairs if pair.label]
        if len(decided) < MIN_LABELS:
            return "all"
        losses: dict[LearnFrom, float] = {}
        for learn_from in get_args(LearnFrom):
            loss = 0.0
            for fold in range(FOLDS):
                probabilities = self.without(is_in(fold), learn_from)
                for pairs, p in zip(self.evidence, probabilities, strict=True):
                    for n, pair in enumerate(pairs):
                        if fold_of(pair.prompt_id) == fold and (label := pair.label):
                            first, second = p[n][:2] + 1e-9
                            loss -= math.log((first if label > 0 else second) / (first + second))
            losses[learn_from] = loss / len(decided)
        best = min(losses, key=lambda name: losses[name])
        logger.info(
            "evidence: reliabilities from %s; nats a held-back label: %s",
            best,
            ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()),
        )
        return best

    def without(self, hidden: Callable[[PairEvidence], bool], learn_from: LearnFrom | None = None) -> list[Any]:
        """Probabilities when the labels of ``hidden`` pairs are not used."""
        if self.config.evidence != "calibrated":
            return [None] * len(self.candidates)
        seen = [
            (pair.prompt_id, pair.responses)
            for pairs in self.evidence
            for pair in pairs
            if pair.labels and not hidden(pair)
        ]
        learned = combined(self.candidates, self.evidence, self.given, seen, learn_from or self.learn_from)
        return by_prompt(learned, self.evidence)


def _warn_of_misfits(combination: Combination) -> None:
    if not combination.misfits:
        return
    (a, b), (observed, expected) = max(combination.misfits.items(), key=lambda item: abs(item[1][0] - item[1][1]))
    others = len(combination.misfits) - 1
    logger.warning(
        "evidence: %s and %s agree on %.0f %% of pairs, independent voters as reliable as these would on %.0f %%%s; "
        "voters that depend on each other look more reliable than they are, which human labels can tell "
        "(`tso-fast annotate`)",
        a,
        b,
        100 * observed,
        100 * expected,
        f", and likewise {others} more" if others else "",
    )


def _by_rule(combination: Combination) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for (rule, _), found in combination.prior.items():
        row = out.setdefault(rule, {"accuracy": 0.0, "ties_share": 0.0, "pairs": 0, "is_given": found.is_given})
        row["pairs"] += found.num_votes
        row["accuracy"] += (found.accuracy - row["accuracy"]) * found.num_votes / max(row["pairs"], 1)
    return out


def is_in(fold: int) -> Callable[[PairEvidence], bool]:
    return lambda pair: fold_of(pair.prompt_id) == fold


def fold_of(prompt_id: str) -> int:
    return zlib.crc32(prompt_id.encode()) % FOLDS


def _labelled(evidence: Evidence) -> list[tuple[str, tuple[int, int]]]:
    return [(pair.prompt_id, pair.responses) for pairs in evidence for pair in pairs if pair.labels]


def by_prompt(combination: Combination, evidence: Evidence) -> list[Any]:
    return list(np.split(combination.probabilities, np.cumsum([len(pairs) for pairs in evidence])[:-1]))


def expected_win_rates(item: Candidates, pairs: Sequence[PairEvidence], p: np.ndarray | None) -> np.ndarray:
    """Mean probability of being the better of two, "neither" counting half, [R] float32; NaN: no evidence."""
    assert p is not None
    n = len(item.responses)
    sums, has_evidence = np.zeros(n), np.zeros(n, dtype=bool)
    for pair, (first, second, neither) in zip(pairs, p, strict=True):
        i, j = pair.responses
        sums[i] += first + neither / 2
        sums[j] += second + neither / 2
        if pair.votes or pair.labels:
            has_evidence[[i, j]] = True
    return np.where(has_evidence, sums / max(n - 1, 1), np.nan).astype(np.float32)
