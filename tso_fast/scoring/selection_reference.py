"""The Python twin of ``selection``: it defines what is correct."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.rules import PairRules, PairTask, Rules, check_finite, decided_task, pair_task

Pair = tuple[int, int]


def select_pairs_reference(
    consensus: npt.ArrayLike, offsets: npt.ArrayLike, **rules: Any
) -> tuple[np.ndarray, np.ndarray]:
    """``select_pairs``, one prompt at a time. ``num_threads`` changes nothing."""
    task = pair_task(consensus, offsets, PairRules(**rules))
    check_finite(task.consensus_R)
    propose = {
        "best_worst": _propose_widest,
        "random": _propose_random,
        "all": _propose_all,
        "best_random": _propose_best_random,
        "baseline": _propose_baseline,
        "tournament": _propose_tournament,
        "first_round": _propose_first_round,
        "diverse": _propose_diverse,
    }[task.strategy]
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


def select_decided_reference(
    pairs: npt.ArrayLike, margin: npt.ArrayLike, offsets: npt.ArrayLike, **rules: Any
) -> np.ndarray:
    """``select_decided``. ``num_threads`` changes nothing."""
    task = decided_task(pairs, margin, offsets, Rules(**rules))
    names_C2 = task.pairs_C2 if task.text_ids_R is None else task.text_ids_R[task.pairs_C2]
    selected: list[int] = []
    for p, (first, last) in enumerate(pairwise(task.offsets_P1.tolist())):
        named = [(i, *names_C2[i].tolist()) for i in range(first, last)]
        named = [(i, a, b) for i, a, b in named if a != b]
        draws = _Draws(task.seed, task.key(p)) if task.strategy == "random" else None
        if draws is None:
            named.sort(key=lambda pair: -task.margin_C[pair[0]])
        phases = [2] if task.strategy == "all" else [0, 1, 2] if task.reuse_texts else [0]
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
    """Pairs (anything, text, text), in order or drawn: those of unused texts first, and no two texts twice."""
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


class _Prompt:
    """What the strategies ask about one prompt; rows are those of the whole task."""

    def __init__(self, task: PairTask, index: int, first: int, last: int, block: int):
        self.task, self.first, self.last = task, first, last
        self.scores = {row: float(task.consensus_R[row]) for row in range(first, last)}
        self.scored = [row for row, score in self.scores.items() if not math.isnan(score)]
        self.ranked = sorted(self.scored, key=lambda row: (-self.scores[row], row))
        self.draws = _Draws(task.seed, task.key(index))
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
        """All pairs that rules allow, by the lower row, then the higher one."""
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
