"""Consistency of rankings: how far two versions of a model agree on which responses to a prompt are better.

CREAM (Wang et al. 2025, arXiv 2410.12735): a policy that rewards its own responses is believed as far as the version
before it ranks them alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from tso_fast.config.settings import JudgeConfig
from tso_fast.judges.implicit import NOTHING, TOO_LONG, CellsJudge, SequenceLogprob, implicit_reward, logprobs_by
from tso_fast.judges.judge import Bench, Judged, Opinion, as_comparisons
from tso_fast.types import Candidates, Comparison


class ConsistencyJudge(CellsJudge):
    """Judge of kind ``consistency``: comparisons by implicit rewards of ``cell``, as sure as two rankings agree.

    The probability of the response that ``cell`` rewards more is C = (Kendall's tau + 1) / 2 of the rankings of all
    responses of the prompt by ``cell`` and by ``previous``. Both rewards are of the same kind: log-probs, less those of
    ``reference`` where there is one.
    """

    takes = ("cell", "previous", "reference", "length_normalized", "consistency_of")

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__(config)
        if len(set(self.cells)) < len(self.cells):
            raise ValueError(f"previous: got the cells {', '.join(self.cells)}; expected different ones")

    @property
    def cells(self) -> list[str]:
        own, *reference = super().cells
        return [own, self.config.previous or "previous", *reference]

    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        own, before, *reference = (logprobs_by(name, self.name, candidates, bench) for name in self.cells)
        nothing: list[list[SequenceLogprob | None]] = [[NOTHING] * len(row) for row in own]
        base = reference[0] if reference else nothing
        new, old = ([self._rewards(*rows) for rows in zip(of, base, strict=True)] for of in (own, before))
        tau_P = np.array([kendall_tau(a, b) for a, b in zip(new, old, strict=True)])
        if self.config.consistency_of == "dataset" and not np.isnan(tau_P).all():
            tau_P = np.full(len(tau_P), np.nanmean(tau_P))
        told: list[Comparison] = []
        for item, rewards, tau in zip(candidates, new, tau_P.tolist(), strict=True):
            told += as_comparisons(item, self.name, functools.partial(_compared, rewards, (tau + 1) / 2))
        return Judged(told)

    def _rewards(self, own: Sequence[SequenceLogprob | None], base: Sequence[SequenceLogprob | None]) -> np.ndarray:
        """[R of a prompt], NaN = longer than the context."""
        values = [implicit_reward(*both, self.config.length_normalized) for both in zip(own, base, strict=True)]
        return np.array([np.nan if value is None else value for value in values])


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's tau-b of two rows of numbers, over the places where both are known; NaN: no pair is ordered by both."""
    known = ~np.isnan(a) & ~np.isnan(b)
    first, second = np.triu_indices(int(known.sum()), 1)
    x, y = (np.sign(row[known][first] - row[known][second]) for row in (a, b))
    scale = np.sqrt(np.count_nonzero(x) * np.count_nonzero(y))
    return float((x * y).sum() / scale) if scale else float("nan")


def _compared(rewards: np.ndarray, consistency: float, i: int, j: int) -> Opinion:
    """The response of the higher reward is better with probability ``consistency``."""
    gap = rewards[i] - rewards[j]
    if math.isnan(gap):
        return TOO_LONG
    if math.isnan(consistency):
        return Opinion(None, "no two responses are ranked by both versions")
    return Opinion(0.5 + (consistency - 0.5) * float(np.sign(gap)))
