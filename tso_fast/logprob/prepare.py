"""Prepares a call of ``preference_loss``: checks arguments on the host, before any work, and lays out the batch."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch

from tso_fast.logprob import checks, fused, impls
from tso_fast.logprob.groups import SequenceShard, VocabShard, is_shared
from tso_fast.losses import FURTHER_INPUTS, Loss, LossFunction, dual_clip, loss_options, resolve_loss

_SCALARS = "scale", "soft_label", "margin", "win_rates"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of ``tso_fast.preference_loss``, whose docstring explains them."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    pairs: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    ref_hidden: torch.Tensor | None
    ref_weight: torch.Tensor | None
    ref_bias: torch.Tensor | None
    bias: torch.Tensor | None
    loss: str | Loss | LossFunction
    loss_options: dict[str, Any]
    scale: torch.Tensor | None
    soft_label: torch.Tensor | None
    margin: torch.Tensor | None
    token_weights: torch.Tensor | None
    ref_token_logprobs: torch.Tensor | None
    ref2_logprobs: torch.Tensor | None
    win_rates: torch.Tensor | None
    token_values: torch.Tensor | None
    softcap: float | None
    temperature: float
    ignore_index: int
    impl: str
    vocab_group: Any
    sequence_group: Any
    needs: tuple[bool, bool, bool]
    """Whether hidden, weight and bias need gradients."""

    def reward_options(self) -> dict[str, Any]:
        """Options that determine the reported rewards and clips; a loss without ``beta`` reports rewards at 0.1."""
        return {"beta": 0.1, **loss_options(self.loss), **self.loss_options}

    def with_reference_head(self) -> Call:
        """The call with the reference's head filled in; default: the policy's head."""
        if self.ref_hidden is None or self.ref_weight is not None:
            return self
        ref_bias = self.bias if self.ref_bias is None else self.ref_bias
        return dataclasses.replace(self, ref_weight=self.weight, ref_bias=ref_bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """Inputs of the passes."""

    hidden_TD: torch.Tensor
    reference: fused.Reference
    batch: fused.Batch
    head: fused.Head
    pairs: torch.Tensor
    """[N, 2 + E] on the device."""
    num_tokens_S: torch.Tensor
    """Completion tokens over all ranks, on the device."""


def prepare(call: Call) -> Prepared:
    """Checks a call and lays out its batch; on a GPU this waits once for the device.

    Raises:
        ValueError: arguments do not fit, see ``tso_fast.preference_loss``.
    """
    call = call.with_reference_head()
    loss = resolve_loss(call.loss, call.loss_options)
    _check_tensors(call, loss)
    backend = impls.resolve(call.impl, call.hidden.device, call.hidden.dtype)
    device = call.hidden.device
    host = checks.to_host(
        call.targets, call.cu_seqlens, call.pairs, call.scale, call.soft_label, call.margin, call.win_rates
    )
    targets, cu_seqlens, pairs, *scalars = host
    assert targets is not None
    shard = VocabShard(call.vocab_group, call.weight.shape[0], device) if _is_vocab_shared(call) else None
    vocab = _vocab(call) if shard is None else shard.vocab
    layout = checks.layout(targets, vocab, call.ignore_index, cu_seqlens, pairs)
    sequence_shard = SequenceShard(call.sequence_group) if is_shared(call.sequence_group, "sequence_group") else None
    planned, total = _token_counts(call, loss, layout, targets, scalars, shard, sequence_shard)
    _check_numbers(call, layout, scalars, total)
    batch = _batch(call, layout, loss, sequence_shard)
    has_unused_pairs = scalars[0] is not None and bool((scalars[0] == 0).any())
    options = loss_options(loss)
    has_clips = loss.function is dual_clip and min(options["clip_chosen"], options["clip_rejected"]) < math.inf
    return Prepared(
        hidden_TD=call.hidden.reshape(-1, call.hidden.shape[-1]),
        reference=_reference(call, total.numel()),
        batch=dataclasses.replace(batch, planned_tokens=planned.tolist(), total_tokens=total.tolist()),
        head=fused.Head(
            backend=backend, softcap=call.softcap, temperature=call.temperature, needs=call.needs,
            may_skip=has_clips or has_unused_pairs, shard=shard,
        ),
        pairs=layout.pairs.to(device, non_blocking=True),
        num_tokens_S=total.to(device, non_blocking=True),
    )  # fmt: skip


def _reference(call: Call, num_sequences: int) -> fused.Reference:
    """The reference; its log-probs are NaN if none was given and the loss needs none."""
    logprob_S = _upload(call.ref_logprobs, call.hidden.device)
    logprob_T = None if call.ref_token_logprobs is None else call.ref_token_logprobs.reshape(-1)
    if logprob_S is None and logprob_T is None and call.ref_hidden is None:
        logprob_S = torch.full((num_sequences,), math.nan, device=call.hidden.device)
    hidden_TD = None if call.ref_hidden is None else call.ref_hidden.flatten(0, -2)
    return fused.make_reference(logprob_S, logprob_T, hidden_TD, call.ref_weight, call.ref_bias)


def _token_counts(
    call: Call, loss: Loss, layout: checks.Layout, targets: torch.Tensor, scalars: list[torch.Tensor | None],
    shard: VocabShard | None, sequence_shard: SequenceShard | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Maximum and sum over ranks of each sequence's completion tokens, after checking that the ranks agree."""
    device, mine = call.hidden.device, torch.tensor(layout.num_tokens)
    if shard is not None:
        rows = {"the hidden dimension": call.hidden.shape[-1], "targets": _checksum(targets)}
        shard.agree(_facts(call, loss, layout, scalars) | rows, device, "vocab_group")
    if sequence_shard is None:
        return mine, mine
    sequence_shard.agree(_facts(call, loss, layout, scalars), device, "sequence_group")
    counts = sequence_shard.gather(mine.to(device)).cpu()
    return counts.amax(0), counts.sum(0)


