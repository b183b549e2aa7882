"""Plans the chunks of a step and computes the memory it takes, before any work.

shape of a step, budget -> limits of the backend -> groups of pairs -> chunks of rows, bytes

A group is a set of pairs whose loss is computed together. If its rows fit into one chunk, their exponentials are kept
for the gradient; otherwise its chunks are computed twice, which costs a fifth matrix product.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Sequence
from typing import Protocol

import torch

MIB = 2**20
# On a GPU this keeps a step of Llama-3-8B's head below 2 GiB, in addition to inputs and gradients.
_DEFAULT_BUDGET_MIB = {"cpu": 64.0, "cuda": 1920.0}
_budget_mib: dict[str, float] = {}


def memory_budget_mib(device_type: str) -> float:
    """Memory budget of a step in addition to its inputs and gradients, MiB: set by ``set_memory_budget_mib``, else by
    the environment variable ``TSO_FAST_MEMORY_BUDGET_MIB``, else 64 on CPUs and 1920 on GPUs."""
    if device_type in _budget_mib:
        return _budget_mib[device_type]
    if given := os.environ.get("TSO_FAST_MEMORY_BUDGET_MIB"):
        return _checked_budget(given)
    return _DEFAULT_BUDGET_MIB.get(device_type, 1920.0)


def set_memory_budget_mib(mib: float | None, device_type: str) -> None:
    """Sets the memory budget of a step on ``cpu`` or ``cuda``; None restores the default.

    Larger chunks are faster on a GPU, since they need fewer passes over the gradient of the output head. A pair whose
    rows don't fit is computed twice (five products instead of four).
    """
    if mib is None:
        _budget_mib.pop(device_type, None)
    else:
        _budget_mib[device_type] = _checked_budget(mib)


def _checked_budget(mib: float | str) -> float:
    try:
        value = float(mib)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise ValueError(f"the memory budget must be a number of MiB > 0, got {mib!r}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything that determines the memory of a step: the head, the rows and the gradients needed."""

    backend: Planner
    dim: int
    vocab: int
    """Rows of the whole head, over all ranks."""
    dtype: torch.dtype
    component_rows: Sequence[int]
    """Rows of every component; pairs that share a sequence are in the same component."""
    can_split: bool = True
    """Whether the loss of a component depends on that component alone."""
    needs_dweight: bool = True
    is_gathered: bool = True
    """Whether rows are copied out of the input because prompts lie between them; otherwise they are used in place."""
    num_ranks: int = 1
    """Number of ranks over which the head is split."""
    device_type: str = "cuda"

    @property
    def num_rows(self) -> int:
        return sum(self.component_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Numbers of rows that fit: ``single``, a whole step in one chunk; ``group``, several components together;
    ``rows``, one component."""

    single: int
    group: int
    rows: int


class Planner(Protocol):
    """The part of a backend that knows its memory use."""

    def limits(self, shape: Shape, budget: int) -> Limits:
        """Numbers of rows that fit into ``budget`` bytes."""

    def memory(self, shape: Shape, num_rows: int, num_chunks: int) -> dict[str, int]:
        """Bytes of each part of a step of ``num_chunks`` chunks, the largest with ``num_rows`` rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Components whose loss is computed together."""

    components: list[int]
    num_rows: int
    chunk_rows: int
    """Maximum number of rows computed at once."""

    @property
    def chunks(self) -> list[tuple[int, int]]:
        return tiles(self.num_rows, self.chunk_rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The groups of a step in order, and the bytes it takes in addition to inputs and gradients."""

    groups: list[Group]
    bytes: dict[str, int]

    @property
    def chunks(self) -> list[int]:
        """Rows of every chunk."""
        return [end - start for group in self.groups for start, end in group.chunks]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


def plan(shape: Shape, budget_mib: float | None = None) -> Plan:
    """The chunks and the memory of a step of ``preference_loss``.

    ``linear_logprobs`` uses the same chunks; with a frozen head it also keeps a float32 gradient of every row.

    Args:
        shape: head, rows and needed gradients.
        budget_mib: memory in addition to inputs and gradients, MiB; None: the device's ``memory_budget_mib``. Chunks of
            a component always have at least 16 rows, even if that exceeds the budget.
    """
    budget = memory_budget_mib(shape.device_type) if budget_mib is None else _checked_budget(budget_mib)
    limits = shape.backend.limits(shape, int(budget * MIB))
    everything = list(range(len(shape.component_rows)))
    if not shape.can_split or shape.num_rows <= limits.single:
        packed = [everything]
    else:
        packed = _balanced(shape.component_rows, limits.group)
    largest = max(limits.rows, limits.single) if len(packed) == 1 else limits.rows
    groups = []
    for components in packed:
        rows = sum(shape.component_rows[c] for c in components)
        groups.append(Group(components=components, num_rows=rows, chunk_rows=rows if rows <= largest else limits.rows))
    made = Plan(groups=groups, bytes={})
    chunks = made.chunks
    return dataclasses.replace(made, bytes=shape.backend.memory(shape, max(chunks, default=0), len(chunks)))


def tiles(size: int, step: int) -> list[tuple[int, int]]:
    """Ranges [start, end) that split ``size`` into steps of ``step``; the last one may be shorter."""
    return [(start, min(start + step, size)) for start in range(0, size, max(step, 1))]


def _balanced(rows: Sequence[int], limit: int) -> list[list[int]]:
    """Components in order, split into the fewest parts of at most ``limit`` rows, with the largest part minimal."""
    fewest = len(_packed(rows, limit))
    capacity = bisect.bisect_left(range(limit + 1), True, key=lambda cap: len(_packed(rows, cap)) <= fewest)
    return _packed(rows, capacity)


def _packed(rows: Sequence[int], limit: int) -> list[list[int]]:
    """Components in order, split greedily into parts of at most ``limit`` rows, or of one larger component."""
    parts: list[list[int]] = []
    filled = 0
    for component, count in enumerate(rows):
        if parts and filled + count <= limit:
            parts[-1].append(component)
            filled += count
        else:
            parts.append([component])
            filled = count
    return parts
