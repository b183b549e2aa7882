"""Which prompts go to which iteration, also when a run that is there gets more prompts or iterations."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence

import numpy as np

from tso_fast.errors import InputError
from tso_fast.files.rows import candidates_row
from tso_fast.types import Candidates

Bounds = tuple[int, int]
"""First prompt of a mini-batch, and the one after its last."""


def schedule(num_prompts: int, num_iterations: int, before: Sequence[Bounds] = (), num_begun: int = 0) -> list[Bounds]:
    """The mini-batch of each iteration: nearly equal shares of the prompts, in file order.

    Iterations that have begun keep theirs. The prompts that none of them had are shared out over the iterations to
    come; if there are none, these take the mini-batches over again, from the first.

    Args:
        before: what was planned when the run was last started.
        num_begun: number of iterations that have responses already.

    Raises:
        InputError: there are fewer prompts than iterations, or more prompts but no iteration for them.
    """
    if len(before) == num_iterations and max((end for _, end in before), default=0) == num_prompts:
        return list(before)
    begun = list(before[:num_begun])
    first = max((end for _, end in begun), default=0)
    num_new, num_left = num_iterations - len(begun), num_prompts - first
    if num_new < 0 or (num_left and not num_new):
        unused = f" and {num_left} prompts were in none of them" if num_left else ""
        raise InputError(
            f"num_iterations: got {num_iterations}, but {len(begun)} iterations have begun{unused}; expected at least "
            f"{len(begun) + bool(num_left)}"
        )
    if begun and not num_left:
        different = list(dict.fromkeys(begun))
        return begun + [different[i % len(different)] for i in range(len(begun), num_iterations)]
    if num_left < num_new:
        raise InputError(
            f"num_iterations: got {num_iterations}, but there are only {num_left} prompts"
            f"{f' for the {num_new} iterations after the first {len(begun)}' if begun else ''}; expected at least one "
            "prompt an iteration"
        )
    bounds = np.linspace(first, num_prompts, num_new + 1).round().astype(int).tolist()
    return begun + list(itertools.pairwise(bounds))


def hash_prompts(prompts: Iterable[Candidates]) -> str:
    """sha256 of what is in the rows, whatever file and format they were read from."""
    digest = hashlib.sha256()
    for item in prompts:
        digest.update(json.dumps(candidates_row(item), sort_keys=True).encode())
    return digest.hexdigest()