def _check_numbers(
    call: Call, layout: checks.Layout, scalars: list[torch.Tensor | None], num_tokens_S: torch.Tensor
) -> None:
    """Checks the values of the arguments, on the host."""
    checks.check_no_empty_sequence(num_tokens_S, layout.pairs, call.ignore_index)
    num_pairs = layout.pairs.shape[0]
    for name, values, high in zip(_SCALARS, scalars, (None, 1.0, None, 1.0), strict=True):
        checks.check_pair_scalars(name, values, (num_pairs, 2) if name == "win_rates" else (num_pairs,), 0.0, high)
    for name, sums in (("ref_logprobs", call.ref_logprobs), ("ref2_logprobs", call.ref2_logprobs)):
        if sums is not None and sums.shape != num_tokens_S.shape:
            raise ValueError(f"{name} must be [{num_tokens_S.numel()}], one sum a sequence, got {tuple(sums.shape)}")


def _batch(call: Call, layout: checks.Layout, loss: Loss, sequence_shard: SequenceShard | None) -> fused.Batch:
    """The batch of this rank."""
    device, options = call.hidden.device, loss_options(loss)
    is_plain_dual_clip = loss.function is dual_clip and not options.pop("nll_weight")
    return fused.Batch(
        targets_T=call.targets.reshape(-1),
        index=layout.index.to(device, non_blocking=True),
        num_tokens=layout.num_tokens,
        planned_tokens=layout.num_tokens,
        total_tokens=layout.num_tokens,
        pairs=layout.pairs.tolist(),
        token_weights_T=None if call.token_weights is None else call.token_weights.detach().reshape(-1),
        token_values_T=None if call.token_values is None else call.token_values.detach().reshape(-1),
        scale_N=_upload(call.scale, device),
        soft_label_N=_upload(call.soft_label, device),
        margin_N=_upload(call.margin, device),
        win_rates_N2=_upload(call.win_rates, device),
        ref2_logprob_S=_upload(call.ref2_logprobs, device),
        loss=loss,
        is_per_pair=loss.is_per_pair,
        dual_clip=options if is_plain_dual_clip else None,
        token_term=None if loss.token_term is None else loss.terms,
        sequence_shard=sequence_shard,
    )


