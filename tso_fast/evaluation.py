"""The accuracy of cells on prompts with known answers, or their mean score, with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tso_fast.answering import Asked, answer
from tso_fast.config.settings import EvalConfig
from tso_fast.errors import InputError
from tso_fast.files.responses import ResponseStore
from tso_fast.files.rows import BadRows
from tso_fast.judges.verifier import make_verifier, verify
from tso_fast.matrix import ModelMatrix
from tso_fast.types import Candidates


def evaluate(
    asked: Sequence[Asked],
    candidates: Sequence[Candidates],
    matrix: ModelMatrix,
    config: EvalConfig,
    store: ResponseStore,
    bad: BadRows,
    advance: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """For each cell: the mean score of its answers with its 95 % interval, and their mean length.

    The mean is called ``accuracy``, which it is where every score is 0 or 1; ``is_graded`` says that there are others.
    """
    assert config.verifier is not None
    answered = list(answer(asked, candidates, matrix, config, store, bad, advance))
    check = make_verifier(config.verifier, config.verifier_pattern, config.verifier_timeout_s)
    verdicts = verify(answered, check, bad)
    responses = {(c.prompt.id, i): r for c in answered for i, r in enumerate(c.responses)}
    out = []
    for a in asked:
        scores = [
            v.score for v in verdicts if v.score is not None and responses[v.prompt_id, v.response].model == a.cell.name
        ]
        if not scores:
            raise InputError(f"{a.cell.name}: the verifier abstained on every response; there is nothing to average")
        low, high = interval(scores)
        lengths = [len(r.token_ids or ()) for r in responses.values() if r.model == a.cell.name]
        out.append(
            {
                "model": a.cell.name,
                "accuracy": sum(scores) / len(scores),
                "low": low,
                "high": high,
                "responses": len(scores),
                "is_graded": is_graded(scores),
                "mean_tokens": sum(lengths) / len(lengths),
            }
        )
    return out


def is_graded(scores: Sequence[float]) -> bool:
    """Whether there is any other score than 0 and 1."""
    return not {0.0, 1.0}.issuperset(scores)


def interval(scores: Sequence[float], z: float = 1.96) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for a proportion, for graded scores by the normal approximation.

    A graded score that is the only one counts as uncertain as one from 0 to 1 can be. The interval of scores from 0 to
    1 ends there.
    """
    mean = sum(scores) / len(scores)
    if not is_graded(scores):
        return wilson(mean, len(scores), z)
    half = z * math.sqrt((statistics.variance(scores) if len(scores) > 1 else 0.25) / len(scores))
    is_share = min(scores) >= 0 and max(scores) <= 1
    return (max(0.0, mean - half), min(1.0, mean + half)) if is_share else (mean - half, mean + half)


def wilson(mean: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    center = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(max(mean * (1 - mean), 0) / count + z * z / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)
