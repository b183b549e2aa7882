"""Reliabilities of judges and of the prior order, estimated from their agreement.

This is a symmetric Dawid-Skene model (Dawid and Skene 1979, doi:10.2307/2346806). Two responses are in one of three
states: the first is better, the second is better, or neither. A judge's vote depends only on the state, and swapping
the two responses mirrors states and votes. So a judge is described by how often it agrees, ties and opposes if one
response is better, and how often it ties if neither is. Votes of different strength (score gaps, probabilities) are
sorted into up to ``LEVELS`` levels per judge, each with its own weight of evidence. The matrix's prior order votes too,
with an accuracy per pair of models that is shrunk towards the accuracy of its rule. A human label fixes the state. EM
finds reliabilities and probabilities together; Dirichlet priors keep the evidence of rare votes finite and select one
of the two mirror-image solutions.

Letters in shapes: N pairs, J judges, C classes of the prior order, U distinct patterns of votes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

logger = logging.getLogger(__name__)

LearnFrom = Literal["all", "labels", "weights"]

LEVELS = 3
MIN_VOTES_PER_LEVEL = 50
ASSUMED = 0.7
"""Accuracy of every voter before any data."""
STRENGTH = 4.0
"""Number of votes that an assumed reliability counts as."""
CLASS_STRENGTH = 20.0
"""Number of pairs that a rule's accuracy counts as when a pair of models is estimated."""
NO_VOTE, NO_LABEL = 99, 2
MISFIT = 0.05
"""Smallest difference between observed and expected agreement that is reported."""
MAX_ITERATIONS = 1000
TOLERANCE = 1e-7


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """``Reliability(accuracy=0.82, tie_rate=0.1, num_votes=990, is_given=False)``"""

    accuracy: float
    """Share of correct votes, ties aside, on pairs where one response is better; below 0.5: the voter is inverted."""
    tie_rate: float
    """Share of ties among all votes."""
    num_votes: int
    is_given: bool
    """Whether the accuracy comes from the configuration instead of being estimated."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Result of combining all votes."""

    probabilities: np.ndarray
    """[N, 3] float64: first better, second better, neither; rows sum to 1."""
    judges: Mapping[str, Reliability]
    prior: Mapping[tuple[str, str], Reliability]
    """Reliability of the prior order, by (rule, class)."""
    misfits: Mapping[tuple[str, str], tuple[float, float]]
    """Observed and expected agreement of two voters, where the model does not explain it; they may depend on each
    other."""
    is_estimated: bool
    """False: there are too few voters to estimate, and reliabilities are the assumed ones."""


def combine(
    votes_NJ: np.ndarray,
    judges: Sequence[str],
    *,
    prior_N: np.ndarray,
    classes_N: np.ndarray,
    classes: Sequence[tuple[str, str]],
    labels_N: np.ndarray | None = None,
    given: Mapping[str, float] | None = None,
    learn_from: LearnFrom = "all",
) -> Combination:
    """Estimates reliabilities and combines votes, prior order and labels.

    Args:
        votes_NJ: float; the sign is positive for the first response, the size is the strength; 0: a tie, NaN: no vote.
        judges: [J] names.
        prior_N: int; the prior order prefers 1: the first, -1: the second, 0: neither.
        classes_N: int; index into ``classes`` of the prior order's class, arbitrary where ``prior_N`` is 0.
        classes: [C] (rule, name of the class); classes of one rule inform each other.
        labels_N: float; human labels 1, -1 or 0, NaN: unknown.
        given: fixed accuracies in (0, 1) that are not estimated, by judge or ``prior: RULE``.
        learn_from: ``all``: reliabilities are learned from all pairs; ``labels``: only from labelled pairs, where
            judges that depend on each other cannot mislead; ``weights``: as ``labels``, and a logistic regression on
            the labels then weights each voter, so that copies share one weight.

    If fewer than three voters vote, and there is no label and no given accuracy, agreement carries no information; then
    each is assumed to have an accuracy of 0.7, with a warning.
    """
    given = given or {}
    levels_NJ, num_levels = _levels(votes_NJ, [name in given for name in judges])
    labels_N = np.full(len(votes_NJ), np.nan) if labels_N is None else labels_N
    table = np.column_stack(
        [
            np.where(np.isnan(levels_NJ), NO_VOTE, levels_NJ),
            prior_N,
            np.where(prior_N == 0, 0, classes_N),
            np.where(np.isnan(labels_N), NO_LABEL, labels_N),
        ]
    ).astype(np.int32)
    patterns, inverse, counts = np.unique(table, axis=0, return_inverse=True, return_counts=True)
    model = _Model(patterns, counts.astype(np.float64), judges, num_levels, classes, given, learn_from)
    is_estimated = model.num_voters >= 3 or any(name in given for name in judges) or not np.isnan(labels_N).all()
    if is_estimated:
        model.fit()
    elif len(votes_NJ):
        logger.warning(
            "evidence: %d voters only and no human label: their reliabilities cannot be told from their agreement; "
            "%.2f is assumed of each",
            model.num_voters,
            ASSUMED,
        )
    return Combination(
        probabilities=model.posterior()[inverse.reshape(-1)],
        misfits=model.misfits() if is_estimated else {},
        judges={name: model.judge_reliability(j) for j, name in enumerate(judges)},
        prior={key: model.class_reliability(c) for c, key in enumerate(classes)},
        is_estimated=is_estimated,
    )


