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
from tso_fast.correction.votes import Votes, pairs_of_rows
from tso_fast.errors import InputError
from tso_fast.scoring import pairwise_distances, select_decided, select_pairs
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, PreferencePair, Response


def select(
    candidates: Sequence[Candidates], decided: Decided, scores_R: np.ndarray, config: PairingConfig, seed: int
) -> np.ndarray:
    """At most ``max_pairs`` of the decided pairs of each prompt, no two with the same texts: [S] numbers of the pairs.

    The random choice depends on prompt and seed only, not on the other prompts. ``best_worst``, ``random`` and ``mate``
    may take any decided pair. The other strategies rank responses by their scores, so they skip pairs of unscored
    responses and pairs decided against the scores (by a person, or because preferences are cyclic).

    Args:
        scores_R: [R] consensus scores, NaN = none.

    Returns:
        [S] numbers of pairs, by prompt, in the order in which they were selected.
    """
    chosen_R, rejected_R = (plays(candidates, roles) for roles in (config.chosen_from, config.rejected_from))
    if config.accepted_responses is not None:
        accepted_R = accepted(candidates, scores_R, config.accepted_responses, config.acceptance_beta or 0.5, seed)
        chosen_R, rejected_R = chosen_R & accepted_R, rejected_R & accepted_R
        scores_R = np.where(accepted_R, scores_R, np.nan)  # strategies that rank do not see the others
    is_allowed_N = decided.is_used & chosen_R[decided.chosen_N] & rejected_R[decided.rejected_N]
    shared: dict[str, Any] = {
        "max_pairs": config.max_pairs,
        "text_ids": text_ids(response for item in candidates for response in item.responses),
        "seed": seed,
        "keys": np.array([seed_of("pairs", item.prompt.id) for item in candidates], dtype=np.int64),
    }
    if config.pair_strategy in ("best_worst", "random"):
        return _select_decided(decided, is_allowed_N, decided.gap_N, config.pair_strategy, shared)
    if config.pair_strategy in ("diverse", "mate"):
        tokens, bounds = _tokens(candidates)
        distances = pairwise_distances(tokens, bounds, decided.votes.offsets, n=config.diversity_ngram)
        if config.pair_strategy == "mate":
            liking_N = _liking(candidates, decided, scores_R, distances)
            return _select_decided(decided, is_allowed_N, liking_N, "best_worst", shared)
        shared |= {"band": config.diversity_band, "distances": distances}
    return _select_ranked(decided, is_allowed_N, scores_R, config.pair_strategy, shared)


def accepted(candidates: Sequence[Candidates], scores_R: np.ndarray, number: int, beta: float, seed: int) -> np.ndarray:
    """[R] bool: the responses of each prompt that statistical rejection sampling accepts.

    Algorithm 1 of RSO (Liu et al. 2024, arXiv 2309.06657): responses are passed over in their order, again and again,
    each of them accepted with probability exp((score - best) / beta), the best of those that were left when the pass
    began, until ``number`` are. So the accepted ones follow the distribution that they were sampled from times
    exp(score / beta); the smaller beta, the closer to the ``number`` best. A text counts once, at its first place, and
    unscored responses are none. Draws hang on seed and prompt alone.
    """
    out = np.zeros(len(scores_R), dtype=bool)
    start = 0
    for item in candidates:
        rows = range(start, start := start + len(item.responses))
        first = {item.responses[row - rows.start].text.strip(): row for row in reversed(rows)}
        left = [row for row in sorted(first.values()) if not math.isnan(scores_R[row])]
        draws = np.random.default_rng(seed_of("accepted", seed, item.prompt.id))
        num_left = min(number, len(left))
        while num_left:
            best = max(scores_R[row] for row in left)
            chances = [math.exp((scores_R[row] - best) / beta) for row in left]
            taken = [row for row, chance in zip(left, chances, strict=True) if draws.random() < chance][:num_left]
            out[taken] = True
            num_left -= len(taken)
            left = [row for row in left if not out[row]]
    return out


def _liking(
    candidates: Sequence[Candidates], decided: Decided, scores_R: np.ndarray, distances: np.ndarray
) -> np.ndarray:
    """[N] how much earlier ``mate`` takes a pair: the better the chosen response, then one of another cell, then the
    more different their n-grams.

    Mate choice is an analogy: "All You Need Is Sex for Diversity" is about genetic programming, where individuals
    choose unlike mates and populations stay diverse.

    Args:
        distances: as ``pairwise_distances`` gives them.
    """
    votes = decided.votes
    cells = np.array([response.model for item in candidates for response in item.responses], dtype=object)
    first, second = votes.rows_of_pair.T
    sizes = votes.num_responses
    block_P = np.concatenate([[0], np.cumsum(sizes**2)])[:-1]
    p_N = votes.prompt_of_pair
    place_N = block_P[p_N] + (first - votes.offsets[p_N]) * sizes[p_N] + second - votes.offsets[p_N]
    rank_N = _dense_ranks(scores_R, votes)[decided.chosen_N]
    return 4.0 * rank_N + 2.0 * (cells[first] != cells[second]) + distances[place_N]


def _dense_ranks(scores_R: np.ndarray, votes: Votes) -> np.ndarray:
    """[R] number of lower scores of the same prompt, equal ones counted once; an unscored response is below all."""
    values_R, prompt_R = np.nan_to_num(scores_R, nan=-np.inf), votes.prompt_of_response
    order = np.lexsort((values_R, prompt_R))
    values_R, prompt_R = values_R[order], prompt_R[order]
    steps = np.cumsum(np.concatenate([[False], values_R[1:] > values_R[:-1]])[: len(order)])
    out = np.empty(len(order), dtype=np.int64)
    out[order] = steps - steps[votes.offsets[prompt_R]]
    return out


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


def _select_decided(
    decided: Decided, is_allowed_N: np.ndarray, liking_N: np.ndarray, strategy: Any, shared: Mapping[str, Any]
) -> np.ndarray:
    allowed = np.flatnonzero(is_allowed_N)
    taken = select_decided(
        np.column_stack([decided.chosen_N[allowed], decided.rejected_N[allowed]]),
        liking_N[allowed].astype(np.float32),
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
