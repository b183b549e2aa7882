"""From the scores of many scorers to one consensus score a response.

Letters in shapes: P prompts, R responses of all prompts, M scorers, n responses of one prompt. NaN = no score.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tso_fast.errors import did_you_mean
from tso_fast.scoring.checks import array, check_offsets, extension, infinite_scores
from tso_fast.scoring.strengths import MAX_ITERATIONS, REGULARIZATION, TOLERANCE, fit, warn_unfinished

Method = Literal["mean", "median", "borda", "win_rate", "bradley_terry"]
Normalize = Literal["none", "z", "rank", "minmax"]
METHODS: tuple[str, ...] = get_args(Method)
NORMALIZATIONS: tuple[str, ...] = get_args(Normalize)

MIN_WEIGHT = 1e-300
"""Of the largest; what is less has no reciprocal in float64."""


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """What the scorers say together: ``Consensus(scores=array([0.5, nan]), num_scores=array([3, 0]))``."""

    scores: np.ndarray
    """[R] float32; higher is better within a prompt, NaN = no verdict."""
    num_scores: np.ndarray
    """[R] int32: scorers of positive weight that scored the response."""


def consensus(
    scores: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    method: Method,
    normalize: Normalize,
    weights: npt.ArrayLike | None = None,
    num_threads: int = 0,
) -> Consensus:
    """One score a response from the scores of M scorers.

    Args:
        scores: [R, M] float32, higher is better, NaN = no score; the rows of one prompt are adjacent.
        offsets: [P+1] int64, prompt p owns the rows offsets[p] : offsets[p + 1].
        method: how the scorers that scored a response are put together.
            ``mean``: weighted mean. ``median``: takes no weights.
            ``borda``: weighted mean of the share of the prompt's other responses that a scorer puts below this one,
            ties half, 0.5 if it scored no other; equals ``mean`` of ``rank``.
            ``win_rate``: mean over the prompt's other responses of the weighted share of the scorers of both that
            prefer this one, ties half; NaN if none shares a scorer with it. Unlike borda, it compares two
            responses only by the scorers they have in common.
            ``bradley_terry``: log-strengths, as ``tso_fast.scoring.bradley_terry`` fits them with its defaults
            when every scorer of two responses adds a game of its weight to the pair, ties half. Weights are scaled to
            mean 1 over the scorers of positive weight. NaN for a response that shares a scorer with no other.
        normalize: applied before to each scorer within each prompt; ``borda``, ``win_rate`` and ``bradley_terry`` take
            only ``none``.
            ``z``: less the mean, over the population std (0 if all are equal). ``rank``: average rank scaled to
            [0, 1] (0.5 if alone). ``minmax``: scaled to [0, 1] (0.5 if all are equal).
        weights: [M] finite, >= 0, renormalised over the scorers present; a scorer of weight 0 counts as absent.
            None: all equal.
        num_threads: 0: one per hardware thread, fewer for small inputs. The result is bitwise the same for any number.

    Raises:
        ValueError: wrong shapes or dtypes, infinite scores, weights or names that cannot be used.
        ImportError: the C++ extension is not built.
    """
    scores_RM, offsets_P1, weights_M = _check(scores, offsets, method, normalize, weights, num_threads)
    result = extension().consensus(
        scores_RM, offsets_P1, weights_M, method, normalize, REGULARIZATION, MAX_ITERATIONS, TOLERANCE, num_threads
    )
    if result is None:
        raise infinite_scores(scores_RM)
    values, num_scores, num_unfinished = result
    warn_unfinished(num_unfinished, MAX_ITERATIONS, TOLERANCE)
    return Consensus(scores=values, num_scores=num_scores)


def consensus_reference(
    scores: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    method: Method,
    normalize: Normalize,
    weights: npt.ArrayLike | None = None,
    num_threads: int = 0,
) -> Consensus:
    """``consensus`` in numpy, one prompt at a time: defines what is correct. ``num_threads`` changes nothing."""
    scores_RM, offsets_P1, weights_M = _check(scores, offsets, method, normalize, weights, num_threads)
    if np.isinf(scores_RM).any():
        raise infinite_scores(scores_RM)
    table_RM = np.where(weights_M > 0, scores_RM, np.nan).astype(np.float64)
    if method == "borda":
        method, normalize = "mean", "rank"
    combine = {"mean": _mean, "median": _median, "win_rate": _win_rate, "bradley_terry": _bradley_terry}[method]
    values_R = np.full(len(table_RM), np.nan)
    for first, last in pairwise(offsets_P1):
        prompt_nM = table_RM[first:last]
        for scorer_n in prompt_nM.T:
            present = ~np.isnan(scorer_n)
            scorer_n[present] = _normalized(scorer_n[present], normalize)
        values_R[first:last] = combine(prompt_nM, weights_M)
    num_scores = (~np.isnan(table_RM)).sum(axis=1, dtype=np.int32)
    return Consensus(scores=values_R.astype(np.float32), num_scores=num_scores)


def _normalized(values: np.ndarray, normalize: str) -> np.ndarray:
    if normalize == "none" or not len(values):
        return values
    if values.min() == values.max():
        return np.full_like(values, 0.0 if normalize == "z" else 0.5)
    if normalize == "z":
        return (values - values.mean()) / values.std()
    if normalize == "minmax":
        return (values - values.min()) / (values.max() - values.min())
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size + 1) / 2)[group] / (len(values) - 1)


def _mean(scores_nM: np.ndarray, weights_M: np.ndarray) -> np.ndarray:
    weight_n = ~np.isnan(scores_nM) @ weights_M
    sum_n = np.nan_to_num(scores_nM) @ weights_M
    return np.divide(sum_n, weight_n, out=np.full_like(sum_n, np.nan), where=weight_n > 0)


def _median(scores_nM: np.ndarray, weights_M: np.ndarray) -> np.ndarray:
    present = [row[~np.isnan(row)] for row in scores_nM]
    return np.array([np.median(row) if len(row) else np.nan for row in present])


def _win_rate(scores_nM: np.ndarray, weights_M: np.ndarray) -> np.ndarray:
    rates_n = np.full(len(scores_nM), np.nan)
    for i, row_M in enumerate(scores_nM):
        others = np.delete(scores_nM, i, axis=0)
        weight = ~np.isnan(row_M + others) @ weights_M
        wins = ((row_M > others) + 0.5 * (row_M == others)) @ weights_M
        if (weight > 0).any():
            rates_n[i] = (wins[weight > 0] / weight[weight > 0]).mean()
    return rates_n


def _bradley_terry(scores_nM: np.ndarray, weights_M: np.ndarray) -> np.ndarray:
    weights_M = weights_M * (weights_M > 0).sum() / weights_M.sum() if weights_M.any() else weights_M
    is_other = ~np.eye(len(scores_nM), dtype=bool)[..., None]
    opponents = scores_nM[:, None]
    return fit(((opponents > scores_nM) + 0.5 * ((opponents == scores_nM) & is_other)) @ weights_M)


def _check(
    scores: npt.ArrayLike,
    offsets: npt.ArrayLike,
    method: str,
    normalize: str,
    weights: npt.ArrayLike | None,
    num_threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C-contiguous [R, M] float32, [P+1] int64, [M] float64."""
    for what, name, known in (("method", method, METHODS), ("normalize", normalize, NORMALIZATIONS)):
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}{hint}")
    if method in ("borda", "win_rate", "bradley_terry") and normalize != "none":
        raise ValueError(
            f"method {method!r} looks only at the order of scores, which normalize={normalize!r} does not change; "
            f"pass normalize='none'"
        )
    if num_threads < 0:
        raise ValueError(f"num_threads must be >= 0 (0: one per hardware thread), got {num_threads}")

    scores_RM = array("scores", scores, np.float32, "[R, M]")
    offsets_P1 = array("offsets", offsets, np.int64, "[P+1]")
    check_offsets(offsets_P1, len(scores_RM))
    if weights is not None and method == "median":
        raise ValueError("method 'median' takes no weights, they would have no effect; pass weights=None or use 'mean'")
    return scores_RM, offsets_P1, _check_weights(weights, scores_RM.shape[1])


