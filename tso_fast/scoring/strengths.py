"""Bradley-Terry strengths from pairwise verdicts.

Letters in shapes: P prompts, R responses of all prompts, C comparisons, n responses of one prompt.
"""

from __future__ import annotations

import logging
import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.checks import array, check_offsets, extension

logger = logging.getLogger(__name__)

REGULARIZATION = 1.0
MAX_ITERATIONS = 1000
TOLERANCE = 1e-6


def bradley_terry(
    pairs: npt.ArrayLike,
    wins: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    regularization: float = REGULARIZATION,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
    num_threads: int = 0,
) -> np.ndarray:
    """Log-strengths s of the responses to each prompt, under P(i beats j) = 1 / (1 + exp(s_j - s_i)).

    The likelihood is maximised by the minorisation-maximisation updates of Hunter, "MM algorithms for generalized
    Bradley-Terry models", Annals of Statistics 32 (2004), section 2, https://doi.org/10.1214/aos/1079120141, all
    responses of a prompt at a time: exp(s_i) = wins_i / sum_j games_ij / (exp(s_i) + exp(s_j)). Every response that was
    compared also plays ``regularization`` games against one average opponent of the prompt, whose strength is fitted
    too, and wins half of each. With that every prompt has one solution, and it is finite, though some response win
    or lose everything or the comparisons fall into groups that never met.

    Args:
        pairs: [C, 2] int64, two rows of one prompt each, in any order; what is said of a pair several times adds up.
        wins: [C, 2] float32 or float64, finite and >= 0: wins of the first row over the second and of the second over
            the first. A tie is half a win for each. Need not be whole: weights of judges go here.
        offsets: [P+1] int64, prompt p owns the rows offsets[p] : offsets[p + 1].
        regularization: games against the average opponent, > 0. More of them draw strengths together.
        max_iterations: at least 1; what was reached by then is returned, with a warning in the log of ``tso_fast``.
        tolerance: >= 0; a prompt is done when no strength exp(s) of it changes by a larger share in an update.
        num_threads: 0: one per hardware thread, fewer for small inputs. The result is bitwise the same for any number.

    Returns:
        [R] float32, natural log, of mean 0 over the prompt's compared responses; NaN for a response that was not
        compared.

    Raises:
        ValueError: wrong shapes or dtypes, pairs that are not two rows of one prompt, options out of range.
        ImportError: the C++ extension is not built.
    """
    pairs_C2, wins_C2, offsets_P1 = _check(pairs, wins, offsets, num_threads)
    check_options(regularization, max_iterations, tolerance)
    result = extension().bradley_terry(
        pairs_C2, wins_C2, offsets_P1, int(offsets_P1[-1]), regularization, max_iterations, tolerance, num_threads
    )
    if isinstance(result, int):
        raise _bad_pair(pairs_C2, offsets_P1, result)
    strengths_R, num_unfinished = result
    warn_unfinished(num_unfinished, max_iterations, tolerance)
    return strengths_R


def warn_unfinished(num_prompts: int, max_iterations: int, tolerance: float) -> None:
    """Tolerance 0 asks for all iterations: nothing to warn of."""
    if num_prompts and tolerance > 0:
        logger.warning(
            "Bradley-Terry strengths of %d prompt%s still changed by more than %g after %d iterations; they are "
            "returned as they are. More regularization makes them settle sooner.",
            num_prompts,
            "s" * (num_prompts > 1),
            tolerance,
            max_iterations,
        )


def bradley_terry_reference(
    pairs: npt.ArrayLike,
    wins: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    regularization: float = REGULARIZATION,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
    num_threads: int = 0,
) -> np.ndarray:
    """``bradley_terry`` in numpy, one prompt at a time: defines what is correct. ``num_threads`` changes nothing."""
    pairs_C2, wins_C2, offsets_P1 = _check(pairs, wins, offsets, num_threads)
    check_options(regularization, max_iterations, tolerance)
    num_rows = int(offsets_P1[-1])
    is_row = np.all((pairs_C2 >= 0) & (pairs_C2 < num_rows), axis=1)
    rows_C2: np.ndarray = np.where(is_row[:, None], pairs_C2, 0)
    prompts_C2 = np.searchsorted(offsets_P1, rows_C2, side="right") - 1
    is_good = is_row & (prompts_C2[:, 0] == prompts_C2[:, 1]) & (pairs_C2[:, 0] != pairs_C2[:, 1])
    if not is_good.all():
        raise _bad_pair(pairs_C2, offsets_P1, int(is_good.argmin()))
    strengths_R = np.full(num_rows, np.nan)
    for prompt, (first, last) in enumerate(pairwise(offsets_P1)):
        wins_nn = np.zeros((last - first, last - first))
        is_here = prompts_C2[:, 0] == prompt
        winners, losers = pairs_C2[is_here].T - first
        np.add.at(wins_nn, (winners, losers), wins_C2[is_here, 0])
        np.add.at(wins_nn, (losers, winners), wins_C2[is_here, 1])
        strengths_R[first:last] = fit(wins_nn, regularization, max_iterations, tolerance)
    return strengths_R.astype(np.float32)


