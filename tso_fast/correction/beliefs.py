"""Beliefs that follow from the evidence: one score per response, and one probability per pair.

ScoreMatrix, PairEvidence -> consensus of scores, or reliabilities of voters -> Beliefs
"""

from __future__ import annotations

import functools
import logging
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from tso_fast.config.settings import EvidenceConfig
from tso_fast.correction.decide import Belief, from_scores
from tso_fast.correction.evidence import Evidence, evidence_of, score_matrix, with_comparisons
from tso_fast.correction.reliability import Combination, LearnFrom, combine, is_identified
from tso_fast.correction.votes import PRIOR, votes_of
from tso_fast.errors import InputError, did_you_mean
from tso_fast.scoring import Agreement, agreement, consensus
from tso_fast.types import Candidates, Comparison, PairEvidence, ScoreMatrix, Verdict

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
    options: dict[str, Any] = {"method": config.consensus, "normalize": config.score_normalize}
    scores = consensus(matrix.scores, matrix.offsets, **options, weights=weights).scores
    counts = np.diff(matrix.offsets)
    known = ~np.isnan(matrix.scores[:, weights > 0])
    prompt_R = np.repeat(np.arange(len(counts)), counts)
    seen = np.stack([np.bincount(prompt_R, column, minlength=len(counts)) for column in known.T], axis=1)
    scored = np.bincount(prompt_R, known.any(axis=1), minlength=len(counts))
    is_uneven = ((seen != 0) & (seen != scored[:, None])).any(axis=1)
    # Win rates and Bradley-Terry strengths compare responses pair by pair as it is.
    if not is_uneven.any() or config.consensus in ("win_rate", "bradley_terry"):
        return Consensus(scores, None)
    alone = np.stack(
        [consensus(matrix.scores[:, [k]], matrix.offsets, **options).scores for k in range(len(weights))], axis=1
    )
    gaps = []
    scores = scores.copy()
    for p, (start, end) in enumerate(zip(matrix.offsets[:-1], matrix.offsets[1:], strict=True)):
        first, second = np.triu_indices(end - start, 1)
        if not is_uneven[p]:
            gaps.append((scores[start + first] - scores[start + second]).astype(np.float64))
            continue
        own = np.where(weights > 0, alone[start:end], np.nan)
        gap = _common_gap(own[first] - own[second], weights, config.consensus)
        sums, has = np.zeros(end - start), np.zeros(end - start, dtype=bool)
        np.add.at(sums, first, np.nan_to_num(gap))
        np.add.at(sums, second, -np.nan_to_num(gap))
        has[first[~np.isnan(gap)]] = has[second[~np.isnan(gap)]] = True
        scores[start:end] = np.where(has, sums / max(int(has.sum()), 1), np.nan)
        gaps.append(gap)
    return Consensus(scores, np.concatenate([*gaps, np.zeros(0)]))


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
    pointwise = score_matrix(candidates, [v for v in verdicts if isinstance(v, Verdict)], hidden)
    comparisons = [v for v in verdicts if isinstance(v, Comparison)]
    return Beliefs(candidates, evidence_of(candidates, pointwise, comparisons), settings, pointwise, comparisons)


