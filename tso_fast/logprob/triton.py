"""The op on CUDA tensors, using the kernels in ``tso_fast.kernels``: a backend of ``tso_fast.logprob.fused``."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from typing import Any

import torch

from tso_fast.logprob.groups import VocabShard
from tso_fast.logprob.plan import Limits, Shape

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether triton runs its kernels in Python, on CPU tensors."""

DEVICES = ("cuda", "cpu") if IS_INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROW_STATISTICS = 4  # float32 values kept per row besides exponentials: their sum, offset, target's logit and slope
_DHIDDEN_ROWS = 1024  # linear_logprob_backward's; plans are made where triton, which that imports, is not installed
_NARROWEST, _WIDEST = 128, 256  # columns of a tile of logits on a GPU


def check_available() -> None:
    """Raises ValueError if triton or a device is missing, or the kernels do not support it."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "impl='triton' is not available: triton is not installed; pip install triton (CUDA builds of "
            "torch bring it), or use impl='auto'"
        )
    if torch.version.hip is not None:
        raise ValueError(
            "impl='triton' is not available: this torch is built for AMD GPUs, and the kernels are "
            "written for NVIDIA's; use impl='reference'"
        )
    if not torch.cuda.is_available() and not IS_INTERPRETED:
        raise ValueError(
            "impl='triton' is not available: torch sees no CUDA device; install a CUDA build of torch "
            "on a machine with one, or use impl='auto'"
        )
    try:
        importlib.import_module("triton.tools.tensor_descriptor")
    except ImportError as error:
        version = importlib.import_module("triton").__version__
        raise ValueError(
            f"impl='triton' is not available: it needs triton >= 3.4, which comes with torch >= 2.8, and "
            f"found {version} ({error}); upgrade torch, or use impl='reference'"
        ) from error


def bytes_per_row(weight_VD: torch.Tensor) -> int:
    """Maximum bytes kept per row."""
    return _columns(weight_VD) * weight_VD.element_size() + _ROW_STATISTICS * 4


def memory(shape: Shape, num_rows: int, num_chunks: int) -> dict[str, int]:
    """Maximum bytes of each part of a step; see ``plan.Planner``."""
    size, columns = shape.dtype.itemsize, -(-shape.vocab // _WIDEST) * _WIDEST // shape.num_ranks
    row = shape.dim * size
    is_summed = shape.needs_dweight and num_chunks > 1 and size == 2
    return {
        "exponentials": num_rows * columns * size,
        "maxima and sums of tiles": num_rows * 2 * 4 * -(-columns // _NARROWEST),
        "rows of hidden states and of their gradient": 2 * num_rows * row if shape.is_gathered else 0,
        "scaled rows": num_rows * row if shape.needs_dweight else 0,
        "product of dhidden": _DHIDDEN_ROWS * shape.dim * 4,
        "dhidden to be summed over ranks": num_rows * shape.dim * (4 + size) if shape.num_ranks > 1 else 0,
        "sum of dweight": shape.vocab * shape.dim // shape.num_ranks if is_summed else 0,
    }


def limits(shape: Shape, budget: int) -> Limits:
    """Numbers of rows that fit into ``budget`` bytes, the same as on one rank; see ``plan.Planner``."""
    shape = dataclasses.replace(shape, num_ranks=1)

    def rows(num_chunks: int) -> int:
        fixed, some = (sum(memory(shape, n, num_chunks).values()) for n in (0, 1024))
        fit = int(max(0, budget - fixed) * 1024 // (some - fixed))
        return max(16, fit // 16 * 16 if fit < 32 else fit // 32 * 32)

    return Limits(single=rows(1), group=rows(2), rows=rows(2))


def make_room(num_rows: int, weight_VD: torch.Tensor) -> torch.Tensor:
    """Memory for the exponentials of up to ``num_rows`` rows."""
    return weight_VD.new_empty(num_rows * _columns(weight_VD))


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
) -> tuple[torch.Tensor, Any]:
    """Log-probs [T] float32, T > 0, and, with ``room``, the state for ``backward``.

    Raises:
        ValueError: the dtype is not in ``DTYPES``.
    """
    if hidden_TD.dtype not in DTYPES:
        raise ValueError(f"impl='triton' has no {hidden_TD.dtype}; use impl='reference'")
    options: dict[str, Any] = {"softcap": softcap, "temperature": temperature, "room": room}
    if shard is not None:
        targets_T, options["gather"] = shard.local_targets(targets_T), shard.gather
    with torch.cuda.device_of(hidden_TD):
        logprob_T, saved = _kernels("linear_logprob").linear_logprob_forward(
            hidden_TD, weight_VD, bias_V, targets_T, **options
        )
    return logprob_T, saved


def backward(
    saved: Any,
    dlogprob_T: torch.Tensor,
    *,
    dhidden_TD: torch.Tensor | None,
    dweight_VD: torch.Tensor | None,
    dweight_rest_VD: torch.Tensor | None,
    dbias_V: torch.Tensor | None,
    is_first: bool,
    is_last: bool,
    may_skip: bool = True,
) -> None:
    """Writes the gradients of one chunk and uses up ``saved``; see ``backend.Backend``."""
    with torch.cuda.device_of(dlogprob_T):
        _kernels("linear_logprob_backward").linear_logprob_backward(
            saved,
            dlogprob_T.float(),
            dhidden_TD=dhidden_TD,
            dweight_VD=dweight_VD,
            dweight_rest_VD=dweight_rest_VD,
            dbias_V=dbias_V,
            is_first=is_first,
            is_last=is_last,
            may_skip=may_skip,
        )


def scale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiplies a gradient by a scalar tensor, in place and without waiting for the device."""
    with torch.cuda.device_of(gradient):
        _kernels("linear_logprob_backward").scale_in_place(gradient, factor)


def segment_sum(values_R: torch.Tensor, weights_R: torch.Tensor | None, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums [S] float64 over the rows of every sequence; see ``backend.Backend``."""
    with torch.cuda.device_of(values_R):
        sum_S: torch.Tensor = _kernels("pair_loss").segment_sum(values_R, weights_R, cu_seqlens)
    return sum_S


def dual_clip_epilogue(
    logprob_S: torch.Tensor,
    ref_logprob_S: torch.Tensor,
    pairs_N2: torch.Tensor,
    scale_N: torch.Tensor | None,
    soft_label_N: torch.Tensor | None,
    margin_N: torch.Tensor | None,
    beta: float,
    clip_chosen: float,
    clip_rejected: float,
    weight_sum: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [N] of ``dual_clip`` and the gradient [S] of their sum, each weighted by scale / weight_sum."""
    scalars = scale_N, soft_label_N, margin_N
    with torch.cuda.device_of(logprob_S):
        losses_N, dlogprob_S = _kernels("pair_loss").dual_clip_epilogue(
            logprob_S, ref_logprob_S, pairs_N2, *scalars, beta, clip_chosen, clip_rejected, weight_sum
        )
    return losses_N, dlogprob_S


def _columns(weight_VD: torch.Tensor) -> int:
    V, D = weight_VD.shape
    if os.environ.get("TSO_FAST_AUTOTUNE") == "1":
        _kernels("autotune").ensure(D, V, weight_VD.dtype, weight_VD.device)
    columns: int = _kernels("linear_logprob").padded_vocab(D, V, weight_VD.dtype, weight_VD.device)
    return columns


def _kernels(name: str) -> Any:
    return importlib.import_module(f"tso_fast.kernels.{name}")
