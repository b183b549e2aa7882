"""Calibration: how well stated probabilities match outcomes, and the temperature that corrects them."""

from __future__ import annotations

import numpy as np

# ------------------------------------------------------------------------------------------------------- calibration


def expected_calibration_error(probabilities: np.ndarray, is_right: np.ndarray, num_bins: int = 10) -> float:
    """Mean distance of stated probability and observed accuracy over equal-count bins (Naeini et al. 2015, with the
    adaptive bins of Nixon et al. 2019, arXiv 1904.01685); 0: calibrated, NaN: there are no pairs.

    Args:
        probabilities: [N] probability that a choice is right.
        is_right: [N] whether it was right, 0 to 1.
    """
    if not len(probabilities):
        return float("nan")
    order = np.argsort(probabilities, kind="stable")
    total = 0.0
    for part in np.array_split(order, min(num_bins, len(order))):
        total += len(part) * abs(probabilities[part].mean() - is_right[part].mean())
    return float(total / len(order))


def fit_temperature(probabilities: np.ndarray, is_right: np.ndarray) -> float:
    """T that minimises the negative log-likelihood of sigmoid(logit(p) / T) (Guo et al. 2017, arXiv 1706.04599).

    Args:
        probabilities: [N] in [0, 1]; 0 and 1 count as 1e-6 and 1 - 1e-6.
        is_right: [N] whether the choice was right, 0 to 1.
    """
    logit = _logit(probabilities)
    # Golden-section search, since the likelihood has a single maximum in 1 / T.
    low, high = -4.0, 4.0
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if _nll(logit * np.exp(a), is_right) < _nll(logit * np.exp(b), is_right):
            high = b
        else:
            low = a
    return float(np.exp(-(low + high) / 2))


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """sigmoid(logit(p) / T)"""
    return 1 / (1 + np.exp(-_logit(probabilities) / temperature))


def _logit(probabilities: np.ndarray) -> np.ndarray:
    p = np.clip(probabilities, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def _nll(logit: np.ndarray, is_right: np.ndarray) -> float:
    return float((np.logaddexp(0, -logit) * is_right + np.logaddexp(0, logit) * (1 - is_right)).sum())
