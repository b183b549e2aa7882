"""Preference losses: pure functions from ``PairLogprobs`` to one loss a pair.

Reduction, scaling and logging belong to the caller. A new loss is a function and a row in ``LOSSES``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tso_fast.types import PairLogprobs

Loss = Callable[..., torch.Tensor]


def _soft_logistic(z: torch.Tensor, pairs: PairLogprobs) -> torch.Tensor:
    """-p log sigma(z) - (1 - p) log sigma(-z), with z already less the margin."""
    if pairs.soft_label is None:
        return -F.logsigmoid(z)
    return -pairs.soft_label * F.logsigmoid(z) - (1 - pairs.soft_label) * F.logsigmoid(-z)


def _less_margin(z: torch.Tensor, pairs: PairLogprobs) -> torch.Tensor:
    return z if pairs.margin is None else z - pairs.margin


def dual_clip(
    pairs: PairLogprobs, *, beta: float = 0.1, clip_chosen: float = 0.5, clip_rejected: float = 0.3
) -> torch.Tensor:
    """TSO's dual-clip loss, [N].

    With A, B the policy-to-reference log-ratios of the chosen and the rejected response::

        u = min(beta A, clip_chosen)      v = max(beta B, -clip_rejected)      z = u - v - m
        loss = -p log sigma(z) - (1 - p) log sigma(-z)

    One-sided: a chosen response whose reward fell is still pulled up. A side at its bound has exactly zero
    gradient. Infinite bounds give DPO. The paper (arXiv 2409.02118) names a "dual clip reward loss"; no public
    page prints it, so this formula is ours.

    Args:
        pairs: sums of log-probs, [N] each.
        beta: > 0, reward per nat of log-ratio.
        clip_chosen: >= 0, reward at which a chosen response is no longer pushed up.
        clip_rejected: >= 0, negated reward at which a rejected response is no longer pushed down.

    Raises:
        ValueError: an option outside its range.
    """
    _check_positive("beta", beta)
    for name, bound in (("clip_chosen", clip_chosen), ("clip_rejected", clip_rejected)):
        if not bound >= 0:
            raise ValueError(f"{name} must be a number >= 0 (inf: no clip), got {bound!r}")
    chosen = beta * (pairs.chosen - pairs.ref_chosen)
    rejected = beta * (pairs.rejected - pairs.ref_rejected)
    is_clipped = clipped_sides(chosen, rejected, clip_chosen=clip_chosen, clip_rejected=clip_rejected)
    # where(), not clamp(): clamp passes the gradient at equality, and a side that reached its bound must not move.
    u = torch.where(is_clipped[:, 0], clip_chosen, chosen)
    v = torch.where(is_clipped[:, 1], -clip_rejected, rejected)
    return _soft_logistic(_less_margin(u - v, pairs), pairs)


def clipped_sides(
    chosen_rewards: torch.Tensor,
    rejected_rewards: torch.Tensor,
    *,
    clip_chosen: float = float("inf"),
    clip_rejected: float = float("inf"),
) -> torch.Tensor:
    """Which sides ``dual_clip`` clips: [N, 2] bool (chosen, rejected), from rewards [N]."""
    return torch.stack([chosen_rewards >= clip_chosen, rejected_rewards <= -clip_rejected], dim=-1)


def dpo(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
    """Direct preference optimisation with soft label and margin, [N] (arXiv 2305.18290, eq. 7).

    loss = -p log sigma(z) - (1 - p) log sigma(-z),  z = beta (A - B) - m.
    """
    _check_positive("beta", beta)
    z = beta * (pairs.chosen - pairs.ref_chosen) - beta * (pairs.rejected - pairs.ref_rejected)
    return _soft_logistic(_less_margin(z, pairs), pairs)


def sft(pairs: PairLogprobs) -> torch.Tensor:
    """Negative log-likelihood of the chosen response, mean over its tokens, [N]; TRL's ``sft`` loss."""
    return -pairs.chosen / pairs.num_chosen_tokens


LOSSES: dict[str, Loss] = {"dual_clip": dual_clip, "dpo": dpo, "sft": sft}
"""Loss name -> function(PairLogprobs, *, options) -> [N] losses."""


def scaled_mean(losses: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """sum(scale * losses) / sum(scale) of [N] losses, their mean without a scale; 0 when every scale is 0."""
    weights = torch.ones_like(losses) if scale is None else scale.to(losses)
    return (weights * losses).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def loss_options(loss: str | Loss) -> dict[str, Any]:
    """Keyword-only options of a loss and their defaults.

    Raises:
        ValueError: a name that is not in ``LOSSES``.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}; known: {', '.join(sorted(LOSSES))}")
        loss = LOSSES[loss]
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


_ONE_PAIR = PairLogprobs(
    **{name: torch.zeros(1) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")},
    num_chosen_tokens=torch.ones(1),
    num_rejected_tokens=torch.ones(1),
)


def resolve_loss(loss: str | Loss, options: dict[str, Any]) -> Loss:
    """The loss with its options bound and checked: a function from ``PairLogprobs`` to [N].

    Raises:
        ValueError: an unknown name, or an option that the loss does not take, or one outside its range.
    """
    if callable(loss):
        return (lambda pairs: loss(pairs, **options)) if options else loss
    known = loss_options(loss)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"loss {loss!r} has no option {', '.join(map(repr, unknown))}; its options: {', '.join(known) or 'none'}"
        )
    function = LOSSES[loss]
    function(_ONE_PAIR, **options)  # an option outside its range is refused here, before any work
    return lambda pairs: function(pairs, **options)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
