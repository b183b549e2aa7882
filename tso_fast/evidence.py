"""What the evidence makes believe: one score a response, one probability a pair, and how right that is.

verdicts -> ScoreMatrix -> Beliefs (consensus, or reliabilities) -> correction
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from tso_fast import correction, pairing
from tso_fast.config import VERIFIERS, EvidenceConfig, PairingConfig
from tso_fast.correction import Corrected, Counts, combined, label_of
from tso_fast.errors import InputError, did_you_mean
from tso_fast.judges.verifier import make_verifier
from tso_fast.reliability import Combination, LearnFrom, expected_calibration_error, fit_temperature, tempered
from tso_fast.scoring import Agreement, agreement, bradley_terry, consensus
from tso_fast.types import HUMAN, Candidates, Comparison, PairEvidence, ScoreMatrix, Verdict

logger = logging.getLogger(__name__)

FOLDS = 5
MIN_LABELS = 50
"""Human labels that a temperature needs."""
VERIFIER_RELIABILITY = {"verifier": 0.99}
"""A program that knows the answer is not put to the vote of judges that do not."""

Evidence = Sequence[Sequence[PairEvidence]]


def score_matrix(
    candidates: Sequence[Candidates], verdicts: Sequence[Verdict], oracle: Oracle | None = None
) -> ScoreMatrix:
    """Verdicts and the scores that came with the data but the oracle's: one row a response, one column a scorer."""
    judges, given = {v.judge for v in verdicts}, {name for c in candidates for r in c.responses for name in r.scores}
    if oracle is not None:
        given -= {oracle.name}
    if both := sorted(judges & given):
        raise InputError(f"responses: the data have scores named {both[0]!r}, and so has a judge of this run; rename "
                         "those in the data")  # fmt: skip
    scorers = tuple(sorted(judges | given))
    column = {name: i for i, name in enumerate(scorers)}
    offsets = np.cumsum([0] + [len(c.responses) for c in candidates], dtype=np.int64)
    first_row = {c.prompt.id: int(offset) for c, offset in zip(candidates, offsets[:-1], strict=True)}
    scores = np.full((int(offsets[-1]), len(scorers)), np.nan, dtype=np.float32)
    for item in candidates:
        for i, response in enumerate(item.responses):
            for name, score in response.scores.items():
                if name not in column:
                    continue
                scores[first_row[item.prompt.id] + i, column[name]] = score
    for verdict in verdicts:
        if verdict.score is not None:
            scores[first_row[verdict.prompt_id] + verdict.response, column[verdict.judge]] = verdict.score
    return ScoreMatrix(scores=scores, offsets=offsets, scorers=scorers)


def with_comparisons(
    matrix: ScoreMatrix,
    candidates: Sequence[Candidates],
    comparisons: Sequence[Comparison],
    score: str = "win_rate",
) -> ScoreMatrix:
    """The matrix with a column for every judge that compares.

    Args:
        score: what a comparing judge says of one response: ``win_rate``, its mean probability of winning, or
            ``bradley_terry``, its log-strength.
    """
    judges = sorted({c.judge for c in comparisons} - {HUMAN})
    if not judges:
        return matrix
    first_row = {c.prompt.id: int(offset) for c, offset in zip(candidates, matrix.offsets[:-1], strict=True)}
    columns = []
    for judge in judges:
        told = [(first_row[c.prompt_id] + c.responses[0], first_row[c.prompt_id] + c.responses[1], c.probability)
                for c in comparisons if c.judge == judge and c.probability is not None]  # fmt: skip
        rows = np.array([pair[:2] for pair in told], dtype=np.int64).reshape(-1, 2)
        first = np.array([probability for *_, probability in told], dtype=np.float64)
        wins = np.stack([first, 1 - first], axis=1)
        if score == "bradley_terry":
            columns.append(bradley_terry(rows, wins, matrix.offsets))
            continue
        num = np.bincount(rows.ravel(), minlength=len(matrix.scores))
        won = np.bincount(rows.ravel(), wins.ravel(), minlength=len(matrix.scores))
        columns.append(np.divide(won, num, out=np.full(len(num), np.nan), where=num > 0).astype(np.float32))
    scores = np.concatenate([matrix.scores, np.stack(columns, axis=1)], axis=1)
    return ScoreMatrix(scores=np.ascontiguousarray(scores), offsets=matrix.offsets, scorers=(*matrix.scorers, *judges))


