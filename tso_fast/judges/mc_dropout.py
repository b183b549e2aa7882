"""Uncertainty by dropout: how far a cell's implicit rewards agree on two responses while parts of it are left out.

UPO (Wang et al. 2025, arXiv 2409.11212) weighs preferences by the BALD score of an estimator with Monte-Carlo dropout.
It trains a classifier of pairs; here the estimator is the cell's implicit reward, which needs no training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from tso_fast.judges.implicit import encoded, find_cell, logprobs_by, response_logprobs
from tso_fast.judges.judge import Bench, Judge, Judged
from tso_fast.matrix import ModelMatrix
from tso_fast.models.load import device_of, load_model
from tso_fast.models.memory import release
from tso_fast.models.policy import set_dropout
from tso_fast.seeds import seed_of
from tso_fast.types import Candidates, Comparison


class McDropoutJudge(Judge):
    """Judge of kind ``mc_dropout``: comparisons, sure as far as passes with dropout agree.

    Pass t says p_t = sigmoid(beta (r_t(y) - r_t(y'))) of the rewards r_t under its dropout. The likelier response by
    the mean of p_t is better with probability 1 - BALD / (2 ln 2), BALD = H(mean p_t) - mean H(p_t): 1 where all passes
    agree, 1/2 where they contradict each other in full. UPO prints a label that is the lower the surer, against its own
    words; this is the correction.
    """

    takes = ("cell", "reference", "length_normalized", "beta", "dropout", "num_passes")
    needs_models = True

    @property
    def _cell(self) -> str:
        return self.config.cell or "policy"

    def check(self, matrix: ModelMatrix | None) -> None:
        for name in filter(None, (self._cell, self.config.reference)):
            find_cell(name, self.name, matrix)

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
            told += self._comparisons(item, reward_TR[:, start:end])
        return Judged(told)

    def _length(self, num_tokens: int) -> int:
        return num_tokens if self.config.length_normalized else 1

    def _passes(self, candidates: Sequence[Candidates], bench: Bench) -> np.ndarray:
        """[T, R] log-probs of all responses under each pass, a token if told so; NaN = longer than the context.

        What is left out in a pass depends on the run's seed, the weights and the responses that are judged together.
        """
        assert bench.matrix is not None
        assert bench.settings is not None
        cell, tokenizer = find_cell(self._cell, self.name, bench.matrix), bench.matrix.tokenizer
        rows, is_scored = encoded(cell, candidates, tokenizer)
        fits_R = np.array(list(itertools.chain.from_iterable(is_scored)), dtype=bool)
        out = np.full((self.config.num_passes, len(fits_R)), np.nan)
        device = device_of(bench.settings.use_cpu)
        model = load_model(
            cell.path,
            base=cell.base,
            dtype=bench.settings.dtype,
            attn_implementation=bench.settings.attn_implementation,
            device=device,
        )
        set_dropout(model, self.config.dropout)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        try:
            for t in range(self.config.num_passes):
                with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
                    torch.manual_seed(seed_of("mc_dropout", bench.settings.seed, cell.weight_hash, t))
                    scores = response_logprobs(
                        model, rows, pad_token_id=pad, impl=bench.impl, advance=bench.advance, is_training=True
                    )
                out[t, fits_R] = [score.logprob / self._length(score.num_tokens) for score in scores]
        finally:
            release(model)
        return out

    def _comparisons(self, item: Candidates, reward_TR: np.ndarray) -> list[Comparison]:
        found = []
        for i, j in itertools.combinations(range(len(item.responses)), 2):
            probability_T = _sigmoid(self.config.beta * (reward_TR[:, i] - reward_TR[:, j]))
            mean = float(probability_T.mean())
            probability: float | None = 0.5 + float(np.sign(mean - 0.5)) * (
                0.5 - bald(probability_T) / (2 * math.log(2))
            )
            reason = ""
            if math.isnan(mean):
                probability, reason = None, "longer than the context"
            found.append(
                Comparison(
                    prompt_id=item.prompt.id, responses=(i, j), judge=self.name, probability=probability, reason=reason
                )
            )
        return found


def bald(probability_T: np.ndarray) -> float:
    """Mutual information of an answer and the pass that gives it, nats in [0, ln 2]: H(mean p) - mean H(p)."""
    gain = _entropy(probability_T.mean()) - _entropy(probability_T).mean()
    return float(np.clip(gain, 0.0, math.log(2)))


def _entropy(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
