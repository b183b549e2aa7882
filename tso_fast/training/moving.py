"""A reference that follows the policy inside an iteration."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from tso_fast.config.settings import ReferenceConfig
from tso_fast.training.batches import EncodedPair
from tso_fast.training.inputs import Logprobs, Scoring
from tso_fast.training.reference import RunningMean, mixup_alpha
from tso_fast.training.shard import reshard


class MovingReference:
    """The reference of ``ref_model_sync_steps``: every so many steps it becomes the policy, or a mean of its weights.

    Whenever it moved, its log-probs of the pairs of the steps until it moves again are computed: by the policy itself,
    or by the policy with the mean's weights in place of its own for the while. There is never a second model. The cost
    is a forward pass over each pair whenever it is trained on, and with a mean the memory of the weights once more.

    Args:
        steps: the pairs of each step of the iteration.
        logprobs: the reference's, in place; those of the pairs of ``first_steps`` are there.
        mean: what the reference is when it moves; None: the policy.
        before: optimiser steps of the iterations before, which are counted.
    """

    def __init__(
        self,
        config: ReferenceConfig,
        scoring: Scoring,
        pairs: Sequence[EncodedPair],
        steps: Sequence[Sequence[int]],
        logprobs: Logprobs,
        mean: RunningMean | None,
        before: int,
    ) -> None:
        assert config.ref_model_sync_steps is not None
        self.every, self.alpha = config.ref_model_sync_steps, mixup_alpha(config)
        self.mixed_every = config.ref_model_mixup_steps or self.every
        self.scoring, self.pairs, self.steps, self.logprobs, self.mean = scoring, pairs, steps, logprobs, mean
        self.before = before

    def after(self, step: int) -> None:
        """Moves the reference, if it is its turn, once the policy made its ``step``."""
        policy: Any = self.scoring.policy
        if self.mean is not None and (self.before + step) % self.mixed_every == 0:
            self.mean.add(policy, self.alpha)
        if (self.before + step) % self.every or step >= len(self.steps):
            return
        index = pairs_of(self.steps[step : step + self.every])
        with contextlib.nullcontext() if self.mean is None else self.mean.in_place_of(policy):
            per_token = bool(self.logprobs.by_completion)
            found = self.scoring.by(policy, [self.pairs[i] for i in index], per_token=per_token)
        reshard(policy)
        policy.train()
        self.logprobs.fill(index, found)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of it, to be saved or to be read into."""
        mean = {} if self.mean is None else {f"mean.{name}": value for name, value in self.mean.weights.items()}
        return {"reference.logprobs": self.logprobs.values, **mean}


def first_steps(config: ReferenceConfig, before: int) -> int:
    """Steps of an iteration until the reference moves, after so many that are counted."""
    assert config.ref_model_sync_steps is not None
    return config.ref_model_sync_steps - before % config.ref_model_sync_steps


def pairs_of(steps: Sequence[Sequence[int]]) -> list[int]:
    """The pairs of some steps, each once."""
    return sorted({i for step in steps for i in step})
