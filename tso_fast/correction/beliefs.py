"""Beliefs that follow from the evidence: one score per response, and one probability per pair.

ScoreMatrix, Votes -> consensus of scores, or reliabilities of voters -> Beliefs

Letters in shapes: P prompts, R responses of all prompts, M scorers, N pairs, L labelled pairs.
"""

from __future__ import annotations

import functools
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from tso_fast.config.settings import EvidenceConfig
from tso_fast.correction.decide import Belief, from_scores
from tso_fast.correction.evidence import (
    Compared,
    compared_of,
    score_matrix,
    stated_of,
    tallies_of,
    votes_of,
    with_comparisons,
)
from tso_fast.correction.reliability import Combination, LearnFrom, combine, is_identified
from tso_fast.correction.votes import PRIOR, rows_of_pairs
from tso_fast.errors import InputError, did_you_mean
from tso_fast.scoring import Agreement, agreement, consensus
from tso_fast.types import HUMAN, Candidates, Comparison, PairEvidence, ScoreMatrix, Verdict

logger = logging.getLogger(__name__)

FOLDS = 5
MIN_LABELS = 50
"""Fewest human labels needed to choose how evidence is combined, or to fit a temperature."""
VERIFIER_RELIABILITY = {"verifier": 0.99}
"""Fixed, since judges that do not know the answer should not outvote a program that does."""
INVERTED = 0.5
PULL = 0.5
"""Least log-odds by which a judge prefers what it is shown first that is warned about."""
LONGER = 0.2
"""Least excess of votes for the longer response, a mean of signs, that is warned about."""
RULES = ("human", "larger", "newer", "newer+larger")

Method = Literal["consensus", "calibrated", "prior"]


class Chosen(NamedTuple):
    """How evidence is combined, and why."""

    method: Method
    why: str
    learn_from: LearnFrom = "all"


class Consensus(NamedTuple):
    """Consensus of the scorers: ``Consensus(scores=..., gaps=None)``."""

    scores: np.ndarray
    """[R] float32, NaN = no evidence."""
    gaps: np.ndarray | None
    """[N] difference of each pair over the scorers that both responses have, NaN: they have none; None: every scorer
    knows all responses of its prompts or none, and differences of ``scores`` say the same."""


def consensus_of(matrix: ScoreMatrix, config: EvidenceConfig) -> Consensus:
    """Consensus score of each response, and of each pair where scorers saw different responses.

    Two responses are only compared on the scorers that both have: a mean over whatever scores each happens to have
    would compare the scales of the scorers.
    """
    weights = np.ones(len(matrix.scorers))
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
        return Consensus(np.full(matrix.scores.shape[0], np.nan, dtype=np.float32), None)
    scores = consensus(
        matrix.scores,
        matrix.offsets,
        method=config.consensus,
        normalize=config.score_normalize,
        weights=None if config.score_weights is None else weights,
    ).scores
    counts = np.diff(matrix.offsets)
    known = ~np.isnan(matrix.scores[:, weights > 0])
    prompt_R = np.repeat(np.arange(len(counts)), counts)
    seen = np.stack([np.bincount(prompt_R, column, minlength=len(counts)) for column in known.T], axis=1)
    scored = np.bincount(prompt_R, known.any(axis=1), minlength=len(counts))
    is_uneven = ((seen != 0) & (seen != scored[:, None])).any(axis=1)
    # Win rates and Bradley-Terry strengths compare responses pair by pair as it is.
    if not is_uneven.any() or config.consensus in ("win_rate", "bradley_terry"):
        return Consensus(scores, None)
    return _over_common_scorers(scores, is_uneven, prompt_R, matrix, weights, config)


