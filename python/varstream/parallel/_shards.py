"""Which classes each rank of a group holds, and the collectives of the head.

``P`` ranks, of which rank r holds ``V_r`` contiguous rows of the weight (V, d) in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from varstream._checks import check_int


@dataclass(frozen=True)
class Shards:
    """The classes' owners."""

    group: Any  # a process group, None for the default one
    rank: int  # this process's in the group
    sizes: tuple[int, ...]  # V_r of every rank

    @property
    def classes(self) -> int:
        """V."""
        return sum(self.sizes)

    @property
    def start(self) -> int:
        """This rank's first class."""
        return sum(self.sizes[: self.rank])

    @property
    def stop(self) -> int:
        return self.start + self.sizes[self.rank]

    def own(self, per_class: Tensor | None) -> Tensor | None:
        """This rank's part of a tensor (V,)."""
        return None if per_class is None else per_class[self.start : self.stop]

    def owner(self, target: Tensor) -> Tensor:
        """The rank that holds each class."""
        ends = torch.tensor(self.sizes, device=target.device).cumsum(0)
        return torch.bucketize(target, ends, right=True)

    def column(self, target: Tensor, spare: int) -> Tensor:
        """Where each class stands in this rank's logits, ``spare`` where another rank holds it."""
        own = (target >= self.start) & (target < self.stop)
        return torch.where(own, target - self.start, spare)

    def gather(self, values: Tensor) -> Tensor:
        """``values`` of all ranks, stacked along a new first dimension (P, ...)."""
        return gather(values, self.group)

    def add_(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over the ranks."""
        dist.all_reduce(values, group=self.group)

    def start_sum(self, values: Tensor) -> Any:
        """``add_`` that returns at once; ``values`` are the sum after ``wait()`` of the result."""
        return dist.all_reduce(values, group=self.group, async_op=True)

    def any_rank(self, mask: Tensor) -> Tensor:
        """Where ``mask`` holds on some rank: one answer for all, so that all walk the same rows."""
        found = mask.to(torch.uint8)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found.bool()


def gather(values: Tensor, group: Any) -> Tensor:
    """``values`` of all ranks of ``group`` along a new first dimension (P, ...)."""
    out = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(out.unbind(0)), values.contiguous(), group=group)
    return out


def check_group(group: Any) -> int:
    """Check a process group; returns this process's rank in it."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group must be a process group of torch.distributed, which has to be initialised "
            f"first (torch.distributed.init_process_group), got {group!r} without it"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must contain this process, got a group of other ranks")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup or None (the default group), "
            f"got {type(group).__name__}"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"group must contain this process, got rank {rank} in it")
    return rank


def check_shard_sizes(value: Any, rank: int, ranks: int, rows: int) -> tuple[int, ...]:
    """Check the shards' sizes as the caller gives them; ``rows`` are this rank's."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"shard_sizes must be a list or tuple of ints, got {type(value).__name__}")
    sizes = tuple(check_int(f"shard_sizes[{i}]", size, low=1) for i, size in enumerate(value))
    if len(sizes) != ranks:
        raise ValueError(f"shard_sizes must have one entry a rank ({ranks}), got {len(sizes)}")
    if sizes[rank] != rows:
        raise ValueError(
            f"shard_sizes[{rank}] must be the number of rows of this rank's linear_weight_shard "
            f"({rows}), got {sizes[rank]}"
        )
    return sizes
