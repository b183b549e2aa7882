"""The ops inside ``torch.compile``: custom operators, each of which is one node in the graph of a compiled model.

The amount of work depends on the targets (how many rows are not ignored), so a tracer cannot look inside; fake kernels
give it the shapes of the outputs. Outside ``torch.compile`` the autograd functions of ``fused.py`` run instead: they
keep exponentials between the passes, take any function as a loss, and avoid about 50 µs per call of a custom operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from tso_fast.logprob import checks, fused, impls
from tso_fast.logprob.prepare import Call, prepare

if TYPE_CHECKING:
    from torch import Tensor

# ---------------------------------------------------------------------------------------------------- preference_loss


def preference_loss(call: Call) -> tuple[Tensor, ...]:
    """loss, losses, logprobs, ref_logprobs, num_tokens and pairs of a call, as one node of a graph."""
    if not isinstance(call.loss, str):
        raise ValueError("inside torch.compile the loss must be a name: a function cannot be part of an operator; add "
                         "it to tso_fast.LOSSES under a name, or call preference_loss outside of the compiled "
                         "function")  # fmt: skip
    names = ",".join(call.loss_options)
    out = torch.ops.tso_fast.preference_loss(
        call.hidden, call.weight, call.targets, call.pairs, call.cu_seqlens, call.ref_logprobs, call.ref_hidden,
        call.ref_weight, call.ref_bias, call.bias, call.loss, names, list(call.loss_options.values()), call.scale,
        call.soft_label, call.margin, call.token_weights, call.ref_token_logprobs, call.ref2_logprobs, call.win_rates,
        call.token_values, call.softcap, call.temperature, call.ignore_index, call.impl,
        _group_name(call.vocab_group), _group_name(call.sequence_group), list(call.needs),
    )  # fmt: skip
    return tuple(out[:6])


def _group_name(group: Any) -> str:
    """Name of a process group in a graph; empty: no group."""
    return "" if group is None else group.group_name


def _group(name: str) -> Any:
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group
    return resolve(name) if name else None


@torch.library.custom_op("tso_fast::preference_loss", mutates_args=())
def _preference_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, pairs: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, ref_logprobs: torch.Tensor | None, ref_hidden: torch.Tensor | None,
    ref_weight: torch.Tensor | None, ref_bias: torch.Tensor | None, bias: torch.Tensor | None, loss: str,
    option_names: str, option_values: Sequence[float], scale: torch.Tensor | None, soft_label: torch.Tensor | None,
    margin: torch.Tensor | None, token_weights: torch.Tensor | None, ref_token_logprobs: torch.Tensor | None,
    ref2_logprobs: torch.Tensor | None, win_rates: torch.Tensor | None, token_values: torch.Tensor | None,
    softcap: float | None, temperature: float, ignore_index: int, impl: str, vocab_group: str, sequence_group: str,
    needs: Sequence[bool],
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor,
]:  # fmt: skip
    """loss, losses [N], logprobs [S], ref_logprobs [S], num_tokens [S], pairs [N, 2 + E], dhidden, dweight, dbias; a
    gradient that is not needed has no elements."""
    names = option_names.split(",") if option_names else []
    need_dhidden, need_dweight, need_dbias = needs
    call = Call(
        hidden=hidden, weight=weight, targets=targets, pairs=pairs, cu_seqlens=cu_seqlens, ref_logprobs=ref_logprobs,
        ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias, bias=bias, loss=loss,
        loss_options=dict(zip(names, option_values, strict=True)), scale=scale, soft_label=soft_label, margin=margin,
        token_weights=token_weights, ref_token_logprobs=ref_token_logprobs, ref2_logprobs=ref2_logprobs,
        win_rates=win_rates, token_values=token_values, softcap=softcap, temperature=temperature,
        ignore_index=ignore_index, impl=impl, vocab_group=_group(vocab_group), sequence_group=_group(sequence_group),
        needs=(need_dhidden, need_dweight, need_dbias),
    )  # fmt: skip
    made = prepare(call)
    with _autograd_inside():
        total, sums, gradients = fused.run_pass(
            made.hidden_TD, weight.contiguous(), None if bias is None else bias.contiguous(), made.reference,
            made.batch, made.head,
        )  # fmt: skip
    dhidden, dweight, dbias = (hidden.new_empty(0) if g is None else g for g in gradients)
    if need_dhidden:
        dhidden = dhidden.view(hidden.shape)
    num_tokens, index = (_own(x, y) for x, y in ((made.num_tokens_S, None), (made.pairs, pairs)))
    return total, *sums, num_tokens, index, dhidden, dweight, dbias


def _autograd_inside() -> Any:
    """A context in which autograd records, for the derivative of the loss: torch runs operators below autograd."""
    left_out = torch._C._dispatch_tls_local_exclude_set()
    for name in ("Other", "CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1"):
        left_out = left_out.remove(getattr(torch._C.DispatchKey, f"Autograd{name}"))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), left_out)


def _own(result: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """A result as operators must return it: contiguous, like its fake kernel's, and never one of the arguments."""
    result = result.contiguous()
    return result.clone() if given is not None and result.data_ptr() == given.data_ptr() else result


