"""Preference losses: pure functions from ``PairLogprobs`` to one loss per pair.

Reduction, scaling and logging belong to the caller. A new loss is a function and a row in ``LOSSES``, here or from
outside::

    def hinge(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
        return torch.relu(1 - beta * (pairs.chosen - pairs.ref_chosen - pairs.rejected + pairs.ref_rejected))

    LOSSES["hinge"] = Loss(hinge, title="hinge")
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from tso_fast.errors import import_named
from tso_fast.types import PairLogprobs

LossFunction = Callable[..., torch.Tensor]
"""Function from ``PairLogprobs`` and keyword-only options to [N] losses."""


@dataclass(frozen=True)
class Loss:
    """A loss and its properties; callable like its function."""

    function: LossFunction
    title: str
    """Name in tables and reports."""
    needs_reference: bool = True
    """Whether the loss uses the reference's log-probs; if not, they may be NaN."""
    takes_labels: bool = True
    """Whether the loss uses soft labels and margins."""
    is_per_pair: bool = True
    """Whether a pair's loss depends on that pair alone, so that pairs can be computed in chunks."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Bound options; the others have the function's defaults."""

    def __call__(self, pairs: PairLogprobs, **options: Any) -> torch.Tensor:
        return self.function(pairs, **{**self.options, **options})


