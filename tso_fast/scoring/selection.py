"""Which responses of a prompt are trained on as a pair (chosen, rejected).

Letters in shapes: P prompts, R responses of all prompts, n responses of one prompt, N pairs, F forbidden pairs, C pairs
decided elsewhere. NaN = no score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from tso_fast.errors import did_you_mean
from tso_fast.scoring.checks import array, check_offsets, extension

Strategy = Literal["best_worst", "best_random", "random", "baseline", "tournament", "first_round", "all", "diverse"]
DecidedStrategy = Literal["best_worst", "random", "all"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
DECIDED_STRATEGIES: tuple[str, ...] = get_args(DecidedStrategy)

_REUSES_TEXTS = {"best_worst": False, "random": True}
"""The strategies that read ``reuse_texts``, and their default."""
_READ_BY = {
    "reuse_texts": tuple(_REUSES_TEXTS),
    "baseline": ("baseline",),
    "distances": ("diverse",),
    "band": ("diverse",),
}


def select_pairs(
    consensus: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    strategy: Strategy,
    max_pairs: int | None,
    min_margin: float = 0.0,
    positives: npt.ArrayLike | None = None,
    negatives: npt.ArrayLike | None = None,
    text_ids: npt.ArrayLike | None = None,
    forbidden: npt.ArrayLike | None = None,
    reuse_texts: bool | None = None,
    baseline: npt.ArrayLike | None = None,
    distances: npt.ArrayLike | None = None,
    band: float | None = None,
    seed: int = 0,
    keys: npt.ArrayLike | None = None,
    num_threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of responses to train on, from one score a response.

    Two responses of a prompt may be a pair, the higher score chosen, if both are scored, the gap of their scores is
    above ``min_margin`` and no constraint below forbids it. Equal scores are never a pair, and no two pairs have the
    same two texts. Pairs come by prompt, within a prompt in the order they were selected. Ties go to the lower row.

    Strategies:
        ``best_worst``: the best against the worst, then the second best against the second worst, and so on: always
            the pair of the widest gap among texts not used yet. With ``reuse_texts`` it goes on with the widest gaps
            of texts already used.
        ``random``: drawn uniformly from the pairs whose texts are used least by the pairs drawn before.
        ``all``: every pair, the widest gap first (equal gaps: the better chosen one).
        ``best_random``: the best against distinct partners below it, drawn uniformly.
        ``baseline``: every response against an intermediate one, the better ones chosen, the worse ones rejected, the
            widest gap first: the ranked pairing of Online Self-Preferring (Zhai et al. 2024, arXiv 2405.14103), which
            needs n comparisons instead of n^2.
        ``tournament``: the n - 1 matches of a random knock-out: in each round neighbours meet and the higher score
            goes on, an odd one out goes on without a match. RSO's tournament-rank (Liu et al. 2024, arXiv 2309.06657).
        ``first_round``: the n // 2 matches of its first round: random disjoint pairs. RSO's first-round-rank.
        ``diverse``: the best against the response farthest from it within a band of quality: mate choice applied to
            pairs. Several: the next farthest.

    In ``best_random`` and ``diverse`` the best is the highest score that has a partner at all. A match of
    ``tournament`` and ``first_round`` that may not be a pair is played, but not returned.

    Args:
        consensus: [R] float32, higher is better, NaN = no score; the rows of one prompt are adjacent.
        offsets: [P+1] int64, prompt p owns the rows offsets[p] : offsets[p + 1].
        strategy: one of the above.
        max_pairs: most pairs of a prompt, > 0; None: all that the strategy gives.
        min_margin: >= 0; the gap of a pair, in float32, is strictly above it (as float32).
        positives: [R] bool, the rows that may be chosen; None: all.
        negatives: [R] bool, the rows that may be rejected; None: all.
        text_ids: [R] int64, rows of a prompt with the same id have the same text and are never a pair; None: all
            texts differ.
        forbidden: [F, 2] int64, two rows of one prompt that must not be a pair, in either order.
        reuse_texts: for ``best_worst`` and ``random``: whether, once no pair of two unused texts is left, those with
            one used text are taken, and then the rest. None: False for ``best_worst``, True for ``random``.
        baseline: for ``baseline``: [P] int64, the row every other of its prompt is compared with, -1: as for None, the
            median-ranked of the scored rows (of an even number the better of the two in the middle).
        distances: for ``diverse``, required: float32, the [n, n] blocks of all prompts one after the other, as
            ``pairwise_distances`` gives; row c of a block holds the distances from c.
        band: for ``diverse``: the gap of a pair is at most this; None: any.
        seed: any int. Strategies that draw nothing do not read it, nor ``keys``.
        keys: [P] int64 or uint64, a stable hash of each prompt; None: its index. The draws of a prompt hang on seed
            and key alone: no other prompt, no order and no number of threads changes them.
        num_threads: 0: one per hardware thread, fewer for small inputs. The result is the same for any number.

    Returns:
        pairs: [N, 2] int64, rows (chosen, rejected).
        margin: [N] float32, consensus[chosen] - consensus[rejected].

    Raises:
        ValueError: wrong shapes or dtypes, infinite scores, an unknown strategy, an option it does not read, values
            that cannot be used.
        ImportError: the C++ extension is not built.
    """
    task = _check(
        consensus,
        offsets,
        strategy=strategy,
        max_pairs=max_pairs,
        min_margin=min_margin,
        positives=positives,
        negatives=negatives,
        text_ids=text_ids,
        forbidden=forbidden,
        reuse_texts=reuse_texts,
        baseline=baseline,
        distances=distances,
        band=band,
        seed=seed,
        keys=keys,
        num_threads=num_threads,
    )
    pairs, margin, is_finite = extension().select_pairs(
        task.consensus_R,
        task.offsets_P1,
        strategy=strategy,
        max_pairs=task.max_pairs,
        min_margin=task.min_margin,
        positives=task.positives_R,
        negatives=task.negatives_R,
        text_ids=task.text_ids_R,
        forbidden=task.forbidden_F2,
        keys=task.keys_P,
        baseline=task.baseline_P,
        distances=task.distances,
        band=task.band,
        reuse_texts=task.reuse_texts,
        seed=task.seed,
        num_threads=num_threads,
    )
    if not is_finite:
        _check_finite(task.consensus_R)
    return pairs, margin


