"""Attention with relative bias over packed rows, composed from ATen: forward and backward.

What depends on the distance t = j - i only is taken to distances first: a table's rows for t =
-(N-1) .. N-1, N the longest length. A product with those gives, for row i, all of its distances;
shifted by one column a row they are the columns j, which is a view with another row stride. So
neither direction gathers or scatters scores: all is products and strided copies.

A row sees all keys of its sequence, and every piece of the plan holds whole rows: the backward
forms the softmax again and needs nothing of the forward's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from varstream._checks import acc_dtype
from varstream.reference.philox import philox4x32
from varstream.reference.relative_plan import CPU, CUDA, Group, Limits, Piece, pieces, plan_groups

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Options:
    """Every argument of the op that isn't q, k, v or a gradient."""

    cu_seqlens: Tensor  # (B+1,) int32
    buckets: Tensor  # (2M-1,) int64 or int32
    table: Tensor | None  # (R, H)
    key_table: Tensor | None  # (R, H, D)
    query_table: Tensor | None  # (R, H, D)
    rng_state: Tensor | None  # (2,) int64
    softmax_scale: float
    dropout_p: float
    deterministic: bool


def limits_of(device: torch.device) -> Limits:
    """How far sequences are grouped on a device."""
    return CPU if device.type == "cpu" else CUDA


# --- layout ---------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Where a group's rows are in the grouped layout, (heads, members, length) from ``start``."""

    group: Group
    start: int

    def of(self, flat: Tensor, heads: int) -> Tensor:
        """The group's part (heads, members, length, dim) of a grouped tensor, a view."""
        shape = heads, len(self.group.members), self.group.length
        rows = shape[0] * shape[1] * shape[2]
        return flat[self.start : self.start + rows].view(*shape, flat.shape[1])


