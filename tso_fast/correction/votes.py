"""Votes of all judges on all pairs of responses, as columns: what the models of reliability read.

Candidates, ScoreMatrix, Comparison[] -> Votes

Letters in shapes: P prompts, R responses of all prompts, N pairs, J voters. The pairs of a prompt are adjacent and in
the order of ``itertools.combinations``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from tso_fast.errors import InputError
from tso_fast.types import HUMAN, Candidates, Comparison, Response, ScoreMatrix

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
    """[N, J] bool: the voter was asked and said nothing; False where it was not asked."""
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
        return np.concatenate([[0], np.cumsum(self.num_responses * (self.num_responses - 1) // 2)])

    @functools.cached_property
    def prompt_of_pair(self) -> np.ndarray:
        """[N] prompt of each pair."""
        return np.repeat(np.arange(len(self.num_responses)), np.diff(self.bounds))

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
        strength_NJ = self.strength_NJ.copy()
        for j, voter in enumerate(self.voters):
            if voter.kind == "label":
                strength_NJ[hidden_N, j] = np.nan
        return dataclasses.replace(self, strength_NJ=strength_NJ)

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


def refuse_two_kinds(judge: str, matrix: ScoreMatrix) -> None:
    """
    Raises:
        InputError: a judge of two responses has scores of single ones, too.
    """
    if judge in matrix.scorers:
        raise InputError(f"verdicts: judge {judge!r} has verdicts on single responses and on two; expected one kind")


def _ranges(bounds: np.ndarray, which: np.ndarray) -> np.ndarray:
    """All indices in the ranges ``bounds[k] : bounds[k + 1]``, for k in ``which``."""
    lengths = (bounds[1:] - bounds[:-1])[which]
    starts = np.repeat(bounds[which] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return starts + np.arange(int(lengths.sum()))


def votes_of(
    candidates: Sequence[Candidates],
    matrix: ScoreMatrix,
    comparisons: Iterable[Comparison],
    given: Mapping[str, float] | None = None,
) -> Votes:
    """Gathers scores, comparisons and labels on every pair of responses to one prompt.

    Args:
        matrix: scores by the judges of single responses.
        comparisons: verdicts of the judges that compare two responses; those of judge ``human`` are labels.
        given: reliabilities that are not estimated, by judge or ``prior: RULE``.

    Raises:
        InputError: a judge has verdicts on single responses and on two.
    """
    given = given or {}
    offsets = matrix.offsets
    first, second, bounds = _pairs(offsets)
    number = {item.prompt.id: p for p, item in enumerate(candidates)}
    columns: dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for comparison in comparisons:
        is_label = comparison.judge == HUMAN
        key = ("label", comparison.annotator or "") if is_label else ("comparison", comparison.judge)
        if not is_label:
            refuse_two_kinds(comparison.judge, matrix)
        if key not in columns:
            columns[key] = (
                np.full(len(first), np.nan, np.float32),
                np.zeros(len(first), np.int8),
                np.zeros(len(first), bool),
            )
        (i, j), p = sorted(comparison.responses), number[comparison.prompt_id]
        count = int(offsets[p + 1] - offsets[p])
        n = int(bounds[p]) + pair_number(i, j, count)
        if comparison.probability is None:
            columns[key][2][n] = not is_label
            continue
        sign = 1 if comparison.responses == (i, j) else -1
        columns[key][0][n] = sign * (2 * comparison.probability - 1)
        both = comparison.orders is not None and None not in comparison.orders
        columns[key][1][n] = 0 if is_label or both else sign
    responses = [response for item in candidates for response in item.responses]
    texts: dict[str, int] = {}
    text_R = np.array([texts.setdefault(r.text.strip(), len(texts)) for r in responses], dtype=np.int64)
    length_R = np.array([len(r.text) for r in responses], dtype=np.int64)
    voters = [Voter(name=name, kind="score", given=given.get(name)) for name in matrix.scorers]
    strengths = [matrix.scores[first, k] - matrix.scores[second, k] for k in range(len(matrix.scorers))]
    shown = [np.zeros(len(first), np.int8)] * len(voters)
    abstained = [np.zeros(len(first), bool)] * len(voters)
    for (kind, name), (strength, order, silent) in sorted(columns.items(), key=lambda item: item[0]):
        voters.append(Voter(name=name, kind=kind, given=given.get(name)))  # type: ignore[arg-type]
        strengths.append(strength)
        shown.append(order)
        abstained.append(silent)
    prior_N, rules_N, rules = _prior(responses, first, second)
    for rule in rules:
        if (share := given.get(PRIOR + rule)) is not None:
            voters.append(Voter(name=PRIOR + rule, kind="prior", given=share))
            strengths.append(np.where(rules_N == rules.index(rule), prior_N, np.nan).astype(np.float32))
            shown.append(np.zeros(len(first), np.int8))
            abstained.append(np.zeros(len(first), bool))
    is_same_N = text_R[first] == text_R[second]
    strength_NJ = np.column_stack([*strengths, np.zeros((len(first), 0))]).astype(np.float32)
    strength_NJ[is_same_N] = np.nan
    return Votes(
        voters=tuple(voters),
        strength_NJ=strength_NJ,
        shown_NJ=np.column_stack([*shown, np.zeros((len(first), 0))]).astype(np.int8),
        abstained_NJ=np.column_stack([*abstained, np.zeros((len(first), 0))]).astype(bool) & ~is_same_N[:, None],
        offsets=np.asarray(offsets, dtype=np.int64),
        order_R=_order(responses, {name.removeprefix(PRIOR) for name in given if name.startswith(PRIOR)}),
        prior_N=prior_N,
        rules_N=rules_N,
        rules=rules,
        is_same_N=is_same_N,
        longer_N=np.sign(length_R[first] - length_R[second]).astype(np.int8),
    )


def _pairs(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the first and of the second response of every pair, and the pairs of each prompt."""
    firsts, seconds, bounds = [], [], [0]
    patterns: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for start, end in itertools.pairwise(offsets.tolist()):
        if end - start not in patterns:
            patterns[end - start] = np.triu_indices(end - start, 1)
        i, j = patterns[end - start]
        firsts.append(start + i)
        seconds.append(start + j)
        bounds.append(bounds[-1] + len(i))
    none = np.zeros(0, np.int64)
    return np.concatenate([*firsts, none]), np.concatenate([*seconds, none]), np.array(bounds)


