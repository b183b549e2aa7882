"""The losses by name, and what a name and options stand for."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tso_fast.errors import import_named
from tso_fast.losses.pairwise import (
    apo_down,
    apo_zero,
    bco,
    bdpo,
    cdpo,
    dpo,
    dpop,
    dual_clip,
    hinge,
    ipo,
    margin_dpo,
    nca,
    robust,
    rpo_sft,
    soft_ce,
    sppo,
)
from tso_fast.losses.reference_free import orpo, sft, simpo, slic
from tso_fast.losses.rows import FURTHER_INPUTS, Loss, LossFunction, keyword_options
from tso_fast.losses.several import mrpo, selm, srpo
from tso_fast.losses.tokens import (
    bmc,
    clamped_log_ratio,
    confidence_weighted,
    humanline,
    inverse_q,
    token_regression,
)
from tso_fast.types import PairLogprobs, TokenLogprobs

LOSSES: dict[str, Loss] = {
    "dual_clip": Loss(dual_clip, title="dual clip (TSO)"),
    "dpo": Loss(dpo, title="plain DPO"),
    "cdpo": Loss(cdpo, title="conservative DPO", takes_labels=False),
    "robust": Loss(robust, title="robust DPO", takes_labels=False),
    "soft_ce": Loss(soft_ce, title="soft cross-entropy", takes_labels="soft_label"),
    "margin_dpo": Loss(margin_dpo, title="DPO with margin", takes_labels="margin"),
    "ipo": Loss(ipo, title="IPO", takes_labels=False),
    "hinge": Loss(hinge, title="hinge", takes_labels=False),
    "slic": Loss(slic, title="SLiC", needs_reference=False, takes_labels=False),
    "simpo": Loss(simpo, title="SimPO", needs_reference=False, takes_labels=False),
    "orpo": Loss(orpo, title="ORPO", needs_reference=False, takes_labels=False),
    "sppo": Loss(sppo, title="SPPO", takes_labels="soft_label", takes=frozenset({"win_rates"})),
    "nca": Loss(nca, title="NCA", takes_labels=False),
    "bco": Loss(bco, title="BCO", takes_labels=False),
    "apo_zero": Loss(apo_zero, title="APO-zero", takes_labels=False),
    "apo_down": Loss(apo_down, title="APO-down", takes_labels=False),
    "dpop": Loss(dpop, title="DPO-Positive", takes_labels=False),
    "bdpo": Loss(bdpo, title="bounded DPO", takes_labels=False),
    "rpo_sft": Loss(rpo_sft, title="RPO (DPO and SFT)"),
    "mrpo": Loss(mrpo, title="MRPO", needs=frozenset({"ref2_logprobs"})),
    "selm": Loss(selm, title="SELM", num_extra=1),
    "srpo": Loss(srpo, title="SRPO", takes_labels="soft_label", num_extra=4),
    "humanline": Loss(humanline, title="humanline DPO", token_term=clamped_log_ratio),
    "bmc": Loss(bmc, title="BMC", token_term=confidence_weighted, needs=frozenset({"token_values"})),
    "inverse_q": Loss(
        inverse_q,
        title="Inverse-Q* (derived)",
        takes_labels=False,
        token_term=token_regression,
        needs=frozenset({"token_values"}),
    ),
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
            function is assumed to need a reference, to use all pairs together, and to read whatever is given.

    Raises:
        ValueError: the name is unknown, or cannot be imported.
    """
    if isinstance(loss, Loss):
        return loss
    if callable(loss):
        title = getattr(loss, "__name__", repr(loss))
        return Loss(loss, title=title, is_per_pair=False, takes=FURTHER_INPUTS - {"token_values"}, num_extra=None)
    if loss in LOSSES:
        return LOSSES[loss]
    if ":" not in loss:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(sorted(LOSSES))}, or package.module:function")
    found = import_named(loss, f"loss {loss!r}", "function")
    if not callable(found):
        raise ValueError(f"loss {loss!r} is {found!r:.60}; expected a function or a tso_fast.losses.Loss")
    return find_loss(found)


def loss_options(loss: str | Loss | LossFunction) -> dict[str, Any]:
    """Keyword-only options of a loss and its token term, with their values: the bound value, else the default.

    Raises:
        ValueError: the name is unknown.
    """
    row = find_loss(loss)
    of_terms = {} if row.token_term is None else keyword_options(row.token_term)
    return {**keyword_options(row.function), **of_terms, **row.options}


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
        _try(bound)  # raises now, before any work, if an option is outside its range
    return bound


def _try(loss: Loss) -> None:
    """Computes the loss of a made-up pair with all inputs."""
    zero, one, extra = torch.zeros(1), torch.ones(1), torch.zeros(1, loss.num_extra or 0)
    names = "chosen", "rejected", "ref_chosen", "ref_rejected", "ref2_chosen", "ref2_rejected"
    loss(
        PairLogprobs(
            **dict.fromkeys(names, zero), num_chosen_tokens=one, num_rejected_tokens=one, chosen_terms=zero,
            rejected_terms=zero, extra=extra, ref_extra=extra,
        )
    )  # fmt: skip
    if loss.token_term is not None:
        loss.terms(TokenLogprobs(logprobs=zero, ref_logprobs=zero, values=zero))


def _takes(loss: Loss, option: str) -> bool:
    functions = [f for f in (loss.function, loss.token_term) if f is not None]
    parameters = [p for f in functions for p in inspect.signature(f).parameters.values()]
    return any(p.kind is p.VAR_KEYWORD or (p.name == option and p.kind is p.KEYWORD_ONLY) for p in parameters)


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

    of_tokens = [part for part in parts if part.token_term is not None]
    extra = {part.num_extra for part in parts} - {0}
    if len(of_tokens) > 1 or len(extra) > 1:
        what = "a term of tokens" if len(of_tokens) > 1 else "further sequences of their own"
        several = of_tokens if len(of_tokens) > 1 else [part for part in parts if part.num_extra != 0]
        raise ValueError(f"{' and '.join(part.title for part in several)} each have {what}; a sum can have one of them")

    def term(tokens: TokenLogprobs, **bound_in_the_parts: Any) -> torch.Tensor:
        return of_tokens[0].terms(tokens)

    titles = [p.title if scale == 1 else f"{scale:g} x {p.title}" for p, scale in zip(parts, scales, strict=True)]
    labels = frozenset.union(*(part.labels for part in parts))
    return Loss(
        total,
        title=" + ".join(titles),
        needs_reference=any(part.needs_reference for part in parts),
        takes_labels=_as_takes_labels(labels),
        is_per_pair=all(part.is_per_pair for part in parts),
        options={name: value for part in reversed(parts) for name, value in loss_options(part).items()},
        token_term=term if of_tokens else None,
        needs=frozenset.union(*(part.needs for part in parts)),
        takes=frozenset.union(*(part.takes for part in parts)),
        num_extra=extra.pop() if extra else 0,
    )


def _as_takes_labels(labels: frozenset[str]) -> Any:
    """``Loss.takes_labels`` that gives these ``Loss.labels``."""
    return len(labels) == 2 if len(labels) != 1 else next(iter(labels))
