"""Calibration of soft labels against human labels that were hidden from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tso_fast.config.settings import PairingConfig
from tso_fast.correction.beliefs import FOLDS, MIN_LABELS, Beliefs
from tso_fast.correction.calibration import expected_calibration_error, fit_temperature, tempered
from tso_fast.correction.decide import correct
from tso_fast.correction.pairing import soft_label

MIN_MEASURED = 30
"""Fewest labels of which a calibration error is told."""


def calibrate(beliefs: Beliefs, config: PairingConfig) -> dict[str, Any] | None:
    """Calibration of soft labels against hidden human labels, and the temperature that corrects them."""
    if config.soft_label_by is None and config.soft_label_kappa is None:
        return None
    stated, right = _against_labels(beliefs, config)
    if not len(stated):
        return None
    if len(stated) < MIN_MEASURED:
        return {"labels": len(stated), "accuracy": None, "temperature": 1.0, "ece": None, "ece_tempered": None}
    out = {
        "labels": len(stated),
        "accuracy": float(right.mean()),
        "temperature": 1.0,
        "ece": expected_calibration_error(stated, right),
        "ece_tempered": None,
    }
    if config.calibrate_soft_labels and len(stated) >= MIN_LABELS:
        out["temperature"] = fit_temperature(stated, right)
        parts = np.arange(len(stated)) % FOLDS
        held_back = stated.copy()
        for fold in range(FOLDS):
            others = parts != fold
            held_back[~others] = tempered(stated[~others], fit_temperature(stated[others], right[others]))
        out["ece_tempered"] = expected_calibration_error(held_back, right)
    return out


def _against_labels(beliefs: Beliefs, config: PairingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Soft labels of human-labelled pairs, computed without those labels, and whether the two agree."""
    stated, right = [], []
    anything = dataclasses.replace(
        config, min_margin=0.0, min_confidence=0.0, on_no_evidence="prior", max_tie_probability=1.0
    )
    votes, is_calibrated = beliefs.votes, beliefs.chosen.method == "calibrated"
    for fold in range(FOLDS if is_calibrated else 1):
        hidden_N = beliefs.fold_of_pair == fold if is_calibrated else np.ones(len(votes.prior_N), dtype=bool)
        if not (votes.is_labelled & hidden_N).any():
            continue
        probabilities = beliefs.without(hidden_N)
        scores_R, win_rates_R = beliefs.scores_R, beliefs.win_rates_R
        if probabilities is not None:  # recomputed without the hidden labels
            scores_R = win_rates_R = beliefs.expected_win_rates(probabilities)
        decided = correct(beliefs.candidates, votes.without_labels(hidden_N), beliefs.about(probabilities), anything)
        numbers = np.flatnonzero(decided.is_used & votes.has_direction & hidden_N)
        for n, pair in zip(numbers.tolist(), decided.pairs(numbers), strict=True):
            own = votes.responses_of(votes.prompt_of_pair[n])
            stated.append(soft_label(pair, scores_R[own], config, win_rates_R[own]))
            right.append(float((votes.label[n] > 0) == (pair.chosen < pair.rejected)))
    return np.array(stated), np.array(right)