def _soft_logistic(z: torch.Tensor, pairs: PairLogprobs) -> torch.Tensor:
    """-p log sigma(z) - (1 - p) log sigma(-z); the margin is already subtracted from z."""
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

    Each clip is one-sided: a chosen response whose reward fell is still pulled up. A side at its bound has exactly zero
    gradient. Infinite bounds give DPO. The paper (arXiv 2409.02118) names a "dual clip reward loss", but no public page
    gives its formula, so this one is ours.

    Args:
        pairs: sums of log-probs, [N] each.
        beta: > 0, reward per nat of log-ratio.
        clip_chosen: >= 0, reward at which a chosen response is no longer pushed up.
        clip_rejected: >= 0, negated reward at which a rejected response is no longer pushed down.

    Raises:
        ValueError: an option is outside its range.
    """
    _check_positive("beta", beta)
    for name, bound in (("clip_chosen", clip_chosen), ("clip_rejected", clip_rejected)):
        if not bound >= 0:
            raise ValueError(f"{name} must be a number >= 0 (inf: no clip), got {bound!r}")
    chosen = beta * (pairs.chosen - pairs.ref_chosen)
    rejected = beta * (pairs.rejected - pairs.ref_rejected)
    is_clipped = clipped_sides(chosen, rejected, clip_chosen=clip_chosen, clip_rejected=clip_rejected)
    # where(), not clamp(): clamp passes the gradient at equality, but a side at its bound must have none.
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


LOSSES: dict[str, Loss] = {
    "dual_clip": Loss(dual_clip, title="dual clip (TSO)"),
    "dpo": Loss(dpo, title="plain DPO"),
    "sft": Loss(sft, title="chosen-only NLL", needs_reference=False, takes_labels=False),
}
"""Losses by name."""


def scaled_mean(losses: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """sum(scale * losses) / sum(scale) of [N] losses; their mean if ``scale`` is None; 0 if every scale is 0."""
    weights = torch.ones_like(losses) if scale is None else scale.to(losses)
    return (weights * losses).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def find_loss(loss: str | Loss | LossFunction) -> Loss:
    """The ``Loss`` of a name or function.

    Args:
        loss: a name in ``LOSSES``, ``package.module:name`` of a function or ``Loss``, or one of these itself. A bare
            function is assumed to need a reference and to use all pairs together.

    Raises:
        ValueError: the name is unknown, or cannot be imported.
    """
    if isinstance(loss, Loss):
        return loss
    if callable(loss):
        return Loss(loss, title=getattr(loss, "__name__", repr(loss)), is_per_pair=False)
    if loss in LOSSES:
        return LOSSES[loss]
    if ":" not in loss:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(sorted(LOSSES))}, or package.module:function")
    found = import_named(loss, f"loss {loss!r}", "function")
    if not callable(found):
        raise ValueError(f"loss {loss!r} is {found!r:.60}; expected a function or a tso_fast.losses.Loss")
    return find_loss(found)


def loss_options(loss: str | Loss | LossFunction) -> dict[str, Any]:
    """Keyword-only options of a loss with their values: the bound value, else the function's default.

    Raises:
        ValueError: the name is unknown.
    """
    row = find_loss(loss)
    parameters = inspect.signature(row.function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
    return {**defaults, **row.options}


_ONE_PAIR = PairLogprobs(
    **{name: torch.zeros(1) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")},
    num_chosen_tokens=torch.ones(1),
    num_rejected_tokens=torch.ones(1),
)


def resolve_loss(loss: str | Loss | LossFunction, options: Mapping[str, Any]) -> Loss:
    """The loss with its options bound and checked.

    Raises:
        ValueError: the name is unknown, the loss does not take an option, or an option is outside its range.
    """
    row = find_loss(loss)
    if not options:
        return row
    if unknown := sorted(name for name in options if not _takes(row, name)):
        known = ", ".join(loss_options(row)) or "none"
        raise ValueError(
            f"loss {loss if isinstance(loss, str) else row.title!r} has no option "
            f"{', '.join(map(repr, unknown))}; its options: {known}"
        )
    bound = dataclasses.replace(row, options={**row.options, **options})
    if isinstance(loss, str):
        bound(_ONE_PAIR)  # raises now, before any work, if an option is outside its range
    return bound


def _takes(loss: Loss, option: str) -> bool:
    parameters = inspect.signature(loss.function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return takes_any or (option in parameters and parameters[option].kind is inspect.Parameter.KEYWORD_ONLY)


def weighted_sum(names: Sequence[str], weights: Sequence[float] | None, options: Mapping[str, Any]) -> Loss:
    """The training loss with its options bound: one loss, or a weighted sum of several.

    Args:
        names: names of losses, see ``find_loss``.
        weights: one weight per name; None: 1 each.
        options: options by name; each loss gets those that it takes, and those under its own name: ``{"sft": {...}}``.

    Raises:
        ValueError: see ``resolve_loss``; also if no loss takes an option, or the number of weights is wrong.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"got the losses {', '.join(names) or 'none'}; expected one or more, each once")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"loss_weights has {len(weights)} items for {len(names)} losses; expected one each")
    rows = {name: find_loss(name) for name in names}
    own = {name: options[name] for name in names if isinstance(options.get(name), Mapping)}
    shared = {key: value for key, value in options.items() if key not in own}
    if len(names) > 1 and (idle := sorted(key for key in shared if not any(_takes(row, key) for row in rows.values()))):
        known = "; ".join(f"{name}: {', '.join(loss_options(row)) or 'none'}" for name, row in rows.items())
        raise ValueError(f"none of the losses has the option {idle[0]!r}; their options are {known}")
    parts = [
        resolve_loss(name, {k: v for k, v in shared.items() if len(names) == 1 or _takes(row, k)} | own.get(name, {}))
        for name, row in rows.items()
    ]
    scales = [1.0] * len(parts) if weights is None else list(weights)
    return parts[0] if scales == [1.0] else _sum(parts, scales)


def _sum(parts: Sequence[Loss], scales: Sequence[float]) -> Loss:
    def total(pairs: PairLogprobs, **bound_in_the_parts: Any) -> torch.Tensor:
        return torch.stack([scale * part(pairs) for part, scale in zip(parts, scales, strict=True)]).sum(dim=0)

    titles = [p.title if scale == 1 else f"{scale:g} x {p.title}" for p, scale in zip(parts, scales, strict=True)]
    return Loss(
        total,
        title=" + ".join(titles),
        needs_reference=any(part.needs_reference for part in parts),
        takes_labels=any(part.takes_labels for part in parts),
        is_per_pair=all(part.is_per_pair for part in parts),
        options={name: value for part in reversed(parts) for name, value in loss_options(part).items()},
    )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
