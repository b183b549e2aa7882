"""The op on CUDA tensors, by the kernels in ``tso_fast.kernels``: a backend of ``tso_fast.logprob.fused``."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
"""Whether triton runs its kernels in Python, on CPU tensors."""

DEVICES = ("cuda", "cpu") if IS_INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROW_STATISTICS = 3  # float32 that a row keeps beside its exponentials: their sum, offset, logit of the target


def check_available() -> None:
    """Raises ValueError when triton or a device is missing."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("impl='triton' is not available: triton is not installed; pip install triton (CUDA builds of "
                         "torch bring it), or use impl='auto'")  # fmt: skip
    if not torch.cuda.is_available() and not IS_INTERPRETED:
        raise ValueError("impl='triton' is not available: torch sees no CUDA device; install a CUDA build of torch "
                         "on a machine with one, or use impl='auto'")  # fmt: skip


def bytes_per_row(weight_VD: torch.Tensor) -> int:
    """Bytes that a row keeps, at most."""
    return _columns(weight_VD) * weight_VD.element_size() + _ROW_STATISTICS * 4


def make_room(num_rows: int, weight_VD: torch.Tensor) -> torch.Tensor:
    """Memory for the exponentials of up to so many rows."""
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
) -> tuple[torch.Tensor, Any]:
    """Log-probs [T] float32, and with ``room`` what ``backward`` needs; T > 0.

    Raises:
        ValueError: a dtype that is not in ``DTYPES``.
    """
    if hidden_TD.dtype not in DTYPES:
        raise ValueError(f"impl='triton' has no {hidden_TD.dtype}; use impl='reference'")
    head = {"softcap": softcap, "temperature": temperature}
    with torch.cuda.device_of(hidden_TD):
        logprob_T, saved = _kernels("linear_logprob").linear_logprob_forward(
            hidden_TD, weight_VD, bias_V, targets_T, **head, room=room
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
) -> None:
    """Writes the gradients of one chunk; ``saved`` is used up. See ``fused.Backend``."""
    with torch.cuda.device_of(dlogprob_T):
        _kernels("linear_logprob").linear_logprob_backward(
            saved,
            dlogprob_T,
            dhidden_TD=dhidden_TD,
            dweight_VD=dweight_VD,
            dweight_rest_VD=dweight_rest_VD,
            dbias_V=dbias_V,
            is_first=is_first,
            is_last=is_last,
        )


def segment_sum(values_R: torch.Tensor, weights_R: torch.Tensor | None, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums [S] float64 over the rows of every sequence; see ``fused.Backend``."""
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
    columns: int = _kernels("linear_logprob").padded_vocab(D, V, weight_VD.dtype, weight_VD.device)
    return columns


def _kernels(name: str) -> Any:
    return importlib.import_module(f"tso_fast.kernels.{name}")
