"""Verifiers for tests that need scores from models which know nothing yet."""

from __future__ import annotations


def letters(prompt: object, response: str, answer: str | None) -> float:
    """Share of letters, so that samples of a prompt differ."""
    return sum(c.isalpha() for c in response) / (1 + len(response))


def even(prompt: object, response: str, answer: str | None) -> float:
    """Right or wrong, both often enough."""
    return float(len(response) % 2 == 0)


def breaks(prompt: object, response: str, answer: str | None) -> float:
    raise RuntimeError("out of patience")
