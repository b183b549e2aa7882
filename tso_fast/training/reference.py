"""Which weights are the reference of an iteration, and their log-probs of its pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from tso_fast.config.settings import ModelConfig, ReferenceConfig
from tso_fast.files.run import Run
from tso_fast.matrix import ModelMatrix
from tso_fast.models.load import load_model, save_model
from tso_fast.models.policy import Policy
from tso_fast.models.tokens import IGNORE
from tso_fast.training.batches import EncodedPair, collate, completion_lengths
from tso_fast.types import Weights

DEFAULT_EMA_ALPHA = 0.6  # TRL's ref_model_mixup_alpha


def reference_weights(config: ReferenceConfig, matrix: ModelMatrix, run: Run, iteration: int) -> Weights:
    """The reference's weights: ``previous`` is TSO's hard copy of the policy at the iteration's start."""
    if config.reference == "previous" or iteration == 1:
        return matrix.policy.weights
    if config.reference == "initial":
        return matrix.initial.weights
    mean = run.iteration(iteration - 1).reference
    return Weights(mean, mean)


def load_whole(config: ModelConfig, weights: Weights, device: torch.device | str) -> Any:
    """To train or to compare with: an adapter is merged, so that policy and reference start as the same model."""
    return load_model(
        weights.path,
        base=weights.base,
        merge=True,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        device=device,
    )


@torch.no_grad()
def save_ema(
    config: ReferenceConfig, loading: ModelConfig, policy: Any, tokenizer: Any, old: Weights, target: Path
) -> None:
    """reference <- alpha policy + (1 - alpha) reference."""
    alpha = DEFAULT_EMA_ALPHA if config.ref_model_mixup_alpha is None else config.ref_model_mixup_alpha
    model = load_whole(loading, old, "cpu")
    # Parameters, not the state dict: that names tied weights twice, and they must move once.
    new = dict(policy.named_parameters())
    for name, value in model.named_parameters():
        value.lerp_(new[name].to(value), alpha)
    save_model(model, tokenizer, target)


@torch.no_grad()
def reference_logprobs(
    policy: Any,
    pairs: Sequence[EncodedPair],
    *,
    batch_size: int,
    pad_token_id: int,
    device: torch.device,
    rank: int,
    world: int,
    impl: str,
    per_token: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    advance: Callable[[int], None] = lambda n: None,
) -> torch.Tensor:
    """Sums of log-probs, [pairs, 2] float32 (chosen, rejected), nats.

    Batches of like length are dealt to the processes; each fills in its own and leaves zeros elsewhere.

    Args:
        per_token: not the sums but the log-probs of all completions' tokens, one after the other in a single dimension,
            see ``completion_lengths``.
        autocast: the context that the policy is trained in, so that both round alike.
    """
    lengths = completion_lengths(pairs)
    out = torch.zeros(sum(lengths)) if per_token else torch.zeros(len(pairs), 2)
    parts = out.split(lengths) if per_token else ()
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].length)
    for start in range(0, len(order), batch_size * world):
        index = order[start + rank * batch_size :][:batch_size]
        # Wrapped models communicate in their forward pass, so a process without pairs makes the pass all the same.
        batch = collate(pairs, index or order[:1], pad_token_id=pad_token_id, device=device)
        with autocast():
            logprobs = policy(batch, impl=impl, per_token=per_token).float()
        if index and per_token:
            sides = [2 * i + side for side in (0, 1) for i in index]
            found = logprobs[batch.targets != IGNORE].cpu().split([lengths[side] for side in sides])
            for side, values in zip(sides, found, strict=True):
                parts[side].copy_(values)
        elif index:
            out[index] = logprobs.reshape(2, -1).T.cpu()
        advance(batch_size * world)
    return out


def load_reference(config: ModelConfig, weights: Weights, device: torch.device) -> Policy:
    return Policy(load_whole(config, weights, device)).eval()
