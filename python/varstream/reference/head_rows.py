"""Which rows of the head take part, and how they are cut into chunks.

``N`` rows, ``K`` targets a row, chunks of ``C`` rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows that take part: all ``total`` of them (``index`` None) or an ascending index."""

    index: Tensor | None
    count: int
    total: int

    def chunks(self, size: int) -> Iterator[slice | Tensor]:
        """Cut into pieces of at most ``size`` rows, as even as possible.

        A run of consecutive rows comes as a slice (a view of the input), others as an index.
        """
        pieces = -(-self.count // size)
        for piece in range(pieces):
            start = self.count * piece // pieces
            stop = self.count * (piece + 1) // pieces
            if self.index is None:
                yield slice(start, stop)
                continue
            index = self.index[start:stop]
            first, last = int(index[0]), int(index[-1])
            yield slice(first, last + 1) if last - first == stop - start - 1 else index

    def largest_chunk(self, size: int) -> int:
        """Rows of the largest chunk."""
        return 0 if self.count == 0 else -(-self.count // -(-self.count // size))


def select_rows(mask: Tensor) -> Rows:
    """Rows where ``mask`` (N,) holds."""
    total = mask.shape[0]
    index = mask.nonzero().view(-1)
    count = index.shape[0]
    return Rows(None if count == total else index, count, total)


def columns(target: Tensor) -> Tensor:
    """Targets (N,) or (N, K) with their second dimension."""
    return target[:, None] if target.dim() == 1 else target


def check_targets(target: Tensor, ignore_index: int, classes: int) -> Tensor:
    """Refuse classes outside ``[0, V)``; returns the mask (N,) or (N, K) of valid targets."""
    valid = target != ignore_index
    wrong = valid & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        row, *column = wrong.nonzero()[0].tolist()
        where = f"row {row}" + (f", column {column[0]}" if column else "")
        raise ValueError(
            f"target must hold classes in [0, {classes}) or ignore_index={ignore_index}, "
            f"got {int(target[row, *column])} at {where}"
        )
    return valid


def only(values: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in ``dtype`` where ``mask`` holds, 0 elsewhere whatever stood there."""
    return torch.where(mask, values.to(dtype), 0)


def take(values: Tensor, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """``values[rows]`` in ``dtype``: a view where that is possible."""
    part = values[rows] if isinstance(rows, slice) else values.index_select(0, rows)
    return part.to(dtype)


def take_any(values: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """``take`` of what may be absent, in its own dtype."""
    return None if values is None else take(values, rows, values.dtype)