def _over_common_scorers(
    scores_R: np.ndarray,
    is_uneven_P: np.ndarray,
    prompt_R: np.ndarray,
    matrix: ScoreMatrix,
    weights: np.ndarray,
    config: EvidenceConfig,
) -> Consensus:
    """Consensus of pairs over the scorers of both; a response's is then its mean gap to all that it was compared with.

    Args:
        scores_R: consensus of the responses of other prompts.
        is_uneven_P: whether the scorers of a prompt saw different responses.
        prompt_R: prompt of each response.
    """
    is_uneven_R = is_uneven_P[prompt_R]
    options: dict[str, Any] = {"method": config.consensus, "normalize": config.score_normalize}
    each = [consensus(column[:, None], matrix.offsets, **options).scores for column in matrix.scores.T]
    own_RM = np.where(weights > 0, np.stack(each, axis=1), np.nan)
    first, second = rows_of_pairs(matrix.offsets).T
    gaps_N = (scores_R[first] - scores_R[second]).astype(np.float64)
    pairs = np.flatnonzero(is_uneven_R[first])
    gaps_N[pairs] = _common_gap(own_RM[first[pairs]] - own_RM[second[pairs]], weights, config.consensus)
    known = pairs[~np.isnan(gaps_N[pairs])]
    rows, gaps = np.concatenate([first[known], second[known]]), np.concatenate([gaps_N[known], -gaps_N[known]])
    has_R = np.zeros(len(scores_R), dtype=bool)
    has_R[rows] = True
    num_R = np.bincount(prompt_R, has_R)[prompt_R]
    mean_R = np.bincount(rows, gaps, minlength=len(scores_R)) / np.maximum(num_R, 1)
    scores_R = np.where(is_uneven_R, np.where(has_R, mean_R, np.nan), scores_R).astype(np.float32)
    return Consensus(scores_R, gaps_N)


def _common_gap(gap_NM: np.ndarray, weights: np.ndarray, method: str) -> np.ndarray:
    """Weighted mean, or median, of the gaps of the scorers of both responses, [N]."""
    known = ~np.isnan(gap_NM)
    out = np.full(len(gap_NM), np.nan)
    some = known.any(axis=1)
    if method == "median":
        out[some] = np.nanmedian(gap_NM[some], axis=1)
    else:
        out[some] = np.nansum(gap_NM[some] * weights, axis=1) / (known[some] @ weights)
    return out


def believe(
    candidates: Sequence[Candidates],
    verdicts: Sequence[Verdict | Comparison],
    settings: EvidenceConfig,
    hidden: str | None = None,
) -> Beliefs:
    """Beliefs that follow from the scores in the data, from verdicts and from labels.

    Args:
        hidden: name of a scorer in the data that is no evidence.
    """
    if (only := settings.evidence_from) is not None:
        _check_known(only, candidates, verdicts)
        verdicts = [verdict for verdict in verdicts if verdict.judge in (HUMAN, *only)]
    scored = [verdict for verdict in verdicts if isinstance(verdict, Verdict)]
    compared = compared_of(candidates, [verdict for verdict in verdicts if isinstance(verdict, Comparison)])
    pointwise = score_matrix(candidates, scored, hidden, only)
    return Beliefs(candidates, pointwise, compared, settings, tallies_of(scored, compared))


def _check_known(
    names: Sequence[str], candidates: Sequence[Candidates], verdicts: Sequence[Verdict | Comparison]
) -> None:
    known = {v.judge for v in verdicts} | {name for c in candidates for r in c.responses for name in r.scores}
    for name in names:
        if name not in known:
            raise InputError(
                f"evidence_from: no judge and no score is called {name!r}{did_you_mean(name, known)}; there are "
                f"{', '.join(sorted(known - {HUMAN})) or 'none'}; a sampler that added nothing gave none"
            )


