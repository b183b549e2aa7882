"""Process groups that share a step by splitting the output head or every sequence.

``VocabShard``: each rank has some rows of the head and all hidden states. ``SequenceShard``: each rank has the hidden
states of some tokens and, within this group, the whole head. Before any work the ranks exchange the facts that must
agree, so that a difference raises an error on every rank instead of a deadlock.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Group:
    """Exchange of tensors among the ranks of a process group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, [ranks, *shape], in rank order and with the same bits on each rank."""
        out = values.new_empty(self.num_ranks, *values.shape)
        dist.all_gather(list(out.unbind(0)), values.contiguous(), group=self.group)
        return out

    def add(self, values: torch.Tensor) -> None:
        """Sums a tensor over the ranks, in place."""
        dist.all_reduce(values, group=self.group)

    def agree(self, facts: dict[str, int], device: torch.device, what: str) -> None:
        """Raises ValueError on every rank unless all ranks have the same numbers."""
        mine = torch.tensor(list(facts.values()), dtype=torch.int64, device=device)
        everyone = self.gather(mine).cpu()
        for column, name in enumerate(facts):
            values = everyone[:, column].tolist()
            if len(set(values)) > 1:
                found = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(values))
                raise ValueError(f"the ranks of {what} disagree on {name}: {found}")


class VocabShard(_Group):
    """This rank's rows, [first, first + num_rows), of an output head that is split over several ranks."""

    def __init__(self, group: Any, num_rows: int, device: torch.device) -> None:
        super().__init__(group)
        sizes = self.gather(torch.tensor(num_rows, dtype=torch.int64, device=device)).tolist()
        self.num_rows, self.vocab, self.first = num_rows, sum(sizes), sum(sizes[: self.rank])

    def local_targets(self, targets: torch.Tensor) -> torch.Tensor:
        """Targets as rows of this rank's part of the head, -1 if another rank has the target."""
        local = targets - self.first
        return torch.where((local >= 0) & (local < self.num_rows), local, -1)


class SequenceShard(_Group):
    """This rank's tokens of sequences that are split over several ranks."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in rank order and with the same bits on each rank."""
        return self.gather(values).sum(0)


def is_shared(group: Any, name: str) -> bool:
    """Whether a process group has more than this rank.

    Raises:
        ValueError: ``group`` is not a process group, or this rank is not in it.
    """
    if group is None:
        return False
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"this rank is not in {name}; call the op on its members only")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"{name} must be a torch.distributed process group, got {type(group).__name__}; of a "
            "DeviceMesh take mesh.get_group(name of the dimension)"
        )
    return dist.get_world_size(group) > 1
