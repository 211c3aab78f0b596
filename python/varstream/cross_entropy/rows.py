"""Which rows of the head take part, chosen on the device: the device never waits for the host.

Rows that take part come first, in their order, then the others. A chunk is a piece of that order,
gathered into a small copy; rows past the count are zeros there and are skipped by the row kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeviceRows:
    """``N`` rows of which ``count`` take part, at most ``bound``."""

    order: Tensor  # (bound,) int64, distinct rows: those that take part first
    index: Tensor  # (bound,) the same, -1 for those that don't
    count: Tensor  # () int64
    total: int  # N
    exact: bool  # whether the caller gave the bound: nothing is read back then

    @property
    def bound(self) -> int:
        return self.order.shape[0]

    def gather(self, values: Tensor) -> Tensor:
        """``values`` (N, ...) of the rows in order, contiguous."""
        return values.index_select(0, self.order)

    def scatter(self, compact: Tensor, fill: float = 0) -> Tensor:
        """The inverse of ``gather``: (N, ...), ``fill`` in rows that have no place in the order.

        Floating values come poisoned.
        """
        out = compact.new_full((self.total, *compact.shape[1:]), fill)
        out.index_copy_(0, self.order, compact)
        return self.poison(out) if out.is_floating_point() else out

    def chunks(self, size: int) -> Iterator[slice]:
        """Pieces of the order of at most ``size`` rows, as even as possible.

        They end with the count. It is copied to the host while the first chunk is on its way to the
        device and looked at before the second, so the device never idles for it. During the capture
        of a graph, or with a bound of the caller's, all of the bound is walked instead.
        """
        pieces = -(-self.bound // size)
        count = None if pieces < 2 or self.exact else _HostCount(self.count)
        for piece in range(pieces):
            start = self.bound * piece // pieces
            if piece > 0 and count is not None and count.known() <= start:
                return
            yield slice(start, self.bound * (piece + 1) // pieces)

    def largest_chunk(self, size: int) -> int:
        """Rows of the largest chunk."""
        return 0 if self.bound == 0 else -(-self.bound // -(-self.bound // size))

    def poison(self, values: Tensor) -> Tensor:
        """NaN in place of ``values`` where more rows take part than the caller said."""
        if not self.exact:
            return values
        return torch.where(self.count > self.bound, torch.nan, values)

    def poison_(self, gradients: Tensor) -> None:
        """The same for a gradient, in place and in one element: enough to stop a training step."""
        if self.exact and gradients.numel() > 0:
            gradients.view(-1)[:1] += torch.where(self.count > self.bound, torch.nan, 0.0)


def select_rows(mask: Tensor, max_rows: int | None) -> DeviceRows:
    """Rows where ``mask`` (N,) holds; the caller knows that they are at most ``max_rows``."""
    total, count = mask.shape[0], mask.sum()
    order = torch.argsort(mask.logical_not().to(torch.uint8), stable=True)
    if max_rows is not None:
        order = order[:max_rows]
    place = torch.arange(order.shape[0], device=mask.device)
    index = torch.where(place < count, order, -1)
    return DeviceRows(order, index, count, total, max_rows is not None)


class _HostCount:
    """A number on its way from the device."""

    def __init__(self, count: Tensor) -> None:
        self.value: Tensor | None = count
        self.event: torch.cuda.Event | None = None
        if not count.is_cuda:
            return
        with torch.cuda.device(count.device):  # stream and event are those of the rows' device
            if torch.cuda.is_current_stream_capturing():
                self.value = None
                return
            self.value = torch.empty((), dtype=count.dtype, pin_memory=True)
            self.value.copy_(count, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def known(self) -> float:
        """The number; infinity where nobody may wait for it."""
        if self.value is None:
            return float("inf")
        if self.event is not None:
            self.event.synchronize()
        return int(self.value)