class Beliefs:
    """Scores and probabilities of a set of candidates.

    Args:
        pointwise: scores by the judges of single responses.
        compared: verdicts of the judges that compare two responses, and labels.
        tallies: verdicts by judge, see ``tallies_of``.
    """

    def __init__(
        self,
        candidates: Sequence[Candidates],
        pointwise: ScoreMatrix,
        compared: Compared,
        config: EvidenceConfig,
        tallies: Mapping[str, Mapping[str, int]],
    ) -> None:
        self.candidates = candidates
        self.config = config
        self.pointwise = pointwise
        self.tallies = tallies
        self.votes = votes_of(candidates, pointwise, compared, self.given)
        self.stated_N = stated_of(compared, len(self.votes.prior_N))
        self.matrix = with_comparisons(pointwise, compared, config.comparison_scores)
        self.stated_rates_RM = with_comparisons(pointwise, compared).scores[:, len(pointwise.scorers) :]
        """[R, M] mean probability of winning, by the judges that compare responses; NaN: not compared."""
        self._check_names()
        self.combination: Combination | None = None
        """None: scores decide."""
        self.gaps_N: np.ndarray | None = None
        """See ``Consensus.gaps``; None: differences of scores decide."""
        self.chosen = self._choose()
        logger.info("evidence: %s, as %s", self.chosen.method, self.chosen.why)
        if self.chosen.method == "calibrated":
            self.combination = combine(self.votes, pointwise.scores, learn_from=self.chosen.learn_from)
            _warn(self.combination)
            self.scores_R = self.win_rates_R = self.expected_win_rates(self.combination.probabilities)
        else:
            self._agree()

    def _agree(self) -> None:
        matrix = self.matrix
        if self.chosen.method == "prior":
            nothing = np.full((len(matrix.scores), 0), np.nan, np.float32)
            matrix = ScoreMatrix(scores=nothing, offsets=matrix.offsets, scorers=())
        self.scores_R, self.gaps_N = consensus_of(matrix, self.config)
        self.win_rates_R = self._win_rates() if matrix.scorers else self.scores_R

    def _win_rates(self) -> np.ndarray:
        """How often each response wins, over all judges, [R] float32: as they state it, or by their scores."""
        pointwise, rates_RM = self.pointwise, self.stated_rates_RM
        if pointwise.scorers:
            by_score = consensus(pointwise.scores, pointwise.offsets, method="win_rate", normalize="none").scores
            rates_RM = np.column_stack([rates_RM, *[by_score] * len(pointwise.scorers)])
        num = (~np.isnan(rates_RM)).sum(axis=1)
        total = np.nansum(rates_RM, axis=1)
        return np.divide(total, num, out=np.full(len(num), np.nan), where=num > 0).astype(np.float32)

    @property
    def given(self) -> dict[str, float]:
        """Fixed reliabilities, which are not estimated."""
        return {**VERIFIER_RELIABILITY, **(self.config.judge_reliability or {})}

    def _check_names(self) -> None:
        known = {voter.name for voter in self.votes.voters if voter.kind != "label"} | {PRIOR + rule for rule in RULES}
        for name in self.config.judge_reliability or {}:
            if name not in known:
                raise InputError(
                    f"judge_reliability: nobody is called {name!r}{did_you_mean(name, known)}; expected one of "
                    f"{', '.join(sorted(known))}"
                )

    # ---- which way

    def _choose(self) -> Chosen:
        """How evidence is combined: as told, or as it can be.

        With enough labels the way that predicts held-back ones best: judges that all err alike look reliable, and only
        people can tell.
        """
        judges = [voter for voter in self.votes.voters if voter.kind in ("comparison", "score")]
        voted = ~np.isnan(self.votes.strength_NJ).all(axis=0)
        active = [voter for voter, has in zip(self.votes.voters, voted, strict=True) if has and voter in judges]
        told = self.config.evidence
        if told in ("consensus", "prior"):
            return Chosen(told, "told")
        if told == "auto" and not active:
            return Chosen("prior", "no judge voted")
        if told == "auto" and all(voter.given is not None for voter in active):
            return Chosen("consensus", f"{active[0].name} alone voted, whose reliability is not estimated")
        if told == "auto" and not is_identified(self.votes, scores_RM=self.pointwise.scores):
            names = " and ".join(voter.name for voter in active)
            return Chosen("consensus", f"nothing tells how reliable {names} is, which is taken at its word")
        if np.count_nonzero(self.votes.has_direction) < MIN_LABELS:
            why = "told" if told == "calibrated" else f"{len(active)} judges voted whose reliability can be estimated"
            return Chosen("calibrated", why)
        return self._choose_by_labels(told == "auto")

    def _choose_by_labels(self, is_free: bool) -> Chosen:
        labelled = np.flatnonzero(self.votes.has_direction)
        prefers_first = self.votes.label[labelled] > 0
        parents = combine(self.votes, self.pointwise.scores).parents
        losses: dict[LearnFrom, np.ndarray] = {}
        errors: dict[LearnFrom, np.ndarray] = {}
        for learn_from in get_args(LearnFrom):
            first, second = self._held_back(labelled, learn_from, parents).T
            losses[learn_from] = -np.log(np.where(prefers_first, first, second) / (first + second))
            errors[learn_from] = (first > second) != prefers_first
        if (names := self._contradicted(labelled, errors["all"])) is not None:
            logger.warning(
                "evidence: the labels of %s contradict the judges and the prior order more often than not: they may be "
                "inverted; labels decide their own pairs, and teach nothing else",
                names,
            )
            return Chosen("calibrated", f"the labels of {names} may be inverted")
        # Labels are few: they teach alone only where that is better by more than chance.
        gain = losses["all"] - losses["labels"]
        is_better = gain.mean() > 2 * gain.std() / math.sqrt(len(gain))
        best: LearnFrom = "labels" if is_better else "all"
        told = ", ".join(f"{name} {loss.mean():.3f}" for name, loss in losses.items())
        chosen = Chosen("calibrated", f"reliabilities from {best} pairs predict labels best ({told} nats each)", best)
        if is_free and (reason := self._consensus_is_better(labelled, errors[best])) is not None:
            return Chosen("consensus", reason)
        return chosen

    def _held_back(self, labelled: np.ndarray, learn_from: LearnFrom, parents: Mapping[int, int]) -> np.ndarray:
        """[L, 2] probabilities that the first and the second response are better, without the labels of the fold."""
        out = np.empty((len(labelled), 2))
        for fold in range(FOLDS):
            votes = self.votes.without_labels(self.fold_of_pair == fold)
            found = combine(votes, self.pointwise.scores, learn_from=learn_from, parents=parents)
            own = self.fold_of_pair[labelled] == fold
            out[own] = found.probabilities[labelled[own], :2] + 1e-9
        return out

    def _contradicted(self, labelled: np.ndarray, is_wrong: np.ndarray) -> str | None:
        """Annotators whose labels clearly contradict what the others say of the same pairs; None: nobody.

        Args:
            is_wrong: [L] whether what the others say of a pair contradicts the mean of its labels.
        """
        names = []
        for j in self.votes.annotators:
            own = self.votes.strength_NJ[labelled, j]
            contrary = (is_wrong == (own * self.votes.label[labelled] > 0))[np.nan_to_num(own) != 0]
            num = len(contrary)
            if num >= MIN_LABELS / 2 and contrary.sum() - num / 2 > math.sqrt(num):
                names.append(self.votes.voters[j].name)
        return " and ".join(names) or None

    def _consensus_is_better(self, labelled: np.ndarray, is_wrong: np.ndarray) -> str | None:
        """Why consensus is preferred: it errs less on labels, by more than two standard errors; None: it is not."""
        scores_R, gaps_N = consensus_of(self.matrix, self.config)
        gap_N = np.nan_to_num(from_scores(self.votes, scores_R).gap_N if gaps_N is None else gaps_N)
        direction_N = np.where(gap_N == 0, self.votes.prior_N, gap_N)
        consensus_is_wrong = (direction_N * self.votes.label)[labelled] <= 0
        only_consensus = np.count_nonzero(consensus_is_wrong & ~is_wrong)
        only_calibrated = np.count_nonzero(is_wrong & ~consensus_is_wrong)
        if only_calibrated - only_consensus <= 2 * math.sqrt(only_calibrated + only_consensus):
            return None
        return f"it alone is right on {only_calibrated} labels, and calibrated evidence alone on {only_consensus}"

    # ---- what is believed

    @functools.cached_property
    def fold_of_pair(self) -> np.ndarray:
        """[N] fold of each pair, by the id of its prompt."""
        fold_P = [zlib.crc32(item.prompt.id.encode()) % FOLDS for item in self.candidates]
        return np.array(fold_P, dtype=np.int64)[self.votes.prompt_of_pair]

    def without(self, hidden_N: np.ndarray) -> np.ndarray | None:
        """Probabilities of all pairs when the labels of ``hidden_N`` ([N] bool) are not used; None: scores decide."""
        if (found := self.combination) is None:
            return None
        votes, learn_from = self.votes.without_labels(hidden_N), self.chosen.learn_from
        return combine(votes, self.pointwise.scores, learn_from=learn_from, parents=found.parents).probabilities

    @functools.cached_property
    def has_votes(self) -> np.ndarray:
        """[P] bool: a judge voted on a pair of the prompt."""
        judges = [j for j, voter in enumerate(self.votes.voters) if voter.kind in ("comparison", "score")]
        voted = (~np.isnan(self.votes.strength_NJ[:, judges])).any(axis=1)
        return np.bincount(self.votes.prompt_of_pair, voted, minlength=len(self.candidates)) > 0

    def expected_win_rates(self, probabilities: np.ndarray) -> np.ndarray:
        """Mean probability of being the better of two, "neither" counting half, [R] float32; NaN: no evidence.

        Args:
            probabilities: [N, 3], see ``Combination.probabilities``.
        """
        votes, num = self.votes, len(self.votes.order_R)
        first, second = votes.rows_of_pair.T
        sums = np.bincount(first, probabilities[:, 0] + probabilities[:, 2] / 2, minlength=num)
        sums += np.bincount(second, probabilities[:, 1] + probabilities[:, 2] / 2, minlength=num)
        has_evidence = self.has_votes[votes.prompt_of_response]
        has_evidence[votes.rows_of_pair[votes.is_labelled]] = True
        others = np.maximum(votes.num_responses - 1, 1)[votes.prompt_of_response]
        return np.where(has_evidence, sums / others, np.nan).astype(np.float32)

    def about(self, probabilities: np.ndarray | None = None) -> Belief:
        """What is believed of all pairs.

        Args:
            probabilities: [N, 3], other ones than those of ``combination``.
        """
        if probabilities is None and self.combination is not None:
            probabilities = self.combination.probabilities
        if probabilities is None:
            belief = from_scores(self.votes, self.scores_R)
            if self.chosen.method == "prior":
                return belief
            return belief._replace(gap_N=belief.gap_N if self.gaps_N is None else self.gaps_N, first_N=self.stated_N)
        first, second, neither = probabilities.T
        either = first + second
        # Rounded, since two equally reliable voters that contradict each other should tie.
        gap_N = np.where(self.has_votes[self.votes.prompt_of_pair], (first - second).round(12), np.nan)
        return Belief(gap_N, np.divide(first, either, out=np.full(len(first), 0.5), where=either > 0), neither)

    def pair(self, n: int) -> PairEvidence:
        """All evidence on one pair."""
        votes, voters = self.votes, self.votes.voters
        p = int(votes.prompt_of_pair[n])
        i, j = (votes.rows_of_pair[n] - votes.offsets[p]).tolist()
        strengths, bad, stated = votes.strength_NJ[n].tolist(), votes.abstained_NJ[n].tolist(), float(self.stated_N[n])
        said = [(voter, vote) for voter, vote in zip(voters, strengths, strict=True) if not math.isnan(vote)]
        labels: dict[str, float | None] = {voter.name: vote for voter, vote in said if voter.kind == "label"}
        return PairEvidence(
            prompt_id=self.candidates[p].prompt.id,
            responses=(i, j),
            prior=int(votes.prior_N[n]),
            rule=votes.rules[votes.rules_N[n]],
            stated=None if math.isnan(stated) else stated,
            votes={voter.name: vote for voter, vote in said if voter.kind in ("score", "comparison")},
            labels=labels | {voters[k].name: None for k in votes.annotators if bad[k]},
            is_same_text=bool(votes.is_same_N[n]),
        )

    def names(self) -> Iterator[tuple[str, int, int]]:
        """Prompt id and places of the two responses of every pair, in order."""
        places = self.votes.rows_of_pair - self.votes.offsets[self.votes.prompt_of_pair][:, None]
        for p, (i, j) in zip(self.votes.prompt_of_pair.tolist(), places.tolist(), strict=True):
            yield self.candidates[p].prompt.id, i, j

    def pairs(self) -> Iterator[PairEvidence]:
        """All evidence on every pair, in order."""
        return map(self.pair, range(len(self.votes.prior_N)))

    # ---- what is told

    def judges(self) -> dict[str, dict[str, Any]]:
        """Facts about each judge: verdicts, abstentions, correlation with the other judges' ranks and, if evidence is
        calibrated, its reliability; also the reliability of the prior."""
        out: dict[str, dict[str, Any]] = {name: dict(row) for name, row in self.tallies.items()}
        if len(self.matrix.scorers) > 1:
            for name, value in zip(self.matrix.scorers, self._agreement.leave_one_out.tolist(), strict=True):
                out.setdefault(name, {})["correlation"] = None if math.isnan(value) else value
        if self.combination is not None:
            copies = {b: a for a, b in self.combination.joined} | dict(self.combination.joined.keys())
            labels = {voter.name for voter in self.votes.voters if voter.kind == "label"}
            rows = [(name, row) for name, row in self.combination.judges.items() if name not in labels]
            rows += [(PRIOR + rule, row) for rule, row in self.combination.prior.items()]
            for name, found in rows:
                if found.num_votes:
                    out.setdefault(name, {}).update(
                        accuracy=found.accuracy,
                        interval=list(found.interval),
                        ties_share=found.tie_rate,
                        pairs=found.num_votes,
                        is_given=found.is_given,
                        shown_first=found.pull,
                        longer=found.longer,
                        shares_errors_with=copies.get(name),
                        curve=[list(point) for point in found.curve],
                    )
        return out

    @functools.cached_property
    def _agreement(self) -> Agreement:
        return agreement(self.matrix.scores, self.matrix.offsets)

    @property
    def concordance(self) -> float | None:
        """Mean Kendall's W over the prompts where it is defined; 1: all judges rank alike; None: never defined."""
        known = self._agreement.concordance[~np.isnan(self._agreement.concordance)]
        return float(known.mean()) if len(known) else None


