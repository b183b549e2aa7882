"""Selects the decided pairs to train on, and sets their strength: scale, soft label, margin."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tso_fast.config.settings import PairingConfig
from tso_fast.correction.calibration import tempered
from tso_fast.correction.decide import Corrected
from tso_fast.scoring import pairwise_distances, select_decided, select_pairs
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, PreferencePair


def select(
    candidates: Sequence[Candidates],
    decided: Sequence[Sequence[Corrected]],
    scores: Sequence[np.ndarray],
    config: PairingConfig,
    seed: int,
) -> list[list[Corrected]]:
    """At most ``max_pairs`` of the decided pairs of each prompt, no two with the same texts.

    The random choice depends on prompt and seed only, not on the other prompts. ``best_worst`` and ``random`` may take
    any decided pair. The other strategies rank responses by their scores, so they skip pairs of unscored responses and
    pairs decided against the scores (by a person, or because preferences are cyclic).

    Args:
        scores: [responses] consensus scores for each prompt, NaN = none.
    """
    offsets = np.cumsum([0] + [len(item.responses) for item in candidates], dtype=np.int64)
    allowed = [
        [pair for pair in pairs if _has_roles(item, pair, config)]
        for item, pairs in zip(candidates, decided, strict=True)
    ]
    texts: dict[str, int] = {}
    shared: dict[str, Any] = {
        "max_pairs": config.max_pairs,
        "text_ids": np.array(
            [texts.setdefault(r.text.strip(), len(texts)) for c in candidates for r in c.responses], dtype=np.int64
        ),
        "seed": seed,
        "keys": np.array([seed_of("pairs", item.prompt.id) for item in candidates], dtype=np.int64),
    }
    if config.pair_strategy in ("best_worst", "random"):
        return _select_decided(allowed, offsets, config.pair_strategy, shared)
    return _select_ranked(candidates, allowed, offsets, np.concatenate([*scores, []]), config, shared)


def _has_roles(item: Candidates, pair: Corrected, config: PairingConfig) -> bool:
    return _plays(item, pair.chosen, config.chosen_from) and _plays(item, pair.rejected, config.rejected_from)


def _plays(item: Candidates, index: int, roles: Sequence[str] | None) -> bool:
    if roles is None:
        return True
    response = item.responses[index]
    if response.model in roles:
        return True
    return any(
        role in roles
        and (own := getattr(response, name)) is not None
        and own == max(value for r in item.responses if (value := getattr(r, name)) is not None)
        for role, name in (("newest", "version_rank"), ("largest", "size_b"))
    )


def _select_decided(
    decided: Sequence[Sequence[Corrected]], offsets: np.ndarray, strategy: Any, shared: dict[str, Any]
) -> list[list[Corrected]]:
    flat = [pair for pairs in decided for pair in pairs]
    rows = [
        (first + pair.chosen, first + pair.rejected)
        for first, pairs in zip(offsets[:-1].tolist(), decided, strict=True)
        for pair in pairs
    ]
    bounds = np.cumsum([0] + [len(pairs) for pairs in decided], dtype=np.int64)
    margins = np.array([pair.gap for pair in flat], dtype=np.float32)
    taken = select_decided(
        np.array(rows, dtype=np.int64).reshape(-1, 2), margins, bounds, strategy=strategy, reuse_texts=True, **shared
    )
    out: list[list[Corrected]] = [[] for _ in decided]
    for prompt, index in zip(np.searchsorted(bounds, taken, side="right") - 1, taken, strict=True):
        out[prompt].append(flat[index])
    return out


def _select_ranked(
    candidates: Sequence[Candidates],
    decided: Sequence[Sequence[Corrected]],
    offsets: np.ndarray,
    scores: np.ndarray,
    config: PairingConfig,
    shared: dict[str, Any],
) -> list[list[Corrected]]:
    scores = scores.astype(np.float32)
    by_rows = {
        (first + pair.chosen, first + pair.rejected): pair
        for first, pairs in zip(offsets[:-1].tolist(), decided, strict=True)
        for pair in pairs
    }
    forbidden = [
        (i, j)
        for first, last in itertools.pairwise(offsets.tolist())
        for i, j in itertools.combinations(range(first, last), 2)
        if ((i, j) not in by_rows and (j, i) not in by_rows)
        or (scores[i] - scores[j]) * (1 if (i, j) in by_rows else -1) < 0
    ]
    if config.pair_strategy == "diverse":
        tokens, bounds = _tokens(candidates)
        shared = {
            **shared,
            "band": config.diversity_band,
            "distances": pairwise_distances(tokens, bounds, offsets, n=config.diversity_ngram),
        }
    # The margin was already applied when the pairs were decided.
    rows, _ = select_pairs(
        scores,
        offsets,
        strategy=config.pair_strategy,
        min_margin=0.0,
        forbidden=np.array(forbidden, dtype=np.int64).reshape(-1, 2),
        **shared,
    )
    out: list[list[Corrected]] = [[] for _ in candidates]
    for prompt, pair in zip(np.searchsorted(offsets, rows[:, 0], side="right") - 1, rows.tolist(), strict=True):
        out[prompt].append(by_rows[tuple(pair)])
    return out


def _tokens(candidates: Sequence[Candidates]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all responses; numbered words instead for a prompt with a response whose tokens are unknown."""
    words: dict[str, int] = {}
    out: list[Sequence[int]] = []
    for item in candidates:
        if all(r.token_ids is not None for r in item.responses):
            out += [r.token_ids or () for r in item.responses]
        else:
            out += [[words.setdefault(word, len(words)) for word in r.text.split()] for r in item.responses]
    tokens = np.array([token for ids in out for token in ids], dtype=np.int32)
    return tokens, np.cumsum([0] + [len(ids) for ids in out], dtype=np.int64)


