"""Prepares a call of ``preference_loss``: checks arguments on the host, before any work, and lays out the batch."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import torch

from tso_fast.logprob import checks, fused, impls
from tso_fast.logprob.groups import SequenceShard, VocabShard, is_shared
from tso_fast.losses import Loss, LossFunction, dual_clip, loss_options, resolve_loss


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
    pairs_N2: torch.Tensor
    """Pairs on the device."""
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
    host = checks.to_host(call.targets, call.cu_seqlens, call.pairs, call.scale, call.soft_label, call.margin)
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
    clips = batch.dual_clip
    has_clips = clips is not None and min(clips["clip_chosen"], clips["clip_rejected"]) < math.inf
    return Prepared(
        hidden_TD=call.hidden.reshape(-1, call.hidden.shape[-1]),
        reference=_reference(call, total.numel()),
        batch=dataclasses.replace(batch, planned_tokens=planned.tolist(), total_tokens=total.tolist()),
        head=fused.Head(
            backend=backend, softcap=call.softcap, temperature=call.temperature, needs=call.needs,
            may_skip=has_clips or has_unused_pairs, shard=shard,
        ),
        pairs_N2=layout.pairs.to(device, non_blocking=True),
        num_tokens_S=total.to(device, non_blocking=True),
    )  # fmt: skip


def _reference(call: Call, num_sequences: int) -> fused.Reference:
    """The reference; its log-probs are NaN if none was given and the loss needs none."""
    logprob_S = _upload(call.ref_logprobs, call.hidden.device)
    if logprob_S is None and call.ref_hidden is None:
        logprob_S = torch.full((num_sequences,), math.nan, device=call.hidden.device)
    hidden_TD = None if call.ref_hidden is None else call.ref_hidden.flatten(0, -2)
    return fused.make_reference(logprob_S, hidden_TD, call.ref_weight, call.ref_bias)


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
    for name, values, high in zip(("scale", "soft_label", "margin"), scalars, (None, 1.0, None), strict=True):
        checks.check_pair_scalars(name, values, layout.pairs.shape[0], 0.0, high)
    if call.ref_logprobs is not None and call.ref_logprobs.shape != num_tokens_S.shape:
        raise ValueError(f"ref_logprobs must be [{num_tokens_S.numel()}], one sum a sequence, "
                         f"got {tuple(call.ref_logprobs.shape)}")  # fmt: skip


def _batch(call: Call, layout: checks.Layout, loss: Loss, sequence_shard: SequenceShard | None) -> fused.Batch:
    """The batch of this rank."""
    device = call.hidden.device
    return fused.Batch(
        targets_T=call.targets.reshape(-1),
        index=layout.index.to(device, non_blocking=True),
        num_tokens=layout.num_tokens,
        planned_tokens=layout.num_tokens,
        total_tokens=layout.num_tokens,
        pairs=layout.pairs.tolist(),
        token_weights_T=None if call.token_weights is None else call.token_weights.detach().reshape(-1),
        scale_N=_upload(call.scale, device),
        soft_label_N=_upload(call.soft_label, device),
        margin_N=_upload(call.margin, device),
        loss=loss,
        is_per_pair=loss.is_per_pair,
        dual_clip=loss_options(loss) if loss.function is dual_clip else None,
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
    if call.token_weights is not None and call.token_weights.shape != call.targets.shape:
        raise ValueError(f"token_weights must be {tuple(call.targets.shape)}, got {tuple(call.token_weights.shape)}")
    if call.token_weights is not None and call.token_weights.device != device:
        raise ValueError(f"token_weights are on {call.token_weights.device} but hidden is on {device}")
    num_given = (call.ref_logprobs is not None) + (call.ref_hidden is not None)
    if num_given == 2 or (num_given == 0 and loss.needs_reference):
        given = "both were given" if num_given else f"neither was given, and {loss.title} needs one"
        raise ValueError(f"give exactly one of ref_logprobs and ref_hidden: {given}")
    if call.ref_hidden is None:
        if call.ref_weight is not None or call.ref_bias is not None:
            raise ValueError("ref_weight and ref_bias have no effect with ref_logprobs; give ref_hidden or leave "
                             "them out")  # fmt: skip
        return
    assert call.ref_weight is not None
    checks.check_head(call.ref_hidden, call.ref_weight, call.ref_bias, "ref_")
    if call.ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(f"ref_hidden must be {(*hidden.shape[:-1], 'D')} like hidden, "
                         f"got {tuple(call.ref_hidden.shape)}")  # fmt: skip
    if call.ref_hidden.device != device:
        raise ValueError(f"ref_hidden is on {call.ref_hidden.device} but hidden is on {device}")


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
    names = "scale", "soft_label", "margin"
    head = loss.title, sorted(loss_options(loss).items()), call.softcap, call.temperature
    return {
        "the number of sequences": len(layout.num_tokens),
        "the number of pairs": layout.pairs.shape[0],
        "pairs": _checksum(layout.pairs),
        **{name: _checksum(values) for name, values in zip(names, scalars, strict=True)},
        "loss, options, softcap and temperature": zlib.crc32(repr(head).encode()),
        "whether reference log-probs are given": int(call.ref_logprobs is not None),
        "whether hidden needs a gradient": int(call.needs[0]),
        "whether anything needs a gradient": int(any(call.needs)),
        "the memory budget": int(fused.memory_budget_mib(call.hidden.device.type) * fused.MIB),
    }