def _warn(found: Combination) -> None:
    """Says by name which voters cannot be trusted as they are, and what was done about it."""
    for (a, b), excess in found.joined.items():
        logger.warning(
            "evidence: %s and %s agree far more often than independent judges would (%.2f, expected %.2f, as a mean of "
            "signs); they share errors, and count as little more than one",
            a,
            b,
            excess.observed,
            excess.expected,
        )
    for name, row in found.judges.items():
        if row.is_given or not row.num_votes:
            continue
        if row.interval[1] < INVERTED:
            logger.warning(
                "evidence: %s is right on %.0f %% of the pairs (95 %% interval %.0f-%.0f): it seems to be inverted",
                name,
                100 * row.accuracy,
                100 * row.interval[0],
                100 * row.interval[1],
            )
        if abs(row.pull) > PULL:
            logger.warning(
                "evidence: %s prefers the response that it was shown %s, by log-odds of %.1f whatever the responses; "
                "this is taken out of its votes",
                name,
                "first" if row.pull > 0 else "second",
                abs(row.pull),
            )
        if abs(row.longer) > LONGER:
            logger.warning(
                "evidence: %s prefers the %s response more than its other votes explain (%+.2f, as a mean of signs)",
                name,
                "longer" if row.longer > 0 else "shorter",
                abs(row.longer),
            )
    if not found.is_identified:
        logger.warning(
            "evidence: too few independent voters and too few labels to tell how reliable each is; stated "
            "probabilities rest on what is assumed (`tso-fast annotate` collects labels)"
        )
