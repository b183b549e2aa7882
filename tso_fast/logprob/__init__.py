"""The public ops: log-probs and preference losses computed directly from hidden states and the output head.

hidden, head -> linear_logprobs -> sums per sequence -> PairLogprobs -> loss
"""

from __future__ import annotations

from typing import Any

import torch

from tso_fast.logprob import checks, compiled, fused, impls
from tso_fast.logprob.plan import memory_budget_mib as memory_budget_mib
from tso_fast.logprob.plan import set_memory_budget_mib as set_memory_budget_mib
from tso_fast.logprob.prepare import Call, prepare
from tso_fast.losses import Loss, LossFunction, clipped_sides
from tso_fast.types import PreferenceOutput


def _autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in autocast's dtype if autocast is on, as ``torch.nn.functional.linear`` would see them."""
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

    Full logits never exist in memory, and rows whose target is ``ignore_index`` take part in no matrix product.

    Args:
        hidden: [..., D] float16, bfloat16, float32 or float64.
        weight: [V, D], dtype and device of ``hidden``.
        targets: [...] int64, already shifted: targets[t] is predicted from hidden[t].
        bias: [V] or None.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None: no softcap.
        temperature: divides the logits, after the softcap.
        ignore_index: target value that marks ignored positions.
        impl: ``reference`` (plain torch), ``cpu``, ``triton``, or ``auto``, which logs its choice.

    Returns:
        Log-probs in nats with the shape of ``targets``, float32 (float64 for float64 inputs), 0.0 where ignored.
        Differentiable in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a target is outside [0, V), or ``impl`` is not available.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)  # type: ignore[assignment]
    needs = _needs(hidden, weight, bias)
    if torch.compiler.is_compiling():
        return compiled.linear_logprobs(hidden, weight, targets, bias, softcap, temperature, ignore_index, impl, needs)
    checks.check_head(hidden, weight, bias)
    checks.check_scalars(softcap, temperature)
    checks.check_targets(targets, hidden)
    backend = impls.resolve(impl, hidden.device, hidden.dtype)
    rows = checks.valid_rows(targets, weight.shape[0], ignore_index)
    head = fused.Head(backend=backend, softcap=softcap, temperature=temperature, needs=needs)
    logprobs_R = fused.linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1), rows, head
    )
    return logprobs_R.new_zeros(targets.numel()).index_copy(0, rows, logprobs_R).reshape(targets.shape)


