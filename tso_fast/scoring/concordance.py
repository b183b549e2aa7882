"""How far scorers agree.

Letters in shapes: P prompts, R responses of all prompts, M scorers, n responses of one prompt. NaN = no score.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.checks import array, check_offsets, extension, infinite_scores


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of two scorers over one prompt: ``Agreement(concordance=array([0.8]), leave_one_out=array([0.6, 0.6]))``."""

    concordance: np.ndarray
    """[P] float32 in [0, 1], Kendall's W of each prompt: 1 = all scorers rank alike."""
    leave_one_out: np.ndarray
    """[M] float32 in [-1, 1], correlation of each scorer with the others."""


def agreement(scores: npt.ArrayLike, offsets: npt.ArrayLike, *, num_threads: int = 0) -> Agreement:
    """Kendall's W of each prompt, and of each scorer the correlation with the other scorers. Both look only at ranks.

    W is 12 S / (m^2 (n^3 - n) - m sum_j T_j) over the m scorers that scored all n responses of the prompt (the
    others are left out of it), with S the sum of squared deviations of the responses' rank sums from their mean, and
    T_j = sum (t^3 - t) over the groups of t scores that scorer j ties: Kendall, Rank Correlation Methods (1948),
    chapter 6; https://en.wikipedia.org/wiki/Kendall%27s_W#Correction_for_ties. NaN when n or m is less than 2, or when
    every one of these scorers ties all responses.

    The leave-one-out correlation of scorer m is Pearson's, over the responses of all prompts together, between its
    rank within the prompt, ties averaged, scaled to [0, 1], and the mean of the same ranks of the other scorers that
    scored the response. A scorer with fewer than two scores in a prompt says nothing of order and sits that prompt
    out. NaN where no response is left, or either side never varies.

    Args:
        scores: [R, M] float32, higher is better, NaN = no score; the rows of one prompt are adjacent.
        offsets: [P+1] int64, prompt p owns the rows offsets[p] : offsets[p + 1].
        num_threads: 0: one per hardware thread, fewer for small inputs. The result is bitwise the same for any number.

    Raises:
        ValueError: wrong shapes or dtypes, infinite scores.
        ImportError: the C++ extension is not built.
    """
    scores_RM, offsets_P1 = _check(scores, offsets, num_threads)
    result = extension().agreement(scores_RM, offsets_P1, num_threads)
    if result is None:
        raise infinite_scores(scores_RM)
    concordance_P, leave_one_out_M = result
    return Agreement(concordance=concordance_P, leave_one_out=leave_one_out_M)


def agreement_reference(scores: npt.ArrayLike, offsets: npt.ArrayLike, *, num_threads: int = 0) -> Agreement:
    """``agreement`` in numpy, one prompt at a time: defines what is correct. ``num_threads`` changes nothing."""
    scores_RM, offsets_P1 = _check(scores, offsets, num_threads)
    if np.isinf(scores_RM).any():
        raise infinite_scores(scores_RM)
    ranks_RM = np.full(scores_RM.shape, np.nan)
    concordance_P = np.full(len(offsets_P1) - 1, np.nan)
    for p, (first, last) in enumerate(pairwise(offsets_P1)):
        columns = scores_RM[first:last].T
        whole = [_ranks(column) for column in columns if not np.isnan(column).any()]
        if last - first >= 2 and len(whole) >= 2:
            concordance_P[p] = _kendalls_w(np.array(whole))
        for m, column in enumerate(columns):
            present = ~np.isnan(column)
            if present.sum() >= 2:
                ranks_RM[first:last, m][present] = (_ranks(column[present]) - 1) / (present.sum() - 1)
    leave_one_out_M = np.full(scores_RM.shape[1], np.nan)
    for m in range(scores_RM.shape[1]):
        others = np.delete(ranks_RM, m, axis=1)
        both = ~np.isnan(ranks_RM[:, m]) & ~np.isnan(others).all(axis=1)
        x, y = ranks_RM[both, m], np.array([row[~np.isnan(row)].mean() for row in others[both]])
        if len(x) and x.std() > 1e-10 and y.std() > 1e-10:
            leave_one_out_M[m] = np.corrcoef(x, y)[0, 1]
    return Agreement(concordance=concordance_P.astype(np.float32), leave_one_out=leave_one_out_M.astype(np.float32))


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1, ties averaged."""
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[group]


def _kendalls_w(ranks_mn: np.ndarray) -> float:
    m, n = ranks_mn.shape
    sums_n = ranks_mn.sum(axis=0)
    ties = sum((size**3 - size).sum() for row in ranks_mn for size in [np.unique(row, return_counts=True)[1]])
    scale = m**2 * (n**3 - n) - m * ties
    return 12 * ((sums_n - sums_n.mean()) ** 2).sum() / scale if scale > 0 else np.nan


def _check(scores: npt.ArrayLike, offsets: npt.ArrayLike, num_threads: int) -> tuple[np.ndarray, np.ndarray]:
    if num_threads < 0:
        raise ValueError(f"num_threads must be >= 0 (0: one per hardware thread), got {num_threads}")
    scores_RM = array("scores", scores, np.float32, "[R, M]")
    offsets_P1 = array("offsets", offsets, np.int64, "[P+1]")
    check_offsets(offsets_P1, len(scores_RM))
    return scores_RM, offsets_P1