@_preference_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, pairs: Tensor | None, cu_seqlens: Tensor | None,
    ref_logprobs: Any, ref_hidden: Any, ref_weight: Any, ref_bias: Any, bias: Tensor | None, loss: str,
    option_names: str, option_values: Any, scale: Any, soft_label: Any, margin: Any, token_weights: Any,
    ref_token_logprobs: Any, ref2_logprobs: Any, win_rates: Any, token_values: Any, softcap: Any, temperature: float,
    ignore_index: int, impl: str, vocab_group: str, sequence_group: str, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    num_sequences = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    pairs_shape = (num_sequences // 2, 2) if pairs is None else pairs.shape
    need_dhidden, need_dweight, need_dbias = needs

    def gradient(tensor: Tensor | None, is_needed: bool) -> Tensor:
        if tensor is None or not is_needed:
            return hidden.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    return (
        numbers(dtype=fused.acc_dtype(hidden.dtype)), numbers(pairs_shape[0]), numbers(num_sequences),
        numbers(num_sequences), numbers(num_sequences, dtype=torch.int64), numbers(*pairs_shape, dtype=torch.int64),
        gradient(hidden, need_dhidden), gradient(weight, need_dweight), gradient(bias, need_dbias),
    )  # fmt: skip


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[6:])
    ctx.needs, ctx.num_inputs = inputs[-1], len(inputs)


def _scaled_gradients(ctx: Any, dloss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    places = 0, 1, 9  # hidden, weight and bias among the arguments
    out: list[Tensor | None] = [None] * ctx.num_inputs
    for place, gradient, is_needed in zip(places, ctx.saved_tensors, ctx.needs, strict=True):
        if is_needed and dloss is not None:
            # In float32 or better: rounding a factor such as 1/3 to bf16 costs up to 0.4 %.
            wide = torch.promote_types(gradient.dtype, torch.float32)
            out[place] = (gradient.to(wide) * dloss).to(gradient.dtype)
    return tuple(out)


_preference_loss.register_autograd(_scaled_gradients, setup_context=_keep_gradients)

# ---------------------------------------------------------------------------------------------------- linear_logprobs


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, temperature: float,
    ignore_index: int, impl: str, needs: tuple[bool, bool, bool],
) -> Tensor:  # fmt: skip
    """The op as one node of a graph; its backward pass recomputes the exponentials."""
    out: Tensor = torch.ops.tso_fast.linear_logprobs(
        hidden, weight, targets, bias, softcap, temperature, ignore_index, impl, list(needs)
    )
    return out


def _head(hidden: Tensor, impl: str, softcap: float | None, temperature: float, needs: Any) -> fused.Head:
    backend = impls.resolve(impl, hidden.device, hidden.dtype)
    return fused.Head(backend=backend, softcap=softcap, temperature=temperature, needs=needs)


@torch.library.custom_op("tso_fast::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, bias: torch.Tensor | None,
    softcap: float | None, temperature: float, ignore_index: int, impl: str, needs: Sequence[bool],
) -> torch.Tensor:  # fmt: skip
    checks.check_head(hidden, weight, bias)
    checks.check_scalars(softcap, temperature)
    checks.check_targets(targets, hidden)
    index = checks.valid_rows(targets, weight.shape[0], ignore_index)
    head = _head(hidden, impl, softcap, temperature, (False, False, False))
    values_R = fused.linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1), index, head
    )
    return values_R.new_zeros(targets.numel()).index_copy(0, index, values_R).view(targets.shape)


@_linear_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Any, softcap: Any, temperature: float, ignore_index: int,
    impl: str, needs: Any,
) -> Tensor:  # fmt: skip
    return hidden.new_empty(targets.shape, dtype=fused.acc_dtype(hidden.dtype))


@torch.library.custom_op("tso_fast::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    dlogprobs: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
    bias: torch.Tensor | None, softcap: float | None, temperature: float, ignore_index: int, impl: str,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    head = _head(hidden, impl, softcap, temperature, tuple(needs))
    rows = fused.rows_of(checks.valid_rows(targets, weight.shape[0], ignore_index), targets.reshape(-1))
    gradients = fused.row_gradients(
        hidden.reshape(-1, hidden.shape[-1]), weight.contiguous(), None if bias is None else bias.contiguous(),
        rows.take(targets.reshape(-1)), rows, head, dlogprobs.reshape(-1)[rows.index],
    )  # fmt: skip
    dhidden, dweight, dbias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return dhidden.view(hidden.shape) if needs[0] else dhidden, dweight, dbias


@_linear_logprobs_backward.register_fake
def _(
    dlogprobs: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: Any,
    temperature: float, ignore_index: int, impl: str, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if x is not None and need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, targets, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets, bias)


def _linear_logprobs_gradients(ctx: Any, dlogprobs: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.options[-1]
    found = torch.ops.tso_fast.linear_logprobs_backward(dlogprobs, *ctx.saved_tensors, *ctx.options)
    dhidden, dweight, dbias = (g if need else None for g, need in zip(found, needs, strict=True))
    return (dhidden, dweight, None, dbias, *[None] * len(ctx.options))


_linear_logprobs.register_autograd(_linear_logprobs_gradients, setup_context=_keep_inputs)
