"""Measuring and freeing memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def available_memory() -> int:
    """Bytes of main memory that programs can still allocate.

    This is the kernel's estimate, which counts the page cache as available: it is full of weights just read.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release(model: nn.Module) -> None:
    """Frees the memory of a model that is not used again.

    Models are in reference cycles, and a garbage collection takes a quarter of a second with these libraries loaded, so
    this drops the weights directly.
    """
    import torch
    from torch.distributed.tensor import DTensor

    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, DTensor):
            tensor.to_local().untyped_storage().resize_(0)
        else:
            tensor.data = tensor.data.new_empty(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Gives memory that was freed back to the system, where the C library can (glibc); it keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_gpu_memory() -> None:
    """Returns unused GPU memory, so that other processes can allocate it."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
