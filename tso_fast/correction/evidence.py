"""Evidence as columns, before anything is decided: scores, comparisons, labels and the prior order.

Candidates, Verdict[] -> ScoreMatrix; Candidates, Comparison[] -> Compared; both -> Votes

Letters in shapes: R responses of all prompts, M scorers, N pairs, J voters, C comparisons. The pairs of a prompt are
adjacent and in the order of ``itertools.combinations``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple, TypeVar

import numpy as np

from tso_fast.correction.votes import ORDER, PRIOR, Voter, Votes, bounds_of_pairs, pairs_of_rows, rows_of_pairs
from tso_fast.errors import InputError
from tso_fast.scoring import bradley_terry
from tso_fast.types import HUMAN, Candidates, Comparison, Response, ScoreMatrix, Verdict

T = TypeVar("T")

# -------------------------------------------------------------------------------------------------------------- scores


def offsets_of(candidates: Sequence[Candidates]) -> np.ndarray:
    """[P + 1] int64: rows of the responses to each prompt."""
    return np.cumsum([0, *(len(item.responses) for item in candidates)], dtype=np.int64)


def numbered(values: Iterable[T]) -> tuple[list[T], np.ndarray]:
    """Distinct values in order of appearance, and [K] int64, the number of each value among them."""
    numbers: dict[T, int] = defaultdict(itertools.count().__next__)
    number_K = np.fromiter(map(numbers.__getitem__, values), np.int64)
    return list(numbers), number_K


def score_matrix(
    candidates: Sequence[Candidates],
    verdicts: Sequence[Verdict],
    hidden: str | None = None,
    only: Collection[str] | None = None,
) -> ScoreMatrix:
    """Scores from verdicts and from the data: one row per response, one column per scorer.

    Args:
        hidden: name of a scorer in the data to leave out, i.e. the oracle.
        only: names of the scorers in the data that count; None: all.
    """
    judges, given = {v.judge for v in verdicts}, {name for c in candidates for r in c.responses for name in r.scores}
    given = (given if only is None else given & set(only)) - {hidden}
    if both := sorted(judges & given):
        raise InputError(
            f"responses: the data have scores named {both[0]!r}, and so has a judge of this run; rename "
            "those in the data"
        )
    scorers = tuple(sorted(judges | given))
    column = {name: i for i, name in enumerate(scorers)}
    offsets = offsets_of(candidates)
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


# --------------------------------------------------------------------------------------------------------- comparisons


class Compared(NamedTuple):
    """Comparisons and labels as columns; at most one of every voter on a pair."""

    voters: tuple[Voter, ...]
    """Judges, then annotators, each by name."""
    voter_C: np.ndarray
    """[C] int64: index into ``voters``."""
    rows_C2: np.ndarray
    """[C, 2] int64: rows of the two responses, as the comparison names them."""
    pair_C: np.ndarray
    """[C] int64: number of the pair."""
    probability_C: np.ndarray
    """[C] float64: probability that the first one named is better; NaN: the judge abstains, or the pair is bad."""
    has_both_orders_C: np.ndarray
    """[C] bool: the judge was shown both orders."""

    @property
    def sign(self) -> np.ndarray:
        """[C] 1: the responses are named in the order of the pair, -1: in the other one."""
        return np.where(self.rows_C2[:, 0] < self.rows_C2[:, 1], 1, -1)

    @property
    def vote(self) -> np.ndarray:
        """[C] float64: 2 x probability - 1, positive for the first response of the pair."""
        return self.sign * (2 * self.probability_C - 1)

    @property
    def is_stated(self) -> np.ndarray:
        """[C] bool: a judge's probability, neither an abstention nor a label."""
        is_judge = np.array([voter.kind == "comparison" for voter in self.voters], dtype=bool)
        return is_judge[self.voter_C] & ~np.isnan(self.probability_C)


def compared_of(candidates: Sequence[Candidates], comparisons: Sequence[Comparison]) -> Compared:
    """Reads comparisons and labels into columns; the last one of a voter on a pair replaces those before it.

    Args:
        comparisons: verdicts of the judges that compare two responses; those of judge ``human`` are labels.
    """
    count, offsets = len(comparisons), offsets_of(candidates)
    number = {item.prompt.id: p for p, item in enumerate(candidates)}
    prompt_C = np.fromiter(map(number.__getitem__, map(attrgetter("prompt_id"), comparisons)), np.int64, count)
    places = itertools.chain.from_iterable(map(attrgetter("responses"), comparisons))
    rows_C2 = np.fromiter(places, np.int64, 2 * count).reshape(-1, 2) + offsets[prompt_C][:, None]
    voters, voter_C = _voters_of(comparisons)
    found = Compared(
        voters=voters,
        voter_C=voter_C,
        rows_C2=rows_C2,
        pair_C=pairs_of_rows(offsets, rows_C2, prompt_C),
        probability_C=np.array([c.probability for c in comparisons], dtype=np.float64),
        has_both_orders_C=np.array([c.orders is not None and None not in c.orders for c in comparisons], dtype=bool),
    )
    return _without_replaced(found, int(bounds_of_pairs(offsets)[-1]))


