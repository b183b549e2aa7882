"""Reliabilities of judges and of the prior order, and the probability of every pair's order, from all votes together.

Two models do the work. Where every judge gives graded scores, each response has a Gaussian quality (``graded``).
Elsewhere each response is right or wrong (``joint``), judges that copy each other are joined (``dependence``), and a
pair of which both are right, or both wrong, has no better one. docs/correction.md derives both and says where they
fail.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tso_fast.correction.dependence import Excess, fit_with_dependence
from tso_fast.correction.emissions import edges_of_levels
from tso_fast.correction.graded import GradedModel, normal_scores
from tso_fast.correction.joint import JointModel
from tso_fast.correction.votes import PRIOR, Votes, with_meaningful_silence

logger = logging.getLogger(__name__)

LearnFrom = Literal["all", "labels"]
FIT_PROMPTS = 4000
"""Most prompts from which reliabilities are estimated; they are global, and more would not change them."""
GRADED_VALUES = 3
"""A judge whose scores take more values than this gives grades."""
IDENTIFIED_VOTERS = 3
"""Fewest independent voters, the prior order among them, whose agreement tells their reliabilities."""
IDENTIFIED_LABELS = 30
"""Fewest labels that tell them otherwise."""
IDENTIFIED_PROMPTS = 30
"""Fewest prompts on which agreement, or votes of one judge that could contradict each other, tell anything."""
QUANTILE = 1.96
CURVE_LEVELS = 8
"""Most points of a curve of right votes by strength."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """``Reliability(accuracy=0.82, interval=(0.78, 0.85), tie_rate=0.1, num_votes=990, is_given=False)``"""

    accuracy: float
    """Share of right votes, ties aside, on pairs where one response is better; below 0.5: the voter is inverted."""
    interval: tuple[float, float]
    """Where the accuracy lies with 95 % probability, if the model holds."""
    tie_rate: float
    """Share of ties among all votes."""
    num_votes: int
    is_given: bool
    """Whether the accuracy comes from the configuration instead of being estimated."""
    pull: float = 0.0
    """Log-odds by which it prefers the response that it was shown first, beyond what the responses explain."""
    longer: float = 0.0
    """How much more often than expected it prefers the longer response, a mean of signs in [-1, 1]."""
    curve: tuple[tuple[float, float, int], ...] = ()
    """(Strength of a vote, share that is right, number of votes), the weakest first."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Result of combining all votes."""

    probabilities: np.ndarray
    """[N, 3] float64: first better, second better, neither; rows sum to 1."""
    judges: Mapping[str, Reliability]
    prior: Mapping[str, Reliability]
    """Reliability of the prior order, by rule."""
    joined: Mapping[tuple[str, str], Excess] = field(default_factory=dict)
    """Judges that depend on each other, with their agreement; each pair counts as little more than one of them."""
    parents: Mapping[int, int] = field(default_factory=dict)
    """The same by column of the votes: whom a judge is believed to copy."""
    quality: Literal["right or wrong", "graded"] = "right or wrong"
    is_identified: bool = True
    """False: there are too few independent voters, and reliabilities rest on what is assumed of them."""
    num_iterations: int = 0
    find_label_gains: Callable[[], np.ndarray] | None = None

    @property
    def expected_wrong(self) -> float:
        """Expected number of pairs that are decided for the worse response."""
        return float(self.probabilities[:, :2].min(axis=1).sum())

    def label_gains(self) -> np.ndarray:
        """Expected number of pairs that one more label on a pair puts right, [N].

        Where responses are right or wrong a label also tells of the other pairs of its prompt, see
        ``JointModel.label_gains``; where they are graded, of its own pair only.
        """
        if self.find_label_gains is None:
            return self.probabilities[:, :2].min(axis=1)
        return self.find_label_gains()


def combine(
    votes: Votes,
    scores_RM: np.ndarray | None = None,
    *,
    learn_from: LearnFrom = "all",
    parents: Mapping[int, int] | None = None,
) -> Combination:
    """Estimates reliabilities and combines votes, prior order and labels.

    Args:
        votes: of any number of judges, annotators and given rules of the prior order.
        scores_RM: [R, M] scores of the voters of kind ``score``, in their order, NaN: none.
        learn_from: ``all``: reliabilities are learned from all pairs; ``labels``: from labelled pairs only.
        parents: whom a judge copies, by column; None: found out.
    """
    has_vote = np.zeros(len(votes.num_responses), dtype=bool)
    has_vote[votes.prompt_of_pair[~np.isnan(votes.strength_NJ).all(axis=1)]] = True
    told = np.flatnonzero(has_vote)
    if len(told) > FIT_PROMPTS:
        told = np.sort(np.random.default_rng(0).choice(told, FIT_PROMPTS, replace=False))
    if scores_RM is not None and _is_graded(votes, scores_RM):
        return _combine_graded(votes, scores_RM, told)
    return _combine_right_or_wrong(votes, told, learn_from, parents)


