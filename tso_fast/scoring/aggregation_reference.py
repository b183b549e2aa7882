"""The numpy twin of ``aggregation``: it defines what is correct."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.aggregation import Consensus, Method, Normalize, checked
from tso_fast.scoring.checks import infinite_scores
from tso_fast.scoring.strengths_reference import fit


def consensus_reference(
    scores: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    method: Method,
    normalize: Normalize,
    weights: npt.ArrayLike | None = None,
    num_threads: int = 0,
) -> Consensus:
    """``consensus``, one prompt at a time. ``num_threads`` changes nothing."""
    scores_RM, offsets_P1, weights_M = checked(scores, offsets, method, normalize, weights, num_threads)
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
