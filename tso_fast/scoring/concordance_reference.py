"""The numpy twin of ``concordance``: it defines what is correct."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.checks import check_num_threads, infinite_scores, scores_by_prompt
from tso_fast.scoring.concordance import Agreement


def agreement_reference(scores: npt.ArrayLike, offsets: npt.ArrayLike, *, num_threads: int = 0) -> Agreement:
    """``agreement``, one prompt at a time. ``num_threads`` changes nothing."""
    check_num_threads(num_threads)
    scores_RM, offsets_P1 = scores_by_prompt(scores, offsets)
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
    """Ranks from 1, ties averaged."""
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size - 1) / 2)[group]


def _kendalls_w(ranks_mn: np.ndarray) -> float:
    m, n = ranks_mn.shape
    sums_n = ranks_mn.sum(axis=0)
    ties = sum((size**3 - size).sum() for row in ranks_mn for size in [np.unique(row, return_counts=True)[1]])
    scale = m**2 * (n**3 - n) - m * ties
    return 12 * ((sums_n - sums_n.mean()) ** 2).sum() / scale if scale > 0 else np.nan