def _is_graded(votes: Votes, scores_RM: np.ndarray) -> bool:
    """Whether judges only score single responses, none has a given reliability, and one at least gives grades."""
    kinds = {voter.kind for voter in votes.voters} - {"label"}
    if kinds != {"score"} or any(voter.given is not None for voter in votes.voters):
        return False
    return any(len(np.unique(column[~np.isnan(column)])) > GRADED_VALUES for column in scores_RM.T)


# ------------------------------------------------------------------------------------------------------ right or wrong


def _combine_right_or_wrong(
    votes: Votes, told: np.ndarray, learn_from: LearnFrom, parents: Mapping[int, int] | None
) -> Combination:
    votes = with_meaningful_silence(votes)
    sample = votes.only(told)
    labels = [j for j, voter in enumerate(votes.voters) if voter.kind == "label"]
    is_labelled = (~np.isnan(sample.strength_NJ[:, labels])).any(axis=1)

    def make(edges: Mapping[int, int]) -> JointModel:
        model = JointModel(sample, edges, is_labelled.astype(float) if learn_from == "labels" else None)
        model.fit()
        return model

    if parents is None:
        model, joined = fit_with_dependence(sample, make)
    else:
        model, joined = make(parents), {}
    own, states = model.expect(), model.posterior(votes)
    errors = model.standard_errors(own)
    names = [voter.name for voter in votes.voters]
    return Combination(
        probabilities=states[:, [2, 0, 1]],
        judges={
            voter.name: _judge(model, own, j, errors[j])
            for j, voter in enumerate(votes.voters)
            if voter.kind != "prior"
        },
        prior=_rules(votes, states),
        joined={(names[a], names[b]): excess for (a, b), excess in joined.items()},
        parents=model.parents,
        is_identified=is_identified(votes, len(joined)),
        num_iterations=model.num_iterations,
        find_label_gains=functools.partial(model.label_gains, votes),
    )


def is_identified(votes: Votes, num_joined: int = 0, scores_RM: np.ndarray | None = None) -> bool:
    """Whether the votes tell how reliable each voter is.

    They do if three independent voters vote on enough prompts, the prior order among them; if the reliability of one
    is given; if there are labels; or if the votes of a judge on one prompt could contradict each other, on enough
    prompts. Where judges give grades the prior order does not count: what two of them do not share may be error, or
    another part of quality.

    Args:
        num_joined: judges that are believed to copy others.
        scores_RM: as in ``combine``.
    """
    voted = ~np.isnan(votes.strength_NJ) & (votes.strength_NJ != 0)
    labels = [j for j, voter in enumerate(votes.voters) if voter.kind == "label"]
    judges = [j for j, voter in enumerate(votes.voters) if voter.kind != "label" and voted[:, j].any()]
    prompts = np.unique(votes.prompt_of_pair[voted[:, judges].any(axis=1)])
    has_order = bool(votes.prior_N.any()) and not any(votes.voters[j].kind == "prior" for j in judges)
    if scores_RM is not None and _is_graded(votes, scores_RM):
        has_order = False
    if len(prompts) >= IDENTIFIED_PROMPTS and len(judges) + has_order - num_joined >= IDENTIFIED_VOTERS:
        return True
    if any(votes.voters[j].given is not None for j in judges) or int(voted[:, labels].sum()) >= IDENTIFIED_LABELS:
        return True
    for j in judges:
        if votes.voters[j].kind == "comparison":
            counts = np.bincount(votes.prompt_of_pair, voted[:, j], minlength=len(votes.num_responses))
            if (counts >= np.maximum(votes.num_responses, 3)).sum() >= IDENTIFIED_PROMPTS:
                return True
    return False


def _judge(model: JointModel, states: np.ndarray, j: int, standard_error: float) -> Reliability:
    votes, emission = model.votes, model.emissions[j]
    strength = votes.strength_NJ[:, j]
    has, decided = ~np.isnan(strength), ~np.isnan(strength) & (strength != 0)
    right = np.where(strength > 0, states[:, 2], states[:, 0])[decided]
    either = (states[:, 2] + states[:, 0])[decided]
    known = np.clip(right / np.maximum(either, 1e-12), 0, 1)
    accuracy = emission.voter.given or emission.accuracy
    if j in model.parents:  # its emission only tells what it adds to the other's
        accuracy = float(np.clip(right.sum() / max(either.sum(), 1e-12), 0.001, 0.999))
    interval = (accuracy, accuracy) if emission.voter.given else _around(accuracy, standard_error)
    return Reliability(
        accuracy=accuracy,
        interval=interval,
        tie_rate=float((strength[has] == 0).mean()) if has.any() else 0.0,
        num_votes=int(has.sum()),
        is_given=emission.voter.given is not None,
        pull=2 * emission.pull,
        longer=_longer(votes, states, strength, decided, accuracy),
        curve=_curve(strength[decided], known, either),
    )


