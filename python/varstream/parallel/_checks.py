"""Checks of the parallel head, and the one exchange by which the ranks agree before they start.

A rank that raised alone would leave the others waiting in a collective, so what is wrong on one
rank is raised on all of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from varstream._checks import FLOATING, check_same_dtype, check_tensor
from varstream.ops._autocast import cast_for_autocast
from varstream.ops._head import AUTO_CHUNK, HeadCall, check_head
from varstream.parallel import _kernels
from varstream.parallel._shards import Shards, check_group, check_shard_sizes, gather
from varstream.reference.head import auto_chunk_size


class ShardCall(NamedTuple):
    """Checked arguments: the head's with this rank's weight (V_r, d), and who holds the rest."""

    call: HeadCall  # its chunk_size is chosen: the same on every rank
    shards: Shards

    def whole(self) -> HeadCall:
        """The call with a weight of the whole head's shape (V, d), one element that is never read:
        for what depends on the number of classes."""
        weight = self.call.linear_weight.detach()
        shape = self.shards.classes, weight.shape[1]
        return self.call._replace(linear_weight=weight.new_empty(()).expand(shape))


class _Note(NamedTuple):
    """What a rank tells the others; all but the first two fields must be the same everywhere."""

    fine: int = 0
    shard: int = 0  # V_r
    rows: int = 0
    width: int = 0
    dtype: int = 0
    target: int = 0
    need_input: int = 0
    options: int = 0


_SAME = {
    "rows": "input must have the same number of rows N on every rank of group",
    "width": "input must have the same width d on every rank of group",
    "dtype": "input must have the same dtype on every rank of group",
    "target": "target must be the same on every rank of group",
    "need_input": "input must require a gradient on every rank of group or on none",
    "options": "the options must be the same on every rank of group",
}


def agree(
    group: Any, shard_sizes: Any, input: Any, check: Callable[[], tuple[HeadCall, tuple[Any, ...]]]
) -> ShardCall:
    """Run ``check`` on this rank and compare the outcome with the other ranks'.

    ``check`` returns the call and further values that must agree, as they decide which collectives
    run. With ``shard_sizes`` nothing is exchanged: the caller vouches for it.

    Raises:
        TypeError, ValueError: those of ``check``, on the other ranks a ValueError that says so;
            arguments that differ between ranks.
    """
    rank = check_group(group)
    if shard_sizes is not None:
        call, _ = check()
        ranks, rows = dist.get_world_size(group), call.linear_weight.shape[0]
        return _planned(
            call, Shards(group, rank, check_shard_sizes(shard_sizes, rank, ranks, rows))
        )
    if not isinstance(input, Tensor):
        check()  # raises; without a tensor no device is known to exchange notes on
    error: Exception | None = None
    note = _Note()
    try:
        call, options = check()
        note = _note_of(call, options)
    except (TypeError, ValueError) as caught:
        error = caught
    notes = [_Note(*n) for n in gather(torch.tensor(note, device=input.device), group).tolist()]
    if error is not None:
        raise error
    _compare(notes)
    return _planned(call, Shards(group, rank, tuple(n.shard for n in notes)))


def _note_of(call: HeadCall, options: tuple[Any, ...]) -> _Note:
    x, target = call.input, call.target.long().reshape(-1)
    places = torch.arange(1, target.numel() + 1, device=target.device)
    # Integers wrap around: a fingerprint of the classes and of their order.
    mark = int((target * 0x9E3779B1 + places).square().sum()) if target.numel() else 0
    scalars = (call.target.dim(), call.target.shape[-1], *call[4:], *options)
    return _Note(
        1,
        call.linear_weight.shape[0],
        x.shape[0],
        x.shape[1],
        FLOATING.index(x.dtype),
        mark,
        int(x.requires_grad and torch.is_grad_enabled()),
        zlib.crc32(repr(scalars).encode()),
    )


def _compare(notes: list[_Note]) -> None:
    refused = [r for r, note in enumerate(notes) if not note.fine]
    if refused:
        raise ValueError(
            f"the arguments must be valid on every rank of group, got an error on ranks {refused}"
        )
    for name, contract in _SAME.items():
        values = [getattr(note, name) for note in notes]
        others = [r for r, value in enumerate(values) if value != values[0]]
        if others:
            shown = f"{values}" if name in ("rows", "width") else f"others on ranks {others}"
            raise ValueError(f"{contract}, got {shown}")


def _planned(call: HeadCall, shards: Shards) -> ShardCall:
    """With the chunk size chosen for the largest shard: every rank walks the same chunks."""
    if call.chunk_size == AUTO_CHUNK:
        largest = max(shards.sizes)
        if _kernels.chosen(call.input):
            rows = _kernels.automatic_rows(call, largest)
        else:
            itemsize, device = call.head().acc.itemsize, call.linear_weight.device.type
            rows = auto_chunk_size(largest, itemsize, device)
        call = call._replace(chunk_size=rows)
    return ShardCall(call, shards)


def check_shard(
    input: Any, linear_weight_shard: Any, target: Any, *, linear_bias: Any, **options: Any
) -> HeadCall:
    """``check_head`` for a shard of the weight, which its errors name."""
    _refuse_dtensor(
        input=input, linear_weight_shard=linear_weight_shard, target=target, linear_bias=linear_bias
    )
    check_tensor("input", input, ndim=2, dtypes=FLOATING, layout="(N, d)")
    check_tensor(
        "linear_weight_shard",
        linear_weight_shard,
        shape=(None, input.shape[1]),
        device=input.device,
        layout="(V_r, d)",
    )
    rows = linear_weight_shard.shape[0]
    if rows < 1:
        raise ValueError(f"linear_weight_shard must have at least one class (V_r, d), got {rows}")
    if linear_bias is not None:
        check_tensor(
            "linear_bias", linear_bias, shape=(rows,), device=input.device, layout="(V_r,)"
        )
    x, weight, bias = cast_for_autocast(input, linear_weight_shard, linear_bias)
    check_same_dtype(input=x, linear_weight_shard=weight, linear_bias=bias)
    return check_head(x, weight, target, linear_bias=bias, **options)


def _refuse_dtensor(**tensors: Any) -> None:
    for name, value in tensors.items():
        if type(value).__module__.startswith("torch.distributed.tensor"):
            raise TypeError(
                f"{name} must be a plain tensor, such as a DTensor's to_local(), "
                f"got {type(value).__name__}"
            )
