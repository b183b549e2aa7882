"""The options of pair selection: as they are given, and checked.

Letters in shapes: P prompts, R responses of all prompts, F forbidden pairs, C pairs decided elsewhere. NaN = no score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.checks import (
    array,
    check_name,
    check_num_threads,
    check_offsets,
    infinite_scores,
    rows_of_two,
    scores_by_prompt,
)

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


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Options of ``select_decided``, as they were given; ``select_pairs`` says what each means."""

    strategy: str
    max_pairs: int | None
    text_ids: npt.ArrayLike | None = None
    reuse_texts: bool | None = None
    seed: int = 0
    keys: npt.ArrayLike | None = None
    num_threads: int = 0


@dataclass(frozen=True, kw_only=True)
class PairRules(Rules):
    """Options of ``select_pairs``, as they were given."""

    min_margin: float = 0.0
    positives: npt.ArrayLike | None = None
    negatives: npt.ArrayLike | None = None
    forbidden: npt.ArrayLike | None = None
    baseline: npt.ArrayLike | None = None
    distances: npt.ArrayLike | None = None
    band: float | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """Checked rules; all arrays of a task are C-contiguous."""

    offsets_P1: np.ndarray
    strategy: str
    max_pairs: int
    text_ids_R: np.ndarray | None
    reuse_texts: bool
    seed: int
    """In [0, 2^64)."""
    keys_P: np.ndarray | None
    """uint64."""
    num_threads: int

    def key(self, prompt: int) -> int:
        return prompt if self.keys_P is None else int(self.keys_P[prompt])


@dataclass(frozen=True, kw_only=True)
class DecidedTask(Task):
    pairs_C2: np.ndarray
    margin_C: np.ndarray


@dataclass(frozen=True, kw_only=True)
class PairTask(Task):
    consensus_R: np.ndarray
    min_margin: float
    positives_R: np.ndarray | None
    negatives_R: np.ndarray | None
    forbidden_F2: np.ndarray | None
    baseline_P: np.ndarray | None
    distances: np.ndarray | None
    band: float
    """Infinite: any."""

    @cached_property
    def forbidden(self) -> set[frozenset[int]]:
        return set() if self.forbidden_F2 is None else {frozenset(rows) for rows in self.forbidden_F2.tolist()}


def pair_task(consensus: npt.ArrayLike, offsets: npt.ArrayLike, rules: PairRules) -> PairTask:
    """The checked arguments of ``select_pairs``, except that scores may still be infinite."""
    check_name("strategy", rules.strategy, STRATEGIES)
    _check_is_read(rules)
    if not rules.min_margin >= 0:
        raise ValueError(
            f"min_margin must be a number >= 0, the gap of scores that a pair must exceed, got {rules.min_margin}"
        )
    if rules.band is not None and not rules.band > rules.min_margin:
        raise ValueError(
            f"band must be above min_margin = {rules.min_margin}, else no pair has a gap above the one and at most the "
            f"other; got {rules.band}. Leave it out for partners of any quality"
        )
    consensus_R, offsets_P1 = scores_by_prompt(consensus, offsets, name="consensus", shape="[R]")
    R = len(consensus_R)
    return PairTask(
        consensus_R=consensus_R,
        offsets_P1=offsets_P1,
        strategy=rules.strategy,
        max_pairs=_checked_max_pairs(rules.max_pairs),
        min_margin=_as_float32(rules.min_margin),
        positives_R=_sized("positives", rules.positives, np.bool_, "[R]", R),
        negatives_R=_sized("negatives", rules.negatives, np.bool_, "[R]", R),
        text_ids_R=_sized("text_ids", rules.text_ids, np.int64, "[R]", R),
        forbidden_F2=_checked_forbidden(rules.forbidden, offsets_P1),
        reuse_texts=_reuses_texts(rules),
        baseline_P=_checked_baseline(rules.baseline, offsets_P1),
        distances=_checked_distances(rules, offsets_P1),
        band=math.inf if rules.band is None else _as_float32(rules.band),
        seed=_checked_seed(rules.seed),
        keys_P=_checked_keys(rules.keys, len(offsets_P1) - 1),
        num_threads=_checked_num_threads(rules.num_threads),
    )


def decided_task(pairs: npt.ArrayLike, margin: npt.ArrayLike, offsets: npt.ArrayLike, rules: Rules) -> DecidedTask:
    """The checked arguments of ``select_decided``."""
    check_name("strategy", rules.strategy, DECIDED_STRATEGIES)
    _check_is_read(rules)
    pairs_C2 = rows_of_two("pairs", pairs, "C")
    margin_C = _sized("margin", margin, np.float32, "[C]", len(pairs_C2))
    assert margin_C is not None
    offsets_P1 = array("offsets", offsets, np.int64, "[P+1]")
    check_offsets(offsets_P1, len(pairs_C2), end="C", what="the rows of pairs")
    if len(bad := np.flatnonzero(~np.isfinite(margin_C))):
        raise ValueError(f"margin[{bad[0]}] is {margin_C[bad[0]]}; expected finite numbers: leave undecided pairs out")
    text_ids_R = None if rules.text_ids is None else array("text_ids", rules.text_ids, np.int64, "[R]")
    end = np.iinfo(np.int64).max if text_ids_R is None else len(text_ids_R)
    if len(bad := np.argwhere((pairs_C2 < 0) | (pairs_C2 >= end))):
        i, side = bad[0]
        what = ">= 0" if text_ids_R is None else f"in [0, {end}), the rows of text_ids"
        raise ValueError(f"pairs[{i}, {side}] is {pairs_C2[i, side]}; expected a row {what}")
    return DecidedTask(
        pairs_C2=pairs_C2,
        margin_C=margin_C,
        offsets_P1=offsets_P1,
        strategy=rules.strategy,
        max_pairs=_checked_max_pairs(rules.max_pairs),
        text_ids_R=text_ids_R,
        reuse_texts=_reuses_texts(rules),
        seed=_checked_seed(rules.seed),
        keys_P=_checked_keys(rules.keys, len(offsets_P1) - 1),
        num_threads=_checked_num_threads(rules.num_threads),
    )


