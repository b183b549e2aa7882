"""How a voter votes where the first response is better, neither is, or the second is.

Votes of different strength (gaps of scores, probabilities) are sorted into levels. An ``Emission`` holds the
probability of each level in each of three states, estimated from expected counts. Three things shape the estimate:

- **Mirror symmetry.** Swapping two responses mirrors states and votes, except for one number, the voter's pull
  towards the response that it was shown first: log-odds, with a Cauchy prior, so that small pulls are taken for
  chance and large ones for what they are.
- **Strength.** Log-odds of being right grow in proportion to the strength of the vote (Platt scaling), and a pair of
  which neither is better is halfway, until many votes of a level say otherwise: levels are shrunk towards both.
- **Whom it copies.** A voter may depend on another one: it then has a table for each way the other votes, so a copy
  adds what it knows beyond its original, which for an exact copy is nothing.

Letters in shapes: L levels of one sign; a vote's column is 0 .. 2 L (L: a tie) or 2 L + 1, silence. States are -1, 0,
1.
"""

from __future__ import annotations

import numpy as np

from tso_fast.correction.votes import Voter

LEVELS = 16
"""Most levels of one sign."""
MOST_CERTAIN = 0.998
"""Strength of a comparison beyond which votes are equally strong: a stated probability of 0.999."""
ASSUMED = 0.6
"""Accuracy of a judge before any data."""
START = 0.75
"""Least accuracy from which the estimation starts: at a lower one nothing tells the two mirror images apart."""
ASSUMED_ANNOTATOR = 0.95
STRENGTH = 20.0
"""Number of votes that the assumed accuracy of a judge counts as."""
LINE_STRENGTH, HALFWAY_STRENGTH = 200.0, 1000.0
"""Number of votes of a level that the line of strengths counts as, and of all levels that "neither" being halfway does.
Levels are many, and without either each would fit the noise of its own votes."""
ANNOTATOR_STRENGTH = 10.0
RARE = 0.05
"""Share of ties, and of silences, before any data."""
PULL_SCALE = 0.02
"""Half of the pulls towards the response shown first are smaller, before any data; log-odds / 2."""
NO_VOTE = -1
STEPS = 6
"""Steps of iterative scaling in one update."""
LARGEST = 50.0


