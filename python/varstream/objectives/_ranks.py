"""Rows of a batch that is spread over the ranks of a process group: sizes, and a gather with
gradient.

A rank that raised alone would leave the others waiting in a collective, so what is wrong on one
rank is raised on all of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from varstream._checks import FLOATING, acc_dtype
from varstream.parallel._shards import check_group, gather


class Part(NamedTuple):
    """This rank's checked rows."""

    queries: Tensor  # (Q, d)
    keys: Tensor  # (K, d)
    positives: Tensor  # (Q,) int64, own keys
    paired: int | Tensor  # queries that have a positive


@dataclass(frozen=True)
class Ranks:
    """Who holds which rows of the whole batch."""

    group: Any
    rank: int
    queries: tuple[int, ...]  # Q of every rank
    keys: tuple[int, ...]  # K of every rank
    paired: int  # queries with a positive, of all ranks

    def gather(self, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The rows of all ranks in rank order; the gradient comes back summed over the ranks."""
        found: Tensor = _Gather.apply(rows, sizes, self)
        return found

    def start(self, sizes: tuple[int, ...]) -> int:
        """Where this rank's rows begin among all of them."""
        return sum(sizes[: self.rank])


class _Note(NamedTuple):
    """What a rank tells the others; what follows ``paired`` must be the same everywhere."""

    fine: int = 0
    queries: int = 0
    keys: int = 0
    paired: int = 0
    width: int = 0
    dtype: int = 0
    query_grad: int = 0
    key_grad: int = 0
    options: int = 0


_SAME = {
    "width": "queries must have the same width d on every rank of group",
    "dtype": "queries must have the same dtype on every rank of group",
    "query_grad": "queries must require a gradient on every rank of group or on none",
    "key_grad": "keys must require a gradient on every rank of group or on none",
    "options": "the options must be the same on every rank of group",
}


def agree(
    group: Any, queries: Any, check: Callable[[], Part], options: tuple[Any, ...]
) -> tuple[Part, Ranks]:
    """Run ``check`` on this rank and compare the outcome with the other ranks'.

    One exchange of nine integers, read on the host.

    Raises:
        TypeError, ValueError: those of ``check``, on the other ranks a ValueError that says so;
            rows or options that don't go together.
    """
    rank = check_group(group)
    if not isinstance(queries, Tensor):
        check()  # raises; without a tensor no device is known to exchange notes on
    error: Exception | None = None
    note = torch.tensor(_Note(), device=queries.device)
    try:
        part = check()
        note = _note_of(part, options)
    except (TypeError, ValueError) as caught:
        error = caught
    notes = [_Note(*n) for n in gather(note, group).tolist()]
    if error is not None:
        raise error
    _compare(notes)
    return part, Ranks(
        group,
        rank,
        tuple(n.queries for n in notes),
        tuple(n.keys for n in notes),
        sum(n.paired for n in notes),
    )


def _note_of(part: Part, options: tuple[Any, ...]) -> Tensor:
    recording = torch.is_grad_enabled()
    note = _Note(
        fine=1,
        queries=part.queries.shape[0],
        keys=part.keys.shape[0],
        width=part.queries.shape[1],
        dtype=FLOATING.index(part.queries.dtype),
        query_grad=int(recording and part.queries.requires_grad),
        key_grad=int(recording and part.keys.requires_grad),
        options=zlib.crc32(repr(options).encode()),
    )
    found = torch.tensor(note, device=part.queries.device)
    found[_Note._fields.index("paired")] = part.paired
    return found


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
            shown = f"{values}" if name == "width" else f"others on ranks {others}"
            raise ValueError(f"{contract}, got {shown}")


class _Gather(torch.autograd.Function):
    """Rows (n_r, d) of every rank to (sum n_r, d); each rank's loss sends its gradient to all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...], ranks: Ranks) -> Tensor:
        ctx.sizes, ctx.ranks = sizes, ranks
        # Collectives take equal shapes; a shorter rank's rows are followed by zeros.
        missing = max(sizes) - rows.shape[0]
        stacked = gather(torch.nn.functional.pad(rows, (0, 0, 0, missing)), ranks.group)
        return torch.cat([part[:size] for part, size in zip(stacked, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        sizes, ranks = ctx.sizes, ctx.ranks
        # A copy in acc dtype: the ranks' parts may be larger than their sum.
        layout = torch.contiguous_format
        total = grad.to(acc_dtype(grad.dtype), copy=True, memory_format=layout)
        dist.all_reduce(total, group=ranks.group)
        start = ranks.start(sizes)
        return total[start : start + sizes[ranks.rank]].to(grad.dtype), None, None
