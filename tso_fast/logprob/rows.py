"""Subsets of rows, read and written without a copy if they are adjacent."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class _Memory:
    """A tensor's memory as numpy takes it. ``Tensor.numpy()`` forbids for ever what sharding does with a weight: to
    free its memory and allocate it again."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values  # lives as long as the array
        self.__array_interface__ = {
            "version": 3,
            "data": (values.data_ptr(), False),
            "shape": tuple(values.shape),
            "strides": tuple(stride * values.itemsize for stride in values.stride()),
            "typestr": np.dtype(str(values.dtype).removeprefix("torch.")).str,
        }


def bits(values: torch.Tensor) -> Any:
    """The tensor's own memory as a numpy array; bfloat16, which numpy lacks, appears as int16."""
    values = values.detach()
    values = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    return np.asarray(_Memory(values)) if values.numel() else values.numpy()


def repeated(values_S: torch.Tensor, counts_S: torch.Tensor, total: int) -> torch.Tensor:
    """Every value repeated ``counts_S`` times, [total], without waiting for a GPU.

    On a CPU this uses numpy: torch would start its threads, which keep spinning next to those of the op.
    """
    if values_S.device.type == "cpu":
        return torch.from_numpy(np.repeat(values_S.numpy(), counts_S.numpy()))
    return values_S.repeat_interleave(counts_S, output_size=total)


class Rows:
    """Some rows of [T, D] tensors: an index and, if the rows are adjacent, their span."""

    def __init__(self, index: torch.Tensor, span: tuple[int, int] | None) -> None:
        self.index, self.span = index, span

    def part(self, start: int, end: int) -> Rows:
        """The subset of these rows from ``start`` to ``end``."""
        span = None if self.span is None else (self.span[0] + start, self.span[0] + end)
        return Rows(self.index[start:end], span)

    def take(self, values: torch.Tensor) -> torch.Tensor:
        if self.span is not None:
            return values[self.span[0] : self.span[1]].contiguous()
        if values.device.type == "cpu":  # avoids torch's threads, which would keep spinning next to those of the op
            return torch.from_numpy(bits(values)[self.index.numpy()]).view(values.dtype)
        return values.index_select(0, self.index)

    def put(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the rows back into ``out``, where they were taken from."""
        if self.span is not None:
            out[self.span[0] : self.span[1]] = values
        elif values.device.type == "cpu":
            bits(out)[self.index.numpy()] = bits(values)
        else:
            out.index_copy_(0, self.index, values)
