"""Cutting packed rows into chunks: lengths to plain data, no tensors."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple


class Chunk(NamedTuple):
    """Rows ``[begin, end)`` of the packed batch and the keys they can see.

    Keys begin at the start of the first document the chunk touches, not at row 0, and end at the
    chunk's own end.
    """

    begin: int
    end: int
    key_begin: int
    cu_q: list[int]  # the touched documents' rows inside the chunk, from 0
    cu_k: list[int]  # their rows from the document's start to the chunk's end, from 0
    max_q: int
    max_k: int


def plan_chunks(cu_seqlens: Sequence[int], chunk_size: int) -> list[Chunk]:
    """Cut the rows that ``cu_seqlens`` covers into chunks of ``chunk_size`` rows.

    Chunk edges fall anywhere: a document may span many chunks and a chunk may hold many documents.
    No rows at all make one empty chunk, so that whoever walks the chunks learns the shapes.
    """
    total = cu_seqlens[-1]
    if total == 0:
        return [Chunk(0, 0, 0, [0, 0], [0, 0], 0, 0)]
    chunks = []
    for begin in range(0, total, chunk_size):
        end = min(begin + chunk_size, total)
        # first document whose rows reach past `begin`; bisect skips the empty ones before it
        first = bisect_right(cu_seqlens, begin) - 1
        last = bisect_left(cu_seqlens, end, lo=first)
        starts = list(cu_seqlens[first:last])
        key_begin = starts[0]
        cu_q = [max(start, begin) - begin for start in starts] + [end - begin]
        cu_k = [start - key_begin for start in starts] + [end - key_begin]
        chunks.append(Chunk(begin, end, key_begin, cu_q, cu_k, _longest(cu_q), _longest(cu_k)))
    return chunks


def _longest(cu: list[int]) -> int:
    return max(b - a for a, b in zip(cu, cu[1:], strict=False))