def _upload(values: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if values is None else values.detach().to(device, non_blocking=True)


def _check_tensors(call: Call, loss: Loss) -> None:
    """Checks shapes, dtypes and devices."""
    hidden, weight, device = call.hidden, call.weight, call.hidden.device
    checks.check_head(hidden, weight, call.bias)
    checks.check_scalars(call.softcap, call.temperature)
    checks.check_targets(call.targets, hidden)
    for name in ("token_weights", "token_values", "ref_token_logprobs"):
        checks.check_tokens(name, getattr(call, name), call.targets)
    _check_what_the_loss_reads(call, loss)
    if call.ref_hidden is None:
        if call.ref_weight is not None or call.ref_bias is not None:
            raise ValueError("ref_weight and ref_bias have no effect without ref_hidden; give it or leave them out")
        return
    assert call.ref_weight is not None
    checks.check_head(call.ref_hidden, call.ref_weight, call.ref_bias, "ref_")
    if call.ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"ref_hidden must be {(*hidden.shape[:-1], 'D')} like hidden, "
                         f"got {tuple(call.ref_hidden.shape)}")  # fmt: skip
    if call.ref_hidden.device != device:
        raise ValueError(f"ref_hidden is on {call.ref_hidden.device} but hidden is on {device}")


def _check_what_the_loss_reads(call: Call, loss: Loss) -> None:
    """Checks that a call has what its loss needs, and nothing that only other losses read."""
    names = "ref_logprobs", "ref_hidden", "ref_token_logprobs"
    given = [name for name in names if getattr(call, name) is not None]
    if len(given) > 1 or (not given and loss.needs_reference):
        found = f"{' and '.join(given)} were given" if given else f"none was given, and {loss.title} needs one"
        raise ValueError(f"give exactly one of {', '.join(names[:2])} and {names[2]}: {found}")
    if loss.token_term is not None and loss.needs_reference and given == ["ref_logprobs"]:
        raise ValueError(f"{loss.title} needs the reference's log-prob of each token, and ref_logprobs has their sums; "
                         "give ref_token_logprobs, shaped like targets, or ref_hidden instead")  # fmt: skip
    for name in sorted(FURTHER_INPUTS):
        is_given = getattr(call, name) is not None
        if name in loss.needs and not is_given:
            raise ValueError(f"{loss.title} needs {name}, which was not given; see preference_loss for its shape")
        if is_given and name not in loss.needs | loss.takes:
            raise ValueError(f"{name} has no effect on {loss.title}; leave it out")
    columns = 2 if call.pairs is None or call.pairs.dim() != 2 else call.pairs.shape[1]
    if loss.num_extra is not None and columns != 2 + loss.num_extra:
        found = "none" if call.pairs is None else f"{tuple(call.pairs.shape)}"
        raise ValueError(f"pairs must be [N, {2 + loss.num_extra}] int64 for {loss.title}: chosen, rejected and "
                         f"{loss.num_extra or 'no'} further sequences, got {found}")  # fmt: skip


def _is_vocab_shared(call: Call) -> bool:
    if not is_shared(call.vocab_group, "vocab_group"):
        return False
    if call.ref_weight is not None and call.ref_weight.shape[0] != call.weight.shape[0]:
        raise ValueError(f"with vocab_group ref_weight must hold the same rows of its head as weight, "
                         f"{call.weight.shape[0]}, got {call.ref_weight.shape[0]}")  # fmt: skip
    return True


def _vocab(call: Call) -> int:
    """Number of classes that policy and reference both have."""
    vocab: int = call.weight.shape[0]
    return vocab if call.ref_weight is None else min(vocab, call.ref_weight.shape[0])


def _checksum(values: torch.Tensor | None) -> int:
    return 0 if values is None else zlib.crc32(values.contiguous().numpy().tobytes())


def _facts(call: Call, loss: Loss, layout: checks.Layout, scalars: list[torch.Tensor | None]) -> dict[str, int]:
    """Facts that must agree on all ranks of a group, as numbers."""
    head = loss.title, sorted(loss_options(loss).items()), call.softcap, call.temperature
    return {
        "the number of sequences": len(layout.num_tokens),
        "the number of pairs": layout.pairs.shape[0],
        "pairs": _checksum(layout.pairs),
        **{name: _checksum(values) for name, values in zip(_SCALARS, scalars, strict=True)},
        "loss, options, softcap and temperature": zlib.crc32(repr(head).encode()),
        "whether reference log-probs are given": int(call.ref_logprobs is not None),
        "whether reference log-probs of tokens are given": int(call.ref_token_logprobs is not None),
        "whether hidden needs a gradient": int(call.needs[0]),
        "whether anything needs a gradient": int(any(call.needs)),
        "the memory budget": int(fused.memory_budget_mib(call.hidden.device.type) * fused.MIB),
    }