class Emission:
    """Probabilities of one voter's votes, ``[shown, parent's sign, 2 L + 2, 3]``."""

    def __init__(self, voter: Voter, strength_N: np.ndarray, has_parent: bool = False) -> None:
        self.voter = voter
        size = self._size(strength_N[~np.isnan(strength_N)])
        self.edges, self.size_L = _levels(size[size > 0])
        self.has_parent = has_parent
        L = self.num_levels
        self.sign = np.concatenate([-np.ones(L), [0.0], np.ones(L), [0.0]])
        self.mirror = np.concatenate([np.arange(2 * L, -1, -1), [2 * L + 1]])
        self.assumed = self._assumed(self._expected_accuracy)
        self.pull = 0.0
        """Log-odds / 2 of a vote for the response shown first, beyond what the state explains."""
        start = self._assumed(self._expected_accuracy if self.voter.given else max(self._expected_accuracy, START))
        both = start + self._mirrored(start)
        self.symmetric = np.repeat((both / both.sum(axis=0))[None], 3, axis=0)
        self.update_table()

    @property
    def num_levels(self) -> int:
        return len(self.size_L)

    def columns(self, strength_N: np.ndarray) -> np.ndarray:
        """Column of each vote, [N] int16; ``NO_VOTE``: none."""
        has = ~np.isnan(strength_N)
        level = 1 + np.searchsorted(self.edges, self._size(np.where(has, strength_N, 0)), side="left")
        return np.where(has, np.sign(strength_N) * level + self.num_levels, NO_VOTE).astype(np.int16)

    def _size(self, strength: np.ndarray) -> np.ndarray:
        """What log-odds of being right are proportional to: the log-odds that are stated, or the gap of two scores."""
        size = np.abs(strength)
        return 2 * np.arctanh(np.minimum(size, MOST_CERTAIN)) if self.voter.kind == "comparison" else size

    def _mirrored(self, table: np.ndarray) -> np.ndarray:
        """The table of the two responses swapped; the last two axes are columns and states."""
        return table[..., self.mirror, ::-1]

    @property
    def _expected_accuracy(self) -> float:
        if self.voter.given is not None:
            return self.voter.given
        return ASSUMED_ANNOTATOR if self.voter.kind == "label" else ASSUMED

    def _assumed(self, accuracy: float) -> np.ndarray:
        """Counts of votes assumed before any data, [2 L + 2, 3]; a given reliability is all there ever is."""
        L, given, kind = self.num_levels, self.voter.given, self.voter.kind
        count = ANNOTATOR_STRENGTH if kind == "label" else STRENGTH
        knows_ties = given is not None or kind == "label"
        out = np.zeros((2 * L + 2, 3))
        for state, share in ((0, 1 - accuracy), (1, 0.5), (2, accuracy)):
            out[L + 1 : 2 * L + 1, state] = share / L
            out[:L, state] = (1 - share) / L
        out[L], out[2 * L + 1] = RARE, RARE
        if knows_ties:  # it ties where neither is better, as often as it is right elsewhere
            wrong = 1 - accuracy
            out[L] = [wrong / 2, accuracy, wrong / 2]
            out[L + 1 : 2 * L + 1] = np.array([wrong / 2, wrong / 2, accuracy]) / L
            out[:L] = np.array([accuracy, wrong / 2, wrong / 2]) / L
        if kind == "prior":
            out[L] = 1e-9
            out[L + 1 : 2 * L + 1], out[:L] = (
                np.array([1 - accuracy, 0.5, accuracy]),
                np.array([accuracy, 0.5, 1 - accuracy]),
            )
        return count * out

    def start_as_copy(self, counts: np.ndarray) -> None:
        """Starts from votes that say nothing beyond the parent's.

        Args:
            counts: votes by the parent's sign and column, ``[3, 2 L + 2]``.
        """
        table = np.repeat(counts[:, :, None], 3, axis=2) + self.assumed.mean() * np.ones((1, 1, 3))
        table = table + self._mirrored(table[::-1])
        self.symmetric = table / table.sum(axis=1, keepdims=True)
        self.update_table()

    def update_table(self) -> None:
        shift = np.exp(self.pull * np.array([-1.0, 0.0, 1.0])[:, None] * self.sign)
        table = self.symmetric[None] * shift[:, None, :, None]
        self.table = table / table.sum(axis=2, keepdims=True)

    def fit(self, counts: np.ndarray, fits_pull: bool = True) -> None:
        """Estimates the table from expected counts, ``[shown, parent's sign, 2 L + 2, 3]``."""
        if self.voter.given is not None:
            return
        target, total = self._targets(counts)
        observed = counts.sum(axis=3) @ self.sign
        for _ in range(STEPS):
            self._scale(target, total)
            if self.voter.kind != "comparison" or not fits_pull:
                continue
            mean = np.einsum("l,sqld->sqd", self.sign, self.table)
            spread = np.einsum("l,sqld->sqd", self.sign**2, self.table) - mean**2
            side = np.array([-1.0, 0.0, 1.0])
            gradient = side @ (observed - (total * mean).sum(axis=2)).sum(axis=1)
            curvature = side**2 @ (total * spread).sum(axis=(1, 2))
            prior = 2 / (PULL_SCALE**2 + self.pull**2)
            step = (gradient - prior * self.pull) / (curvature + prior)
            self.pull += float(np.clip(step, -1, 1))
            self.update_table()

    def _targets(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the symmetric part must explain, ``[parent's sign, 2 L + 2, 3]``, and the votes of each state, ``[shown,
        parent's sign, 3]``, both with what is assumed."""
        summed = counts.sum(axis=0)
        if not self.has_parent:
            summed = summed.sum(axis=0, keepdims=True).repeat(3, axis=0)
            counts = np.zeros_like(counts) + counts.sum(axis=1, keepdims=True) * np.array([0, 1, 0])[:, None, None]
        total = counts.sum(axis=2)
        if self.has_parent:  # shrunk towards votes that say nothing beyond the parent's
            pooled = (summed + self._mirrored(summed[::-1])).sum(axis=2, keepdims=True) + self.assumed.mean()
            shrink = STRENGTH * (pooled / pooled.sum(axis=1, keepdims=True)).repeat(3, axis=2)
            target = (summed + self._mirrored(summed[::-1]) + shrink) / 2
            total = total + (shrink / 2).sum(axis=1) * np.array([0, 1, 0])[:, None, None]
        else:
            marginal = summed[1] + self._mirrored(summed[1]) + self.assumed + self._mirrored(self.assumed)
            target = (self._smooth(marginal) / 2)[None].repeat(3, axis=0)
            middle = np.array([0, 1, 0])
            total = total + self.assumed.sum(axis=0) * middle[:, None, None] * middle[:, None]
        return target, total

    def _scale(self, target: np.ndarray, total: np.ndarray) -> None:
        """One step of iterative scaling of the symmetric part towards its targets."""
        expected = (self.table * total[:, :, None, :]).sum(axis=0)
        if self.has_parent:
            expected = (expected + self._mirrored(expected[::-1])) / 2
        else:
            middle = (expected[1] + self._mirrored(expected[1])) / 2
            expected = middle[None].repeat(3, axis=0)
        new = self.symmetric * np.divide(target, expected, out=np.ones_like(target), where=expected > 0)
        total_D = new.sum(axis=1, keepdims=True)
        self.symmetric = np.divide(new, total_D, out=self.symmetric.copy(), where=total_D > 0)
        self.update_table()

    def _smooth(self, counts: np.ndarray) -> np.ndarray:
        """Counts pulled towards a line: log-odds of being right in proportion to the strength, and "neither" halfway.

        Votes are exponential in a state that is -1, 0 or 1 if log p(vote | 0) is the mean of log p(vote | -1) and
        log p(vote | 1), but for a constant. With log-odds b of a level, votes where one response is better are then
        cosh(b / 2) times as frequent as where neither is, again but for a constant.
        """
        L = self.num_levels
        if L == 1:
            return counts
        right = counts[L + 1 : 2 * L + 1, 2] + counts[:L, 0][::-1]
        wrong = counts[L + 1 : 2 * L + 1, 0] + counts[:L, 2][::-1]
        tied = counts[L + 1 : 2 * L + 1, 1] + counts[:L, 1][::-1]
        odds = line_of_strengths(self.size_L, right, wrong)
        share = (right + LINE_STRENGTH / (1 + np.exp(-odds))) / (right + wrong + LINE_STRENGTH)
        either, cosh = right + wrong, np.cosh(odds / 2)
        either, tied = _pulled(either, tied * cosh), _pulled(tied, either / cosh)
        out = counts.copy()
        for state, each in ((2, either * share / 2), (1, tied / 2), (0, either * (1 - share) / 2)):
            out[L + 1 : 2 * L + 1, state], out[:L, 2 - state] = each, each[::-1]
        return out

    @property
    def accuracy(self) -> float:
        """Share of right votes, ties and silences aside, where one response is better and both orders were shown."""
        L = self.num_levels
        table = self.symmetric.mean(axis=0)
        right, wrong = table[L + 1 : 2 * L + 1, 2].sum(), table[:L, 2].sum()
        return float(right / (right + wrong))


def _pulled(counts: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Counts with the same sum, as if ``HALFWAY_STRENGTH`` votes of the other shape had been seen, too."""
    if not shape.sum() > 0:
        return counts
    total = counts.sum()
    return (counts + HALFWAY_STRENGTH * shape / shape.sum()) * total / (total + HALFWAY_STRENGTH)


def edges_of_levels(size: np.ndarray, most: int) -> np.ndarray:
    """Edges between at most so many levels that hold about equally many votes."""
    values = np.unique(size)
    if len(values) <= most:
        return values[:-1]
    edges = np.unique(np.quantile(size, np.arange(1, most) / most))
    return edges[edges < values[-1]]


def _levels(size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges between levels that hold about equally many votes, and the mean strength of each level."""
    edges = edges_of_levels(size, LEVELS)
    if not len(size):
        return edges, np.ones(1)
    level = np.searchsorted(edges, size, side="left")
    return edges, np.bincount(level, size, minlength=len(edges) + 1) / np.bincount(level, minlength=len(edges) + 1)


def line_of_strengths(strength_L: np.ndarray, right_L: np.ndarray, wrong_L: np.ndarray) -> np.ndarray:
    """Log-odds of being right by level, if they are proportional to the strength: maximum likelihood, by Newton."""
    unit = strength_L / strength_L.mean()
    slope, count = 1.0, right_L + wrong_L
    for _ in range(20):
        share = 1 / (1 + np.exp(-slope * unit))
        gradient = (right_L - count * share) @ unit
        slope = float(np.clip(slope + gradient / (count * share * (1 - share) @ unit**2 + 1e-9), -LARGEST, LARGEST))
    return np.clip(slope * unit, -LARGEST, LARGEST)
