"""The C++ op on CPU tensors: a backend of ``tso_fast.logprob.fused``."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from typing import Any

import torch

from tso_fast.logprob.groups import VocabShard
from tso_fast.logprob.plan import Limits, Shape
from tso_fast.logprob.reference import segment_sum as segment_sum
from tso_fast.logprob.rows import bits

ISA = os.environ.get("TSO_FAST_CPU_ISA", "")
"""Instruction set to use, e.g. ``avx2``; empty: the best of this machine."""

DEVICES = ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """State of a forward pass for its gradient."""

    tensors: tuple[torch.Tensor | None, ...]
    """Hidden states, weight, bias and targets. Not their arrays: a weight's memory may be another one in the backward
    pass, when it is sharded."""
    options: tuple[Any, ...]
    rows: Any
    exps: torch.Tensor
    """Stored exponentials, [V * stride] elements as bytes."""


def check_available() -> None:
    """Raises ValueError if the extension was not built, or lacks the instruction set in ``TSO_FAST_CPU_ISA``."""
    try:
        extension = _extension()
    except ImportError as error:
        raise ValueError(
            f"impl='cpu' is not available: the C++ extension is not built ({error}); reinstall tso-fast "
            "with a C++17 compiler, or use impl='reference'"
        ) from error
    if ISA and ISA not in (known := extension.logprob_isas("bfloat16")):
        raise ValueError(f"TSO_FAST_CPU_ISA={ISA!r} is not available on this machine; it has {', '.join(known)}")


def isas(dtype: torch.dtype) -> list[str]:
    """Instruction sets available on this machine for inputs of ``dtype``, best first."""
    names: list[str] = _extension().logprob_isas(_name(dtype))
    return names


def bytes_per_row(weight_VD: torch.Tensor) -> int:
    """Bytes of exponentials kept per row."""
    return _exps_bytes(64, weight_VD) // 64


def limits(shape: Shape, budget: int) -> Limits:
    """Numbers of rows whose exponentials fit into ``budget`` bytes; see ``plan.Planner``.

    Groups of pairs fill only half of it, since more would not stay in the cache; a single longer pair may use all. A
    step in one chunk may also use the memory that a sum of dweight over chunks would take, at 16 bits per element.
    """
    per_row = bytes_per_row(torch.empty(shape.vocab, shape.dim, dtype=shape.dtype, device="meta"))
    fit = max(16, budget // per_row)
    rows = fit // 16 * 16 if fit < 32 else fit // 32 * 32
    half = shape.vocab * shape.dim * 2 if shape.needs_dweight and shape.dtype.itemsize == 2 else 0
    return Limits(single=rows // 2 + half // per_row, group=rows // 2, rows=rows)


def memory(shape: Shape, num_rows: int, num_chunks: int) -> dict[str, int]:
    """Bytes of the large parts of a step; see ``plan.Planner``."""
    vocab = -(-shape.vocab // shape.num_ranks)
    head = torch.empty(vocab, shape.dim, dtype=shape.dtype, device="meta")
    is_summed = shape.needs_dweight and num_chunks > 1 and shape.dtype.itemsize == 2
    return {
        "exponentials": _exps_bytes(num_rows, head),
        "rows of hidden states and of their gradient": 2 * num_rows * shape.dim * shape.dtype.itemsize,
        "sum of dweight": vocab * shape.dim if is_summed else 0,
    }


def make_room(num_rows: int, weight_VD: torch.Tensor) -> torch.Tensor:
    """Memory, as bytes, in which ``forward`` keeps up to ``num_rows`` rows."""
    return torch.empty(_exps_bytes(num_rows, weight_VD), dtype=torch.uint8)


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
) -> tuple[torch.Tensor, Saved | None]:
    """Log-probs [T] float64 and, with ``room``, the state for ``backward``; arguments are checked and contiguous."""
    name = _name(hidden_TD.dtype)
    if shard is not None:
        targets_T = shard.local_targets(targets_T)
    tensors = hidden_TD, weight_VD, bias_V, targets_T
    options = name, softcap or 0.0, 1 / temperature, torch.get_num_threads(), _isa(name)
    exps = None if room is None else room[: _exps_bytes(targets_T.numel(), weight_VD)]
    reduce = None if shard is None else functools.partial(_reduce, shard)
    stored = None if exps is None else exps.numpy()
    logprobs, rows = _extension().logprob_forward(*map(_numpy, tensors), *options, stored, reduce)
    saved = None if exps is None else Saved(tensors=tensors, options=options, rows=rows, exps=exps)
    return torch.from_numpy(logprobs), saved


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
    """Writes the gradients of one chunk; see ``backend.Backend``."""
    upstream = dlogprobs_T.to(torch.float64).contiguous()
    _extension().logprob_backward(
        *map(_numpy, saved.tensors),
        *saved.options,
        saved.exps.numpy(),
        saved.rows,
        upstream.numpy(),
        _numpy(dhidden_TD),
        _name(torch.float32 if dhidden_TD is None else dhidden_TD.dtype),
        _numpy(dweight_VD),
        _numpy(dweight_rest_VD),
        _numpy(dbias_V),
        is_first,
        is_last,
    )


def _reduce(shard: VocabShard, values: Any, find_max: bool) -> None:
    """Replaces values by their sum or maximum over the ranks of a head."""
    ranks = shard.gather(torch.from_numpy(values))
    values[:] = (ranks.amax(0) if find_max else ranks.sum(0)).numpy()


def scale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies a gradient by a scalar tensor, in place."""
    gradient.mul_(factor.item())


dual_clip_epilogue = None


def _extension() -> Any:
    return importlib.import_module("tso_fast._C")


def _exps_bytes(num_rows: int, weight_VD: torch.Tensor) -> int:
    name = _name(weight_VD.dtype)
    return int(_extension().logprob_exps_bytes(num_rows, weight_VD.shape[0], name, _isa(name)))


def _isa(dtype_name: str) -> str:
    """Instruction set to use for a dtype, empty for the best; ``avx512_bf16`` and ``amx`` serve only bfloat16."""
    return ISA if ISA in _extension().logprob_isas(dtype_name) else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _numpy(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else bits(tensor)