def consensus_of(matrix: ScoreMatrix, config: EvidenceConfig) -> np.ndarray:
    """One score a response, [R] float32, NaN = no evidence."""
    weights = None
    if config.score_weights is not None:
        if unknown := sorted(set(config.score_weights) - set(matrix.scorers)):
            raise InputError(f"score_weights: no scorer is called {unknown[0]!r}; the scorers are "
                             f"{', '.join(matrix.scorers) or 'none'}")  # fmt: skip
        weights = np.array([config.score_weights.get(name, 1.0) for name in matrix.scorers])
        if len(weights) and not weights.any():
            raise InputError(f"score_weights: {config.score_weights} leaves no scorer; expected a weight > 0")
    if not matrix.scorers:
        return np.full(matrix.scores.shape[0], np.nan, dtype=np.float32)
    result = consensus(matrix.scores, matrix.offsets, method=config.consensus, normalize=config.score_normalize,
                       weights=weights)  # fmt: skip
    return result.scores


class Beliefs:
    """Scores and probabilities of a set of candidates, all lists by prompt."""

    def __init__(
        self, candidates: Sequence[Candidates], evidence: Evidence, config: EvidenceConfig, matrix: ScoreMatrix
    ) -> None:
        self.candidates = candidates
        self.evidence = evidence
        self.config = config
        self.matrix = matrix
        self.combination: Combination | None = None
        self.probabilities: list[Any] = [None] * len(candidates)
        """[pairs of the prompt, 3] of ``reliability.combine``; None: scores decide."""
        bounds = matrix.offsets[1:-1]
        if config.evidence == "calibrated":
            self.learn_from = self._choose()
            self.combination = combined(candidates, evidence, self.given, _labelled(evidence), self.learn_from)
            _warn_of_misfits(self.combination)
            self.probabilities = _by_prompt(self.combination, evidence)
            self.scores = [
                _expected_win_rates(item, pairs, p)
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
        """Reliabilities that are not estimated."""
        return {**VERIFIER_RELIABILITY, **(self.config.judge_reliability or {})}

    def judges(self, verdicts: Sequence[Verdict | Comparison]) -> dict[str, dict[str, Any]]:
        """Of each judge: verdicts, abstentions, correlation with the other judges' ranks; with calibrated evidence its
        reliability, and that of the prior."""
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
                out.setdefault(name, {}).update(accuracy=found.accuracy, ties_share=found.tie_rate,
                                                pairs=found.num_votes, is_given=found.is_given)  # fmt: skip
            out |= {f"prior: {rule}": of for rule, of in _by_rule(self.combination).items() if of["pairs"]}
        return out

    @functools.cached_property
    def _agreement(self) -> Agreement:
        return agreement(self.matrix.scores, self.matrix.offsets)

    @property
    def concordance(self) -> float | None:
        """Mean Kendall's W over the prompts where it is defined: 1, all judges rank alike; None: nowhere defined."""
        known = self._agreement.concordance[~np.isnan(self._agreement.concordance)]
        return float(known.mean()) if len(known) else None

    def _choose(self) -> LearnFrom:
        """What reliabilities are learned from: whichever predicts held-back labels best.

        Agreement among dependent judges looks like reliability; labels see through it, once there are enough.
        """
        decided = [pair for pairs in self.evidence for pair in pairs if pair.labels and label_of(pair.labels)]
        if len(decided) < MIN_LABELS:
            return "all"
        losses: dict[LearnFrom, float] = {}
        for learn_from in get_args(LearnFrom):
            loss = 0.0
            for fold in range(FOLDS):
                probabilities = self.without(_is_in(fold), learn_from)
                for pairs, p in zip(self.evidence, probabilities, strict=True):
                    for n, pair in enumerate(pairs):
                        if pair.labels and _fold(pair.prompt_id) == fold and (label := label_of(pair.labels)):
                            first, second = p[n][:2] + 1e-9
                            loss -= math.log((first if label > 0 else second) / (first + second))
            losses[learn_from] = loss / len(decided)
        best = min(losses, key=lambda name: losses[name])
        logger.info("evidence: reliabilities from %s; nats a held-back label: %s", best,
                    ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))  # fmt: skip
        return best

    def without(self, hidden: Callable[[PairEvidence], bool], learn_from: LearnFrom | None = None) -> list[Any]:
        """Probabilities where the labels of some pairs are not used."""
        if self.config.evidence != "calibrated":
            return [None] * len(self.candidates)
        seen = [(pair.prompt_id, pair.responses) for pairs in self.evidence for pair in pairs
                if pair.labels and not hidden(pair)]  # fmt: skip
        learned = combined(self.candidates, self.evidence, self.given, seen, learn_from or self.learn_from)
        return _by_prompt(learned, self.evidence)

    def calibrate(self, config: PairingConfig) -> dict[str, Any] | None:
        """How well soft labels match human ones that were hidden from them, and the temperature that mends it."""
        if config.soft_label_by is None and config.soft_label_kappa is None:
            return None
        stated, right = self._against_labels(config)
        if not len(stated):
            return None
        out = {"labels": len(stated), "accuracy": float(right.mean()), "temperature": 1.0,
               "ece": expected_calibration_error(stated, right), "ece_tempered": None}  # fmt: skip
        if config.calibrate_soft_labels and len(stated) >= MIN_LABELS:
            out["temperature"] = fit_temperature(stated, right)
            parts = np.arange(len(stated)) % FOLDS
            held_back = stated.copy()
            for fold in range(FOLDS):
                others = parts != fold
                held_back[~others] = tempered(stated[~others], fit_temperature(stated[others], right[others]))
            out["ece_tempered"] = expected_calibration_error(held_back, right)
        return out

    def _against_labels(self, config: PairingConfig) -> tuple[np.ndarray, np.ndarray]:
        """Soft labels of pairs that people have labelled, stated without that label; and whether they agree."""
        stated, right = [], []
        anything = dataclasses.replace(config, min_margin=0.0, min_confidence=0.0, on_no_evidence="prior")
        for fold in range(FOLDS if self.config.evidence == "calibrated" else 1):
            hidden = _is_in(fold) if self.config.evidence == "calibrated" else lambda pair: True
            if not any(pair.labels and hidden(pair) for pairs in self.evidence for pair in pairs):
                continue
            probabilities = self.without(hidden)
            for p, item in enumerate(self.candidates):
                labels = {pair.responses: label_of(pair.labels) for pair in self.evidence[p]
                          if pair.labels and hidden(pair)}  # fmt: skip
                if not any(labels.values()):
                    continue
                unlabelled = [dataclasses.replace(pair, labels={}) for pair in self.evidence[p]]
                scores, win_rates = self.scores[p], self.win_rates[p]
                if self.config.evidence == "calibrated":  # without what the labels told
                    scores = win_rates = _expected_win_rates(item, unlabelled, probabilities[p])
                for pair in correction.correct(item, scores, anything, Counts(), evidence=unlabelled,
                                               probabilities=probabilities[p]):  # fmt: skip
                    i, j = sorted((pair.chosen, pair.rejected))
                    if label := labels.get((i, j)):
                        stated.append(pairing.soft_label(pair, scores, config, win_rates))
                        right.append(float((label > 0) == (pair.chosen == i)))
        return np.array(stated), np.array(right)