@dataclass(frozen=True)
class Layout:
    """The grouped layout of a packed batch: blocks (heads, members, length, dim), one after the
    other, so that every batched product reads whole blocks."""

    blocks: list[Block]
    heads: int
    longest: int
    lengths: Tensor  # (B,) int64
    source: Tensor  # (P,) int64: packed row * heads + head, or total * heads where padded
    padding: Tensor | None  # positions that are padded
    total: int

    @staticmethod
    def make(cu_seqlens: Tensor, total: int, heads: int, itemsize: int) -> Layout:
        """The layout for these lengths; reads them on the host."""
        device = cu_seqlens.device
        starts = cu_seqlens.to(torch.int64)
        lengths = starts[1:] - starts[:-1]
        sizes: list[int] = lengths.tolist()
        groups = plan_groups(sizes, heads, itemsize, limits_of(device))
        blocks, parts, at = [], [], 0
        longest = max(sizes, default=0)
        columns = torch.arange(longest, device=device)
        head = torch.arange(heads, device=device)[:, None, None]
        for group in groups:
            members = torch.tensor(group.members, device=device)
            column = columns[: group.length]
            rows = (starts[members, None] + column) * heads + head  # (heads, members, length)
            if group.padded:
                rows.masked_fill_(column >= lengths[members, None], total * heads)
            blocks.append(Block(group, at))
            parts.append(rows.view(-1))
            at += rows.numel()
        source = torch.cat(parts) if parts else starts.new_empty(0)
        padded = any(group.padded for group in groups)
        padding = (source == total * heads).nonzero().squeeze(1) if padded else None
        return Layout(blocks, heads, longest, lengths, source, padding, total)

    def gather(self, t: Tensor) -> Tensor:
        """(total, heads, dim) to the grouped (P, dim) in acc dtype; 0 where padded."""
        rows = t.reshape(self.total * self.heads, t.shape[2])
        source = self.source
        if self.padding is not None:
            source = source.clamp(max=rows.shape[0] - 1)
        flat = rows.index_select(0, source)
        if self.padding is not None:
            flat.index_fill_(0, self.padding, 0.0)
        return flat.to(acc_dtype(t.dtype))

    def empty(self, like: Tensor) -> Tensor:
        """A grouped tensor (P + 1, dim) for ``like`` (total, heads, dim); the last row is 0."""
        flat = like.new_empty(len(self.source) + 1, like.shape[2], dtype=acc_dtype(like.dtype))
        flat[-1].zero_()
        return flat

    def scatter(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of ``empty`` as (total, heads, dim); rows of no sequence are 0."""
        last = len(self.source)
        position = self.source.new_full((self.total * self.heads + 1,), last)
        position.index_copy_(0, self.source, torch.arange(last, device=flat.device))
        rows = flat.to(dtype).index_select(0, position[:-1])
        return rows.view(self.total, self.heads, flat.shape[1])

    def pieces(self, block: Block, itemsize: int) -> Iterator[Piece]:
        """The pieces of a block."""
        limits = limits_of(self.source.device)
        return pieces(block.group, self.heads, itemsize, limits)


# --- bias -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distances:
    """The tables by distance, in acc dtype: column N - 1 is distance 0, N the longest length."""

    rows: Tensor  # (2N-1,) int64: the table row of t = j - i
    table: Tensor | None  # (H, 2N-1)
    key: Tensor | None  # (H, D, 2N-1)
    query: Tensor | None  # (H, D, 2N-1), of i - j
    longest: int

    @staticmethod
    def make(opts: Options, longest: int, dtype: torch.dtype) -> Distances:
        """Take the table rows that these lengths meet."""
        middle = (opts.buckets.shape[0] + 1) // 2
        rows = opts.buckets[middle - longest : middle + longest - 1].to(torch.int64)
        tables = [opts.table, opts.key_table, opts.query_table]
        for table in tables:
            if table is not None:  # an index past the table must not be read, whatever it holds
                rows = rows.clamp(0, table.shape[0] - 1)
        table, key, query = (
            None if t is None else t.index_select(0, rows).to(dtype) for t in tables
        )
        return Distances(
            rows,
            None if table is None else table.t().contiguous(),
            None if key is None else key.permute(1, 2, 0).contiguous(),
            None if query is None else query.flip(0).permute(1, 2, 0).contiguous(),
            longest,
        )

    def columns(self, piece: Piece, length: int) -> slice:
        """Distances j - i of the piece's rows to all keys: ``length + rows - 1`` of them."""
        first = self.longest - piece.i1
        return slice(first, first + length + piece.i1 - piece.i0 - 1)

    def columns_back(self, piece: Piece, j0: int, j1: int) -> slice:
        """Distances i - j of keys ``[j0, j1)`` to the piece's rows."""
        first = self.longest + piece.i0 - j1
        return slice(first, first + j1 - j0 + piece.i1 - piece.i0 - 1)


def key_blocks(piece: Piece, length: int) -> Iterator[tuple[int, int]]:
    """Keys in blocks as long as the piece's rows: a wider one would form distances nobody asks
    for."""
    step = piece.i1 - piece.i0
    for j0 in range(0, length, step):
        yield j0, min(j0 + step, length)


def shifted(by_distance: Tensor, columns: int) -> Tensor:
    """(h, members, rows, columns + rows - 1) by distance as (h, members, rows, columns), a view.

    Row i's distance to column j is ``j - i``, kept at ``j - i + rows - 1``: a step of one row is a
    step of one column back.
    """
    h, members, rows, width = by_distance.shape
    stride = members * rows * width, rows * width, max(width - 1, 1), 1
    offset = by_distance.storage_offset() + rows - 1
    return by_distance.as_strided((h, members, rows, columns), stride, offset)


def unshifted(scores: Tensor) -> Tensor:
    """The inverse of ``shifted``: 0 where a row has no such distance; a copy."""
    h, members, rows, columns = scores.shape
    by_distance = scores.new_zeros(h, members, rows, columns + rows - 1)
    shifted(by_distance, columns).copy_(scores)
    return by_distance


# --- scores ---------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What one piece reads of its group: q (h, members, rows, D), k and v (h, members, n, dim)."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def heads(self) -> int:
        return self.q.shape[0]


def products(t: Tensor) -> Tensor:
    """(h, members, rows, dim) as one batch of matrices (h * members, rows, dim), a view."""
    return t.view(t.shape[0] * t.shape[1], t.shape[2], t.shape[3])


def by_head(t: Tensor) -> Tensor:
    """(h, members, rows, dim) as one matrix a head (h, members * rows, dim), a view."""
    return t.view(t.shape[0], t.shape[1] * t.shape[2], t.shape[3])


def probabilities(
    part: Part, piece: Piece, hidden: Tensor | None, distances: Distances, scale: float
) -> Tensor:
    """Softmax (h, members, rows, n) of the piece's scores; ``hidden`` (members, 1, n) are padded
    keys."""
    h, members, rows, _ = part.q.shape
    n, heads = part.k.shape[2], slice(piece.h0, piece.h1)
    scores = part.q.new_empty(h, members, rows, n)
    terms = []
    if distances.table is not None:
        # Windows over the distances, last first, are the rows.
        row = distances.table[heads, distances.columns(piece, n)]
        terms.append(row.unfold(1, n, 1).flip(1).unsqueeze(1))
    if distances.key is not None:
        key = distances.key[heads, :, distances.columns(piece, n)]
        content = torch.bmm(by_head(part.q), key).view(h, members, rows, -1)
        terms.append(shifted(content, n))
    if len(terms) == 2:
        torch.add(*terms, out=scores)
    elif terms:
        scores.copy_(terms[0])
    else:
        scores.zero_()
    if distances.query is not None:
        for j0, j1 in key_blocks(piece, n):
            query = distances.query[heads, :, distances.columns_back(piece, j0, j1)]
            keys = part.k[:, :, j0:j1]
            back = torch.bmm(by_head(keys), query).view(h, members, j1 - j0, -1)
            scores[..., j0:j1] += shifted(back, rows).transpose(2, 3)
    keys_t = products(part.k).transpose(1, 2)
    scores.view(-1, rows, n).baddbmm_(products(part.q), keys_t, alpha=scale)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1)


