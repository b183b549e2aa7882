"""What the functions of this package ask of their arguments."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt

from tso_fast.errors import did_you_mean


def array(name: str, value: npt.ArrayLike, dtype: type[np.generic], shape: str) -> np.ndarray:
    array = np.asarray(value)
    expected = f"{name} must be {shape} {np.dtype(dtype)}"
    if array.ndim != shape.count(",") + 1:
        raise ValueError(f"{expected}, got shape {list(array.shape)}")
    if array.dtype != dtype:
        raise ValueError(f"{expected}, got {array.dtype}; convert it with .astype(np.{np.dtype(dtype)})")
    return np.require(array, requirements=["C", "ALIGNED"])


def rows_of_two(name: str, value: npt.ArrayLike, letter: str) -> np.ndarray:
    rows = array(name, value, np.int64, f"[{letter}, 2]")
    if rows.shape[1] != 2:
        raise ValueError(f"{name} must be [{letter}, 2] int64, got shape {list(rows.shape)}")
    return rows


def scores_by_prompt(
    scores: npt.ArrayLike, offsets: npt.ArrayLike, *, name: str = "scores", shape: str = "[R, M]"
) -> tuple[np.ndarray, np.ndarray]:
    """C-contiguous float32 scores, and [P+1] int64 offsets of their rows."""
    values = array(name, scores, np.float32, shape)
    offsets_P1 = array("offsets", offsets, np.int64, "[P+1]")
    check_offsets(offsets_P1, len(values))
    return values, offsets_P1


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


def check_num_threads(num_threads: int) -> None:
    if num_threads < 0:
        raise ValueError(f"num_threads must be >= 0 (0: one per hardware thread), got {num_threads}")


def check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        hint = did_you_mean(str(name), known)
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}{hint}")


def infinite_scores(scores: np.ndarray, name: str = "scores") -> ValueError:
    """The error for scores of which at least one is infinite."""
    is_infinite = np.isinf(scores)
    place = tuple(map(int, np.unravel_index(is_infinite.argmax(), is_infinite.shape)))
    return ValueError(
        f"{name}{list(place)} is {scores[place]} ({is_infinite.sum()} infinite in all); expected finite numbers: use "
        f"NaN for a missing score, or clip"
    )


def extension() -> ModuleType:
    try:
        return importlib.import_module("tso_fast._C")
    except ImportError as error:
        raise ImportError(
            f"the C++ extension tso_fast._C cannot be loaded ({error}); build it with `pip install .` in the source "
            f"folder, which needs a C++17 compiler (g++ or clang++). consensus_reference does without it, slowly."
        ) from error
