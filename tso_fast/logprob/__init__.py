"""The public ops: log-probs and preference losses straight from hidden states and the output head.

hidden, head -> linear_logprobs -> sums per sequence -> PairLogprobs -> loss
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch

from tso_fast.logprob import checks, fused, reference
from tso_fast.logprob.fused import memory_budget_mib as memory_budget_mib
from tso_fast.logprob.fused import set_memory_budget_mib as set_memory_budget_mib
from tso_fast.losses import Loss, clipped_sides, loss_options, resolve_loss, scaled_mean
from tso_fast.types import PreferenceOutput

logger = logging.getLogger(__name__)

IMPLS = ("reference", "cpu", "triton")


@functools.cache
def _log_choice(device: str, dtype: torch.dtype, chosen: str, reason: str) -> None:
    logger.info("linear_logprobs: impl='auto' chose %r for %s tensors on %s%s", chosen, dtype, device, reason)


def _resolve_impl(impl: str, hidden: torch.Tensor) -> Any:
    """The backend's module, or None for the reference."""
    device, dtype = hidden.device.type, hidden.dtype
    if impl == "auto":
        impl, reason = _choose_impl(device, dtype)
        _log_choice(device, dtype, impl, reason)
    if impl == "reference":
        return None
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; known: auto, {', '.join(IMPLS)}")
    backend = _backend(impl)
    if device not in backend.DEVICES:
        raise ValueError(f"impl={impl!r} is for tensors on {backend.DEVICES[0]}, got hidden on {hidden.device}; "
                         "use impl='auto'")  # fmt: skip
    if dtype not in backend.DTYPES:
        raise ValueError(f"impl={impl!r} has no {dtype}; use impl='reference'")
    return backend


