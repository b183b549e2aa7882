"""How good each response is, inferred from graded scores: one Gaussian quality a response.

    quality_r = trust * its order by the prior + noise of variance 1
    score_rj  = offset of judge j on this prompt + slope_j * quality_r + noise_j
    log-odds that a label or a comparison prefers r to s = slope_j * (quality_r - quality_s)

Scores become normal scores (mid-ranks over all responses, as quantiles of a Gaussian), so scale and shape do not
matter, and a judge may have seen any subset. Each judge is centred within the prompt. Its slope is learned from what
it shares with the other judges, response by response: cells have no quality of their own beyond the prior order,
since which cells a judge favours on average does not tell how reliable it is. This is factor analysis by EM;
comparisons and labels enter by the logistic bound of Polson, Scott and Windle 2013
(doi:10.1080/01621459.2013.829001). The qualities of a prompt are jointly Gaussian, and so is each difference.
"""

from __future__ import annotations

import numpy as np

from tso_fast.correction.votes import Votes

ASSUMED_SLOPE = 0.6
SLOPE_STRENGTH = 20.0
"""Number of responses that the assumed slope of a judge counts as."""
TRUST_STRENGTH = 100.0
PER_LOG_ODDS = 0.87
"""Quality of one unit of the prior order's log-odds, before any data: the same share of right pairs."""
LABEL_SLOPE = 2.6
"""Log-odds of a label a unit of quality: a person is right on 95 % of typical pairs."""
MAX_ITERATIONS = 500
TOLERANCE = 1e-4
"""Change of all slopes at which EM has converged."""
BOUND_STEPS = 20
"""Updates of the logistic bound where nothing else is estimated."""
CHUNK = 20_000
"""Prompts whose qualities are inferred at once."""


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Quantiles of a standard Gaussian at the mid-ranks of the values, ties sharing one; NaN stays."""
    import torch

    known = ~np.isnan(values)
    out = np.full(len(values), np.nan)
    _, place, counts = np.unique(values[known], return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2) / max(int(known.sum()), 1)
    out[known] = torch.special.ndtri(torch.from_numpy(ranks)).numpy()[place.ravel()]
    return out


class GradedModel:
    """Slopes of judges and trust in the prior order, fitted to some prompts.

    Args:
        votes: pair votes of ``comparison`` and ``label`` voters; those of ``score`` voters are in ``normal_RM``.
        normal_RM: normal scores of the ``score`` voters, in their order, NaN: none.
    """

    def __init__(self, votes: Votes, normal_RM: np.ndarray) -> None:
        self.votes = votes
        self.score_voters = [j for j, voter in enumerate(votes.voters) if voter.kind == "score"]
        self.pair_voters = [j for j, voter in enumerate(votes.voters) if voter.kind in ("comparison", "label")]
        self.scores = normal_RM
        self.slope = np.full(len(self.score_voters), ASSUMED_SLOPE)
        self.noise = np.ones(len(self.score_voters))
        is_label = [votes.voters[j].kind == "label" for j in self.pair_voters]
        self.pair_slope = np.where(is_label, LABEL_SLOPE, 1.0)
        self.trust = 1.0
        self.mean_R = PER_LOG_ODDS * votes.order_R
        self.gap_N = np.zeros(len(votes.prior_N))
        """Posterior mean of the difference of qualities."""
        self.spread_N = np.full(len(votes.prior_N), 2.0)
        """Posterior variance of the difference."""
        self.num_iterations = 0

    def fit(self) -> None:
        for iteration in range(MAX_ITERATIONS):
            before = np.concatenate([self.slope, self.pair_slope, [self.trust]])
            self._step()
            self.num_iterations = iteration + 1
            if np.abs(np.concatenate([self.slope, self.pair_slope, [self.trust]]) - before).max() < TOLERANCE:
                break
        self._expect()

    def _step(self) -> None:
        shared, power, residual, count = self._expect()
        slope = (shared + SLOPE_STRENGTH * ASSUMED_SLOPE) / (power + SLOPE_STRENGTH)
        self.noise = np.maximum((residual - 2 * slope * shared + slope**2 * power) / np.maximum(count, 1), 1e-3)
        self.slope = np.where(count > 0, slope, ASSUMED_SLOPE)
        order = PER_LOG_ODDS * self.votes.order_R
        self.trust = float((order @ self.mean_R + TRUST_STRENGTH) / (order @ order + TRUST_STRENGTH))
        second = self.gap_N**2 + self.spread_N
        for k, j in enumerate(self.pair_voters):
            if self.votes.voters[j].kind == "label":
                continue
            vote = self.votes.strength_NJ[:, j].astype(np.float64)
            has = ~np.isnan(vote)
            bound = _bound(self.pair_slope[k] * np.sqrt(second[has]))
            pull = vote[has] / 2 @ self.gap_N[has] + SLOPE_STRENGTH / 4
            self.pair_slope[k] = pull / (bound @ second[has] + SLOPE_STRENGTH / 4)

    def _expect(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Posterior of the qualities; returns the sums of score x quality, quality squared, score squared, and the
        degrees of freedom, all centred within the prompt, by judge."""
        sums = np.zeros((4, len(self.score_voters)))
        prior_R = self.trust * PER_LOG_ODDS * self.votes.order_R
        for count in np.unique(self.votes.num_responses).tolist():
            every = np.flatnonzero(self.votes.num_responses == count)
            for start in range(0, len(every) if count else 0, CHUNK):
                prompts = every[start : start + CHUNK]
                rows = self.votes.offsets[prompts][:, None] + np.arange(count)
                pairs = self.votes.bounds[prompts][:, None] + np.arange(count * (count - 1) // 2)
                self._infer(rows, pairs, prior_R, sums)
        return sums[0], sums[1], sums[2], sums[3]

    def _infer(self, rows: np.ndarray, pairs: np.ndarray, prior_R: np.ndarray, sums: np.ndarray) -> None:
        count = rows.shape[1]
        precision = np.repeat(np.eye(count)[None], len(rows), axis=0)
        pull = prior_R[rows].copy()
        centred, centring = [], []
        for k in range(len(self.score_voters)):
            score = self.scores[rows, k]
            known = (~np.isnan(score)).astype(np.float64)
            number = np.maximum(known.sum(axis=1, keepdims=True), 1)
            centred.append(np.where(known > 0, score - np.nansum(score, axis=1, keepdims=True) / number, 0.0))
            centring.append(known[:, :, None] * np.eye(count) - known[:, :, None] * known[:, None] / number[:, :, None])
            precision += self.slope[k] ** 2 / self.noise[k] * centring[k]
            pull += self.slope[k] / self.noise[k] * centred[k]
        first, second = np.triu_indices(count, 1)
        self._add_pair_votes(pairs, first, second, precision, pull)
        covariance = np.linalg.inv(precision)
        mean = np.einsum("bij,bj->bi", covariance, pull)
        self.mean_R[rows] = mean
        variance = np.einsum("bii->bi", covariance)
        self.gap_N[pairs] = mean[:, first] - mean[:, second]
        self.spread_N[pairs] = variance[:, first] + variance[:, second] - 2 * covariance[:, first, second]
        for k in range(len(self.score_voters)):
            own = np.einsum("bij,bj->bi", centring[k], mean)
            sums[0, k] += (centred[k] * mean).sum()
            sums[1, k] += (mean * own).sum() + np.einsum("bij,bji->", centring[k], covariance)
            sums[2, k] += (centred[k] ** 2).sum()
            sums[3, k] += np.einsum("bii->", centring[k])

    def _add_pair_votes(
        self, pairs: np.ndarray, first: np.ndarray, second: np.ndarray, precision: np.ndarray, pull: np.ndarray
    ) -> None:
        scale = np.sqrt(self.gap_N[pairs] ** 2 + self.spread_N[pairs])
        for k, j in enumerate(self.pair_voters):
            vote = self.votes.strength_NJ[pairs, j].astype(np.float64)
            has = ~np.isnan(vote)
            if not has.any():
                continue
            slope = self.pair_slope[k]
            weight = np.where(has, _bound(slope * scale) * slope**2, 0.0)
            force = np.where(has, np.nan_to_num(vote) / 2 * slope, 0.0)
            for n, (i, j2) in enumerate(zip(first, second, strict=True)):
                precision[:, i, i] += weight[:, n]
                precision[:, j2, j2] += weight[:, n]
                precision[:, i, j2] -= weight[:, n]
                precision[:, j2, i] -= weight[:, n]
                pull[:, i] += force[:, n]
                pull[:, j2] -= force[:, n]

    def applied(self, votes: Votes, normal_RM: np.ndarray) -> GradedModel:
        """The same slopes, noise and trust on other prompts with the same voters."""
        other = GradedModel(votes, normal_RM)
        other.slope, other.noise, other.pair_slope, other.trust = self.slope, self.noise, self.pair_slope, self.trust
        for _ in range(BOUND_STEPS if self.pair_voters else 1):
            other._expect()
        return other

    @property
    def probabilities(self) -> np.ndarray:
        """[N] probability that the first response is better."""
        import torch

        return torch.special.ndtr(torch.from_numpy(self.gap_N / np.sqrt(self.spread_N))).numpy()

    @property
    def accuracies(self) -> np.ndarray:
        """Share of pairs of one cell that each judge of ``score_voters`` orders rightly."""
        correlation = self.slope / np.sqrt(self.slope**2 + self.noise)
        return 0.5 + np.arcsin(correlation) / np.pi


def _bound(x: np.ndarray) -> np.ndarray:
    """Precision of the logistic bound, tanh(x / 2) / (2 x)."""
    x = np.maximum(np.abs(x), 1e-6)
    return np.tanh(x / 2) / (2 * x)
