"""Votes of all judges on all pairs of responses, as columns: what the models of reliability read.

Letters in shapes: P prompts, R responses of all prompts, N pairs, J voters, A annotators. The pairs of a prompt are
adjacent and in the order of ``itertools.combinations``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

PRIOR = "prior: "
"""Begins the name of a rule of the prior order where reliabilities are given by name."""
PARTITIONED, TELLING = 0.95, 0.05
"""Shares of a judge's prompts that must look as if its silence meant a tie, and that can tell."""
ORDER = math.log(3.0)
"""Log-odds of the prior order before any data: right on three of four pairs that differ by one rule of two values."""


@dataclass(frozen=True, kw_only=True)
class Voter:
    """Who votes: ``Voter(name="llm", kind="comparison")``."""

    name: str
    kind: Literal["comparison", "score", "label", "prior"]
    """A judge of two responses, one of single responses, an annotator, or a rule of the prior order whose reliability
    is given."""
    given: float | None = None
    """Reliability that is not estimated."""

    @property
    def is_pointwise(self) -> bool:
        """Whether the votes of a prompt come from one number a response, and so cannot contradict each other."""
        return self.kind in ("score", "prior")


@dataclass(frozen=True, kw_only=True)
class Votes:
    """All votes on the pairs of some prompts."""

    voters: tuple[Voter, ...]
    strength_NJ: np.ndarray
    """[N, J] float32: positive for the first response, the size is the strength, 0 a tie, NaN no vote."""
    shown_NJ: np.ndarray
    """[N, J] int8: 1: the first response was shown first, -1: second, 0: both ways, or single responses were shown."""
    abstained_NJ: np.ndarray
    """[N, J] bool: the voter was asked and said nothing, or an annotator called the pair bad; False where it was not
    asked."""
    offsets: np.ndarray
    """[P + 1] int64: rows of the responses to each prompt."""
    order_R: np.ndarray
    """[R] float64: log-odds that the prior order gives a response, before any data."""
    prior_N: np.ndarray
    """[N] int8: 1: the prior order prefers the first response, -1: the second, 0: neither."""
    rules_N: np.ndarray
    """[N] int16: index into ``rules``."""
    rules: tuple[str, ...]
    is_same_N: np.ndarray
    """[N] bool: both responses have the same text; they have no votes."""
    longer_N: np.ndarray
    """[N] int8: 1: the first response has more characters, -1: the second."""

    @functools.cached_property
    def num_responses(self) -> np.ndarray:
        """[P] numbers of responses."""
        return np.diff(self.offsets)

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """[P + 1] int64: rows of the pairs of each prompt."""
        return bounds_of_pairs(self.offsets)

    @functools.cached_property
    def prompt_of_pair(self) -> np.ndarray:
        """[N] prompt of each pair."""
        return np.repeat(np.arange(len(self.num_responses)), np.diff(self.bounds))

    @functools.cached_property
    def prompt_of_response(self) -> np.ndarray:
        """[R] prompt of each response."""
        return np.repeat(np.arange(len(self.num_responses)), self.num_responses)

    def responses_of(self, p: int) -> slice:
        """Rows of the responses to a prompt."""
        return slice(self.offsets[p], self.offsets[p + 1])

    @functools.cached_property
    def rows_of_pair(self) -> np.ndarray:
        """[N, 2] int64: rows of the two responses of each pair."""
        return rows_of_pairs(self.offsets)

    @functools.cached_property
    def annotators(self) -> list[int]:
        """Columns of the labels."""
        return [j for j, voter in enumerate(self.voters) if voter.kind == "label"]

    @functools.cached_property
    def is_labelled(self) -> np.ndarray:
        """[N] bool: somebody labelled the pair, if only as a bad one."""
        labels_NA, bad_NA = self.strength_NJ[:, self.annotators], self.abstained_NJ[:, self.annotators]
        return (~np.isnan(labels_NA) | bad_NA).any(axis=1)

    @functools.cached_property
    def label(self) -> np.ndarray:
        """[N] float64: mean of the labels; NaN: nobody labelled the pair, or most annotators call it bad."""
        labels_NA = self.strength_NJ[:, self.annotators].astype(np.float64)
        num, bad = (~np.isnan(labels_NA)).sum(axis=1), self.abstained_NJ[:, self.annotators].sum(axis=1)
        return np.divide(np.nansum(labels_NA, axis=1), num, out=np.full(len(num), np.nan), where=num > bad)

    @property
    def has_direction(self) -> np.ndarray:
        """[N] bool: the labels, put together, say which response is better."""
        return np.nan_to_num(self.label) != 0

    def is_contradicted(self, direction_N: np.ndarray) -> np.ndarray:
        """[N] bool: a judge prefers the other response than ``direction_N``, positive for the first, or neither."""
        judges = [j for j, voter in enumerate(self.voters) if voter.kind in ("comparison", "score")]
        strength_NJ = self.strength_NJ[:, judges]
        return (~np.isnan(strength_NJ) & (np.sign(strength_NJ) != np.sign(direction_N)[:, None])).any(axis=1)

    def only(self, prompts: np.ndarray) -> Votes:
        """The votes on the pairs of some prompts, in this order."""
        rows = _ranges(self.offsets, prompts)
        pairs = _ranges(self.bounds, prompts)
        lengths = self.num_responses[prompts]
        return dataclasses.replace(
            self,
            strength_NJ=self.strength_NJ[pairs],
            shown_NJ=self.shown_NJ[pairs],
            abstained_NJ=self.abstained_NJ[pairs],
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            order_R=self.order_R[rows],
            prior_N=self.prior_N[pairs],
            rules_N=self.rules_N[pairs],
            is_same_N=self.is_same_N[pairs],
            longer_N=self.longer_N[pairs],
        )

    def without_labels(self, hidden_N: np.ndarray) -> Votes:
        """The same without the labels on the pairs ``hidden_N`` ([N] bool)."""
        strength_NJ, abstained_NJ = self.strength_NJ.copy(), self.abstained_NJ.copy()
        for j in self.annotators:
            strength_NJ[hidden_N, j] = np.nan
            abstained_NJ[hidden_N, j] = False
        return dataclasses.replace(self, strength_NJ=strength_NJ, abstained_NJ=abstained_NJ)

    def with_label(self, name: str, label_N: np.ndarray) -> Votes:
        """The same with one more annotator, whose labels replace those of all others; NaN: no label."""
        kept = [j for j, voter in enumerate(self.voters) if voter.kind != "label"]
        column = np.where(self.is_same_N, np.nan, label_N).astype(np.float32)
        return dataclasses.replace(
            self,
            voters=(*(self.voters[j] for j in kept), Voter(name=name, kind="label")),
            strength_NJ=np.column_stack([self.strength_NJ[:, kept], column]),
            shown_NJ=np.column_stack([self.shown_NJ[:, kept], np.zeros(len(column), np.int8)]),
            abstained_NJ=np.column_stack([self.abstained_NJ[:, kept], np.zeros(len(column), bool)]),
        )


