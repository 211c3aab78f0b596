"""Gradients of a sharded head: of this rank's classes, and of the input over all classes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from varstream.ops._head import OnceOnly
from varstream.parallel._shards import Shards
from varstream.parallel._softmax import ChunkValues, ShardSoftmax
from varstream.reference.head import ClassSums, Head, row_slices
from varstream.reference.head_gradient import (
    Gradients,
    Upstream,
    capped_gradient_,
    logit_gradient_,
)
from varstream.reference.head_rows import Rows


class ShardGradients(Gradients):
    """Gradients being summed over chunks; a chunk of dX also over the ranks.

    dX is reduced chunk by chunk, (C, d) in the accumulation dtype, and rounded to the input's dtype
    afterwards: the shards' parts may be larger than their sum, and no (N, d) buffer in the
    accumulation dtype is needed. dW and db are this rank's own.
    """

    def __init__(
        self,
        x: Tensor,
        head: Head,
        rows: Rows,
        needs: tuple[bool, bool, bool],
        sums: ClassSums | None,
        shards: Shards,
    ) -> None:
        super().__init__(x, head, rows, needs, sums)
        self.shards = shards

    def _input_rows(
        self,
        rows: slice | Tensor,
        x: Tensor,
        g: Tensor,
        factor: Tensor | None,
        smooth: Tensor | None,
    ) -> None:
        part = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.head.input_gradient(g, part)
        if factor is not None:
            part.mul_(factor[:, None])
        if smooth is not None:
            part.addr_(smooth, self.columns, alpha=-self.head.gradient_scale)
        self.shards.add_(part)
        self.input[rows] = part.to(self.input.dtype)


def finished(
    name: str, grads: Iterable[Tensor | None], anchor: Tensor
) -> tuple[Tensor | None, ...]:
    """What a backward returns: under ``create_graph=True`` gradients that refuse to be
    differentiated. ``anchor`` is an output of the function, which leads back to its inputs."""
    if not torch.is_grad_enabled():
        return tuple(grads)
    return tuple(None if g is None else OnceOnly.apply(name, g, anchor) for g in grads)


def add_chunk(
    grads: ShardGradients,
    softmax: ShardSoftmax,
    rows: slice | Tensor,
    chunk: tuple[Tensor, Tensor, Tensor],
    values: ChunkValues,
    up: Upstream,
) -> None:
    """Add the gradients of a chunk: ``chunk`` holds x (C, d), the buffer's rows as ``measure`` left
    them, and the targets' columns (C, K)."""
    x, u, t = chunk
    capped = softmax.capped
    factors = []
    for block in row_slices(u, capped or up.entropy is not None):
        p = softmax.probabilities(u, values, block)
        factor = logit_gradient_(
            p, values.rows(block), t[block], up[block], softmax.wide_sums, capped
        )
        if capped:
            capped_gradient_(u[block], p)
        if factor is not None:
            factors.append(factor)
    factor = torch.cat(factors) if factors else None
    grads.add(rows, x, u[:, : softmax.classes], factor, up.smooth)
