"""Longest-pack-first histogram packing: bins are planned for counts of equal lengths, not one
document at a time (Krell et al., arXiv 2107.02027)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from varstream.batching.packing import Packing, pack_with


def lpfhp(lengths: Any, capacity: int, max_depth: int | None = None) -> Packing:
    """Longest-pack-first histogram packing: best fit on the histogram of lengths.

    From the longest length on, all documents of one length go together into the fullest bins that
    still hold them, as many into one bin as fit, then into new bins. Bins alike are kept as one
    entry with a count, so the work grows with the number of different lengths. Fill comes close to
    :func:`best_fit_decreasing`; bins hold runs of equal lengths.

    Args:
        lengths: (n,) tokens of each document, 0 to ``capacity``: a list, array or tensor of
            integers.
        capacity: tokens that a bin may hold, at most 2**31 - 1.
        max_depth: documents that a bin may hold, or None for no limit.

    Returns:
        A :class:`Packing`. Equal documents are taken in the given order; the result is
        deterministic.

    Raises:
        TypeError, ValueError: as :func:`best_fit_decreasing`.

    Source: LPFHP of "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027),
    with its option to spread equal lengths over a bin.
    """
    return pack_with(_pack, lengths, capacity, max_depth)


class _Run(NamedTuple):
    """What a bin holds, from the last run of equal lengths back to the first."""

    before: _Run | None
    length: int
    repeat: int


class _Group(NamedTuple):
    """Bins alike."""

    bins: int
    depth: int  # documents in each
    last: _Run | None


class _Open:
    """Groups of open bins by the room they have left; of equal room the one used last comes
    first."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # ascending
        self._groups: dict[int, list[_Group]] = {}

    def push(self, room: int, group: _Group) -> None:
        if room not in self._groups:
            insort(self._rooms, room)
            self._groups[room] = []
        self._groups[room].append(group)

    def pop(self, length: int) -> tuple[int, _Group] | None:
        """Takes out a group of least room >= length."""
        at = bisect_left(self._rooms, length)
        if at == len(self._rooms):
            return None
        room = self._rooms[at]
        group = self._groups[room].pop()
        if not self._groups[room]:
            del self._rooms[at], self._groups[room]
        return room, group

    def __iter__(self) -> Iterator[_Group]:
        return (group for room in self._rooms for group in self._groups[room])


def _pack(lengths: np.ndarray, capacity: int, max_depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The packer behind ``lpfhp``: (order (n,), offsets (bins + 1,)), as the compiled ones."""
    for wrong, contract in (
        (lengths < 0, ">= 0"),
        (lengths > capacity, f"at most the capacity {capacity}"),
    ):
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(f"lengths must be {contract}, got {lengths[at]} at index {at}")
    order = np.argsort(-lengths, kind="stable")
    values, starts, counts = np.unique(-lengths[order], return_index=True, return_counts=True)
    next_document = dict(zip((-values).tolist(), starts.tolist(), strict=True))
    groups = _plan(zip((-values).tolist(), counts.tolist(), strict=True), capacity, max_depth)

    pieces, depths = [], [np.zeros(1, dtype=np.int64)]
    for group in groups:
        runs, run = [], group.last
        while run is not None:
            runs.append(run)
            run = run.before
        columns = []
        for run in reversed(runs):
            start, taken = next_document[run.length], group.bins * run.repeat
            columns.append(order[start : start + taken].reshape(group.bins, run.repeat))
            next_document[run.length] = start + taken
        pieces.append(np.concatenate(columns, axis=1).ravel())
        depths.append(np.full(group.bins, group.depth, dtype=np.int64))
    return (
        np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64),
        np.cumsum(np.concatenate(depths)),
    )


def _plan(histogram: Iterator[tuple[int, int]], capacity: int, max_depth: int) -> list[_Group]:
    """Groups of bins for (length, documents) pairs that come from long to short."""
    still_open, full = _Open(), []
    for length, left in histogram:
        while left:
            found = still_open.pop(length)
            room, group = found or (capacity, _Group(left, 0, None))
            fits = max_depth - group.depth
            if length > 0:
                fits = min(fits, room // length)
            repeat = min(fits, left)
            used = min(group.bins, left // repeat)
            if found and group.bins > used:
                still_open.push(room, group._replace(bins=group.bins - used))
            left -= used * repeat
            grown = _Group(used, group.depth + repeat, _Run(group.last, length, repeat))
            if grown.depth == max_depth:
                full.append(grown)
            else:
                still_open.push(room - repeat * length, grown)
    return [*full, *still_open]
