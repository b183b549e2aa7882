"""Which decided pairs are trained on, and how strongly: scale, soft label, margin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tso_fast.config import PairingConfig
from tso_fast.correction import Corrected
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
    item: Candidates, pair: Corrected, scores: Sequence[float] | np.ndarray, config: PairingConfig
) -> PreferencePair:
    """The selected pair with its strength, from the consensus scores of the prompt."""
    chosen_score, rejected_score = (_known(scores[i]) for i in (pair.chosen, pair.rejected))
    kappa = config.soft_label_kappa
    return PreferencePair(
        prompt=item.prompt,
        chosen=item.responses[pair.chosen],
        rejected=item.responses[pair.rejected],
        score_chosen=chosen_score,
        score_rejected=rejected_score,
        scale=_scale(pair, scores, config),
        # 1 / (1 + e^-x) in [1/2, 1], for x >= 0
        soft_label=1.0 if kappa is None else 1 / (1 + math.exp(-kappa * pair.gap)),
        margin=config.margin_weight * pair.gap,
        prior=pair.prior,
        decision=pair.decision,
        reason=pair.reason,
    )


def _known(score: float) -> float | None:
    return None if math.isnan(score) else float(score)


def _scale(pair: Corrected, scores: Sequence[float] | np.ndarray, config: PairingConfig) -> float:
    if config.scale_by == "unit" or math.isnan(scores[pair.chosen]):
        return 1.0
    if config.scale_by == "gap":
        return pair.gap
    known = np.asarray(scores, dtype=np.float64)
    known = known[~np.isnan(known)]
    return 2.0 * float((known < scores[pair.chosen]).mean())