def prior_order(a: Response, b: Response) -> tuple[int, str]:
    """Which of two responses the matrix prefers (1: the first, -1: the second, 0: neither), and by which rule.

    Human is preferred to model, newer to older and larger to smaller, unless the last two contradict each other.
    """
    if a.is_human != b.is_human:
        return (1 if a.is_human else -1), "human"
    if a.is_human:
        return 0, "none"
    newer = _compare(a.version_rank, b.version_rank)
    larger = _compare(a.size_b, b.size_b)
    if newer * larger < 0 or (newer == 0 and larger == 0):
        return 0, "none"
    return newer or larger, "+".join(rule for rule, sign in (("newer", newer), ("larger", larger)) if sign)


def _compare(a: float | None, b: float | None) -> int:
    return 0 if a is None or b is None else (a > b) - (a < b)


def _cell(response: Response) -> tuple[bool, int | None, float | None]:
    """All that the prior order depends on."""
    return (True, None, None) if response.is_human else (False, response.version_rank, response.size_b)


def _prior(
    responses: Sequence[Response], first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Sign and rule of the prior order of every pair, looked up by the cells of the two responses."""
    cells: dict[tuple[bool, int | None, float | None], int] = {}
    examples: list[Response] = []
    cell_R = np.empty(len(responses), dtype=np.int64)
    for row, response in enumerate(responses):
        cell_R[row] = cells.setdefault(_cell(response), len(cells))
        if cell_R[row] == len(examples):
            examples.append(response)
    orders = [[prior_order(a, b) for b in examples] for a in examples]
    rules = tuple(sorted({rule for row in orders for _, rule in row} | {"none"}))
    signs = np.array([[sign for sign, _ in row] for row in orders], dtype=np.int8).reshape(len(cells), len(cells))
    names = np.array([[rules.index(rule) for _, rule in row] for row in orders], dtype=np.int16).reshape(signs.shape)
    return signs[cell_R[first], cell_R[second]], names[cell_R[first], cell_R[second]], rules


def _order(responses: Sequence[Response], given: set[str]) -> np.ndarray:
    """Log-odds of each response by the prior order, [R]; rules whose reliability is ``given`` add nothing.

    Versions and sizes are two scales that add up. The ranks on a scale are equally far from each other, and two drawn
    at random differ by ``ORDER`` on average; an unknown rank is in the middle. People are one ``ORDER`` above all.
    """
    values: dict[str, list[float | None]] = {
        "newer": [r.version_rank for r in responses],
        "larger": [r.size_b for r in responses],
    }
    out = np.zeros(len(responses))
    for rule, column in values.items():
        known = sorted({x for x, r in zip(column, responses, strict=True) if x is not None and not r.is_human})
        if rule in given or len(known) < 2:
            continue
        step, middle = 3 * ORDER / (len(known) + 1), (len(known) - 1) / 2
        place = {x: step * (k - middle) for k, x in enumerate(known)}
        out += [0.0 if x is None else place.get(x, 0.0) for x in column]
    is_human = np.array([r.is_human for r in responses], dtype=bool)
    top = out[~is_human].max(initial=0.0)
    out[is_human] = 0.0 if "human" in given else top + ORDER
    return out