def keep_factors(opts: Options, group: Group, piece: Piece, like: Tensor) -> Tensor:
    """Dropout factors (h, members, rows, n), those of ``philox.keep_scale`` for each sequence."""
    assert opts.rng_state is not None
    seed, offset = (int(word) for word in opts.rng_state.tolist())
    device = like.device
    sequences = torch.tensor([(b ^ offset) & _MASK for b in group.members], device=device)
    counter = [
        torch.arange((group.length + 3) // 4, device=device),
        torch.arange(piece.i0, piece.i1, device=device)[:, None],
        torch.arange(piece.h0, piece.h1, device=device)[:, None, None, None],
        sequences[:, None, None],
    ]
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    threshold = min(round(opts.dropout_p * 2**32), _MASK)
    kept = torch.stack([word >= threshold for word in words], dim=-1).flatten(-2)
    return kept[..., : group.length].to(like.dtype).mul_(1.0 / (1.0 - opts.dropout_p))


def parts_of(
    layout: Layout, block: Block, grouped: tuple[Tensor, ...], piece: Piece
) -> tuple[Part, list[Tensor]]:
    """q, k, v of a piece, and of the grouped tensors after these the piece's rows."""
    heads, rows = slice(piece.h0, piece.h1), slice(piece.i0, piece.i1)
    q, k, v, *rest = (block.of(t, layout.heads)[heads] for t in grouped)
    return Part(q[:, :, rows], k, v), [t[:, :, rows] for t in rest]


def hidden_keys(layout: Layout, block: Block) -> Tensor | None:
    """(members, 1, n) true at padded keys; None where there are none."""
    group = block.group
    if not group.padded:
        return None
    lengths = torch.tensor(group.members, device=layout.lengths.device)
    column = torch.arange(group.length, device=layout.lengths.device)
    return column >= layout.lengths[lengths][:, None, None]


# --- forward, backward ----------------------------------------------------------------------------


def forward(q: Tensor, k: Tensor, v: Tensor, opts: Options) -> Tensor:
    """Return out (total, H, Dv) in q's dtype."""
    acc = acc_dtype(q.dtype)
    layout = Layout.make(opts.cu_seqlens, q.shape[0], q.shape[1], acc.itemsize)
    if not layout.blocks or not q.shape[1]:
        return v.new_zeros(v.shape)
    distances = Distances.make(opts, layout.longest, acc)
    grouped = tuple(layout.gather(t) for t in (q, k, v))
    out = layout.empty(v)
    for block in layout.blocks:
        hidden = hidden_keys(layout, block)
        for piece in layout.pieces(block, acc.itemsize):
            part, _ = parts_of(layout, block, grouped, piece)
            p = probabilities(part, piece, hidden, distances, opts.softmax_scale)
            if opts.dropout_p > 0.0:
                p.mul_(keep_factors(opts, block.group, piece, p))
            _, (rows,) = parts_of(layout, block, (*grouped, out), piece)
            torch.bmm(products(p), products(part.v), out=products(rows))
    return layout.scatter(out, v.dtype)