def check_finite(consensus_R: np.ndarray) -> None:
    if np.isinf(consensus_R).any():
        raise infinite_scores(consensus_R, "consensus")


def _check_is_read(rules: Rules) -> None:
    for name, strategies in _READ_BY.items():
        if getattr(rules, name, None) is not None and rules.strategy not in strategies:
            raise ValueError(
                f"strategy {rules.strategy!r} does not read {name}, it would have no effect; leave it out, or use "
                f"{' or '.join(map(repr, strategies))}"
            )


def _reuses_texts(rules: Rules) -> bool:
    return _REUSES_TEXTS.get(rules.strategy, False) if rules.reuse_texts is None else bool(rules.reuse_texts)


def _checked_num_threads(num_threads: int) -> int:
    check_num_threads(num_threads)
    return num_threads


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ValueError(f"seed must be an int, got {seed!r}")
    return int(seed) % 2**64


def _checked_max_pairs(max_pairs: int | None) -> int:
    if max_pairs is None:
        return np.iinfo(np.int64).max
    if isinstance(max_pairs, bool) or not isinstance(max_pairs, int | np.integer) or max_pairs < 1:
        raise ValueError(f"max_pairs must be an int >= 1, or None for all that the strategy gives, got {max_pairs!r}")
    return int(max_pairs)


def _as_float32(value: float) -> float:
    """Gaps are float32: then ``margin > min_margin`` holds for what is returned, in float32 and in float64."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _sized(name: str, value: npt.ArrayLike | None, dtype: type[np.generic], shape: str, size: int) -> np.ndarray | None:
    if value is None:
        return None
    values = array(name, value, dtype, shape)
    if len(values) != size:
        raise ValueError(f"{name} must be {shape} with {shape[1:-1]} = {size}, got {len(values)} entries")
    return values


def _checked_forbidden(forbidden: npt.ArrayLike | None, offsets_P1: np.ndarray) -> np.ndarray | None:
    if forbidden is None:
        return None
    forbidden_F2 = rows_of_two("forbidden", forbidden, "F")
    R = offsets_P1[-1]
    if len(bad := np.argwhere((forbidden_F2 < 0) | (forbidden_F2 >= R))):
        f, side = bad[0]
        raise ValueError(f"forbidden[{f}, {side}] is {forbidden_F2[f, side]}; expected a row in [0, R = {R})")
    prompts_F2 = np.searchsorted(offsets_P1, forbidden_F2, side="right") - 1
    if len(bad := np.flatnonzero(prompts_F2[:, 0] != prompts_F2[:, 1])):
        f = bad[0]
        raise ValueError(
            f"forbidden[{f}] is {forbidden_F2[f].tolist()}, rows of the prompts {prompts_F2[f].tolist()}; expected two "
            f"rows of one prompt: rows are those of consensus, not counted from the prompt's first"
        )
    return forbidden_F2


def _checked_baseline(baseline: npt.ArrayLike | None, offsets_P1: np.ndarray) -> np.ndarray | None:
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


def _checked_distances(rules: PairRules, offsets_P1: np.ndarray) -> np.ndarray | None:
    if rules.strategy != "diverse":
        return None
    if rules.distances is None:
        raise ValueError("strategy 'diverse' needs distances; pass those of tso_fast.scoring.pairwise_distances")
    size = int((np.diff(offsets_P1) ** 2).sum())
    values = array("distances", rules.distances, np.float32, "[D]")
    if len(values) != size:
        raise ValueError(
            f"distances must be [D] with D = {size}, the [n, n] blocks of the prompts' n responses one after the "
            f"other, got {len(values)} entries; pairwise_distances with the same offsets gives them"
        )
    if len(bad := np.flatnonzero(np.isnan(values))):
        raise ValueError(f"distances[{bad[0]}] is NaN ({len(bad)} in all); expected numbers, larger is farther")
    return values


def _checked_keys(keys: npt.ArrayLike | None, num_prompts: int) -> np.ndarray | None:
    if keys is None:
        return None
    keys_P = np.asarray(keys)
    if keys_P.dtype == np.int64:
        keys_P = keys_P.astype(np.uint64)
    return _sized("keys", keys_P, np.uint64, "[P]", num_prompts)
