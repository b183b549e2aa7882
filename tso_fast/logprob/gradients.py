"""Accumulates the gradients of an output head and its hidden states chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tso_fast.logprob.backend import Head
from tso_fast.logprob.plan import tiles
from tso_fast.logprob.rows import Rows


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class WeightSum:
    """The weight's gradient as a sum over chunks, without a second tensor of that size.

    For float32 and float64 weights the sum is the result itself. For 16-bit weights it is a float32 cut to 24 bits: the
    upper 16 in the memory of the result and 8 more in ``rest``; the last chunk rounds it to the weight's dtype. This is
    as accurate as a float32 sum, since it is 128 times finer than the final rounding. With a single chunk there is no
    ``rest``.
    """

    def __init__(self, weight_VD: torch.Tensor, num_chunks: int) -> None:
        self.total_VD = torch.empty_like(weight_VD)
        is_whole = weight_VD.dtype.itemsize > 2 or num_chunks == 1
        self.rest_VD = None if is_whole else torch.empty_like(weight_VD, dtype=torch.uint8)

    def round(self) -> None:
        """Rounds the sum to the weight's dtype, as a backend does with the last chunk; for last chunks without any
        gradient."""
        if self.rest_VD is None:
            return
        for start, end in tiles(self.total_VD.shape[0], 1024):
            total, rest = self.total_VD[start:end], self.rest_VD[start:end]
            high = total.view(torch.int16).to(torch.int32) << 16
            total.copy_((high | (rest.to(torch.int32) << 8)).view(torch.float32))


class Gradients:
    """Those gradients of hidden, weight and bias that are needed."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        needs: Sequence[bool],
        num_chunks: int,
        covers_all_rows: bool,
        head: Head,
    ) -> None:
        need_dhidden, need_dweight, need_dbias = needs
        make = torch.empty_like if covers_all_rows else torch.zeros_like
        self.dhidden_TD = make(hidden_TD, memory_format=torch.contiguous_format) if need_dhidden else None
        self.dweight = WeightSum(weight_VD, num_chunks) if need_dweight else None
        self.dbias_V = torch.empty_like(bias_V, dtype=torch.float64) if bias_V is not None and need_dbias else None
        self.bias_V, self.head = bias_V, head
        self.num_left, self.is_first = num_chunks, True

    def add(self, saved: Any, dlogprobs_T: torch.Tensor, rows: Rows) -> None:
        """Adds the gradients of a chunk; ``saved`` is None if it has none."""
        self.num_left -= 1
        if saved is None:
            self._add_nothing(rows)
            return
        out_RD, is_apart = self._room_for(rows, dlogprobs_T.numel())
        self.head.backend.backward(
            saved,
            dlogprobs_T,
            dhidden_TD=out_RD,
            dweight_VD=None if self.dweight is None else self.dweight.total_VD,
            dweight_rest_VD=None if self.dweight is None else self.dweight.rest_VD,
            dbias_V=self.dbias_V,
            is_first=self.is_first,
            is_last=self.num_left == 0,
            may_skip=self.head.may_skip,
        )
        self.is_first = False
        if self.dhidden_TD is None or out_RD is None or not is_apart:
            return
        if self.head.shard is not None:
            self.head.shard.add(out_RD)
        rows.put(out_RD.to(self.dhidden_TD.dtype), self.dhidden_TD)

    def _room_for(self, rows: Rows, num_rows: int) -> tuple[torch.Tensor | None, bool]:
        """The tensor to write a chunk's dhidden to, and whether it is separate from the result."""
        if self.dhidden_TD is None:
            return None, False
        dim = self.dhidden_TD.shape[1]
        if self.head.shard is not None:  # part of a sum over ranks, which is rounded once
            return self.dhidden_TD.new_empty(num_rows, dim, dtype=acc_dtype(self.dhidden_TD.dtype)), True
        if rows.span is not None:
            return self.dhidden_TD[rows.span[0] : rows.span[1]], False
        return self.dhidden_TD.new_empty(num_rows, dim), True

    def _add_nothing(self, rows: Rows) -> None:
        if self.dhidden_TD is not None:
            self.dhidden_TD.index_fill_(0, rows.index, 0)
        if self.num_left:
            return
        if self.dweight is not None:
            self.dweight.total_VD.zero_() if self.is_first else self.dweight.round()
        if self.is_first and self.dbias_V is not None:
            self.dbias_V.zero_()

    def finished(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        assert self.num_left == 0
        dweight = None if self.dweight is None else self.dweight.total_VD
        dbias = None if self.dbias_V is None or self.bias_V is None else self.dbias_V.to(self.bias_V.dtype)
        self.dweight = None
        return self.dhidden_TD, dweight, dbias
