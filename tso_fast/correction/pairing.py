"""Selects the decided pairs to train on, and sets their strength: scale, soft label, margin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tso_fast.config.settings import PairingConfig
from tso_fast.correction.calibration import tempered
from tso_fast.correction.decide import Corrected, Decided
from tso_fast.correction.evidence import text_ids
from tso_fast.correction.votes import pairs_of_rows
from tso_fast.errors import InputError
from tso_fast.scoring import pairwise_distances, select_decided, select_pairs
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, PreferencePair, Response


def select(
    candidates: Sequence[Candidates], decided: Decided, scores_R: np.ndarray, config: PairingConfig, seed: int
) -> np.ndarray:
    """At most ``max_pairs`` of the decided pairs of each prompt, no two with the same texts: [S] numbers of the pairs.

    The random choice depends on prompt and seed only, not on the other prompts. ``best_worst`` and ``random`` may take
    any decided pair. The other strategies rank responses by their scores, so they skip pairs of unscored responses and
    pairs decided against the scores (by a person, or because preferences are cyclic).

    Args:
        scores_R: [R] consensus scores, NaN = none.

    Returns:
        [S] numbers of pairs, by prompt, in the order in which they were selected.
    """
    chosen_R, rejected_R = (plays(candidates, roles) for roles in (config.chosen_from, config.rejected_from))
    is_allowed_N = decided.is_used & chosen_R[decided.chosen_N] & rejected_R[decided.rejected_N]
    shared: dict[str, Any] = {
        "max_pairs": config.max_pairs,
        "text_ids": text_ids(response for item in candidates for response in item.responses),
        "seed": seed,
        "keys": np.array([seed_of("pairs", item.prompt.id) for item in candidates], dtype=np.int64),
    }
    if config.pair_strategy in ("best_worst", "random"):
        return _select_decided(decided, is_allowed_N, config.pair_strategy, shared)
    if config.pair_strategy == "diverse":
        tokens, bounds = _tokens(candidates)
        shared["band"] = config.diversity_band
        shared["distances"] = pairwise_distances(tokens, bounds, decided.votes.offsets, n=config.diversity_ngram)
    return _select_ranked(decided, is_allowed_N, scores_R, config.pair_strategy, shared)


def plays(candidates: Sequence[Candidates], roles: Sequence[str] | None) -> np.ndarray:
    """[R] bool: the response is of one of the models, or the newest or largest of its prompt; None: all are."""
    responses = [response for item in candidates for response in item.responses]
    if roles is None:
        return np.ones(len(responses), dtype=bool)
    out = np.array([response.model in roles for response in responses], dtype=bool)
    prompt_R = np.repeat(np.arange(len(candidates)), [len(item.responses) for item in candidates])
    for role, name in (("newest", "version_rank"), ("largest", "size_b")):
        if role in roles:
            own_R = np.array([getattr(response, name) for response in responses], dtype=np.float64)
            most_P = np.full(len(candidates), np.nan)
            np.fmax.at(most_P, prompt_R, own_R)
            out |= own_R == most_P[prompt_R]
    return out


def _select_decided(decided: Decided, is_allowed_N: np.ndarray, strategy: Any, shared: Mapping[str, Any]) -> np.ndarray:
    allowed = np.flatnonzero(is_allowed_N)
    taken = select_decided(
        np.column_stack([decided.chosen_N[allowed], decided.rejected_N[allowed]]),
        decided.gap_N[allowed].astype(np.float32),
        np.searchsorted(allowed, decided.votes.bounds),
        strategy=strategy,
        reuse_texts=True,
        **shared,
    )
    return allowed[taken]


def _select_ranked(
    decided: Decided, is_allowed_N: np.ndarray, scores_R: np.ndarray, strategy: Any, shared: Mapping[str, Any]
) -> np.ndarray:
    votes, scores_R = decided.votes, scores_R.astype(np.float32)
    is_against_N = scores_R[decided.chosen_N] < scores_R[decided.rejected_N]
    # The margin was already applied when the pairs were decided.
    rows, _ = select_pairs(
        scores_R,
        votes.offsets,
        strategy=strategy,
        min_margin=0.0,
        forbidden=votes.rows_of_pair[~is_allowed_N | is_against_N],
        **shared,
    )
    return pairs_of_rows(votes.offsets, rows, votes.prompt_of_response[rows[:, 0]])


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
        win_rates: [R of this prompt] over the other responses, for ``soft_label_by: win_rate`` and ``win_rates``.
        temperature: temperature that fits soft labels to human labels.
    """
    chosen, rejected = item.responses[pair.chosen], item.responses[pair.rejected]
    label = soft_label(pair, scores, config, win_rates, (chosen.scores, rejected.scores))
    if config.soft_label_by is not None or config.soft_label_kappa is not None:
        label = pair.probability if pair.is_human and pair.probability else tempered_label(label, temperature)
    chosen_score, rejected_score = (_known(scores[i]) for i in (pair.chosen, pair.rejected))
    return PreferencePair(
        prompt=item.prompt,
        chosen=chosen,
        rejected=rejected,
        score_chosen=chosen_score,
        score_rejected=rejected_score,
        scale=_scale(pair, scores, label, config),
        soft_label=label,
        margin=config.margin_weight * pair.gap,
        prior=pair.prior,
        decision=pair.decision,
        reason=pair.reason,
        probability=pair.probability,
        win_rates=_win_rates(pair, win_rates, label, config),
        extra=() if config.extra_from is None else (_first_of(config.extra_from, item),),
    )


def _first_of(model: str, item: Candidates) -> Response:
    for response in item.responses:
        if response.model == model:
            return response
    models = ", ".join(dict.fromkeys(response.model for response in item.responses))
    raise InputError(
        f"{item.prompt.where or item.prompt.id}: extra_from: {model!r} has no response; expected one of {models}"
    )


def _win_rates(
    pair: Corrected, win_rates: Sequence[float] | np.ndarray | None, label: float, config: PairingConfig
) -> tuple[float, float] | None:
    """Win rates of the chosen and the rejected response, if they are asked for; without evidence p and 1 - p."""
    if config.win_rates is None:
        return None
    assert win_rates is not None
    chosen, rejected = (float(win_rates[i]) for i in (pair.chosen, pair.rejected))
    if math.isnan(chosen) or math.isnan(rejected):
        return label, 1 - label
    if config.win_rates == "all":
        others = int(np.count_nonzero(~np.isnan(win_rates))) - 1
        chosen, rejected = ((rate * others + 0.5) / (others + 1) for rate in (chosen, rejected))
    return chosen, rejected


def soft_label(
    pair: Corrected,
    scores: Sequence[float] | np.ndarray,
    config: PairingConfig,
    win_rates: Sequence[float] | np.ndarray | None = None,
    own: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
) -> float:
    """Probability in [1/2, 1] that the chosen response is better, according to the evidence; 1/2 if there is none.

    Args:
        own: scores that came with the chosen and with the rejected response.
    """
    by = config.soft_label_by or (None if config.soft_label_kappa is None else "score_gap")
    if by is None:
        return 1.0
    kappa = 1.0 if config.soft_label_kappa is None else config.soft_label_kappa
    if by == "probability":
        stated = 0.5 if pair.probability is None else pair.probability
    elif by == "score_gap":
        stated = 1 / (1 + math.exp(-kappa * pair.gap))  # in [1/2, 1], as the gap is >= 0
    elif by == "score_share":
        chosen, rejected = (scores_of.get(config.soft_label_score or "", 0.0) for scores_of in own)
        stated = chosen / (chosen + rejected) if chosen + rejected else 0.5
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