def _voters_of(comparisons: Sequence[Comparison]) -> tuple[tuple[Voter, ...], np.ndarray]:
    """Judges, then annotators, each by name; [C] which of them gave each comparison."""
    judges, code_C = numbered(map(attrgetter("judge"), comparisons))
    labels = np.flatnonzero(np.array([judge == HUMAN for judge in judges], dtype=bool)[code_C])
    annotators, annotator_L = numbered(comparisons[k].annotator or "" for k in labels.tolist())
    code_C[labels] = len(judges) + annotator_L
    named = [Voter(name=name, kind="comparison") for name in judges]
    named += [Voter(name=name, kind="label") for name in annotators]
    voters = sorted((named[k] for k in np.flatnonzero(np.bincount(code_C))), key=lambda voter: (voter.kind, voter.name))
    place = {voter: k for k, voter in enumerate(voters)}
    return tuple(voters), np.array([place.get(voter, -1) for voter in named], dtype=np.int64)[code_C]


def _without_replaced(compared: Compared, num_pairs: int) -> Compared:
    """Only the last comparison of every voter on every pair."""
    place, key = np.arange(len(compared.pair_C)), compared.voter_C * num_pairs + compared.pair_C
    last = np.zeros(len(compared.voters) * num_pairs, dtype=np.int64)
    np.maximum.at(last, key, place)
    is_last = last[key] == place
    return compared if is_last.all() else Compared(compared.voters, *(column[is_last] for column in compared[1:]))


def with_comparisons(matrix: ScoreMatrix, compared: Compared, score: str = "win_rate") -> ScoreMatrix:
    """The matrix with one more column for every judge that compares responses.

    Args:
        score: how comparisons become a score of one response: ``win_rate``, its mean probability of winning, or
            ``bradley_terry``, its log-strength.
    """
    judges = {j: voter.name for j, voter in enumerate(compared.voters) if voter.kind == "comparison"}
    if not judges:
        return matrix
    columns, is_stated = [], compared.is_stated
    for j in judges:
        told = is_stated & (compared.voter_C == j)
        rows, first = compared.rows_C2[told], compared.probability_C[told]
        wins = np.stack([first, 1 - first], axis=1)
        if score == "bradley_terry":
            columns.append(bradley_terry(rows, wins, matrix.offsets))
            continue
        num = np.bincount(rows.ravel(), minlength=len(matrix.scores))
        won = np.bincount(rows.ravel(), wins.ravel(), minlength=len(matrix.scores))
        columns.append(np.divide(won, num, out=np.full(len(num), np.nan), where=num > 0).astype(np.float32))
    scores = np.concatenate([matrix.scores, np.stack(columns, axis=1)], axis=1)
    scorers = (*matrix.scorers, *judges.values())
    return ScoreMatrix(scores=np.ascontiguousarray(scores), offsets=matrix.offsets, scorers=scorers)


def stated_of(compared: Compared, num_pairs: int) -> np.ndarray:
    """[N] float64: mean probability that the first is better, over the judges that compare responses; NaN: none did."""
    told = compared.is_stated
    num = np.bincount(compared.pair_C[told], minlength=num_pairs)
    votes = np.bincount(compared.pair_C[told], compared.vote[told], minlength=num_pairs)
    return (1 + np.divide(votes, num, out=np.full(num_pairs, np.nan), where=num > 0)) / 2


def tallies_of(scored: Sequence[Verdict], compared: Compared) -> dict[str, dict[str, int]]:
    """Numbers of ``verdicts``, of those ``abstained``, and of ``ties`` where two responses are compared, by judge."""
    out: dict[str, dict[str, int]] = {}
    silent = Counter(verdict.judge for verdict in scored if verdict.score is None)
    for judge, count in Counter(verdict.judge for verdict in scored).items():
        out[judge] = {"verdicts": count, "abstained": silent[judge]}
    columns = {
        "verdicts": np.ones(len(compared.voter_C)),
        "abstained": np.isnan(compared.probability_C),
        "ties": compared.probability_C == 0.5,
    }
    for name, column in columns.items():
        sums = np.bincount(compared.voter_C, column, minlength=len(compared.voters)).astype(int).tolist()
        for voter, count in zip(compared.voters, sums, strict=True):
            row = out.setdefault(HUMAN if voter.kind == "label" else voter.name, {})
            row[name] = row.get(name, 0) + count
    return out


# --------------------------------------------------------------------------------------------------------------- votes


