"""Generators: token ids in, sampled token ids out.

Request[] + Sampling -> Generator.generate -> Completion[]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tso_fast.types import FinishReason


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample; temperature 0 is greedy, top_p 1 and top_k 0 keep every token."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response wanted; it depends on these tokens and this seed, not on its batch or order."""

    token_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What was sampled, end-of-sequence token included."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprob: float
    """Under the sampling distribution (under the model's own when greedy), nats."""


class Generator(Protocol):
    """One cell of the matrix, ready to answer."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Callable[[int], None] = ...
    ) -> list[Completion]:
        """One completion a request, in their order; ``advance(n)`` reports n more done."""
        ...

    def close(self) -> None:
        """Frees the model."""
        ...