def _interval(accuracy: float, right: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """95 % interval from the observed information (Louis 1982), on the scale of log-odds."""
    information = weight.sum() * accuracy * (1 - accuracy) - (weight * right * (1 - right)).sum()
    return _around(accuracy, 1 / math.sqrt(information)) if information > 1e-9 else (0.0, 1.0)


def _around(accuracy: float, standard_error: float) -> tuple[float, float]:
    """95 % interval from the standard error of the log-odds."""
    middle = math.log(accuracy / (1 - accuracy)) if 0 < accuracy < 1 else math.copysign(20.0, accuracy - 0.5)
    half = QUANTILE * standard_error
    return 1 / (1 + math.exp(min(half - middle, 700))), 1 / (1 + math.exp(min(-half - middle, 700)))


def _longer(votes: Votes, states: np.ndarray, strength: np.ndarray, decided: np.ndarray, accuracy: float) -> float:
    """Mean of vote x longer, less what the states explain."""
    rows = decided & (votes.longer_N != 0)
    if not rows.any():
        return 0.0
    expected = (2 * accuracy - 1) * (states[rows, 2] - states[rows, 0])
    return float(((np.sign(strength[rows]) - expected) * votes.longer_N[rows]).mean())


def _curve(strength: np.ndarray, right: np.ndarray, weight: np.ndarray) -> tuple[tuple[float, float, int], ...]:
    """Share of right votes in levels of strength that hold about equally many votes."""
    size = np.abs(strength)
    level = np.searchsorted(edges_of_levels(size, CURVE_LEVELS), size, side="left")
    out = []
    for k in np.unique(level).tolist():
        rows = level == k
        share = float((right[rows] * weight[rows]).sum() / max(weight[rows].sum(), 1e-12))
        out.append((float(size[rows].mean()), share, int(rows.sum())))
    return tuple(out)


def _rules(votes: Votes, states: np.ndarray) -> dict[str, Reliability]:
    """How often each rule of the prior order is right, where one of two responses is better and somebody voted."""
    voted = np.zeros(len(votes.num_responses), dtype=bool)
    voted[votes.prompt_of_pair[~np.isnan(votes.strength_NJ).all(axis=1)]] = True
    given = {voter.name: voter.given for voter in votes.voters if voter.kind == "prior"}
    out = {}
    for k, rule in enumerate(votes.rules):
        rows = (votes.rules_N == k) & (votes.prior_N != 0) & voted[votes.prompt_of_pair] & ~votes.is_same_N
        if not rows.any():
            continue
        right = np.where(votes.prior_N > 0, states[:, 2], states[:, 0])[rows]
        either = (states[:, 2] + states[:, 0])[rows]
        share = float(right.sum() / max(either.sum(), 1e-12))
        fixed = given.get(PRIOR + rule)
        out[rule] = Reliability(
            accuracy=share if fixed is None else fixed,
            interval=_interval(share, np.clip(right / np.maximum(either, 1e-12), 0, 1), either),
            tie_rate=0.0,
            num_votes=int(rows.sum()),
            is_given=fixed is not None,
        )
    return out


# -------------------------------------------------------------------------------------------------------------- graded


def _combine_graded(votes: Votes, scores_RM: np.ndarray, told: np.ndarray) -> Combination:
    normal_RM = np.column_stack([normal_scores(column) for column in scores_RM.T])
    sample = votes.only(told)
    rows = np.concatenate([np.arange(a, b) for a, b in zip(votes.offsets[told], votes.offsets[told + 1], strict=True)])
    # Without labels, which are few, and whose certainty the logistic bound would exaggerate.
    model = GradedModel(sample.without_labels(np.ones(len(sample.prior_N), dtype=bool)), normal_RM[rows])
    model.fit()
    first = model.applied(votes, normal_RM).probabilities
    states = np.column_stack([1 - first, np.zeros(len(first)), first])
    judges: dict[str, Reliability] = {}
    for k, j in enumerate(model.score_voters):
        judges[votes.voters[j].name] = _scorer(votes, states, j, float(model.accuracies[k]))
    for j in model.pair_voters:
        judges[votes.voters[j].name] = _scorer(votes, states, j, None)
    return Combination(
        probabilities=states[:, [2, 0, 1]],
        judges=judges,
        prior=_rules(votes, states),
        quality="graded",
        is_identified=is_identified(votes, 0, scores_RM),
        num_iterations=model.num_iterations,
    )


def _scorer(votes: Votes, states: np.ndarray, j: int, accuracy: float | None) -> Reliability:
    strength = votes.strength_NJ[:, j]
    has, decided = ~np.isnan(strength), ~np.isnan(strength) & (strength != 0)
    right = np.where(strength > 0, states[:, 2], states[:, 0])[decided]
    share = (float(right.mean()) if len(right) else 0.5) if accuracy is None else accuracy
    return Reliability(
        accuracy=share,
        interval=_interval(share, right, np.ones(len(right))),
        tie_rate=float((strength[has] == 0).mean()) if has.any() else 0.0,
        num_votes=int(has.sum()),
        is_given=votes.voters[j].given is not None,
        longer=_longer(votes, states, strength, decided, share),
        curve=_curve(strength[decided], right, np.ones(len(right))),
    )
