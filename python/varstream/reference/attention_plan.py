"""Which parts of each sequence's score matrix are visited: lengths and masks to plain data.

A plan is a list of row blocks; each block holds the tiles of keys its rows see. Work is
proportional to the visible
area: a key that no row of a block sees is in none of its tiles.
"""

from __future__ import annotations

from typing import NamedTuple

FULL, CAUSAL, EDGE = "full", "causal", "edge"


class Tile(NamedTuple):
    """Keys ``[k0, k1)`` of one sequence as a row block sees them.

    ``full``: every row sees every key. ``causal``: a square, row r sees keys up to r. ``edge``: a
    border of the mask runs through the tile, which has to be masked key by key.
    """

    k0: int
    k1: int
    kind: str


class RowBlock(NamedTuple):
    """Query rows ``[q0, q1)`` of one sequence and disjoint tiles they see, in key order."""

    q0: int
    q1: int
    tiles: list[Tile]
    again: bool = False  # an earlier block holds other tiles of these rows


def visible_range(row: int, sq: int, sk: int, left: int, right: int) -> tuple[int, int]:
    """Keys ``[first, last)`` that query ``row`` sees; both borders aligned bottom-right, -1 is
    unbounded."""
    at = row + sk - sq
    first = min(sk, max(0, at - left)) if left >= 0 else 0
    last = max(0, min(sk, at + right + 1)) if right >= 0 else sk
    return first, max(first, last)


def plan_sequence(
    sq: int, sk: int, left: int, right: int, block_q: int, block_k: int, causal_tiles: bool
) -> list[RowBlock]:
    """Plan one sequence.

    Args:
        sq: query rows.
        sk: keys in use.
        left: keys visible to the left of the aligned position, -1 for all.
        right: keys visible to its right, -1 for all, 0 for causal.
        block_q: rows of a block.
        block_k: keys of a ``full`` tile at most.
        causal_tiles: whether the kernel that runs the plan has a causal mode for square tiles.

    Returns:
        Row blocks in order; rows that see no key are in no tile or are hidden by an ``edge`` tile.
    """
    blocks: list[RowBlock] = []
    if sq == 0 or sk == 0:
        return blocks
    # More queries than keys: bottom-right alignment leaves the first rows nothing to see.
    start = max(0, sq - sk - right) if right >= 0 else 0
    for q0 in range(start, sq, block_q):
        q1 = min(q0 + block_q, sq)
        tiles = _tiles(q0, q1, sq, sk, left, right, block_k, causal_tiles)
        if tiles:
            blocks.append(RowBlock(q0, q1, tiles))
    return blocks


def plan_causal(sq: int, sk: int, block_q: int, block_k: int, square_q: int) -> list[RowBlock]:
    """Plan one causal sequence without a window, in two levels.

    Blocks of ``block_q`` rows see all keys before their diagonal square in one ``full`` tile (of
    ``block_k`` keys at most); inside the square, blocks of ``square_q`` rows hug the diagonal.
    Coarse blocks keep the number of passes over a long prefix small, fine ones the hidden half of
    the square.
    """
    blocks: list[RowBlock] = []
    shift = sk - sq
    for q0 in range(max(0, -shift), sq, block_q):
        q1, before = min(q0 + block_q, sq), q0 + shift
        if before > 0:
            tiles = [Tile(k, min(k + block_k, before), FULL) for k in range(0, before, block_k)]
            blocks.append(RowBlock(q0, q1, tiles))
        for row in range(q0, q1, square_q):
            end = min(row + square_q, q1)
            tiles = [Tile(before, row + shift, FULL)] if row > q0 else []
            tiles.append(Tile(row + shift, end + shift, CAUSAL))
            blocks.append(RowBlock(row, end, tiles, again=before > 0))
    return blocks


def _tiles(
    q0: int, q1: int, sq: int, sk: int, left: int, right: int, block_k: int, causal_tiles: bool
) -> list[Tile]:
    first_lo, first_hi = visible_range(q0, sq, sk, left, right)
    last_lo, last_hi = visible_range(q1 - 1, sq, sk, left, right)
    body_end, tail = first_hi, EDGE
    if causal_tiles and right == 0 and last_lo <= q0 + sk - sq:
        body_end, tail = q0 + sk - sq, CAUSAL  # the diagonal square [body_end, last_hi)
    if tail == EDGE and last_lo >= body_end:  # no key is seen by all rows
        return [Tile(first_lo, last_hi, EDGE)] if first_lo < last_hi else []
    tiles = [Tile(first_lo, last_lo, EDGE)]
    tiles += [Tile(k, min(k + block_k, body_end), FULL) for k in range(last_lo, body_end, block_k)]
    tiles += [Tile(body_end, last_hi, tail)]
    return [t for t in tiles if t.k0 < t.k1]