def votes_of(
    candidates: Sequence[Candidates],
    matrix: ScoreMatrix,
    compared: Compared,
    given: Mapping[str, float] | None = None,
) -> Votes:
    """Puts scores, comparisons, labels and the prior order together, on every pair of responses to one prompt.

    Args:
        matrix: scores by the judges of single responses.
        given: reliabilities that are not estimated, by judge or ``prior: RULE``.

    Raises:
        InputError: a judge has verdicts on single responses and on two.
    """
    _refuse_two_kinds(matrix, compared)
    given = given or {}
    responses = [response for item in candidates for response in item.responses]
    text_R, length_R = text_ids(responses), np.array([len(response.text) for response in responses], dtype=np.int64)
    first, second = rows_of_pairs(matrix.offsets).T
    prior_N, rules_N, rules, order_R = _prior(responses, first, second, given)
    voters = [Voter(name=name, kind="score") for name in matrix.scorers]
    voters += [*compared.voters, *(Voter(name=PRIOR + rule, kind="prior") for rule in rules if PRIOR + rule in given)]
    strength_NJ = np.full((len(first), len(voters)), np.nan, dtype=np.float32)
    shown_NJ, abstained_NJ = np.zeros(strength_NJ.shape, dtype=np.int8), np.zeros(strength_NJ.shape, dtype=bool)
    for j, voter in enumerate(voters):
        if voter.kind == "score":
            strength_NJ[:, j] = matrix.scores[first, j] - matrix.scores[second, j]
        elif voter.kind == "prior":
            strength_NJ[:, j] = np.where(rules_N == rules.index(voter.name.removeprefix(PRIOR)), prior_N, np.nan)
    cell = compared.pair_C, len(matrix.scorers) + compared.voter_C
    strength_NJ[cell] = compared.vote
    shown_NJ[cell] = np.where(compared.is_stated & ~compared.has_both_orders_C, compared.sign, 0)
    abstained_NJ[cell] = np.isnan(compared.probability_C)
    is_same_N = text_R[first] == text_R[second]
    strength_NJ[is_same_N], abstained_NJ[is_same_N] = np.nan, False
    return Votes(
        voters=tuple(dataclasses.replace(voter, given=given.get(voter.name)) for voter in voters),
        strength_NJ=strength_NJ,
        shown_NJ=shown_NJ,
        abstained_NJ=abstained_NJ,
        offsets=matrix.offsets,
        order_R=order_R,
        prior_N=prior_N,
        rules_N=rules_N,
        rules=rules,
        is_same_N=is_same_N,
        longer_N=np.sign(length_R[first] - length_R[second]).astype(np.int8),
    )


def _refuse_two_kinds(matrix: ScoreMatrix, compared: Compared) -> None:
    for voter in compared.voters:
        if voter.kind == "comparison" and voter.name in matrix.scorers:
            raise InputError(
                f"verdicts: judge {voter.name!r} has verdicts on single responses and on two; expected one kind"
            )


def text_ids(responses: Iterable[Response]) -> np.ndarray:
    """[R] int64: a number of every text; the same for texts that differ in surrounding white space only."""
    return numbered(response.text.strip() for response in responses)[1]


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
    responses: Sequence[Response], first: np.ndarray, second: np.ndarray, given: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray]:
    """Sign and rule of the prior order of every pair, all rules, and the log-odds of every response.

    All of it hangs on the cells of the responses, which are few: it is found for one response of each.
    """
    cells, cell_R = numbered(map(_cell, responses))
    examples = [responses[row] for row in np.unique(cell_R, return_index=True)[1].tolist()]
    orders = [[prior_order(a, b) for b in examples] for a in examples]
    rules = tuple(sorted({rule for row in orders for _, rule in row} | {"none"}))
    signs = np.array([[sign for sign, _ in row] for row in orders], dtype=np.int8).reshape(len(cells), len(cells))
    names = np.array([[rules.index(rule) for _, rule in row] for row in orders], dtype=np.int16).reshape(signs.shape)
    order = _order(examples, {name.removeprefix(PRIOR) for name in given if name.startswith(PRIOR)})
    pairs = cell_R[first], cell_R[second]
    return signs[pairs], names[pairs], rules, order[cell_R]


def _order(cells: Sequence[Response], given: set[str]) -> np.ndarray:
    """Log-odds by the prior order of a response of each cell; rules whose reliability is ``given`` add nothing.

    Versions and sizes are two scales that add up. The ranks on a scale are equally far from each other, and two drawn
    at random differ by ``ORDER`` on average; an unknown rank is in the middle. People are one ``ORDER`` above all.
    """
    values: dict[str, list[float | None]] = {
        "newer": [r.version_rank for r in cells],
        "larger": [r.size_b for r in cells],
    }
    out = np.zeros(len(cells))
    for rule, column in values.items():
        known = sorted({x for x, r in zip(column, cells, strict=True) if x is not None and not r.is_human})
        if rule in given or len(known) < 2:
            continue
        step, middle = 3 * ORDER / (len(known) + 1), (len(known) - 1) / 2
        place = {x: step * (k - middle) for k, x in enumerate(known)}
        out += [0.0 if x is None else place.get(x, 0.0) for x in column]
    is_human = np.array([r.is_human for r in cells], dtype=bool)
    top = out[~is_human].max(initial=0.0)
    out[is_human] = 0.0 if "human" in given else top + ORDER
    return out
