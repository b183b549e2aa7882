"""The twin of ``diversity`` in Python sets and counters: it defines what is correct."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tso_fast.scoring.diversity import checked

NGram = tuple[int, ...]


def pairwise_distances_reference(
    tokens: npt.ArrayLike, token_offsets: npt.ArrayLike, offsets: npt.ArrayLike, *, n: int = 3, num_threads: int = 0
) -> np.ndarray:
    """``pairwise_distances`` with Python sets. ``num_threads`` changes nothing."""
    distances = []
    for responses in _responses(*checked(tokens, token_offsets, offsets, "n", n, num_threads)):
        sets = [set(_ngrams(response, n)) for response in responses]
        distances += [1 - len(a & b) / len(a | b) if a | b else 0.0 for a in sets for b in sets]
    return np.array(distances, np.float32)


def distinct_n_reference(
    tokens: npt.ArrayLike, token_offsets: npt.ArrayLike, offsets: npt.ArrayLike, *, n: int, num_threads: int = 0
) -> np.ndarray:
    """``distinct_n`` with Python sets. ``num_threads`` changes nothing."""
    shares = []
    for responses in _responses(*checked(tokens, token_offsets, offsets, "n", n, num_threads)):
        ngrams = [ngram for response in responses for ngram in _ngrams(response, n)]
        shares.append(len(set(ngrams)) / len(ngrams) if ngrams else math.nan)
    return np.array(shares, np.float32)


def self_bleu_reference(
    tokens: npt.ArrayLike, token_offsets: npt.ArrayLike, offsets: npt.ArrayLike, *, max_n: int = 4, num_threads: int = 0
) -> np.ndarray:
    """``self_bleu`` with Python counters. ``num_threads`` changes nothing."""
    scores = []
    for responses in _responses(*checked(tokens, token_offsets, offsets, "max_n", max_n, num_threads)):
        for i, response in enumerate(responses):
            others = responses[:i] + responses[i + 1 :]
            precisions = [_precision(response, others, k) for k in range(1, min(max_n, len(response)) + 1)]
            is_known = others and precisions
            scores.append(math.prod(precisions) ** (1 / len(precisions)) if is_known else math.nan)
    return np.array(scores, np.float32)


def _precision(response: list[int], others: list[list[int]], n: int) -> float:
    counts = Counter(_ngrams(response, n))
    most: Counter[NGram] = Counter()
    for other in others:
        most |= Counter(_ngrams(other, n))  # the larger count of each
    return (counts & most).total() / counts.total()


def _ngrams(response: list[int], n: int) -> list[NGram]:
    return [tuple(response[i : i + n]) for i in range(len(response) - n + 1)]


def _responses(tokens_T: np.ndarray, token_offsets_R1: np.ndarray, offsets_P1: np.ndarray) -> list[list[list[int]]]:
    """[prompt][response][token]"""
    responses = [tokens_T[first:last].tolist() for first, last in pairwise(token_offsets_R1)]
    return [responses[first:last] for first, last in pairwise(offsets_P1)]