def _warn_of_misfits(combination: Combination) -> None:
    if not combination.misfits:
        return
    (a, b), (observed, expected) = max(combination.misfits.items(), key=lambda item: abs(item[1][0] - item[1][1]))
    others = len(combination.misfits) - 1
    logger.warning(
        "evidence: %s and %s agree on %.0f %% of pairs, independent voters as reliable as these would on %.0f %%%s; "
        "voters that depend on each other look more reliable than they are, which human labels can tell "
        "(`tso-fast annotate`)",
        a, b, 100 * observed, 100 * expected, f", and likewise {others} more" if others else "",
    )  # fmt: skip


def _by_rule(combination: Combination) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for (rule, _), found in combination.prior.items():
        row = out.setdefault(rule, {"accuracy": 0.0, "ties_share": 0.0, "pairs": 0, "is_given": found.is_given})
        row["pairs"] += found.num_votes
        row["accuracy"] += (found.accuracy - row["accuracy"]) * found.num_votes / max(row["pairs"], 1)
    return out


def _is_in(fold: int) -> Callable[[PairEvidence], bool]:
    return lambda pair: _fold(pair.prompt_id) == fold


def _fold(prompt_id: str) -> int:
    return zlib.crc32(prompt_id.encode()) % FOLDS


def _labelled(evidence: Evidence) -> list[tuple[str, tuple[int, int]]]:
    return [(pair.prompt_id, pair.responses) for pairs in evidence for pair in pairs if pair.labels]


