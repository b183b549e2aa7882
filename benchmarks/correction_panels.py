"""Simulated judges on a real model matrix, the joint limit of what their votes tell, and figures of a panel."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from tso_fast.config.settings import EvidenceConfig, PairingConfig
from tso_fast.correction.beliefs import INVERTED, LONGER, PULL, consensus_of
from tso_fast.correction.calibration import expected_calibration_error
from tso_fast.correction.evidence import compared_of, score_matrix, votes_of
from tso_fast.correction.reliability import Combination, combine
from tso_fast.correction.votes import Voter, Votes
from tso_fast.files.rows import BadRows, read_candidates
from tso_fast.types import ScoreMatrix

COVERAGES = (1.0, 0.8)
STATES = np.array([-1, 0, 1])
"""Of a pair: the second response is better, neither is, the first is."""

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------- the simulated judges


class Judged(NamedTuple):
    """Votes of simulated judges, and what they truly tell."""

    strength_NJ: np.ndarray
    """Positive: the first response is better; NaN: no vote."""
    log_NS: np.ndarray
    """[N, 3] log-likelihood of all votes on a pair in each of ``STATES``."""


class Matrix:
    """All pairs of a real model matrix, with the truth."""

    def __init__(self, file: Path) -> None:
        rows = read_candidates(file, BadRows())
        self.candidates = [
            dataclasses.replace(item, responses=tuple(r for r in item.responses if not r.is_human)) for item in rows
        ]
        self.base = votes_of(self.candidates, score_matrix(self.candidates, []), compared_of(self.candidates, []))
        right_PR = np.array([[bool(r.is_correct) for r in item.responses] for item in self.candidates]).astype(int)
        first, second = np.triu_indices(right_PR.shape[1], 1)
        self.truth_N = (right_PR[:, first] - right_PR[:, second]).ravel()
        self.is_measured = (self.truth_N != 0) & (self.base.prior_N != 0)
        right_CR = np.array(list(itertools.product([0, 1], repeat=right_PR.shape[1])))
        self.state_CN = right_CR[:, first] - right_CR[:, second]
        """[C, pairs of a prompt] state of each pair in each possibility of right and wrong responses."""
        counts = (right_PR[:, None] == right_CR).all(axis=2).sum(axis=0)
        self.log_frequency_C = np.log(counts / counts.sum(), out=np.full(len(counts), -np.inf), where=counts > 0)

    def votes(self, judged: Judged) -> Votes:
        """The votes as the package gathers them from comparisons, the first response of each pair shown first."""
        strength_NJ = judged.strength_NJ.astype(np.float32)
        strength_NJ[self.base.is_same_N] = np.nan
        return dataclasses.replace(
            self.base,
            voters=tuple(Voter(name=f"judge {j + 1}", kind="comparison") for j in range(strength_NJ.shape[1])),
            strength_NJ=strength_NJ,
            shown_NJ=np.where(np.isnan(strength_NJ), 0, 1).astype(np.int8),
            abstained_NJ=np.zeros(strength_NJ.shape, dtype=bool),
        )

    def limit(self, judged: Judged) -> np.ndarray:
        """[N] log-odds that the first response is better, with all that can be known."""
        log_NS = np.where(self.base.is_same_N[:, None] & (STATES != 0), -np.inf, judged.log_NS)
        each_PNS = log_NS.reshape(-1, self.state_CN.shape[1], 3)
        log_PC = each_PNS[:, np.arange(each_PNS.shape[1]), self.state_CN + 1].sum(axis=2) + self.log_frequency_C
        sides = [
            np.logaddexp.reduce(np.where(side == self.state_CN.T, log_PC[:, None], -np.inf), axis=2) for side in (1, -1)
        ]
        first, second = (np.maximum(side, -700.0).ravel() for side in sides)
        return first - second


def independent(matrix: Matrix, accuracies: Sequence[float], seed: int, silent: bool = False) -> Judged:
    """Judges that err independently; where both responses are right or both wrong they guess, or are silent."""
    rng = np.random.default_rng(seed)
    truth = matrix.truth_N[:, None]
    right = rng.random((len(truth), len(accuracies))) < np.array(accuracies)
    guesses = rng.choice([-1.0, 1.0], size=right.shape)
    strength_NJ = np.where(truth == 0, np.nan if silent else guesses, np.where(right, truth, -truth))
    return Judged(strength_NJ, _log(strength_NJ, np.array([_first(q) for q in accuracies]), silent))


def _first(accuracy: float) -> np.ndarray:
    """[3] probability that a judge prefers the first response."""
    return np.array([1 - accuracy, 0.5, accuracy])


def _log(strength_NJ: np.ndarray, first_JS: np.ndarray, silent: bool) -> np.ndarray:
    """[N, 3] log-likelihood of independent votes; a pair without any is undecided if judges are ``silent`` there."""
    says = np.where(strength_NJ[:, :, None] > 0, first_JS, 1 - first_JS)
    log_NS = np.log(np.where(np.isnan(strength_NJ)[:, :, None], 1.0, says)).sum(axis=1)
    if silent:
        log_NS[np.isnan(strength_NJ).all(axis=1)[:, None] != (STATES == 0)] = -np.inf
    return log_NS


def with_biased(matrix: Matrix, judged: Judged, share: float, seed: int) -> Judged:
    """One judge more, which prefers the response shown first on a share of the pairs, and else is right on 70 %."""
    own = independent(matrix, [0.7], 200 + seed).strength_NJ
    biased = np.where(np.random.default_rng(300 + seed).random(own.shape) < share, 1.0, own)
    log_NS = _log(biased, (share + (1 - share) * _first(0.7))[None], False)
    return Judged(np.column_stack([judged.strength_NJ, biased]), judged.log_NS + log_NS)


def copying(matrix: Matrix, accuracy: float, share: float, seed: int, silent: bool) -> Judged:
    """Three judges, of which the second repeats the first on a share of the pairs."""
    votes = independent(matrix, [accuracy] * 3, seed, silent).strength_NJ
    copied = np.random.default_rng(100 + seed).random(len(votes)) < share
    votes[:, 1] = np.where(copied, votes[:, 0], votes[:, 1])
    log_NS = _log(votes[:, [0, 2]], np.array([_first(accuracy)] * 2), silent)
    own = np.where(votes[:, [1]] > 0, _first(accuracy), 1 - _first(accuracy))
    likelihood = share * (votes[:, [1]] == votes[:, [0]]) + (1 - share) * own
    return Judged(votes, log_NS + np.where(np.isnan(votes[:, [1]]), 0.0, np.log(np.maximum(likelihood, 1e-300))))


def graded(matrix: Matrix, accuracy: float, seed: int) -> Judged:
    """Three judges that state calibrated probabilities, which are on the right side as often as ``accuracy``."""
    gap = 2 * NormalDist().inv_cdf(accuracy) ** 2
    noise = np.random.default_rng(seed).normal(size=(len(matrix.truth_N), 3))
    odds_NJ = matrix.truth_N[:, None] * gap + math.sqrt(2 * gap) * noise
    log_NS = (odds_NJ[:, :, None] * STATES / 2 - gap / 4 * np.abs(STATES)).sum(axis=1)
    return Judged(np.tanh(odds_NJ / 2), log_NS)


# ----------------------------------------------------------------------------------------------------- what is measured


def risk(log_odds: np.ndarray, truth: np.ndarray, coverage: float = 1.0) -> float:
    """Error rate of the most certain share of pairs; equally certain pairs at the edge count in proportion."""
    wrong = np.where(log_odds == 0, 0.5, np.sign(log_odds) != truth)
    _, level = np.unique(-np.abs(log_odds).round(9), return_inverse=True)
    num, errors = np.bincount(level), np.bincount(level, wrong)
    taken = np.clip(coverage * len(truth) - np.concatenate([[0], np.cumsum(num)[:-1]]), 0, num)
    return float((errors * taken / num).sum() / (coverage * len(truth)))


def log_odds_of(probabilities: np.ndarray) -> np.ndarray:
    """[N] log-odds that the first response is better, given that one is."""
    return (np.log(probabilities[:, 0] + 1e-13) - np.log(probabilities[:, 1] + 1e-13)).round(9)


def is_kept(probabilities: np.ndarray) -> np.ndarray:
    """[N] whether a pair is used at the defaults of ``PairingConfig``."""
    config = PairingConfig()
    first, second, neither = probabilities.T
    stated = np.maximum(first, second) / np.maximum(first + second, 1e-300)
    is_decided = np.abs(first - second).round(12) > config.min_margin
    return is_decided & (neither <= config.max_tie_probability) & (stated >= config.min_confidence)


def calibration(log_odds: np.ndarray, truth: np.ndarray) -> Row:
    """Mean probability stated for the response preferred, how often it is right, and the calibration error."""
    right = np.where(log_odds == 0, 0.5, np.sign(log_odds) == truth)
    stated = 1 / (1 + np.exp(-np.abs(log_odds)))
    return {
        "stated": float(stated.mean()),
        "right": float(right.mean()),
        "ece": expected_calibration_error(stated, right),
    }


def consensus_gaps(votes: Votes) -> np.ndarray:
    """[N] gaps of the mean win rates, as `evidence: consensus` has them; the prior order where there is none."""
    offsets, (first, second) = votes.offsets, votes.rows_of_pair.T
    won = (1 + votes.strength_NJ.astype(np.float64)) / 2
    rates = []
    for share in won.T:
        has = ~np.isnan(share)
        sums = np.bincount(first[has], share[has], offsets[-1]) + np.bincount(second[has], 1 - share[has], offsets[-1])
        counts = np.bincount(first[has], minlength=offsets[-1]) + np.bincount(second[has], minlength=offsets[-1])
        rates.append(np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0))
    scores = np.column_stack(rates).astype(np.float32)
    matrix = ScoreMatrix(scores=scores, offsets=offsets, scorers=tuple(voter.name for voter in votes.voters))
    found = consensus_of(matrix, EvidenceConfig(evidence="consensus"))
    gaps = found.scores[first] - found.scores[second] if found.gaps is None else found.gaps
    return np.where(np.isnan(gaps), votes.prior_N, gaps.round(6))


def named(found: Combination) -> list[str]:
    """What the package warns about, in short."""
    out = [f"{a} = {b}" for a, b in found.joined]
    for name, row in found.judges.items():
        if row.is_given or not row.num_votes:
            continue
        out += [f"{name} inverted"] * (row.interval[1] < INVERTED)
        out += [f"{name} prefers {'first' if row.pull > 0 else 'second'}"] * (abs(row.pull) > PULL)
        out += [f"{name} prefers {'longer' if row.longer > 0 else 'shorter'}"] * (abs(row.longer) > LONGER)
    return out + ["too few voters"] * (not found.is_identified)


def measure(
    matrix: Matrix, votes: Votes, limit_N: np.ndarray, found: Combination | None = None, on: np.ndarray | None = None
) -> Row:
    """Everything about one run, on ordered decided pairs, or those of them that are ``on``."""
    found = combine(votes) if found is None else found
    on = matrix.is_measured if on is None else on
    truth = matrix.truth_N[on]
    ours = log_odds_of(found.probabilities)[on]
    return {
        "prior": risk(votes.prior_N[on].astype(float), truth),
        "majority": risk(np.nansum(np.sign(votes.strength_NJ), axis=1)[on], truth),
        "consensus": risk(consensus_gaps(votes)[on], truth),
        "corrected": [risk(ours, truth, c) for c in COVERAGES],
        "limit": [risk(limit_N[on], truth, c) for c in COVERAGES],
        **calibration(ours, truth),
        "used": float(is_kept(found.probabilities)[on].mean()),
        "named": named(found),
        "accuracies": {name: row.accuracy for name, row in found.judges.items()},
    }


def ratio(ours: Iterable[float], base: Iterable[float]) -> list[float]:
    """Ratio of the means over seeds, and the lowest and highest ratio of a seed; NaN where the base has no error."""
    above, below = np.array(list(ours)), np.array(list(base))
    each = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    if not below.any():
        return [float("nan")] * 3
    return [float(above.mean() / below.mean()), float(np.nanmin(each)), float(np.nanmax(each))]


def mean(seeds: Sequence[Row], name: str) -> float:
    return float(np.mean([seed[name] for seed in seeds]))


def summary(name: str, seeds: list[Row]) -> Row:
    """Means over seeds, and ratios to the limit on all pairs and on the most certain."""
    columns = [[[seed[key][k] for seed in seeds] for k in range(len(COVERAGES))] for key in ("corrected", "limit")]
    return {
        "name": name,
        **{key: mean(seeds, key) for key in ("prior", "majority", "consensus", "ece", "used", "stated", "right")},
        "corrected": [float(np.mean(errors)) for errors in columns[0]],
        "limit": [float(np.mean(errors)) for errors in columns[1]],
        "ratio": [ratio(ours, limit) for ours, limit in zip(*columns, strict=True)],
        "named": dict(Counter(text for seed in seeds for text in seed["named"])),
        "seeds": seeds,
    }
