"""Log-probs of targets under a linear head in plain torch, tile by tile: the definition of correct, on any device.

Logits exist one tile [ROWS, VOCAB] at a time, in float32 from the float32 product of the inputs (in float64 for
float64 inputs), so they are never rounded to bf16 before the log-sum-exp. The backward pass recomputes the tiles: this
backend of ``tso_fast.logprob.fused`` stores no exponentials.
"""

from __future__ import annotations

import dataclasses

import torch

from tso_fast.logprob.groups import VocabShard
from tso_fast.logprob.plan import Limits, Shape, tiles
from tso_fast.logprob.rows import repeated

ROWS, VOCAB = 1024, 8192  # one float32 tile is at most 32 MiB
DEVICES: tuple[str, ...] = ()
DTYPES: tuple[torch.dtype, ...] = ()
"""Supported devices and dtypes; empty: any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """State of a forward pass for its gradient."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    targets_T: torch.Tensor
    """Rows of ``weight_VD``; -1 if another rank has the target."""
    lse_T: torch.Tensor
    softcap: float | None
    scale: float
    """1 / temperature."""


def check_available() -> None:
    """Does nothing, since plain torch is always available."""


def limits(shape: Shape, budget: int) -> Limits:
    """No limits, since nothing is kept; see ``plan.Planner``."""
    every = max(1, shape.num_rows)
    return Limits(single=every, group=every, rows=every)


def memory(shape: Shape, num_rows: int, num_chunks: int) -> dict[str, int]:
    """Bytes of the large parts of a step; see ``plan.Planner``."""
    acc = 8 if shape.dtype == torch.float64 else 4
    return {
        "a tile of logits and its copies": 4 * min(num_rows, ROWS) * min(shape.vocab, VOCAB) * acc,
        "dhidden before it is rounded": num_rows * shape.dim * acc,
    }


def make_room(num_rows: int, weight_VD: torch.Tensor) -> torch.Tensor:
    """An empty tensor, since no exponentials are stored."""
    return weight_VD.new_empty(0)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, end) for start, end in tiles(length, size)]


def _logits(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, softcap: float | None, scale: float
) -> torch.Tensor:
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    with torch.autocast(hidden_TD.device.type, enabled=False):  # autocast would round the product to its dtype
        logits_TV = hidden_TD.to(dtype) @ weight_VD.to(dtype).T
    if bias_V is not None:
        logits_TV += bias_V.to(dtype)
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return logits_TV * scale


