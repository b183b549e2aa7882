"""Memory that is free, and memory that is given back."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def available_memory() -> int:
    """Bytes of main memory that programs can still take.

    The kernel's estimate counts the page cache, which is full of weights just read.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release(model: nn.Module) -> None:
    """Gives back the memory of a model that is not used again.

    Models hold themselves in cycles, and a collection takes a quarter of a second with these libraries loaded; their
    weights are let go of here and now.
    """
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_gpu_memory() -> None:
    """Gives GPU memory that nothing holds any more back to other processes."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
