"""Which sequences of a packed batch share one batched product, and in what pieces: lengths to plain
data.

A product over few short sequences costs more in its call than in its arithmetic, so sequences of
like length run together, the shorter ones padded with a few keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

FEWEST_ROWS = 64  # a piece of a long sequence; its scores are linear in the length all the same


class Limits(NamedTuple):
    """How far grouping goes on a device."""

    score_bytes: int  # one buffer of scores; a call holds a handful of them
    padded_scores: int  # what the sequences of one length may waste to save a group of their own


CPU = Limits(4 << 20, 1 << 14)
CUDA = Limits(64 << 20, 1 << 20)


class Group(NamedTuple):
    """Sequences that are computed together, all as long as the first."""

    members: list[int]  # indices in the batch, longest first
    length: int  # of the longest
    padded: bool  # some member is shorter


class Piece(NamedTuple):
    """Heads ``[h0, h1)`` and query rows ``[i0, i1)`` of a group, against all of its keys."""

    h0: int
    h1: int
    i0: int
    i1: int


def plan_groups(lengths: Sequence[int], heads: int, itemsize: int, limits: Limits) -> list[Group]:
    """Group the non-empty sequences, longest first; each is in one group."""
    order = sorted((b for b, n in enumerate(lengths) if n > 0), key=lambda b: -lengths[b])
    groups: list[Group] = []
    members: list[int] = []
    for n, run in groupby(order, key=lambda b: lengths[b]):
        alike = list(run)
        longest = lengths[members[0]] if members else n
        if len(alike) * heads * (longest * longest - n * n) > limits.padded_scores:
            groups.append(_group(members, lengths))
            members = []
        for b in alike:
            area = heads * lengths[members[0] if members else b] ** 2
            if members and (len(members) + 1) * area * itemsize > limits.score_bytes:
                groups.append(_group(members, lengths))
                members = []
            members.append(b)
    if members:
        groups.append(_group(members, lengths))
    return groups


def _group(members: list[int], lengths: Sequence[int]) -> Group:
    longest = lengths[members[0]]
    return Group(members, longest, lengths[members[-1]] < longest)


def pieces(group: Group, heads: int, itemsize: int, limits: Limits) -> Iterator[Piece]:
    """Pieces whose scores fit in the budget: all of the group, or one long sequence cut by heads,
    and by rows where one head's scores are too many."""
    n = group.length
    row = len(group.members) * n * itemsize
    most_heads = max(1, min(heads, limits.score_bytes // (row * n)))
    rows = n if row * n <= limits.score_bytes else max(FEWEST_ROWS, limits.score_bytes // row)
    for h0 in range(0, heads, most_heads):
        for i0 in range(0, n, rows):
            yield Piece(h0, min(h0 + most_heads, heads), i0, min(i0 + rows, n))