def to_pair(
    item: Candidates,
    pair: Corrected,
    scores: Sequence[float] | np.ndarray,
    config: PairingConfig,
    *,
    win_rates: Sequence[float] | np.ndarray | None = None,
    temperature: float = 1.0,
) -> PreferencePair:
    """The training pair for a selected pair, with its scale, soft label and margin.

    Args:
        scores: [R of this prompt] consensus scores.
        win_rates: [R of this prompt], for ``soft_label_by: win_rate``.
        temperature: temperature that fits soft labels to human labels.
    """
    label = soft_label(pair, scores, config, win_rates)
    if config.soft_label_by is not None or config.soft_label_kappa is not None:
        label = pair.probability if pair.is_human and pair.probability else tempered_label(label, temperature)
    chosen_score, rejected_score = (_known(scores[i]) for i in (pair.chosen, pair.rejected))
    return PreferencePair(
        prompt=item.prompt,
        chosen=item.responses[pair.chosen],
        rejected=item.responses[pair.rejected],
        score_chosen=chosen_score,
        score_rejected=rejected_score,
        scale=_scale(pair, scores, label, config),
        soft_label=label,
        margin=config.margin_weight * pair.gap,
        prior=pair.prior,
        decision=pair.decision,
        reason=pair.reason,
        probability=pair.probability,
    )


def soft_label(
    pair: Corrected,
    scores: Sequence[float] | np.ndarray,
    config: PairingConfig,
    win_rates: Sequence[float] | np.ndarray | None = None,
) -> float:
    """Probability in [1/2, 1] that the chosen response is better, according to the evidence; 1/2 if there is none."""
    by = config.soft_label_by or (None if config.soft_label_kappa is None else "score_gap")
    if by is None:
        return 1.0
    kappa = 1.0 if config.soft_label_kappa is None else config.soft_label_kappa
    if by == "probability":
        stated = 0.5 if pair.probability is None else pair.probability
    elif by == "score_gap":
        stated = 1 / (1 + math.exp(-kappa * pair.gap))  # in [1/2, 1], as the gap is >= 0
    elif by == "rank_gap":
        stated = 1 / (1 + math.exp(-kappa * _gap(_ranks(scores), pair)))
    else:
        assert win_rates is not None
        stated = 0.5 + 0.5 * _gap(win_rates, pair)
    return min(max(stated, 0.5), 1.0)


def tempered_label(label: float, temperature: float) -> float:
    return label if temperature == 1.0 else float(tempered(np.array(label), temperature))


def _gap(values: Sequence[float] | np.ndarray, pair: Corrected) -> float:
    gap = float(values[pair.chosen]) - float(values[pair.rejected])
    return 0.0 if math.isnan(gap) else gap


def _ranks(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Average rank among the known scores, scaled to [0, 1]; NaN stays NaN."""
    scores = np.asarray(scores, dtype=np.float64)
    known = scores[~np.isnan(scores)]
    below = (known[None] < scores[:, None]).sum(axis=1) + 0.5 * ((known[None] == scores[:, None]).sum(axis=1) - 1)
    return np.where(np.isnan(scores), np.nan, below / max(len(known) - 1, 1))


def _known(score: float) -> float | None:
    return None if math.isnan(score) else float(score)


def _scale(pair: Corrected, scores: Sequence[float] | np.ndarray, label: float, config: PairingConfig) -> float:
    if config.scale_by == "confidence":
        return 2 * label - 1
    if config.scale_by == "unit" or math.isnan(scores[pair.chosen]):
        return 1.0
    if config.scale_by == "gap":
        return pair.gap
    known = np.asarray(scores, dtype=np.float64)
    known = known[~np.isnan(known)]
    return 2.0 * float((known < scores[pair.chosen]).mean())
