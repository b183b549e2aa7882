"""Bradley-Terry strengths from pairwise verdicts.

Letters in shapes: P prompts, R responses of all prompts, C comparisons, n responses of one prompt.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.checks import array, check_num_threads, check_offsets, extension, rows_of_two

logger = logging.getLogger(__name__)

REGULARIZATION = 1.0
MAX_ITERATIONS = 1000
TOLERANCE = 1e-6


def win_probability(gap: npt.ArrayLike) -> np.ndarray:
    """Probability of winning against a response whose log-strength is smaller by ``gap``: sigmoid(gap)."""
    return np.exp(-np.logaddexp(0, -np.asarray(gap, dtype=np.float64)))


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
    pairs_C2, wins_C2, offsets_P1 = checked(
        pairs, wins, offsets, regularization, max_iterations, tolerance, num_threads
    )
    result = extension().bradley_terry(
        pairs_C2, wins_C2, offsets_P1, int(offsets_P1[-1]), regularization, max_iterations, tolerance, num_threads
    )
    if isinstance(result, int):
        raise bad_pair(pairs_C2, offsets_P1, result)
    strengths_R, num_unfinished = result
    warn_unfinished(num_unfinished, max_iterations, tolerance)
    return strengths_R


def warn_unfinished(num_prompts: int, max_iterations: int, tolerance: float) -> None:
    if num_prompts and tolerance > 0:  # tolerance 0 asks for all iterations
        logger.warning(
            "Bradley-Terry strengths of %d prompt%s still changed by more than %g after %d iterations; they are "
            "returned as they are. More regularization makes them settle sooner.",
            num_prompts,
            "s" * (num_prompts > 1),
            tolerance,
            max_iterations,
        )


def checked(
    pairs: npt.ArrayLike,
    wins: npt.ArrayLike,
    offsets: npt.ArrayLike,
    regularization: float,
    max_iterations: int,
    tolerance: float,
    num_threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C-contiguous [C, 2] int64, [C, 2] float64, [P+1] int64."""
    check_num_threads(num_threads)
    if not (math.isfinite(regularization) and regularization > 0):
        raise ValueError(
            f"regularization must be finite and > 0, got {regularization}: without it strengths are infinite where a "
            f"response wins or loses everything; 1e-3 hardly moves the others"
        )
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    pairs_C2 = rows_of_two("pairs", pairs, "C")
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


def bad_pair(pairs_C2: np.ndarray, offsets_P1: np.ndarray, index: int) -> ValueError:
    """The error for a pair that is not two rows of one prompt."""
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