def _levels(votes_NJ: np.ndarray, is_given: Sequence[bool]) -> tuple[np.ndarray, list[int]]:
    """Votes as -L .. L (NaN: no vote) and each judge's L; its levels hold about equally many votes."""
    out = np.sign(votes_NJ)
    num_levels = []
    for j in range(votes_NJ.shape[1]):
        size = np.abs(votes_NJ[:, j])
        strong = size[size > 0]  # excludes NaN
        wanted = min(LEVELS, len(strong) // MIN_VOTES_PER_LEVEL) if not is_given[j] else 1
        edges = np.unique(np.quantile(strong, np.arange(1, wanted) / wanted)) if wanted > 1 else np.array([])
        edges = edges[edges < strong.max()] if len(edges) else edges
        num_levels.append(len(edges) + 1)
        out[:, j] *= 1 + np.searchsorted(edges, np.nan_to_num(size), side="left")
    return out, num_levels


class _Model:
    def __init__(
        self,
        patterns: np.ndarray,
        counts_U: np.ndarray,
        judges: Sequence[str],
        num_levels: Sequence[int],
        classes: Sequence[tuple[str, str]],
        given: Mapping[str, float],
        learn_from: LearnFrom,
    ) -> None:
        J = len(judges)
        self.judges = judges
        # Pairs with only a prior order, or nothing at all, carry no information on reliabilities.
        is_labelled = patterns[:, J + 2] != NO_LABEL
        has_evidence = (patterns[:, :J] != NO_VOTE).any(axis=1) | is_labelled
        self.counts_U = counts_U * has_evidence
        self.weight_U = self.counts_U if learn_from == "all" else self.counts_U * is_labelled
        self.is_weighed = learn_from == "weights"
        self.say = np.ones(J + 1)
        self.levels_UJ = patterns[:, :J]
        self.prior_U, self.class_U, self.label_U = patterns[:, J], patterns[:, J + 1], patterns[:, J + 2]
        self.has_vote_UJ = self.levels_UJ != NO_VOTE
        self.num_levels = num_levels
        rules = sorted({rule for rule, _ in classes})
        self.rule_C = np.array([rules.index(rule) for rule, _ in classes], dtype=np.int64)
        self.num_rules = len(rules)
        self.given_J = [given.get(name) for name in judges]
        self.has_ties = bool(((self.levels_UJ == 0).any() or (self.label_U == 0).any()) and len(counts_U))
        self.num_voters = int(sum((self.has_vote_UJ & (self.levels_UJ != 0)).any(axis=0)) + bool(self.prior_U.any()))
        # Probability of each vote in the states "first" and "neither"; "second" mirrors "first".
        self.pseudo = [self._pseudo_counts(j) for j in range(J)]
        self.vote_probabilities = [pseudo / pseudo.sum(axis=1, keepdims=True) for pseudo in self.pseudo]
        self.given_C = [given.get(f"prior: {rule}") for rule, _ in classes]
        self.class_accuracy_C = np.array([ASSUMED if share is None else share for share in self.given_C])
        self.share_neither = 1 / 3 if self.has_ties else 0.0

    def _pseudo_counts(self, j: int) -> np.ndarray:
        """Vote counts assumed before any data, [2, 2 L + 1], or, if given, the fixed reliability as counts."""
        L, accuracy = self.num_levels[j], self.given_J[j]
        levels = np.arange(-L, L + 1)
        can_tie = bool((self.levels_UJ[:, j] == 0).any())
        if accuracy is None:
            accuracy, wrong = ASSUMED, 1 - ASSUMED
            tie = 0.5 * can_tie
        else:
            wrong = (1 - accuracy) / 2 if can_tie else 1 - accuracy
            tie = wrong * can_tie
        first = np.select([levels > 0, levels < 0], [accuracy / L, wrong / L], tie)
        tie_in_neither = (ASSUMED if self.given_J[j] is None else accuracy) if can_tie else 0.0
        neither = np.where(levels == 0, tie_in_neither, (1 - tie_in_neither) / (2 * L))
        return STRENGTH * np.stack([first, neither])

    def posterior(self) -> np.ndarray:
        """Probability of each state, [U, 3]."""
        with np.errstate(divide="ignore"):
            log_U3 = np.log([(1 - self.share_neither) / 2] * 2 + [self.share_neither]) + np.einsum(
                "juz,j->uz", self._log_likelihoods(), self.say
            )
        log_U3 -= log_U3.max(axis=1, keepdims=True)
        p_U3 = np.exp(log_U3)
        p_U3 /= p_U3.sum(axis=1, keepdims=True)
        for label, state in ((1, 0), (-1, 1), (0, 2)):
            p_U3[self.label_U == label] = np.eye(3)[state]
        return p_U3

    def _log_likelihoods(self) -> np.ndarray:
        """Log-likelihood of every judge's vote and of the prior order in each state, [J + 1, U, 3]."""
        log_JU3 = np.zeros((len(self.judges) + 1, len(self.counts_U), 3))
        for j, (first, neither) in enumerate(self.vote_probabilities):
            rows, index = self.has_vote_UJ[:, j], self.levels_UJ[self.has_vote_UJ[:, j], j] + self.num_levels[j]
            log_JU3[j, rows] = np.log(np.stack([first[index], first[::-1][index], neither[index]], axis=1))
        ordered = self.prior_U != 0
        if ordered.any():
            accuracy = self.class_accuracy_C[self.class_U[ordered]]
            agrees = np.where(self.prior_U[ordered] > 0, accuracy, 1 - accuracy)
            log_JU3[-1, ordered] = np.log(np.stack([agrees, 1 - agrees, np.full_like(agrees, 0.5)], axis=1))
        return log_JU3

    def _weigh(self) -> None:
        """Logistic regression of the labels on the voters' log-odds, with weights shrunk towards 1 (Newton)."""
        rows = np.abs(self.label_U) == 1
        log_JU3 = self._log_likelihoods()
        x = (log_JU3[:, rows, 0] - log_JU3[:, rows, 1]).T
        y, n = self.label_U[rows] > 0, self.counts_U[rows]
        for _ in range(50):
            p = 1 / (1 + np.exp(-np.clip(x @ self.say, -30, 30)))
            gradient = x.T @ (n * (p - y)) + STRENGTH * (self.say - 1)
            hessian = (x.T * (n * p * (1 - p))) @ x + STRENGTH * np.eye(len(self.say))
            step = np.linalg.solve(hessian, gradient)
            self.say = self.say - step
            if np.abs(step).max() < TOLERANCE:
                break

    def fit(self) -> None:
        for _ in range(MAX_ITERATIONS):
            p_U3 = self.posterior() * self.weight_U[:, None]
            change = max(self._fit_judges(p_U3), self._fit_prior(p_U3))
            if self.has_ties:
                share = (p_U3[:, 2].sum() + 1) / (self.weight_U.sum() + 3)
                change, self.share_neither = max(change, abs(share - self.share_neither)), share
            if change < TOLERANCE:
                break
        if self.is_weighed:
            self._weigh()

    def _fit_judges(self, p_U3: np.ndarray) -> float:
        change = 0.0
        for j, pseudo in enumerate(self.pseudo):
            if self.given_J[j] is not None:
                continue
            rows, L = self.has_vote_UJ[:, j], self.num_levels[j]
            index = self.levels_UJ[rows, j] + L
            first, second, neither = (np.bincount(index, p_U3[rows, s], minlength=2 * L + 1) for s in range(3))
            counts = pseudo + np.stack([first + second[::-1], 0.5 * (neither + neither[::-1])])
            new = counts / counts.sum(axis=1, keepdims=True)
            change = max(change, float(np.abs(new - self.vote_probabilities[j]).max()))
            self.vote_probabilities[j] = new
        return change

    def _fit_prior(self, p_U3: np.ndarray) -> float:
        C = len(self.class_accuracy_C)
        if not C:
            return 0.0
        ordered = self.prior_U != 0
        p_U3, prior, index = p_U3[ordered], self.prior_U[ordered], self.class_U[ordered]
        right_C = np.bincount(index, np.where(prior > 0, p_U3[:, 0], p_U3[:, 1]), minlength=C)
        all_C = np.bincount(index, p_U3[:, :2].sum(axis=1), minlength=C)
        right_R = np.bincount(self.rule_C, right_C, minlength=self.num_rules)
        all_R = np.bincount(self.rule_C, all_C, minlength=self.num_rules)
        rule_R = (right_R + STRENGTH * ASSUMED) / (all_R + STRENGTH)
        new = (right_C + CLASS_STRENGTH * rule_R[self.rule_C]) / (all_C + CLASS_STRENGTH)
        new = np.array([share if own is None else own for share, own in zip(new, self.given_C, strict=True)])
        change = float(np.abs(new - self.class_accuracy_C).max())
        self.class_accuracy_C = new
        return change

    def misfits(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Observed and expected agreement of two voters, if they differ by over ``MISFIT`` and four standard errors.

        The likelihood is a mixture over the three states, within which voters are independent. Expected agreement is
        its prediction for the pairs on which neither of the two ties.
        """
        out = {}
        J = len(self.judges)
        names = [*self.judges, "prior"]
        votes = np.column_stack([np.where(self.has_vote_UJ, np.sign(self.levels_UJ), 0), self.prior_U])
        for a, b in itertools.combinations(range(J + 1), 2):
            rows = (votes[:, a] != 0) & (votes[:, b] != 0)
            n = self.counts_U[rows].sum()
            if n < MIN_VOTES_PER_LEVEL:
                continue
            first_a, first_b = self._chance_of_first(a, rows), self._chance_of_first(b, rows)
            state = np.array([(1 - self.share_neither) / 2] * 2 + [self.share_neither])
            both = state * first_a.sum(axis=1) * first_b.sum(axis=1)
            agree = state * (first_a * first_b).sum(axis=1)
            share = (agree.sum(axis=1) / both.sum(axis=1)) @ self.counts_U[rows] / n
            observed = self.counts_U[rows & (votes[:, a] == votes[:, b])].sum() / n
            if abs(observed - share) > max(MISFIT, 4 * np.sqrt(share * (1 - share) / n)):
                out[names[a], names[b]] = (float(observed), float(share))
        return out

    def _chance_of_first(self, voter: int, rows: np.ndarray) -> np.ndarray:
        """Probability of a vote for the first and for the second response in each state, [rows, 2, 3]."""
        if voter < len(self.judges):
            L, (first, neither) = self.num_levels[voter], self.vote_probabilities[voter]
            right, wrong, either = first[L + 1 :].sum(), first[:L].sum(), neither[L + 1 :].sum()
            one = np.array([[right, wrong, either], [wrong, right, either]])
            return np.broadcast_to(one, (int(rows.sum()), 2, 3))
        accuracy = self.class_accuracy_C[self.class_U[rows]]
        half = np.full_like(accuracy, 0.5)
        return np.stack(
            [np.stack([accuracy, 1 - accuracy, half], axis=1), np.stack([1 - accuracy, accuracy, half], axis=1)], axis=1
        )

    def judge_reliability(self, j: int) -> Reliability:
        L, (first, _) = self.num_levels[j], self.vote_probabilities[j]
        rows = self.has_vote_UJ[:, j]
        num_votes = self.counts_U[rows].sum()
        ties = self.counts_U[rows & (self.levels_UJ[:, j] == 0)].sum()
        return Reliability(
            accuracy=float(first[L + 1 :].sum() / (first[L + 1 :].sum() + first[:L].sum())),
            tie_rate=float(ties / num_votes) if num_votes else 0.0,
            num_votes=int(num_votes),
            is_given=self.given_J[j] is not None,
        )

    def class_reliability(self, c: int) -> Reliability:
        num_votes = self.counts_U[(self.prior_U != 0) & (self.class_U == c)].sum()
        return Reliability(
            accuracy=float(self.class_accuracy_C[c]),
            tie_rate=0.0,
            num_votes=int(num_votes),
            is_given=self.given_C[c] is not None,
        )
