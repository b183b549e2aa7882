"""Calibration of soft labels against human labels that were hidden from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tso_fast.config.settings import PairingConfig
from tso_fast.correction.beliefs import FOLDS, MIN_LABELS, Beliefs, is_in
from tso_fast.correction.calibration import expected_calibration_error, fit_temperature, tempered
from tso_fast.correction.decide import Counts, correct
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
    is_calibrated = beliefs.chosen.method == "calibrated"
    for fold in range(FOLDS if is_calibrated else 1):
        hidden = is_in(fold) if is_calibrated else lambda pair: True
        if not any(pair.labels and hidden(pair) for pairs in beliefs.evidence for pair in pairs):
            continue
        probabilities = beliefs.without(hidden)
        for p, item in enumerate(beliefs.candidates):
            labels = {pair.responses: pair.label for pair in beliefs.evidence[p] if pair.labels and hidden(pair)}
            if not any(labels.values()):
                continue
            unlabelled = [dataclasses.replace(pair, labels={}) for pair in beliefs.evidence[p]]
            scores, win_rates = beliefs.scores[p], beliefs.win_rates[p]
            if is_calibrated:  # recomputed without the hidden labels
                scores = win_rates = beliefs.expected_win_rates(p, probabilities[p])
            beliefs_of_pairs = beliefs.about(p, scores, probabilities[p])
            for pair in correct(item, unlabelled, beliefs_of_pairs, anything, Counts()):
                i, j = sorted((pair.chosen, pair.rejected))
                if label := labels.get((i, j)):
                    stated.append(soft_label(pair, scores, config, win_rates))
                    right.append(float((label > 0) == (pair.chosen == i)))
    return np.array(stated), np.array(right)