def _needs(*tensors: torch.Tensor | None) -> tuple[bool, bool, bool]:
    """Whether hidden, weight and bias need gradients."""
    hidden, weight, bias = (torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    return hidden, weight, bias


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
    loss: str | Loss | LossFunction = "dual_clip",
    scale: torch.Tensor | None = None,
    soft_label: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    ref_token_logprobs: torch.Tensor | None = None,
    ref2_logprobs: torch.Tensor | None = None,
    win_rates: torch.Tensor | None = None,
    token_values: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
    vocab_group: Any = None,
    sequence_group: Any = None,
    **loss_options: Any,
) -> PreferenceOutput:
    """A preference loss from hidden states: policy log-probs, reference log-probs and the loss in one call.

    Padded input has one sequence per row; packed input has all tokens in one row, with bounds in ``cu_seqlens``. Inside
    ``torch.compile`` this is one node of the graph; the loss must then be a name.

    Args:
        hidden: [S, L, D] padded or [T, D] packed hidden states of the policy.
        weight: [V, D] output head of the policy.
        targets: [S, L] or [T] int64, already shifted, ``ignore_index`` outside the completion.
        pairs: [N, 2] int64 (chosen, rejected) indices of sequences; default: first half against second half. For a loss
            of further sequences [N, 2 + E]; a sequence may stand in several places.
        cu_seqlens: [S+1] int, cumulative lengths; packed input only.
        ref_logprobs: [S] sums of reference log-probs, nats.
        ref_hidden: hidden states of the reference, shaped like ``hidden``, to compute them from. One of
            ``ref_logprobs``, ``ref_hidden`` and ``ref_token_logprobs`` is needed, unless the loss needs no reference.
        ref_weight: [V, D], default ``weight``; ``ref_bias``: [V], default ``bias`` when ``ref_weight`` is not given.
        loss: a name in ``LOSSES``, ``package.module:function``, a ``losses.Loss``, or a function from ``PairLogprobs``
            to [N] losses.
        scale: [N] >= 0, weight of each pair; default 1. ``soft_label``: [N] in [0, 1]. ``margin``: [N] >= 0.
        token_weights: weight of each token in its sequence's sum, shaped like ``targets``, for policy and reference.
        ref_token_logprobs: reference log-prob of each target, shaped like ``targets``; the sums are taken here. A loss
            with terms of tokens (``humanline``, ``bmc``, ``inverse_q``) needs these or ``ref_hidden``.
        ref2_logprobs: [S] sums under a second reference (``mrpo``).
        win_rates: [N, 2] in [0, 1], win rates of the chosen and the rejected response (``sppo``).
        token_values: a number for each target, shaped like ``targets``, detached: marks (``bmc``), rewards
            (``inverse_q``).
        vocab_group: process group over which the head is split by rows: ``weight``, ``bias``, ``ref_weight`` and
            ``ref_bias`` are this rank's rows, in the order of the ranks; all other arguments are equal on all ranks.
            Every rank gets the whole loss, the whole gradient of ``hidden``, and the gradient of its own rows.
        sequence_group: process group over which every sequence is split by tokens: ``hidden``, ``targets``,
            ``ref_hidden``, ``token_weights``, ``token_values`` and ``ref_token_logprobs`` are this rank's tokens of the
            same sequences; all other arguments are equal on all ranks. Every rank gets the whole loss; the gradient of
            ``weight`` covers its own tokens only and must be summed over the group (if a wrapper averages gradients,
            multiply the loss by the group's size).
        loss_options: options of the loss, e.g. ``beta=0.1``, ``clip_chosen``, ``clip_rejected`` of ``dual_clip``.

    Returns:
        ``PreferenceOutput``; ``loss`` is sum(scale * losses) / sum(scale), 0 if every scale is 0. Without a reference
        its log-probs and the rewards are NaN.

    Raises:
        ValueError: arguments do not fit, a sequence of a pair has no completion token, or the loss or an option is
            unknown.
    """
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = _autocast(  # type: ignore[assignment]
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias
    )
    call = Call(
        hidden=hidden, weight=weight, targets=targets, pairs=pairs, cu_seqlens=cu_seqlens, ref_logprobs=ref_logprobs,
        ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias, bias=bias, loss=loss,
        loss_options=loss_options, scale=scale, soft_label=soft_label, margin=margin, token_weights=token_weights,
        ref_token_logprobs=ref_token_logprobs, ref2_logprobs=ref2_logprobs, win_rates=win_rates,
        token_values=token_values, softcap=softcap, temperature=temperature, ignore_index=ignore_index, impl=impl,
        vocab_group=vocab_group, sequence_group=sequence_group, needs=_needs(hidden, weight, bias),
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return _output(call, *compiled.preference_loss(call))
    made = prepare(call)
    total, losses, logprobs, ref_logprobs = fused.preference_loss(
        made.hidden_TD, weight, bias, reference=made.reference, batch=made.batch, head=made.head
    )
    return _output(call, total, losses, logprobs, ref_logprobs, made.num_tokens_S, made.pairs)


def _output(
    call: Call, total: torch.Tensor, losses: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor,
    num_tokens: torch.Tensor, pairs: torch.Tensor,
) -> PreferenceOutput:  # fmt: skip
    dtype = fused.acc_dtype(call.hidden.dtype)
    options = call.reward_options()
    rewards = options["beta"] * (logprobs - ref_logprobs)
    chosen_rewards, rejected_rewards = rewards[pairs[:, 0]], rewards[pairs[:, 1]]
    clips = {name: options[name] for name in ("clip_chosen", "clip_rejected") if name in options}
    return PreferenceOutput(
        loss=total.to(dtype),
        losses=losses.to(dtype),
        logprobs=logprobs.to(dtype),
        ref_logprobs=ref_logprobs.to(dtype),
        num_tokens=num_tokens,
        chosen_rewards=chosen_rewards.to(dtype),
        rejected_rewards=rejected_rewards.to(dtype),
        clipped=clipped_sides(chosen_rewards, rejected_rewards, **clips),
    )