def fit(
    wins_nn: np.ndarray,
    regularization: float = REGULARIZATION,
    max_iterations: int = MAX_ITERATIONS,
    tolerance: float = TOLERANCE,
) -> np.ndarray:
    """[n] float64 log-strengths from the wins of row over column."""
    log_n = np.full(len(wins_nn), np.nan)
    games_nn = wins_nn + wins_nn.T
    compared = games_nn.sum(axis=1) > 0
    if not compared.any():
        return log_n
    games = games_nn[compared][:, compared]
    wins = wins_nn[compared].sum(axis=1) + regularization / 2
    strength, opponent = np.ones(len(games)), 1.0
    for _ in range(max_iterations):
        share = regularization / (strength + opponent)
        updated = wins / ((games / (strength[:, None] + strength)).sum(axis=1) + share)
        opponent = len(games) * regularization / 2 / share.sum()
        change = np.abs(updated / strength - 1).max()
        strength = updated
        if change <= tolerance:
            break
    log_n[compared] = np.log(strength) - np.log(strength).mean()
    return log_n


def check_options(regularization: float, max_iterations: int, tolerance: float) -> None:
    if not (math.isfinite(regularization) and regularization > 0):
        raise ValueError(
            f"regularization must be finite and > 0, got {regularization}: without it strengths are infinite where a "
            f"response wins or loses everything; 1e-3 hardly moves the others"
        )
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")


def _check(
    pairs: npt.ArrayLike, wins: npt.ArrayLike, offsets: npt.ArrayLike, num_threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C-contiguous [C, 2] int64, [C, 2] float64, [P+1] int64."""
    if num_threads < 0:
        raise ValueError(f"num_threads must be >= 0 (0: one per hardware thread), got {num_threads}")
    pairs_C2 = array("pairs", pairs, np.int64, "[C, 2]")
    if pairs_C2.shape[1] != 2:
        raise ValueError(f"pairs must be [C, 2] int64, got shape {list(pairs_C2.shape)}")
    wins_: Any = np.asarray(wins)
    if wins_.shape != pairs_C2.shape or wins_.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"wins must be [C, 2] float32 or float64 with C = {len(pairs_C2)} as pairs has, got shape "
            f"{list(wins_.shape)} {wins_.dtype}"
        )
    wins_C2 = np.require(wins_, np.float64, ["C", "ALIGNED"])
    if not (is_good := np.isfinite(wins_C2) & (wins_C2 >= 0)).all():
        c, side = np.argwhere(~is_good)[0]
        raise ValueError(
            f"wins[{c}, {side}] is {wins_C2[c, side]}; expected a finite number >= 0: leave out pairs without verdict"
        )
    offsets_P1 = array("offsets", offsets, np.int64, "[P+1]")
    check_offsets(offsets_P1, int(offsets_P1[-1]) if len(offsets_P1) else 0)
    return pairs_C2, wins_C2, offsets_P1


def _bad_pair(pairs_C2: np.ndarray, offsets_P1: np.ndarray, index: int) -> ValueError:
    i, j = pairs_C2[index]
    num_rows = offsets_P1[-1]
    if i == j:
        reason = "a response is not compared with itself"
    elif not (min(i, j) >= 0 and max(i, j) < num_rows):
        reason = f"rows are 0 to {num_rows - 1}" if num_rows else "there are no rows"
    else:
        first, second = np.searchsorted(offsets_P1, [i, j], side="right") - 1
        reason = f"row {i} is of prompt {first}, row {j} of prompt {second}"
    return ValueError(f"pairs[{index}] is ({i}, {j}); expected two rows of one prompt: {reason}")
