"""Ranks that share a step: some hold parts of the output head, some hold parts of every sequence.

``VocabShard``: each rank has rows of the head and all hidden states. ``SequenceShard``: each rank has hidden states of
some tokens and, as far as this group goes, the whole head. Before any work the ranks exchange what must be the same
on all of them, so that a difference is an error with words on every rank and no wait without end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _Group:
    """The exchange of tensors among the ranks of a process group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[ranks, *shape]: the tensors of all ranks in their order, the same bits on each."""
        out = values.new_empty(self.num_ranks, *values.shape)
        dist.all_gather(list(out.unbind(0)), values.contiguous(), group=self.group)
        return out

    def add(self, values: torch.Tensor) -> None:
        """Sums over the ranks, in place."""
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
    """This rank's rows of an output head that lies on several ranks, [first, first + its size) of the whole head."""

    def __init__(self, group: Any, num_rows: int, device: torch.device) -> None:
        super().__init__(group)
        sizes = self.gather(torch.tensor(num_rows, dtype=torch.int64, device=device)).tolist()
        self.num_rows, self.vocab, self.first = num_rows, sum(sizes), sum(sizes[: self.rank])

    def local_targets(self, targets: torch.Tensor) -> torch.Tensor:
        """Targets as rows of this rank's head, -1 where another rank has them."""
        local = targets - self.first
        return torch.where((local >= 0) & (local < self.num_rows), local, -1)


class SequenceShard(_Group):
    """This rank's tokens of sequences that lie on several ranks."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in their order, the same bits on each."""
        return self.gather(values).sum(0)


def is_shared(group: Any, name: str) -> bool:
    """Whether a process group has other ranks than this one.

    Raises:
        ValueError: it is no process group, or this rank is not in it.
    """
    if group is None:
        return False
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"this rank is not in {name}; call the op on its members only")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{name} must be a torch.distributed process group, got {type(group).__name__}; of a "
                         "DeviceMesh take mesh.get_group(name of the dimension)")  # fmt: skip
    return dist.get_world_size(group) > 1
