"""Which decided pairs are trained on, and how strongly: scale, soft label, margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tso_fast.config import PairingConfig
from tso_fast.correction import Corrected
from tso_fast.reliability import tempered
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, PreferencePair


def select(item: Candidates, decided: Sequence[Corrected], config: PairingConfig, seed: int) -> list[Corrected]:
    """At most ``max_pairs`` pairs of one prompt, no two of the same two texts; the draw depends on prompt and seed."""
    rng = np.random.default_rng(seed_of(seed, "pairs", item.prompt.id))
    order = [decided[i] for i in rng.permutation(len(decided))]
    if config.pair_strategy == "best_worst":
        order.sort(key=lambda pair: -pair.gap)  # stable: ties stay shuffled
    distinct: dict[frozenset[str], Corrected] = {}  # in either order: a judge may score one text in two ways
    for pair in order:
        distinct.setdefault(frozenset(_texts(item, pair)), pair)
    remaining = list(distinct.values())
    chosen: list[Corrected] = []
    used: set[str] = set()
    while remaining and len(chosen) < config.max_pairs:
        best = min(remaining, key=lambda pair: sum(text in used for text in _texts(item, pair)))
        remaining.remove(best)
        chosen.append(best)
        used.update(_texts(item, best))
    return chosen


def _texts(item: Candidates, pair: Corrected) -> tuple[str, str]:
    return item.responses[pair.chosen].text.strip(), item.responses[pair.rejected].text.strip()


def to_pair(
    item: Candidates,
    pair: Corrected,
    scores: Sequence[float] | np.ndarray,
    config: PairingConfig,
    *,
    win_rates: Sequence[float] | np.ndarray | None = None,
    temperature: float = 1.0,
) -> PreferencePair:
    """The selected pair with its strength, from what is known of the prompt's responses.

    Args:
        scores: [R of this prompt] consensus.
        win_rates: [R of this prompt], for ``soft_label_by: win_rate``.
        temperature: that fits soft labels to human ones.
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
    """Probability in [1/2, 1] that the chosen response is the better one, as the evidence has it; 1/2 without any."""
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
    """Average rank among the known scores, scaled to [0, 1]; NaN stays."""
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