def with_meaningful_silence(votes: Votes) -> Votes:
    """The same, with pairs that a judge skipped counted as abstentions where its silence says that neither is better.

    A judge that is silent on ties votes exactly on the pairs between groups of equal responses: where it has no vote,
    the two responses have the same votes to cast elsewhere. Judges that are asked for some pairs only never look so on
    nearly all prompts, but for those that compare one response with all others; so in some prompts two groups must have
    two members or more.
    """
    abstained = votes.abstained_NJ.copy()
    for j, voter in enumerate(votes.voters):
        if voter.kind != "comparison" or abstained[:, j].any():
            continue
        voted, fitting, telling = 0, 0, 0
        silent = np.zeros(len(abstained), dtype=bool)
        for count in np.unique(votes.num_responses[votes.num_responses > 3]).tolist():
            prompts = np.flatnonzero(votes.num_responses == count)
            pairs = votes.bounds[prompts][:, None] + np.arange(count * (count - 1) // 2)
            found = _equal_groups(~np.isnan(votes.strength_NJ[pairs, j]), count)
            voted += int(found.has_votes.sum())
            fitting += int((found.has_votes & found.is_partition).sum())
            telling += int((found.is_partition & found.has_two_groups).sum())
            silent[pairs[found.is_equal]] = True
        if fitting > PARTITIONED * voted and telling > TELLING * voted:
            abstained[:, j] = silent & ~votes.is_same_N
    return dataclasses.replace(votes, abstained_NJ=abstained)


class _Groups(NamedTuple):
    has_votes: np.ndarray
    """[B]"""
    is_partition: np.ndarray
    """[B] whether the pairs without a vote are those inside groups of responses."""
    has_two_groups: np.ndarray
    """[B] whether two groups have two members or more."""
    is_equal: np.ndarray
    """[B, pairs] whether the pair has no vote, and both responses have some."""


def _equal_groups(voted: np.ndarray, count: int) -> _Groups:
    first, second = np.triu_indices(count, 1)
    adjacent = np.zeros((len(voted), count, count), dtype=bool)
    adjacent[:, first, second] = adjacent[:, second, first] = voted
    covered = np.logical_or.reduce(adjacent, axis=2)
    is_equal = ~voted & covered[:, first] & covered[:, second]
    same = np.logical_and.reduce(adjacent[:, first] == adjacent[:, second], axis=2)
    # A response of a group of m has m - 1 equals; m (m - 1) / 2 pairs in one group of m, fewer in several.
    equals = np.zeros((len(voted), count), dtype=np.int64)
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        equals[:, a] += is_equal[:, k]
        equals[:, b] += is_equal[:, k]
    members = (equals > 0).sum(axis=1)
    return _Groups(
        np.logical_or.reduce(covered, axis=1),
        np.logical_and.reduce(same | ~is_equal, axis=1),
        members > equals.max(axis=1) + 1,
        is_equal,
    )


def pair_number(i: Any, j: Any, count: int) -> Any:
    """Place of the pair (i, j), i < j, among those of ``itertools.combinations(range(count), 2)``; ints or arrays."""
    return i * count - i * (i + 1) // 2 + j - i - 1


def bounds_of_pairs(offsets: np.ndarray) -> np.ndarray:
    """[P + 1] int64: rows of the pairs of each prompt."""
    counts = np.diff(offsets)
    return np.concatenate([[0], np.cumsum(counts * (counts - 1) // 2)])


def rows_of_pairs(offsets: np.ndarray) -> np.ndarray:
    """[N, 2] int64: rows of the two responses of every pair."""
    counts, bounds = np.diff(offsets), bounds_of_pairs(offsets)
    out = np.empty((int(bounds[-1]), 2), dtype=np.int64)
    for count in np.unique(counts).tolist():
        prompts = np.flatnonzero(counts == count)
        places = np.column_stack(np.triu_indices(count, 1))
        pairs = bounds[prompts][:, None] + np.arange(len(places))
        out[pairs] = offsets[prompts][:, None, None] + places
    return out


def pairs_of_rows(offsets: np.ndarray, rows_K2: np.ndarray, prompt_K: np.ndarray) -> np.ndarray:
    """[K] number of the pair of two responses to a prompt, by their rows in either order."""
    low, high = rows_K2.min(axis=1) - offsets[prompt_K], rows_K2.max(axis=1) - offsets[prompt_K]
    return bounds_of_pairs(offsets)[prompt_K] + pair_number(low, high, np.diff(offsets)[prompt_K])


def _ranges(bounds: np.ndarray, which: np.ndarray) -> np.ndarray:
    """All indices in the ranges ``bounds[k] : bounds[k + 1]``, for k in ``which``."""
    lengths = (bounds[1:] - bounds[:-1])[which]
    starts = np.repeat(bounds[which] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return starts + np.arange(int(lengths.sum()))