def _check_weights(weights: npt.ArrayLike | None, num_scorers: int) -> np.ndarray:
    if weights is None:
        return np.ones(num_scorers)
    weights_M = np.ascontiguousarray(weights, dtype=np.float64)
    if weights_M.shape != (num_scorers,):
        raise ValueError(
            f"weights must be [M], one for each of the M = {num_scorers} columns of scores, got shape "
            f"{list(weights_M.shape)}"
        )
    if len(bad := np.flatnonzero(~(np.isfinite(weights_M) & (weights_M >= 0)))):
        raise ValueError(
            f"weights[{bad[0]}] is {weights_M[bad[0]]}; expected a finite number >= 0: 0 leaves a scorer out"
        )
    if num_scorers and not weights_M.any():
        raise ValueError("weights are all 0; at least one scorer needs a weight > 0 (weights=None: all equal)")
    if len(bad := np.flatnonzero((weights_M > 0) & (weights_M / weights_M.max(initial=0.0) < MIN_WEIGHT))):
        raise ValueError(
            f"weights[{bad[0]}] is {weights_M[bad[0]]}, below {MIN_WEIGHT:g} of the largest, {weights_M.max()}; 0 "
            f"leaves a scorer out"
        )
    # Only ratios count. Scaled by a power of two, exact, so that no weights overflow in a sum.
    return np.ldexp(weights_M, -np.frexp(weights_M.max(initial=0.0))[1])
