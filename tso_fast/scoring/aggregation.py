"""One consensus score a response from the scores of many scorers.

Letters in shapes: P prompts, R responses of all prompts, M scorers, n responses of one prompt. NaN = no score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.checks import check_name, check_num_threads, extension, infinite_scores, scores_by_prompt
from tso_fast.scoring.strengths import MAX_ITERATIONS, REGULARIZATION, TOLERANCE, warn_unfinished

Method = Literal["mean", "median", "borda", "win_rate", "bradley_terry"]
Normalize = Literal["none", "z", "rank", "minmax"]
METHODS: tuple[str, ...] = get_args(Method)
NORMALIZATIONS: tuple[str, ...] = get_args(Normalize)

MIN_WEIGHT = 1e-300
"""Smallest weight, as a share of the largest; what is less has no reciprocal in float64."""


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
    scores_RM, offsets_P1, weights_M = checked(scores, offsets, method, normalize, weights, num_threads)
    result = extension().consensus(
        scores_RM, offsets_P1, weights_M, method, normalize, REGULARIZATION, MAX_ITERATIONS, TOLERANCE, num_threads
    )
    if result is None:
        raise infinite_scores(scores_RM)
    values, num_scores, num_unfinished = result
    warn_unfinished(num_unfinished, MAX_ITERATIONS, TOLERANCE)
    return Consensus(scores=values, num_scores=num_scores)


def checked(
    scores: npt.ArrayLike,
    offsets: npt.ArrayLike,
    method: str,
    normalize: str,
    weights: npt.ArrayLike | None,
    num_threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C-contiguous [R, M] float32, [P+1] int64, [M] float64."""
    check_name("method", method, METHODS)
    check_name("normalize", normalize, NORMALIZATIONS)
    if method in ("borda", "win_rate", "bradley_terry") and normalize != "none":
        raise ValueError(
            f"method {method!r} looks only at the order of scores, which normalize={normalize!r} does not change; "
            f"pass normalize='none'"
        )
    check_num_threads(num_threads)
    scores_RM, offsets_P1 = scores_by_prompt(scores, offsets)
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