def _choose_impl(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The best implementation for a device and dtype, and why it is not a faster one."""
    fastest = {"cpu": "cpu", "cuda": "triton"}.get(device)
    if fastest is None:
        return "reference", ""
    try:
        has_dtype = dtype in _backend(fastest).DTYPES
    except ValueError as error:
        return "reference", f": {error}"
    return (fastest, "") if has_dtype else ("reference", f": impl={fastest!r} has no {dtype}")


@functools.cache
def _backend(name: str) -> Any:
    backend = importlib.import_module(f"tso_fast.logprob.{name}")
    backend.check_available()
    return backend


def _autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """As ``torch.nn.functional.linear`` would see them: in autocast's dtype where it is on."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> torch.Tensor:
    """Log-probs of target tokens under ``softmax(softcap(hidden @ weight.T + bias) / temperature)``.

    Full logits are never held; rows whose target is ``ignore_index`` enter no matrix product.

    Args:
        hidden: [..., D] float16, bfloat16, float32 or float64.
        weight: [V, D], dtype and device of ``hidden``.
        targets: [...] int64, already shifted: targets[t] is predicted from hidden[t].
        bias: [V] or None.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None: as they are.
        temperature: divides the logits, after the softcap.
        ignore_index: target value that does not count.
        impl: ``reference`` (plain torch), ``cpu``, ``triton``, or ``auto``, which logs what it chose.

    Returns:
        Shape of ``targets``, float32 (float64 for float64 inputs), nats, 0.0 where ignored. Differentiable in
        ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a target outside [0, V), an ``impl`` not available.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)  # type: ignore[assignment]
    checks.check_head(hidden, weight, bias)
    checks.check_scalars(softcap, temperature)
    checks.check_targets(targets, hidden)
    backend = _resolve_impl(impl, hidden)
    (targets_host,) = checks.to_host(targets)
    assert targets_host is not None
    is_valid = checks.valid_targets(targets_host, weight.shape[0], ignore_index)
    rows = is_valid.reshape(-1).nonzero()[:, 0].to(hidden.device, non_blocking=True)
    hidden_TD, targets_T = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    with torch.autocast(hidden.device.type, enabled=False):
        if backend is None:
            logprobs_R = reference.linear_logprobs(
                hidden_TD[rows], weight, targets_T[rows], bias_V=bias, softcap=softcap, temperature=temperature
            )
        else:
            head = _head(backend, softcap, temperature)
            logprobs_R = fused.linear_logprobs(hidden_TD, weight, bias, targets_T, rows, head)
    return logprobs_R.new_zeros(targets.numel()).index_copy(0, rows, logprobs_R).reshape(targets.shape)


def _head(backend: Any, softcap: float | None, temperature: float) -> fused.Head:
    return fused.Head(
        backend=backend, softcap=softcap, temperature=temperature, is_grad_enabled=torch.is_grad_enabled()
    )


def preference_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    pairs: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_weight: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    loss: str | Loss = "dual_clip",
    scale: torch.Tensor | None = None,
    soft_label: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
    **loss_options: Any,
) -> PreferenceOutput:
    """A preference loss from hidden states: policy log-probs, reference log-probs and the loss in one call.

    Padded input has one sequence a row; packed input has all tokens in a row, bounded by ``cu_seqlens``.

    Args:
        hidden: [S, L, D] padded or [T, D] packed, of the policy.
        weight: [V, D] output head of the policy.
        targets: [S, L] or [T] int64, already shifted, ``ignore_index`` outside the completion.
        pairs: [N, 2] int64 (chosen, rejected) sequences; default: the first half against the second half.
        cu_seqlens: [S+1] int, cumulative lengths; packed input only.
        ref_logprobs: [S] sums of reference log-probs, nats.
        ref_hidden: shape of ``hidden``, to compute them here; one of the two is needed.
        ref_weight: [V, D], default ``weight``; ``ref_bias``: [V], default ``bias`` when ``ref_weight`` is not given.
        loss: a name in ``LOSSES`` or a function from ``PairLogprobs`` to [N] losses.
        scale: [N] >= 0, weight of a pair; default 1. ``soft_label``: [N] in [0, 1]. ``margin``: [N] >= 0.
        token_weights: shape of ``targets``, weight of a token inside its sequence's sum, for policy and reference.
        loss_options: options of the loss, e.g. ``beta=0.1``, ``clip_chosen``, ``clip_rejected`` of ``dual_clip``.

    Returns:
        ``PreferenceOutput``; ``loss`` is sum(scale * losses) / sum(scale), 0 when every scale is 0.

    Raises:
        ValueError: arguments that do not fit, a sequence of a pair without a completion token, an unknown loss or
            option.
    """
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = _autocast(  # type: ignore[assignment]
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias
    )
    device = hidden.device
    checks.check_head(hidden, weight, bias)
    checks.check_scalars(softcap, temperature)
    checks.check_targets(targets, hidden)
    loss_function = resolve_loss(loss, loss_options)
    if token_weights is not None and token_weights.shape != targets.shape:
        raise ValueError(f"token_weights must be {tuple(targets.shape)}, got {tuple(token_weights.shape)}")
    if token_weights is not None and token_weights.device != device:
        raise ValueError(f"token_weights are on {token_weights.device} but hidden is on {device}")
    if (ref_logprobs is None) == (ref_hidden is None):
        raise ValueError("give exactly one of ref_logprobs and ref_hidden: "
                         + ("neither was given" if ref_logprobs is None else "both were given"))  # fmt: skip
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        checks.check_head(ref_hidden, ref_weight, ref_bias, "ref_")
        if ref_hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(f"ref_hidden must be {(*hidden.shape[:-1], 'D')} like hidden, "
                             f"got {tuple(ref_hidden.shape)}")  # fmt: skip
        if ref_hidden.device != device:
            raise ValueError(f"ref_hidden is on {ref_hidden.device} but hidden is on {device}")
    elif ref_weight is not None or ref_bias is not None:
        raise ValueError("ref_weight and ref_bias have no effect with ref_logprobs; give ref_hidden or leave them out")
    backend = _resolve_impl(impl, hidden)

    host = checks.to_host(targets, cu_seqlens, pairs, scale, soft_label, margin)
    assert host[0] is not None
    vocab = min(weight.shape[0], weight.shape[0] if ref_weight is None else ref_weight.shape[0])
    layout = checks.layout(host[0], vocab, ignore_index, host[1], host[2])
    num_pairs, num_sequences = layout.pairs.shape[0], len(layout.num_tokens)
    checks.check_pair_scalars("scale", host[3], num_pairs, 0.0, None)
    checks.check_pair_scalars("soft_label", host[4], num_pairs, 0.0, 1.0)
    checks.check_pair_scalars("margin", host[5], num_pairs, 0.0, None)
    if ref_logprobs is not None and ref_logprobs.shape != (num_sequences,):
        raise ValueError(f"ref_logprobs must be [{num_sequences}], one sum a sequence, got {tuple(ref_logprobs.shape)}")

    def upload(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.detach().to(device, non_blocking=True)

    pairs = layout.pairs.to(device, non_blocking=True)
    num_tokens = torch.tensor(layout.num_tokens).to(device, non_blocking=True)
    scale, soft_label, margin, ref_logprobs = map(upload, (scale, soft_label, margin, ref_logprobs))
    with torch.autocast(hidden.device.type, enabled=False):
        if backend is None:
            index, sequence = layout.index.to(device), layout.sequence.to(device)
            targets_R = targets.reshape(-1)[index]
            weights_R = None if token_weights is None else token_weights.reshape(-1)[index]

            def sums(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                hidden_RD = hidden.reshape(-1, hidden.shape[-1])[index]
                values = reference.linear_logprobs(
                    hidden_RD, weight, targets_R, bias_V=bias, softcap=softcap, temperature=temperature
                )
                if weights_R is not None:
                    values = values * weights_R
                # In float64: a margin is the small difference of large sums.
                out = torch.zeros(num_sequences, dtype=torch.float64, device=device)
                return out.index_add(0, sequence, values.double())

            if ref_hidden is not None and ref_weight is not None:
                with torch.no_grad():
                    ref_logprobs = sums(ref_hidden, ref_weight, ref_bias)
            logprobs = sums(hidden, weight, bias)
            assert ref_logprobs is not None
            ref_logprobs = ref_logprobs.to(logprobs)
            losses = fused.pair_losses(
                loss_function, logprobs, ref_logprobs, num_tokens, pairs[:, 0], pairs[:, 1], soft_label, margin
            )
            total = scaled_mean(losses, scale)
        else:
            batch = fused.Batch(
                targets_T=targets.reshape(-1),
                index=layout.index.to(device, non_blocking=True),
                num_tokens=layout.num_tokens,
                pairs=layout.pairs.tolist(),
                token_weights_T=None if token_weights is None else token_weights.detach().reshape(-1),
                scale_N=scale,
                soft_label_N=soft_label,
                margin_N=margin,
                loss=loss_function,
                is_per_pair=isinstance(loss, str),
                dual_clip=_reward_options(loss, loss_options) if loss == "dual_clip" else None,
            )
            total, losses, logprobs, ref_logprobs = fused.preference_loss(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                bias,
                ref_logprob_S=ref_logprobs,
                ref_hidden_TD=None if ref_hidden is None else ref_hidden.reshape(-1, ref_hidden.shape[-1]),
                ref_weight_VD=ref_weight,
                ref_bias_V=ref_bias,
                batch=batch,
                head=_head(backend, softcap, temperature),
            )

    dtype = fused.acc_dtype(hidden.dtype)
    chosen, rejected = pairs[:, 0], pairs[:, 1]
    log_ratio = (logprobs - ref_logprobs).detach()
    options = _reward_options(loss, loss_options)
    chosen_rewards, rejected_rewards = options["beta"] * log_ratio[chosen], options["beta"] * log_ratio[rejected]
    clips = {name: options[name] for name in ("clip_chosen", "clip_rejected") if name in options}
    return PreferenceOutput(
        loss=total.to(dtype),
        losses=losses.detach().to(dtype),
        logprobs=logprobs.detach().to(dtype),
        ref_logprobs=ref_logprobs.to(dtype),
        num_tokens=num_tokens,
        chosen_rewards=chosen_rewards.to(dtype),
        rejected_rewards=rejected_rewards.to(dtype),
        clipped=clipped_sides(chosen_rewards, rejected_rewards, **clips),
    )


def _reward_options(loss: str | Loss, given: dict[str, Any]) -> dict[str, Any]:
    """Options that the reported rewards and clips depend on; a loss without ``beta`` reports rewards at its default."""
    return {"beta": 0.1, **loss_options(loss), **given}
