"""Gradients of attention with relative bias: each piece's probabilities are formed again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varstream._checks import acc_dtype
from varstream.reference.relative_attention import (
    Distances,
    Layout,
    Options,
    Part,
    Piece,
    by_head,
    hidden_keys,
    keep_factors,
    key_blocks,
    parts_of,
    probabilities,
    products,
    unshifted,
)


@dataclass(frozen=True)
class DistanceGradients:
    """Sums by distance for the tables whose gradients are wanted, in acc dtype."""

    table: Tensor | None  # (H, 2N-1)
    key: Tensor | None  # (H, 2N-1, D)
    query: Tensor | None  # (H, 2N-1, D), of i - j

    @staticmethod
    def zeros(distances: Distances) -> DistanceGradients:
        key, query = (
            None if t is None else t.new_zeros(t.shape[0], t.shape[2], t.shape[1])
            for t in (distances.key, distances.query)
        )
        table = distances.table
        return DistanceGradients(None if table is None else torch.zeros_like(table), key, query)

    def tables(self, distances: Distances, opts: Options) -> list[Tensor | None]:
        """The tables' gradients in their dtypes: distances that share a row are summed there."""
        by_row = [
            None if self.table is None else self.table.t(),
            None if self.key is None else self.key.transpose(0, 1),
            None if self.query is None else self.query.transpose(0, 1).flip(0),
        ]
        found: list[Tensor | None] = []
        for table, rows in zip((opts.table, opts.key_table, opts.query_table), by_row, strict=True):
            if table is None or rows is None:
                found.append(None)
                continue
            grad = rows.new_zeros(table.shape)
            if opts.deterministic and grad.is_cuda:
                grad.index_put_((distances.rows,), rows, accumulate=True)  # sorts, then sums
            else:
                grad.index_add_(0, distances.rows, rows)
            found.append(grad.to(table.dtype))
        return found


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, opts: Options, need_tables: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Return dq, dk, dv in q's dtype, and the gradients of table, key_table and query_table, each
    None where there is no table or ``need_tables`` is false."""
    acc = acc_dtype(q.dtype)
    layout = Layout.make(opts.cu_seqlens, q.shape[0], q.shape[1], acc.itemsize)
    if not layout.blocks or not q.shape[1]:
        tables = [
            None if t is None or not need_tables else torch.zeros_like(t)
            for t in (opts.table, opts.key_table, opts.query_table)
        ]
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), tables
    distances = Distances.make(opts, layout.longest, acc)
    sums = DistanceGradients.zeros(distances) if need_tables else DistanceGradients(*[None] * 3)
    grouped = tuple(layout.gather(t) for t in (q, k, v, dout))
    grads = tuple(layout.empty(t).zero_() for t in (q, k, v))
    for block in layout.blocks:
        hidden = hidden_keys(layout, block)
        for piece in layout.pieces(block, acc.itemsize):
            part, (rows,) = parts_of(layout, block, grouped, piece)
            into, _ = parts_of(layout, block, grads, piece)
            p = probabilities(part, piece, hidden, distances, opts.softmax_scale)
            keep = None
            if opts.dropout_p > 0.0:
                keep = keep_factors(opts, block.group, piece, p)
            dscores = _scores_gradient(part, rows, p, keep, into.v)
            _product_gradients(part, into, dscores, opts.softmax_scale)
            _bias_gradients(part, into, dscores, piece, distances, sums)
    dq, dk, dv = (layout.scatter(t, q.dtype) for t in grads)
    return dq, dk, dv, sums.tables(distances, opts)


def _scores_gradient(
    part: Part, dout: Tensor, p: Tensor, keep: Tensor | None, dv: Tensor
) -> Tensor:
    """Add into dv (h, members, n, Dv) and return the scores' gradient (h, members, rows, n)."""
    dropped = p if keep is None else p * keep
    products(dv).baddbmm_(products(dropped).transpose(1, 2), products(dout))
    dp = torch.bmm(products(dout), products(part.v).transpose(1, 2)).view(p.shape)
    if keep is not None:
        dp.mul_(keep)
    # p * (dp - rowsum(p * dp)): a piece holds whole rows
    return torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)


def _product_gradients(part: Part, into: Part, dscores: Tensor, scale: float) -> None:
    """Gradients of scale * q k^T, added into ``into``."""
    ds = products(dscores)
    products(into.q).baddbmm_(ds, products(part.k), alpha=scale)
    products(into.k).baddbmm_(ds.transpose(1, 2), products(part.q), alpha=scale)


def _bias_gradients(
    part: Part,
    into: Part,
    dscores: Tensor,
    piece: Piece,
    distances: Distances,
    sums: DistanceGradients,
) -> None:
    """Gradients of the bias terms, added into ``into`` and ``sums``."""
    n, heads = part.k.shape[2], slice(piece.h0, piece.h1)
    columns = distances.columns(piece, n)
    if distances.key is not None:
        by_distance = by_head(unshifted(dscores))  # (h, members * rows, distances)
        key = distances.key[heads, :, columns].transpose(1, 2)
        by_head(into.q).baddbmm_(by_distance, key)
        if sums.key is not None:
            sums.key[heads, columns].baddbmm_(by_distance.transpose(1, 2), by_head(part.q))
        if sums.table is not None:
            sums.table[heads, columns] += by_distance.sum(1)
    elif sums.table is not None:
        sums.table[heads, columns] += unshifted(dscores.sum(1, keepdim=True)).sum((1, 2))
    if distances.query is None:
        return
    for j0, j1 in key_blocks(piece, n):
        columns = distances.columns_back(piece, j0, j1)
        by_distance = by_head(unshifted(dscores[..., j0:j1].transpose(2, 3)))
        query = distances.query[heads, :, columns].transpose(1, 2)
        by_head(into.k[:, :, j0:j1]).baddbmm_(by_distance, query)
        if sums.query is not None:
            keys = by_head(part.k[:, :, j0:j1])
            sums.query[heads, columns].baddbmm_(by_distance.transpose(1, 2), keys)
