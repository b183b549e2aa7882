"""What a judge, a person or a score rewards: a regularised Bradley-Terry model on properties of the responses.

Dissecting Human and LLM Preferences (Li et al. 2024, arXiv 2402.11296) fits a Bayesian logistic regression of
preferences on differences of 29 properties that a language model annotates; here a program reads seven off the texts.

Letters in shapes: P prompts, R responses of all prompts, N pairs, J voters, F features.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tso_fast.correction.evidence import compared_of, score_matrix, votes_of
from tso_fast.correction.features import FEATURES
from tso_fast.scoring.strengths import win_probability
from tso_fast.types import Candidates, Comparison, Verdict

FOLDS = 5
MIN_PAIRS, MIN_PROMPTS = 20, 5
"""Fewest pairs and prompts with a preference of which something is told."""
PRIOR_SD = 1.0
"""Standard deviation of the normal prior of a weight: the more pairs, the less it counts."""
NORMAL_95 = 1.959964


class Fit(NamedTuple):
    """Weights of a logistic model and how sure they are."""

    weight_F: np.ndarray
    """[F] log-odds of being preferred for each standard deviation of the difference."""
    error_F: np.ndarray
    """[F] standard errors, robust to pairs that share a prompt."""


def explain(candidates: Sequence[Candidates], verdicts: Sequence[Verdict | Comparison]) -> dict[str, dict[str, Any]]:
    """What each judge, each score in the data and each annotator rewards, by name.

    A value has the numbers of ``pairs`` with a preference and of their ``prompts``; ``predicted``, the share of pairs
    of held-back prompts that the features predict; and ``features``: by name ``weight``, ``low`` and ``high``, log-odds
    for a standard deviation with a 95 % interval; None: it does not vary. Whoever has too few pairs has no features.
    """
    compared = compared_of(candidates, [v for v in verdicts if isinstance(v, Comparison)])
    matrix = score_matrix(candidates, [v for v in verdicts if isinstance(v, Verdict)])
    votes = votes_of(candidates, matrix, compared)
    value_RF = np.array(
        [[f(c.prompt.text, r.text) for f in FEATURES.values()] for c in candidates for r in c.responses]
    ).reshape(-1, len(FEATURES))
    first, second = votes.rows_of_pair.T
    difference_NF = value_RF[first] - value_RF[second]
    fold_P = np.array([zlib.crc32(item.prompt.id.encode()) % FOLDS for item in candidates], dtype=np.int64)
    out = {}
    for j, voter in enumerate(votes.voters):
        sign_N = np.sign(np.nan_to_num(votes.strength_NJ[:, j]))
        used = np.flatnonzero(sign_N)
        prompt_N = votes.prompt_of_pair[used]
        # Turned so that every difference is that of the preferred response to the other.
        won_NF = difference_NF[used] * sign_N[used, None]
        name = f"person: {voter.name}" if voter.kind == "label" else voter.name
        out[name] = _explained(won_NF, prompt_N, fold_P[prompt_N])
    return out


def _explained(won_NF: np.ndarray, prompt_N: np.ndarray, fold_N: np.ndarray) -> dict[str, Any]:
    told: dict[str, Any] = {
        "pairs": len(won_NF),
        "prompts": len(np.unique(prompt_N)),
        "predicted": None,
        "features": {},
    }
    if told["pairs"] < MIN_PAIRS or told["prompts"] < MIN_PROMPTS:
        return told
    scale_F = np.sqrt((won_NF**2).mean(axis=0))
    varies = scale_F > 0
    x_NF = won_NF[:, varies] / scale_F[varies]
    fit = fit_preferences(x_NF, prompt_N)
    names = [name for name, does in zip(FEATURES, varies, strict=True) if does]
    rows = {
        name: {"weight": w, "low": w - NORMAL_95 * e, "high": w + NORMAL_95 * e}
        for name, w, e in zip(names, fit.weight_F.tolist(), fit.error_F.tolist(), strict=True)
    }
    told["features"] = {name: rows.get(name) for name in FEATURES}
    margin_N = np.empty(len(x_NF))
    for fold in range(FOLDS):
        own = fold_N == fold
        if own.any():
            margin_N[own] = x_NF[own] @ fit_preferences(x_NF[~own], prompt_N[~own]).weight_F
    told["predicted"] = float((margin_N > 0).mean() + (margin_N == 0).mean() / 2)
    return told


def fit_preferences(won_NF: np.ndarray, prompt_N: np.ndarray) -> Fit:
    """Maximum a posteriori weights of P(preferred) = sigmoid(w . difference), and errors clustered by prompt.

    There is no intercept, since which of two responses is called the first means nothing.

    Args:
        won_NF: features of the preferred response less those of the other.
        prompt_N: prompt of each pair; its pairs share responses, so they are no independent observations.
    """
    num = won_NF.shape[1]
    weight_F, precision = np.zeros(num), np.eye(num) / PRIOR_SD**2

    def posterior(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -won_NF @ w).sum() + w @ precision @ w / 2)

    for _ in range(100):
        lost_N = win_probability(-won_NF @ weight_F)
        step_F = np.linalg.solve(_hessian(won_NF, lost_N) + precision, won_NF.T @ lost_N - precision @ weight_F)
        size = 1.0
        while size > 1e-6 and posterior(weight_F + size * step_F) > posterior(weight_F):
            size /= 2
        weight_F = weight_F + size * step_F
        if np.abs(step_F).max(initial=0.0) < 1e-9:
            break
    lost_N = win_probability(-won_NF @ weight_F)
    inverse = np.linalg.inv(_hessian(won_NF, lost_N) + precision)
    clusters, cluster_N = np.unique(prompt_N, return_inverse=True)
    score_CF = np.zeros((len(clusters), num))
    np.add.at(score_CF, cluster_N, won_NF * lost_N[:, None])
    spread = score_CF.T @ score_CF * len(clusters) / max(len(clusters) - 1, 1)
    return Fit(weight_F, np.sqrt(np.diag(inverse @ (spread + precision) @ inverse)))


def _hessian(won_NF: np.ndarray, lost_N: np.ndarray) -> np.ndarray:
    return won_NF.T @ (won_NF * (lost_N * (1 - lost_N))[:, None])