class Beliefs:
    """Scores and probabilities of a set of candidates; all lists are by prompt.

    Args:
        pointwise: scores by the judges of single responses.
        comparisons: verdicts of the judges that compare two responses, and labels.
    """

    def __init__(
        self,
        candidates: Sequence[Candidates],
        evidence: Evidence,
        config: EvidenceConfig,
        pointwise: ScoreMatrix,
        comparisons: Sequence[Comparison] = (),
    ) -> None:
        self.candidates = candidates
        self.evidence = evidence
        self.config = config
        self.pointwise = pointwise
        self.matrix = with_comparisons(pointwise, candidates, comparisons, config.comparison_scores)
        self.votes = votes_of(candidates, pointwise, comparisons, self.given)
        self._check_names()
        self.combination: Combination | None = None
        self.probabilities: list[Any] = [None] * len(candidates)
        """[pairs of the prompt, 3], see ``Combination.probabilities``; None: scores decide."""
        self.gaps: list[Any] = [None] * len(candidates)
        """[pairs of the prompt], see ``Consensus.gaps``; None: differences of scores decide."""
        self.chosen = self._choose()
        logger.info("evidence: %s, as %s", self.chosen.method, self.chosen.why)
        if self.chosen.method == "calibrated":
            self._calibrate()
        else:
            self._agree()

    def _calibrate(self) -> None:
        self.combination = combine(self.votes, self.pointwise.scores, learn_from=self.chosen.learn_from)
        _warn(self.combination)
        self.probabilities = self.by_prompt(self.combination)
        self.scores = [self.expected_win_rates(p) for p in range(len(self.candidates))]
        self.win_rates = self.scores

    def _agree(self) -> None:
        matrix, bounds = self.matrix, self.matrix.offsets[1:-1]
        if self.chosen.method == "prior":
            nothing = np.full((len(matrix.scores), 0), np.nan, np.float32)
            matrix = ScoreMatrix(scores=nothing, offsets=matrix.offsets, scorers=())
        found = consensus_of(matrix, self.config)
        self.scores = np.split(found.scores, bounds) if len(self.candidates) else []
        if found.gaps is not None:
            self.gaps = np.split(found.gaps, self.votes.bounds[1:-1])
        self.win_rates = self.scores
        if matrix.scorers:
            rates = consensus(matrix.scores, matrix.offsets, method="win_rate", normalize="none").scores
            self.win_rates = np.split(rates, bounds) if len(self.candidates) else []

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
        if told == "auto" and not is_identified(self.votes):
            names = " and ".join(voter.name for voter in active)
            return Chosen("consensus", f"nothing tells how reliable {names} is, which is taken at its word")
        labelled = [pair for pairs in self.evidence for pair in pairs if pair.label]
        if len(labelled) < MIN_LABELS:
            why = "told" if told == "calibrated" else f"{len(active)} judges voted whose reliability can be estimated"
            return Chosen("calibrated", why)
        return self._choose_by_labels(len(labelled), told == "auto")

    def _choose_by_labels(self, count: int, is_free: bool) -> Chosen:
        parents = combine(self.votes, self.pointwise.scores).parents
        losses: dict[LearnFrom, np.ndarray] = {}
        errors: dict[LearnFrom, dict[Any, bool]] = {}
        for learn_from in get_args(LearnFrom):
            nats, is_wrong = [], {}
            for fold in range(FOLDS):
                votes = self.votes.without_labels(self._hidden(is_in(fold)))
                found = combine(votes, self.pointwise.scores, learn_from=learn_from, parents=parents)
                for pairs, p in zip(self.evidence, self.by_prompt(found), strict=True):
                    for n, pair in enumerate(pairs):
                        if fold_of(pair.prompt_id) == fold and (label := pair.label):
                            first, second = p[n][:2] + 1e-9
                            nats.append(-math.log((first if label > 0 else second) / (first + second)))
                            is_wrong[pair.prompt_id, pair.responses] = (first > second) != (label > 0)
            losses[learn_from], errors[learn_from] = np.array(nats), is_wrong
        if (names := self._contradicted(errors["all"])) is not None:
            logger.warning(
                "evidence: the labels of %s contradict the judges and the prior order more often than not: they may be "
                "inverted; labels decide their own pairs, and teach nothing else",
                names,
            )
            return Chosen("calibrated", f"the labels of {names} may be inverted")
        # Labels are few: they teach alone only where that is better by more than chance.
        gain = losses["all"] - losses["labels"]
        is_better = gain.mean() > 2 * gain.std() / math.sqrt(count)
        best: LearnFrom = "labels" if is_better else "all"
        told = ", ".join(f"{name} {loss.mean():.3f}" for name, loss in losses.items())
        chosen = Chosen("calibrated", f"reliabilities from {best} pairs predict labels best ({told} nats each)", best)
        if is_free and (reason := self._consensus_is_better(errors[best])) is not None:
            return Chosen("consensus", reason)
        return chosen

    def _contradicted(self, is_wrong: dict[Any, bool]) -> str | None:
        """Annotators whose labels clearly contradict what the others say of the same pairs; None: nobody."""
        told: dict[str, list[bool]] = {}
        for pairs in self.evidence:
            for pair in pairs:
                for name, vote in pair.labels.items():
                    if vote and pair.label and (pair.prompt_id, pair.responses) in is_wrong:
                        disagrees = is_wrong[pair.prompt_id, pair.responses] == (vote * pair.label > 0)
                        told.setdefault(name, []).append(disagrees)
        names = [
            name
            for name, contrary in told.items()
            if len(contrary) >= MIN_LABELS / 2 and sum(contrary) - len(contrary) / 2 > math.sqrt(len(contrary))
        ]
        return " and ".join(names) or None

    def _consensus_is_better(self, is_wrong: dict[Any, bool]) -> str | None:
        """Why consensus is preferred: it errs less on labels, by more than two standard errors; None: it is not."""
        found = consensus_of(self.matrix, self.config)
        only_consensus = only_calibrated = 0
        for p, pairs in enumerate(self.evidence):
            scores = found.scores[self.matrix.offsets[p] : self.matrix.offsets[p + 1]]
            for pair in pairs:
                label = pair.label
                if not label:
                    continue
                i, j = pair.responses
                gap = float(scores[i] - scores[j])
                wrong = (pair.prior if math.isnan(gap) or gap == 0 else gap) * label <= 0
                other = is_wrong[pair.prompt_id, pair.responses]
                only_consensus += wrong and not other
                only_calibrated += other and not wrong
        if only_calibrated - only_consensus <= 2 * math.sqrt(only_calibrated + only_consensus):
            return None
        return f"it alone is right on {only_calibrated} labels, and calibrated evidence alone on {only_consensus}"

    def _hidden(self, hidden: Callable[[PairEvidence], bool]) -> np.ndarray:
        return np.array([hidden(pair) for pairs in self.evidence for pair in pairs], dtype=bool)

    def without(self, hidden: Callable[[PairEvidence], bool]) -> list[Any]:
        """Probabilities when the labels of ``hidden`` pairs are not used."""
        if self.combination is None:
            return [None] * len(self.candidates)
        votes, parents = self.votes.without_labels(self._hidden(hidden)), self.combination.parents
        learn_from = self.chosen.learn_from
        return self.by_prompt(combine(votes, self.pointwise.scores, learn_from=learn_from, parents=parents))

    def by_prompt(self, combination: Combination) -> list[Any]:
        """Probabilities of each prompt's pairs."""
        return list(np.split(combination.probabilities, self.votes.bounds[1:-1])) if len(self.candidates) else []

    @functools.cached_property
    def has_votes(self) -> np.ndarray:
        """[P] whether a judge voted on any pair of the prompt."""
        judges = [j for j, voter in enumerate(self.votes.voters) if voter.kind in ("comparison", "score")]
        voted = (
            ~np.isnan(self.votes.strength_NJ[:, judges]).all(axis=1) if judges else np.zeros(len(self.votes.prior_N))
        )
        return np.bincount(self.votes.prompt_of_pair, voted, minlength=len(self.candidates)) > 0

    def expected_win_rates(self, p: int, probabilities: np.ndarray | None = None) -> np.ndarray:
        """Mean probability of being the better of two, "neither" counting half, [R] float32; NaN: no evidence."""
        states = self.probabilities[p] if probabilities is None else probabilities
        n = len(self.candidates[p].responses)
        first, second = np.triu_indices(n, 1)
        sums = np.bincount(first, states[:, 0] + states[:, 2] / 2, minlength=n)
        sums += np.bincount(second, states[:, 1] + states[:, 2] / 2, minlength=n)
        has_evidence = np.full(n, bool(self.has_votes[p]))
        for pair in self.evidence[p]:
            if pair.labels:
                has_evidence[list(pair.responses)] = True
        return np.where(has_evidence, sums / max(n - 1, 1), np.nan).astype(np.float32)

    def about(self, p: int, scores: np.ndarray | None = None, probabilities: np.ndarray | None = None) -> list[Belief]:
        """What is believed of each pair of a prompt.

        Args:
            scores, probabilities: other ones than ``self.scores`` and ``self.probabilities``.
        """
        scores = self.scores[p] if scores is None else scores
        states = self.probabilities[p] if probabilities is None else probabilities
        if self.chosen.method == "prior":
            return [Belief(math.nan, None) for _ in self.evidence[p]]
        if states is None and self.gaps[p] is None:
            return from_scores(self.evidence[p], scores)
        if states is None:
            return [Belief(float(gap), pair.stated) for gap, pair in zip(self.gaps[p], self.evidence[p], strict=True)]
        out = []
        for first, second, neither in states.tolist():
            stated = first / (first + second) if first + second > 0 else 0.5
            # Rounded, since two equally reliable voters that contradict each other should tie.
            out.append(Belief(round(first - second, 12) if self.has_votes[p] else math.nan, stated, neither))
        return out

    # ---- what is told

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


def is_in(fold: int) -> Callable[[PairEvidence], bool]:
    return lambda pair: fold_of(pair.prompt_id) == fold


def fold_of(prompt_id: str) -> int:
    return zlib.crc32(prompt_id.encode()) % FOLDS
