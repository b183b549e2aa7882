"""Uncertainty by dropout: how far a cell's implicit rewards agree on two responses while parts of it are left out.

UPO (Wang et al. 2025, arXiv 2409.11212) weighs preferences by the BALD score of an estimator with Monte-Carlo dropout.
It trains a classifier of pairs; here the estimator is the cell's implicit reward, which needs no training.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from tso_fast.judges.implicit import (
    TOO_LONG,
    CellsJudge,
    encoded,
    find_cell,
    loaded,
    loading,
    logprobs_by,
    response_logprobs,
)
from tso_fast.judges.judge import Bench, Judged, Opinion, as_comparisons
from tso_fast.models.policy import set_dropout
from tso_fast.models.tokens import padding_id
from tso_fast.scoring.strengths import win_probability
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, Comparison


class McDropoutJudge(CellsJudge):
    """Judge of kind ``mc_dropout``: comparisons, sure as far as passes with dropout agree.

    Pass t says p_t = sigmoid(beta (r_t(y) - r_t(y'))) of the rewards r_t under its dropout. The likelier response by
    the mean of p_t is better with probability 1 - BALD / (2 ln 2), BALD = H(mean p_t) - mean H(p_t): 1 where all passes
    agree, 1/2 where they contradict each other in full. UPO prints a label that is the lower the surer, against its own
    words; this is the correction.
    """

    takes = ("cell", "reference", "length_normalized", "beta", "dropout", "num_passes")

    def num_steps(self, candidates: Sequence[Candidates]) -> int:
        passes = self.config.num_passes + (self.config.reference is not None)
        return passes * sum(len(item.responses) for item in candidates)

    def judge(self, candidates: Sequence[Candidates], bench: Bench) -> Judged:
        reward_TR = self._passes(candidates, bench)
        if self.config.reference is not None:
            base = logprobs_by(self.config.reference, self.name, candidates, bench)
            flat = [None if s is None else s.logprob / self._length(s.num_tokens) for row in base for s in row]
            reward_TR = reward_TR - np.array([np.nan if value is None else value for value in flat])
        told: list[Comparison] = []
        end = 0
        for item in candidates:
            start, end = end, end + len(item.responses)
            told += as_comparisons(item, self.name, functools.partial(self._compared, reward_TR[:, start:end]))
        return Judged(told)

    def _length(self, num_tokens: int) -> int:
        return num_tokens if self.config.length_normalized else 1

    def _passes(self, candidates: Sequence[Candidates], bench: Bench) -> np.ndarray:
        """[T, R] log-probs of all responses under each pass, a token if told so; NaN = longer than the context.

        What is left out in a pass depends on the run's seed, the weights and the responses that are judged together.
        """
        assert bench.matrix is not None
        assert bench.settings is not None
        cell, tokenizer = find_cell(self.cells[0], self.name, bench.matrix), bench.matrix.tokenizer
        rows, is_scored = encoded(cell, candidates, tokenizer)
        fits_R = np.array(list(itertools.chain.from_iterable(is_scored)), dtype=bool)
        out = np.full((self.config.num_passes, len(fits_R)), np.nan)
        how, pad = loading(bench), padding_id(tokenizer)
        with loaded(cell, **how) as model:
            set_dropout(model, self.config.dropout)
            for t in range(self.config.num_passes):
                with torch.random.fork_rng(devices=[how["device"]] if how["device"].type == "cuda" else []):
                    torch.manual_seed(seed_of("mc_dropout", bench.settings.seed, cell.weight_hash, t))
                    scores = response_logprobs(
                        model, rows, pad_token_id=pad, impl=bench.impl, advance=bench.advance, is_training=True
                    )
                out[t, fits_R] = [score.logprob / self._length(score.num_tokens) for score in scores]
        return out

    def _compared(self, reward_TR: np.ndarray, i: int, j: int) -> Opinion:
        probability_T = win_probability(self.config.beta * (reward_TR[:, i] - reward_TR[:, j]))
        mean = float(probability_T.mean())
        if math.isnan(mean):
            return TOO_LONG
        return Opinion(0.5 + float(np.sign(mean - 0.5)) * (0.5 - bald(probability_T) / (2 * math.log(2))))


def bald(probability_T: np.ndarray) -> float:
    """Mutual information of an answer and the pass that gives it, nats in [0, ln 2]: H(mean p) - mean H(p)."""
    gain = _entropy(probability_T.mean()) - _entropy(probability_T).mean()
    return float(np.clip(gain, 0.0, math.log(2)))


def _entropy(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))
