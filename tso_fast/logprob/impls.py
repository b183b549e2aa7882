"""The implementations of the op by name: ``reference``, ``cpu``, ``triton``, and the choice of ``auto``."""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

IMPLS = ("reference", "cpu", "triton")


@functools.cache
def _log_choice(device: str, dtype: torch.dtype, chosen: str, reason: str) -> None:
    logger.info("linear_logprobs: impl='auto' chose %r for %s tensors on %s%s", chosen, dtype, device, reason)


def resolve(impl: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The backend for tensors of a device and dtype.

    Raises:
        ValueError: the name is unknown, or the backend is not available here or for these tensors.
    """
    if impl == "auto":
        impl, reason = choose(device.type, dtype)
        _log_choice(device.type, dtype, impl, reason)
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; known: auto, {', '.join(IMPLS)}")
    found = backend(impl)
    if found.DEVICES and device.type not in found.DEVICES:
        raise ValueError(f"impl={impl!r} is for tensors on {found.DEVICES[0]}, got hidden on {device}; use impl='auto'")
    if found.DTYPES and dtype not in found.DTYPES:
        raise ValueError(f"impl={impl!r} has no {dtype}; use impl='reference'")
    return found


def choose(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The best available implementation for a device and dtype, and why it is not a faster one."""
    fastest = {"cpu": "cpu", "cuda": "triton"}.get(device)
    if fastest is None:
        return "reference", ""
    try:
        has_dtype = dtype in backend(fastest).DTYPES
    except ValueError as error:
        return "reference", f": {error}"
    return (fastest, "") if has_dtype else ("reference", f": impl={fastest!r} has no {dtype}")


@functools.cache
def backend(name: str) -> Any:
    """The backend of a name, a module that implements ``backend.Backend``. Raises ValueError if not available."""
    module = importlib.import_module(f"tso_fast.logprob.{name}")
    module.check_available()
    return module