def _by_prompt(combination: Combination, evidence: Evidence) -> list[Any]:
    return list(np.split(combination.probabilities, np.cumsum([len(pairs) for pairs in evidence])[:-1]))


def _expected_win_rates(item: Candidates, pairs: Sequence[PairEvidence], p: np.ndarray | None) -> np.ndarray:
    """[R] float32: mean probability of being the better of two, neither half; NaN for a response without evidence."""
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


# -------------------------------------------------------------------------------------------------- measured against


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """What is known to be right and is no evidence."""

    name: str
    """``is_correct`` of the responses, a scorer of the data, or a verifier."""
    scores: Sequence[Sequence[float | None]]
    """By prompt and response; None: not known."""


def make_oracle(name: str, candidates: Sequence[Candidates]) -> Oracle:
    """
    Raises:
        InputError: nothing in the data is called so.
    """
    if name == "is_correct":
        scores = [[None if r.is_correct is None else float(r.is_correct) for r in c.responses] for c in candidates]
        # A person's own response has no such field; it is what the answer was taken from.
    elif any(name in r.scores for c in candidates for r in c.responses):
        scores = [[r.scores.get(name) for r in c.responses] for c in candidates]
    else:
        names = {score for c in candidates for r in c.responses for score in r.scores}
        known = sorted({"is_correct", *VERIFIERS, *names} - {"regex"})  # which needs a pattern
        if name not in known and ":" not in name:
            raise InputError(f"oracle: nothing is called {name!r}{did_you_mean(name, known)}; expected one of "
                             f"{', '.join(known)}, or package.module:function")  # fmt: skip
        check = make_verifier(name)
        scores = [[check(c.prompt, r).score for r in c.responses] for c in candidates]
    if all(score is None for of_prompt in scores for score in of_prompt):
        raise InputError(f"oracle: no response has {name!r}; expected is_correct, a name in the data's scores, or a "
                         "verifier")  # fmt: skip
    return Oracle(name=name, scores=scores)