def select_pairs_reference(
    consensus: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    strategy: Strategy,
    max_pairs: int | None,
    min_margin: float = 0.0,
    positives: npt.ArrayLike | None = None,
    negatives: npt.ArrayLike | None = None,
    text_ids: npt.ArrayLike | None = None,
    forbidden: npt.ArrayLike | None = None,
    reuse_texts: bool | None = None,
    baseline: npt.ArrayLike | None = None,
    distances: npt.ArrayLike | None = None,
    band: float | None = None,
    seed: int = 0,
    keys: npt.ArrayLike | None = None,
    num_threads: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """``select_pairs`` in Python, one prompt at a time: defines what is correct. ``num_threads`` changes nothing."""
    task = _check(
        consensus,
        offsets,
        strategy=strategy,
        max_pairs=max_pairs,
        min_margin=min_margin,
        positives=positives,
        negatives=negatives,
        text_ids=text_ids,
        forbidden=forbidden,
        reuse_texts=reuse_texts,
        baseline=baseline,
        distances=distances,
        band=band,
        seed=seed,
        keys=keys,
        num_threads=num_threads,
    )
    _check_finite(task.consensus_R)
    propose = {
        "best_worst": _propose_widest,
        "random": _propose_random,
        "all": _propose_all,
        "best_random": _propose_best_random,
        "baseline": _propose_baseline,
        "tournament": _propose_tournament,
        "first_round": _propose_first_round,
        "diverse": _propose_diverse,
    }[strategy]
    selected: list[tuple[int, int]] = []
    block = 0
    for p, (first, last) in enumerate(pairwise(task.offsets_P1.tolist())):
        prompt = _Prompt(task, p, first, last, block)
        block += (last - first) ** 2
        seen: set[frozenset[int]] = set()
        for chosen, rejected in propose(prompt):
            texts = frozenset((prompt.text(chosen), prompt.text(rejected)))
            if len(seen) < task.max_pairs and texts not in seen:
                seen.add(texts)
                selected.append((chosen, rejected))
    pairs_N2 = np.array(selected, np.int64).reshape(-1, 2)
    return pairs_N2, task.consensus_R[pairs_N2[:, 0]] - task.consensus_R[pairs_N2[:, 1]]


def select_decided(
    pairs: npt.ArrayLike,
    margin: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    strategy: DecidedStrategy,
    max_pairs: int | None,
    text_ids: npt.ArrayLike | None = None,
    reuse_texts: bool | None = None,
    seed: int = 0,
    keys: npt.ArrayLike | None = None,
    num_threads: int = 0,
) -> np.ndarray:
    """Which of the pairs that were decided elsewhere (prior, correction, people) are trained on.

    The strategies ``best_worst``, ``random`` and ``all`` of ``select_pairs`` over a list of pairs instead of all that
    scores allow; the others need a ranking, which decisions pair by pair need not form. Equal margins go to the earlier
    pair. Two pairs of the same two texts are not both selected, in whatever order they were decided.

    Args:
        pairs: [C, 2] int64, rows (chosen, rejected), >= 0; the pairs of one prompt are adjacent.
        margin: [C] float32, finite, how far apart the two are; ``best_worst`` and ``all`` take the widest first. No
            least margin is asked for here: that a pair is listed is the decision.
        offsets: [P+1] int64, prompt p owns the pairs offsets[p] : offsets[p + 1].
        text_ids: [R] int64, of the rows that ``pairs`` names; None: all texts differ.
        strategy, max_pairs, reuse_texts, seed, keys, num_threads: as for ``select_pairs``.

    Returns:
        [N] int64: indices into ``pairs``, by prompt, in the order of selection.

    Raises:
        ValueError: as ``select_pairs``.
        ImportError: the C++ extension is not built.
    """
    task = _check_decided(pairs, margin, offsets, strategy, max_pairs, text_ids, reuse_texts, seed, keys, num_threads)
    return extension().select_decided(
        task.pairs_C2,
        task.margin_C,
        task.offsets_P1,
        strategy=strategy,
        max_pairs=task.max_pairs,
        text_ids=task.text_ids_R,
        keys=task.keys_P,
        reuse_texts=task.reuse_texts,
        seed=task.seed,
        num_threads=num_threads,
    )


def select_decided_reference(
    pairs: npt.ArrayLike,
    margin: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    strategy: DecidedStrategy,
    max_pairs: int | None,
    text_ids: npt.ArrayLike | None = None,
    reuse_texts: bool | None = None,
    seed: int = 0,
    keys: npt.ArrayLike | None = None,
    num_threads: int = 0,
) -> np.ndarray:
    """``select_decided`` in Python: defines what is correct. ``num_threads`` changes nothing."""
    task = _check_decided(pairs, margin, offsets, strategy, max_pairs, text_ids, reuse_texts, seed, keys, num_threads)
    names_C2 = task.pairs_C2 if task.text_ids_R is None else task.text_ids_R[task.pairs_C2]
    selected: list[int] = []
    for p, (first, last) in enumerate(pairwise(task.offsets_P1.tolist())):
        named = [(i, *names_C2[i].tolist()) for i in range(first, last)]
        named = [(i, a, b) for i, a, b in named if a != b]
        draws = None
        if strategy == "random":
            draws = _Draws(task.seed, p if task.keys_P is None else int(task.keys_P[p]))
        else:
            named.sort(key=lambda pair: -task.margin_C[pair[0]])
        phases = [2] if strategy == "all" else [0, 1, 2] if task.reuse_texts else [0]
        selected += [i for i, _, _ in _least_used(named, phases, draws)][: task.max_pairs]
    return np.array(selected, np.int64)


class _Draws:
    """splitmix64 (Steele et al. 2014): its state is a counter that starts from seed and key."""

    GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1

    def __init__(self, seed: int, key: int):
        self.state = self._mix(self._mix((seed + self.GOLDEN) & self.MASK) ^ key)

    @classmethod
    def _mix(cls, z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & cls.MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & cls.MASK
        return z ^ z >> 31

    def below(self, n: int) -> int:
        self.state = (self.state + self.GOLDEN) & self.MASK
        return self._mix(self.state) * n >> 64

    def shuffled(self, items: Sequence[Any]) -> Iterator[Any]:
        items = list(items)
        for i in range(len(items)):
            j = i + self.below(len(items) - i)
            items[i], items[j] = items[j], items[i]
            yield items[i]


def _least_used(
    pairs: Sequence[tuple[Any, int, int]], phases: Sequence[int], draws: _Draws | None
) -> Iterator[tuple[Any, int, int]]:
    """Pairs (anything, text, text), in order or drawn, those of unused texts first, no two texts twice."""
    used: set[int] = set()
    seen: set[frozenset[int]] = set()
    for phase in phases:
        skipped = []
        for pair in draws.shuffled(pairs) if draws else pairs:
            _, a, b = pair
            if (a in used) + (b in used) > phase:
                skipped.append(pair)
            elif frozenset((a, b)) not in seen:
                seen.add(frozenset((a, b)))
                used |= {a, b}
                yield pair
        pairs = skipped


Pair = tuple[int, int]


class _Prompt:
    """What the strategies ask about one prompt; rows are those of the whole."""

    def __init__(self, task: _Task, index: int, first: int, last: int, block: int):
        self.task, self.first, self.last = task, first, last
        self.scores = {row: float(task.consensus_R[row]) for row in range(first, last)}
        self.scored = [row for row, score in self.scores.items() if not math.isnan(score)]
        self.ranked = sorted(self.scored, key=lambda row: (-self.scores[row], row))
        self.draws = _Draws(task.seed, index if task.keys_P is None else int(task.keys_P[index]))
        self.baseline = -1 if task.baseline_P is None else int(task.baseline_P[index])
        self.block = block
        """Where the distances of the prompt begin."""

    def text(self, row: int) -> int:
        return row if self.task.text_ids_R is None else int(self.task.text_ids_R[row])

    def gap(self, chosen: int, rejected: int) -> np.float32:
        return self.task.consensus_R[chosen] - self.task.consensus_R[rejected]

    def distance(self, a: int, b: int) -> float:
        assert self.task.distances is not None
        return float(self.task.distances[self.block + (a - self.first) * (self.last - self.first) + b - self.first])

    def may_be_chosen(self, row: int) -> bool:
        return self.task.positives_R is None or bool(self.task.positives_R[row])

    def may_be_rejected(self, row: int) -> bool:
        return self.task.negatives_R is None or bool(self.task.negatives_R[row])

    def may_pair(self, chosen: int, rejected: int) -> bool:
        return (
            bool(self.gap(chosen, rejected) > np.float32(self.task.min_margin))
            and self.may_be_chosen(chosen)
            and self.may_be_rejected(rejected)
            and self.text(chosen) != self.text(rejected)
            and frozenset((chosen, rejected)) not in self.task.forbidden
        )

    def allowed(self) -> list[Pair]:
        """By the lower row, then the higher one."""
        both = [(b, a) if self.scores[b] > self.scores[a] else (a, b) for a, b in combinations(self.scored, 2)]
        return [pair for pair in both if self.may_pair(*pair)]

    def widest(self, pairs: list[Pair]) -> list[Pair]:
        def order(pair: Pair) -> tuple[float, ...]:
            chosen, rejected = self.scores[pair[0]], self.scores[pair[1]]
            return rejected - chosen, -chosen, rejected, *pair

        return sorted(pairs, key=order)

    def best(self) -> tuple[int, list[int]]:
        """The best row that has partners, and these; -1 if there is none."""
        band = np.float32(self.task.band)
        for best in self.ranked:
            partners = [row for row in self.scored if self.may_pair(best, row) and self.gap(best, row) <= band]
            if partners:
                return best, partners
        return -1, []

    def least_used(self, pairs: list[Pair], phases: list[int], draws: _Draws | None = None) -> Iterator[Pair]:
        named = [(pair, self.text(pair[0]), self.text(pair[1])) for pair in pairs]
        return (pair for pair, _, _ in _least_used(named, phases, draws))


def _propose_widest(prompt: _Prompt) -> Iterable[Pair]:
    return prompt.least_used(prompt.widest(prompt.allowed()), [0, 1, 2] if prompt.task.reuse_texts else [0])


def _propose_random(prompt: _Prompt) -> Iterable[Pair]:
    return prompt.least_used(prompt.allowed(), [0, 1, 2] if prompt.task.reuse_texts else [0], prompt.draws)


def _propose_all(prompt: _Prompt) -> Iterable[Pair]:
    return prompt.widest(prompt.allowed())


def _propose_best_random(prompt: _Prompt) -> Iterable[Pair]:
    best, partners = prompt.best()
    return [(best, partner) for partner in prompt.draws.shuffled(partners)]


def _propose_diverse(prompt: _Prompt) -> Iterable[Pair]:
    best, partners = prompt.best()
    return [(best, row) for row in sorted(partners, key=lambda row: (-prompt.distance(best, row), row))]


def _propose_baseline(prompt: _Prompt) -> Iterable[Pair]:
    baseline = prompt.baseline
    if baseline < 0 and prompt.ranked:
        baseline = prompt.ranked[(len(prompt.ranked) - 1) // 2]
    return prompt.widest([pair for pair in prompt.allowed() if baseline in pair])


def _propose_tournament(prompt: _Prompt) -> Iterable[Pair]:
    return [match for matches in _rounds(prompt) for match in matches if prompt.may_pair(*match)]


def _propose_first_round(prompt: _Prompt) -> Iterable[Pair]:
    return [match for match in next(_rounds(prompt), []) if prompt.may_pair(*match)]


def _rounds(prompt: _Prompt) -> Iterator[list[Pair]]:
    """Matches (winner, loser) of a knock-out of all scored rows that have a role."""
    rows = [row for row in prompt.scored if prompt.may_be_chosen(row) or prompt.may_be_rejected(row)]
    rows = list(prompt.draws.shuffled(rows))
    rank = {row: i for i, row in enumerate(prompt.ranked)}
    while len(rows) > 1:
        matches = [tuple(sorted(two, key=rank.__getitem__)) for two in zip(rows[::2], rows[1::2], strict=False)]
        yield [(winner, loser) for winner, loser in matches]
        rows = [winner for winner, _ in matches] + rows[len(rows) // 2 * 2 :]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Checked: C-contiguous arrays."""

    consensus_R: np.ndarray
    offsets_P1: np.ndarray
    max_pairs: int
    min_margin: float
    positives_R: np.ndarray | None
    negatives_R: np.ndarray | None
    text_ids_R: np.ndarray | None
    forbidden_F2: np.ndarray | None
    reuse_texts: bool
    baseline_P: np.ndarray | None
    distances: np.ndarray | None
    band: float
    """Infinite: any."""
    seed: int
    """In [0, 2^64)."""
    keys_P: np.ndarray | None
    """uint64."""

    @cached_property
    def forbidden(self) -> set[frozenset[int]]:
        return set() if self.forbidden_F2 is None else {frozenset(rows) for rows in self.forbidden_F2.tolist()}


def _check(
    consensus: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    strategy: str,
    max_pairs: int | None,
    min_margin: float,
    positives: npt.ArrayLike | None,
    negatives: npt.ArrayLike | None,
    text_ids: npt.ArrayLike | None,
    forbidden: npt.ArrayLike | None,
    reuse_texts: bool | None,
    baseline: npt.ArrayLike | None,
    distances: npt.ArrayLike | None,
    band: float | None,
    seed: int,
    keys: npt.ArrayLike | None,
    num_threads: int,
) -> _Task:
    _check_strategy(strategy, STRATEGIES)
    for name, value in {"reuse_texts": reuse_texts, "baseline": baseline, "distances": distances, "band": band}.items():
        if value is not None and strategy not in _READ_BY[name]:
            raise ValueError(
                f"strategy {strategy!r} does not read {name}, it would have no effect; leave it out, or use "
                f"{' or '.join(map(repr, _READ_BY[name]))}"
            )
    if not min_margin >= 0:
        raise ValueError(
            f"min_margin must be a number >= 0, the gap of scores that a pair must exceed, got {min_margin}"
        )
    if band is not None and not band > min_margin:
        raise ValueError(
            f"band must be above min_margin = {min_margin}, else no pair has a gap above the one and at most the "
            f"other; got {band}. Leave it out for partners of any quality"
        )
    consensus_R = array("consensus", consensus, np.float32, "[R]")
    offsets_P1 = array("offsets", offsets, np.int64, "[P+1]")
    check_offsets(offsets_P1, len(consensus_R))
    R, P = len(consensus_R), len(offsets_P1) - 1
    return _Task(
        consensus_R=consensus_R,
        offsets_P1=offsets_P1,
        max_pairs=_check_options(max_pairs, seed, num_threads),
        min_margin=_as_float32(min_margin),
        positives_R=_sized("positives", positives, np.bool_, "[R]", R),
        negatives_R=_sized("negatives", negatives, np.bool_, "[R]", R),
        text_ids_R=_sized("text_ids", text_ids, np.int64, "[R]", R),
        forbidden_F2=_check_forbidden(forbidden, offsets_P1),
        reuse_texts=_REUSES_TEXTS.get(strategy, False) if reuse_texts is None else bool(reuse_texts),
        baseline_P=_check_baseline(baseline, offsets_P1),
        distances=_check_distances(distances, offsets_P1, strategy),
        band=math.inf if band is None else _as_float32(band),
        seed=int(seed) % 2**64,
        keys_P=_check_keys(keys, P),
    )


@dataclass(frozen=True, kw_only=True)
class _DecidedTask:
    pairs_C2: np.ndarray
    margin_C: np.ndarray
    offsets_P1: np.ndarray
    max_pairs: int
    text_ids_R: np.ndarray | None
    reuse_texts: bool
    seed: int
    keys_P: np.ndarray | None


def _check_decided(
    pairs: npt.ArrayLike,
    margin: npt.ArrayLike,
    offsets: npt.ArrayLike,
    strategy: str,
    max_pairs: int | None,
    text_ids: npt.ArrayLike | None,
    reuse_texts: bool | None,
    seed: int,
    keys: npt.ArrayLike | None,
    num_threads: int,
) -> _DecidedTask:
    _check_strategy(strategy, DECIDED_STRATEGIES)
    if reuse_texts is not None and strategy not in _REUSES_TEXTS:
        raise ValueError(f"strategy {strategy!r} does not read reuse_texts, it would have no effect; leave it out")
    pairs_C2 = _rows_of_two("pairs", pairs, "C")
    margin_C = _sized("margin", margin, np.float32, "[C]", len(pairs_C2))
    assert margin_C is not None
    offsets_P1 = array("offsets", offsets, np.int64, "[P+1]")
    check_offsets(offsets_P1, len(pairs_C2))
    if len(bad := np.flatnonzero(~np.isfinite(margin_C))):
        raise ValueError(f"margin[{bad[0]}] is {margin_C[bad[0]]}; expected finite numbers: leave undecided pairs out")
    text_ids_R = None if text_ids is None else array("text_ids", text_ids, np.int64, "[R]")
    end = np.iinfo(np.int64).max if text_ids_R is None else len(text_ids_R)
    if len(bad := np.argwhere((pairs_C2 < 0) | (pairs_C2 >= end))):
        i, side = bad[0]
        what = ">= 0" if text_ids_R is None else f"in [0, {end}), the rows of text_ids"
        raise ValueError(f"pairs[{i}, {side}] is {pairs_C2[i, side]}; expected a row {what}")
    return _DecidedTask(
        pairs_C2=pairs_C2,
        margin_C=margin_C,
        offsets_P1=offsets_P1,
        max_pairs=_check_options(max_pairs, seed, num_threads),
        text_ids_R=text_ids_R,
        reuse_texts=_REUSES_TEXTS.get(strategy, False) if reuse_texts is None else bool(reuse_texts),
        seed=int(seed) % 2**64,
        keys_P=_check_keys(keys, len(offsets_P1) - 1),
    )


def _check_strategy(strategy: str, known: tuple[str, ...]) -> None:
    if strategy not in known:
        hint = did_you_mean(str(strategy), known)
        raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(known)}{hint}")


def _check_options(max_pairs: int | None, seed: int, num_threads: int) -> int:
    """``max_pairs`` as a number."""
    if num_threads < 0:
        raise ValueError(f"num_threads must be >= 0 (0: one per hardware thread), got {num_threads}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"seed must be an int, got {seed!r}")
    if max_pairs is None:
        return np.iinfo(np.int64).max
    if isinstance(max_pairs, bool) or not isinstance(max_pairs, int | np.integer) or max_pairs < 1:
        raise ValueError(f"max_pairs must be an int >= 1, or None for all that the strategy gives, got {max_pairs!r}")
    return int(max_pairs)


def _as_float32(value: float) -> float:
    """Gaps are float32: then ``margin > min_margin`` holds for what is returned, in float32 and in float64."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _check_finite(consensus_R: np.ndarray) -> None:
    if len(bad := np.flatnonzero(np.isinf(consensus_R))):
        raise ValueError(
            f"consensus[{bad[0]}] is {consensus_R[bad[0]]} ({len(bad)} infinite in all); expected finite numbers: use "
            f"NaN for a missing score, or clip"
        )


def _sized(name: str, value: npt.ArrayLike | None, dtype: type[np.generic], shape: str, size: int) -> np.ndarray | None:
    if value is None:
        return None
    values = array(name, value, dtype, shape)
    if len(values) != size:
        raise ValueError(f"{name} must be {shape} with {shape[1:-1]} = {size}, got {len(values)} entries")
    return values


def _rows_of_two(name: str, value: npt.ArrayLike, letter: str) -> np.ndarray:
    rows = array(name, value, np.int64, f"[{letter}, 2]")
    if rows.shape[1] != 2:
        raise ValueError(f"{name} must be [{letter}, 2] int64, got shape {list(rows.shape)}")
    return rows


def _prompt_of(rows: np.ndarray, offsets_P1: np.ndarray) -> np.ndarray:
    return np.searchsorted(offsets_P1, rows, side="right") - 1


def _check_forbidden(forbidden: npt.ArrayLike | None, offsets_P1: np.ndarray) -> np.ndarray | None:
    if forbidden is None:
        return None
    forbidden_F2 = _rows_of_two("forbidden", forbidden, "F")
    R = offsets_P1[-1]
    if len(bad := np.argwhere((forbidden_F2 < 0) | (forbidden_F2 >= R))):
        f, side = bad[0]
        raise ValueError(f"forbidden[{f}, {side}] is {forbidden_F2[f, side]}; expected a row in [0, R = {R})")
    prompts_F2 = _prompt_of(forbidden_F2, offsets_P1)
    if len(bad := np.flatnonzero(prompts_F2[:, 0] != prompts_F2[:, 1])):
        f = bad[0]
        raise ValueError(
            f"forbidden[{f}] is {forbidden_F2[f].tolist()}, rows of the prompts {prompts_F2[f].tolist()}; expected two "
            f"rows of one prompt: rows are those of consensus, not counted from the prompt's first"
        )
    return forbidden_F2


def _check_baseline(baseline: npt.ArrayLike | None, offsets_P1: np.ndarray) -> np.ndarray | None:
    baseline_P = _sized("baseline", baseline, np.int64, "[P]", len(offsets_P1) - 1)
    if baseline_P is None:
        return None
    is_bad = (baseline_P != -1) & ((baseline_P < offsets_P1[:-1]) | (baseline_P >= offsets_P1[1:]))
    if len(bad := np.flatnonzero(is_bad)):
        p = bad[0]
        raise ValueError(
            f"baseline[{p}] is {baseline_P[p]}; expected a row of prompt {p}, in [{offsets_P1[p]}, "
            f"{offsets_P1[p + 1]}), or -1 for the median-ranked one"
        )
    return baseline_P


def _check_distances(distances: npt.ArrayLike | None, offsets_P1: np.ndarray, strategy: str) -> np.ndarray | None:
    if strategy != "diverse":
        return None
    if distances is None:
        raise ValueError("strategy 'diverse' needs distances; pass those of tso_fast.scoring.pairwise_distances")
    size = int((np.diff(offsets_P1) ** 2).sum())
    values = array("distances", distances, np.float32, "[D]")
    if len(values) != size:
        raise ValueError(
            f"distances must be [D] with D = {size}, the [n, n] blocks of the prompts' n responses one after the "
            f"other, got {len(values)} entries; pairwise_distances with the same offsets gives them"
        )
    if len(bad := np.flatnonzero(np.isnan(values))):
        raise ValueError(f"distances[{bad[0]}] is NaN ({len(bad)} in all); expected numbers, larger is farther")
    return values


def _check_keys(keys: npt.ArrayLike | None, num_prompts: int) -> np.ndarray | None:
    if keys is None:
        return None
    keys_P = np.asarray(keys)
    if keys_P.dtype == np.int64:
        keys_P = keys_P.astype(np.uint64)
    return _sized("keys", keys_P, np.uint64, "[P]", num_prompts)