def _here(targets_T: torch.Tensor, rows: slice, vocab: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask of the targets of some rows that lie in a slice of the vocabulary, and their positions in it."""
    local = targets_T[rows] - vocab.start
    return (local >= 0) & (local < vocab.stop - vocab.start), local


def forward(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_T: torch.Tensor,
    *,
    softcap: float | None,
    temperature: float,
    room: torch.Tensor | None,
    shard: VocabShard | None = None,
) -> tuple[torch.Tensor, Saved]:
    """log softmax(softcap(hidden @ weight.T + bias) / temperature)[targets], [T], and the state for ``backward``."""
    dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    T, V = hidden_TD.shape[0], weight_VD.shape[0]
    if shard is not None:
        targets_T = shard.local_targets(targets_T)
    # Not -inf: a bias may mask out a whole tile, and -inf - -inf is NaN.
    max_T = hidden_TD.new_full((T,), torch.finfo(dtype).min, dtype=dtype)
    sumexp_T = hidden_TD.new_zeros(T, dtype=dtype)
    target_logit_T = hidden_TD.new_zeros(T, dtype=dtype)
    for vocab in _slices(V, VOCAB):
        weight, bias = weight_VD[vocab].to(dtype), None if bias_V is None else bias_V[vocab]
        for rows in _slices(T, ROWS):
            logits = _logits(hidden_TD[rows], weight, bias, softcap, 1 / temperature)
            new_max = torch.maximum(max_T[rows], logits.amax(dim=1))
            sumexp_T[rows] *= torch.exp(max_T[rows] - new_max)
            sumexp_T[rows] += torch.exp(logits - new_max[:, None]).sum(dim=1)
            max_T[rows] = new_max
            is_here, local = _here(targets_T, rows, vocab)
            picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
            target_logit_T[rows] = torch.where(is_here, picked, target_logit_T[rows])
    if shard is not None:
        max_RT, sumexp_RT, target_RT = shard.gather(torch.stack([max_T, sumexp_T, target_logit_T])).unbind(1)
        max_T, target_logit_T = max_RT.amax(0), target_RT.sum(0)  # the target's logit is 0 on all ranks but one
        sumexp_T = (sumexp_RT * torch.exp(max_RT - max_T)).sum(0)
    lse_T = max_T + sumexp_T.log()
    saved = Saved(
        hidden_TD=hidden_TD,
        weight_VD=weight_VD,
        bias_V=bias_V,
        targets_T=targets_T,
        lse_T=lse_T,
        softcap=softcap,
        scale=1 / temperature,
    )
    return target_logit_T - lse_T, saved


def backward(
    saved: Saved,
    dlogprobs_T: torch.Tensor,
    *,
    dhidden_TD: torch.Tensor | None,
    dweight_VD: torch.Tensor | None,
    dweight_rest_VD: torch.Tensor | None,
    dbias_V: torch.Tensor | None,
    is_first: bool,
    is_last: bool,
    may_skip: bool = True,
) -> None:
    """Writes the gradients; see ``backend.Backend``. Skips rows without a gradient."""
    dtype = saved.lse_T.dtype
    assert is_first
    assert is_last
    sum_TD = None if dhidden_TD is None else torch.zeros_like(dhidden_TD, dtype=dtype)
    for vocab in _slices(saved.weight_VD.shape[0], VOCAB):
        weight = saved.weight_VD[vocab].to(dtype)
        dweight = None if dweight_VD is None else torch.zeros_like(weight)
        dbias = None if dbias_V is None else torch.zeros_like(weight[:, 0])
        for rows in _slices(saved.targets_T.numel(), ROWS):
            dlogits = _dlogits(saved, weight, dlogprobs_T[rows].to(dtype), rows, vocab)
            if sum_TD is not None:
                sum_TD[rows].addmm_(dlogits, weight)
            if dweight is not None:
                dweight.addmm_(dlogits.T, saved.hidden_TD[rows].to(dtype))
            if dbias is not None:
                dbias += dlogits.sum(dim=0)
        if dweight_VD is not None and dweight is not None:
            dweight_VD[vocab] = dweight.to(dweight_VD.dtype)
        if dbias_V is not None and dbias is not None:
            dbias_V[vocab] = dbias.to(dbias_V.dtype)
    if dhidden_TD is not None and sum_TD is not None:
        dhidden_TD.copy_(sum_TD)


def _dlogits(saved: Saved, weight: torch.Tensor, dlogprobs_T: torch.Tensor, rows: slice, vocab: slice) -> torch.Tensor:
    """The gradient by a tile of h W^T + b; ``weight`` holds the tile's rows of W in the dtype of logits."""
    bias = None if saved.bias_V is None else saved.bias_V[vocab]
    logits = _logits(saved.hidden_TD[rows], weight, bias, saved.softcap, saved.scale)
    dlogits = -torch.exp(logits - saved.lse_T[rows, None])
    is_here, local = _here(saved.targets_T, rows, vocab)
    here = is_here.nonzero()[:, 0]
    dlogits[here, local[here]] += 1
    dlogits *= dlogprobs_T[:, None] * saved.scale
    if saved.softcap is not None:
        dlogits *= 1 - (logits / (saved.scale * saved.softcap)) ** 2
    return dlogits


def scale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies a gradient by a scalar tensor in place, computing in float32 or better."""
    gradient.copy_(gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * factor)


def segment_sum(values_R: torch.Tensor, weights_R: torch.Tensor | None, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums [S] float64 over the rows of every sequence; see ``backend.Backend``."""
    values = values_R.double() if weights_R is None else values_R.double() * weights_R
    lengths = cu_seqlens.diff()
    segments = repeated(torch.arange(lengths.numel(), device=lengths.device), lengths, values.numel())
    return values.new_zeros(lengths.numel()).index_add_(0, segments, values)


dual_clip_epilogue = None
