"""The numpy twin of ``strengths``: it defines what is correct."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.strengths import MAX_ITERATIONS, REGULARIZATION, TOLERANCE, bad_pair, checked


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
    """``bradley_terry``, one prompt at a time. ``num_threads`` changes nothing."""
    pairs_C2, wins_C2, offsets_P1 = checked(
        pairs, wins, offsets, regularization, max_iterations, tolerance, num_threads
    )
    num_rows = int(offsets_P1[-1])
    is_row = np.all((pairs_C2 >= 0) & (pairs_C2 < num_rows), axis=1)
    rows_C2: np.ndarray = np.where(is_row[:, None], pairs_C2, 0)
    prompts_C2 = np.searchsorted(offsets_P1, rows_C2, side="right") - 1
    is_good = is_row & (prompts_C2[:, 0] == prompts_C2[:, 1]) & (pairs_C2[:, 0] != pairs_C2[:, 1])
    if not is_good.all():
        raise bad_pair(pairs_C2, offsets_P1, int(is_good.argmin()))
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