def errors_against(
    oracle: Oracle,
    candidates: Sequence[Candidates],
    evidence: Evidence,
    decided: Sequence[Sequence[Corrected]],
    beliefs: Beliefs,
) -> dict[str, dict[str, int]]:
    """By rule of the prior, over the pairs that the oracle orders: how many, and how many each way gets wrong.

    ``prior``: the matrix's order. ``kept``: pairs that correction decided; ``corrected``: those of them that it decided
    wrongly. ``best``: the kept pairs that the same evidence gets wrong with reliabilities counted on the oracle itself
    (on other prompts, in five folds): what correction could reach with nothing left to estimate.
    """
    told = [[_told(pair, oracle.scores[p]) for pair in pairs] for p, pairs in enumerate(evidence)]
    best = _best(candidates, evidence, told, beliefs.given)
    out: dict[str, dict[str, int]] = {}
    for p, pairs in enumerate(evidence):
        chosen = {frozenset((d.chosen, d.rejected)): d.chosen for d in decided[p]}
        for n, (pair, truth) in enumerate(zip(pairs, told[p], strict=True)):
            if not truth:
                continue
            row = out.setdefault(pair.rule, {"pairs": 0, "prior": 0, "kept": 0, "corrected": 0, "best": 0})
            row["pairs"] += 1
            row["prior"] += pair.prior == -truth
            if (of := chosen.get(frozenset(pair.responses))) is not None:
                row["kept"] += 1
                row["corrected"] += (of == pair.responses[0]) != (truth > 0)
                first, second, _ = best[p][n]
                row["best"] += (first > second) != (truth > 0)
    return out


def _told(pair: PairEvidence, scores: Sequence[float | None]) -> int:
    a, b = (scores[i] for i in pair.responses)
    return 0 if a is None or b is None else (a > b) - (a < b)


def _best(
    candidates: Sequence[Candidates], evidence: Evidence, told: Sequence[Sequence[int]], given: dict[str, float]
) -> list[np.ndarray]:
    """Probabilities with the oracle's order as labels of the other folds."""
    labelled = [
        [dataclasses.replace(pair, labels={"oracle": float(truth)}) for pair, truth in zip(pairs, truths, strict=True)]
        for pairs, truths in zip(evidence, told, strict=True)
    ]
    out: list[np.ndarray] = [np.empty((len(pairs), 3)) for pairs in evidence]
    for fold in range(FOLDS):
        seen = [
            (pair.prompt_id, pair.responses) for pairs in labelled for pair in pairs if _fold(pair.prompt_id) != fold
        ]
        found = _by_prompt(combined(candidates, labelled, given, seen, learn_from="weights"), evidence)
        for p, item in enumerate(candidates):
            if _fold(item.prompt.id) == fold:
                out[p] = found[p]
    return out


# ------------------------------------------------------------------------------------------------- for people

JUDGE_COLUMNS = ("voter", "verdicts", "abstained", "with the rest", "votes on pairs", "ties", "believed right")
COST_COLUMNS = ("judge", "requests", "new", "prompt tokens", "tokens written", "abstained", "contradictions",
                "first shown")  # fmt: skip


def judge_rows(judges: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """What was asked of whom, how it correlates with the others and, if calibrated, how far it was believed."""
    for name, of in judges.items():
        verdicts, abstained, pairs = (
            f"{of[key]:,}" if key in of else "-" for key in ("verdicts", "abstained", "pairs")
        )
        rest = "-" if of.get("correlation") is None else f"{of['correlation']:.2f}"
        ties = f"{of['ties_share']:.1%}" if "ties_share" in of else "-"
        believed = "-" if "accuracy" not in of else f"{of['accuracy']:.1%}" + (" (given)" if of["is_given"] else "")
        yield name, verdicts, abstained, rest, pairs, ties, believed


def cost_rows(costs: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """What judges that are models took, and how often the two orders of a pair contradict each other."""
    for name, of in costs.items():
        numbers = (f"{of[key]:,}" for key in ("requests", "new_requests", "prompt_tokens", "completion_tokens",
                                              "abstentions"))  # fmt: skip
        shares = (f"{of[key]:.0%}" if of[key] is not None else "-" for key in ("disagreement", "first_shown_share"))
        yield (name, *numbers, *shares)
