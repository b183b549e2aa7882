"""What the functions of this package ask of their arrays."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np


def array(name: str, value: Any, dtype: type[np.generic], shape: str) -> np.ndarray:
    array = np.asarray(value)
    expected = f"{name} must be {shape} {np.dtype(dtype)}"
    if array.ndim != shape.count(",") + 1:
        raise ValueError(f"{expected}, got shape {list(array.shape)}")
    if array.dtype != dtype:
        raise ValueError(f"{expected}, got {array.dtype}; convert it with .astype(np.{np.dtype(dtype)})")
    return np.require(array, requirements=["C", "ALIGNED"])


def check_offsets(
    offsets: np.ndarray, num_rows: int, *, name: str = "offsets", end: str = "R", what: str = "the rows of scores"
) -> None:
    rule = f"{name} must start at 0, never decrease and end at {end} = {num_rows}, {what}"
    if not len(offsets):
        raise ValueError(f"{rule}; got no entries: nothing is {name} [0]")
    if offsets[0] != 0:
        raise ValueError(f"{rule}; {name}[0] is {offsets[0]}")
    if (offsets[1:] < offsets[:-1]).any():
        p = np.flatnonzero(offsets[1:] < offsets[:-1])[0]
        raise ValueError(f"{rule}; {name}[{p}] = {offsets[p]} is followed by {offsets[p + 1]}")
    if offsets[-1] != num_rows:
        hint = "; its last entry is the total, not the start of the last one" if offsets[-1] < num_rows else ""
        raise ValueError(f"{rule}; {name}[-1] is {offsets[-1]}{hint}")


def infinite_scores(scores_RM: np.ndarray) -> ValueError:
    """What is wrong with scores of which at least one is infinite."""
    is_infinite = np.isinf(scores_RM)
    row, column = np.unravel_index(is_infinite.argmax(), is_infinite.shape)
    return ValueError(
        f"scores[{row}, {column}] is {scores_RM[row, column]} ({is_infinite.sum()} infinite in all); expected finite "
        f"numbers: use NaN for a missing score, or clip"
    )


def extension() -> ModuleType:
    try:
        return importlib.import_module("tso_fast._C")
    except ImportError as error:
        raise ImportError(
            f"the C++ extension tso_fast._C cannot be loaded ({error}); build it with `pip install .` in the source "
            f"folder, which needs a C++17 compiler (g++ or clang++). consensus_reference does without it, slowly."
        ) from error
