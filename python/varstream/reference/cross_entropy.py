"""The chunked cross-entropy composed from ATen calls: loss and gradient in one pass.

The op walks the rows that take part in chunks of ``C`` and keeps one ``(C, V)`` buffer, which holds
in turn the logits, the probabilities and their gradient; nothing of shape ``(N, V)`` exists. The
gradient of the *summed* loss is formed together with the loss, three matrix products a chunk, which
is exact because every row's share in the sum is known before the loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varstream.reference.head import (
    Chunking,
    ClassSums,
    Head,
    auto_chunk_size,
    cap_scratch,
    logits_of,
    row_slices,
    softmax_in_place,
)
from varstream.reference.head_gradient import (
    Gradients,
    Upstream,
    capped_gradient_,
    logit_gradient_,
)
from varstream.reference.head_rows import (
    Rows,
    check_targets,
    columns,
    only,
    select_rows,
    take,
    take_any,
)


class Scales(NamedTuple):
    """What multiplies the terms of the loss, known before the loop; None: see each."""

    class_weight: Tensor | None = None  # (V,) w, all ones if None; used by the smoothing term only
    nll: Tensor | None = None  # like target, of -log p(target); 1 if None
    smooth: Tensor | None = None  # (N,) of sum_c w_c (-log p_c); no such term if None
    lse_sq: Tensor | None = None  # () of lse^2 of rows with a valid target; no such term if None


class Loss(NamedTuple):
    """Results of ``linear_cross_entropy``, in the op's order."""

    loss_sum: Tensor  # () acc dtype
    input: Tensor  # (N, d) gradient in the dtype of the input
    weight: Tensor  # (V, d) gradient, acc dtype
    bias: Tensor  # (V,) gradient, acc dtype
    lse_sq_sum: Tensor  # () sum of lse^2 over rows with a valid target
    logp: Tensor  # like target, log p(target), 0 where ignored; empty without metrics
    argmax: Tensor  # (N,) int64, -1 at ignored rows; empty without metrics


def chunk_rows(chunk_size: int, head: Head) -> int:
    """Rows of a chunk: what the caller asked for, or the automatic rule where that is 0."""
    if chunk_size > 0:
        return chunk_size
    weight = head.weight
    return auto_chunk_size(weight.shape[0], head.acc.itemsize, weight.device.type)


def chunk_buffer(head: Head, rows: Rows, size: int) -> Tensor:
    """The one (C, V) buffer of a call."""
    shape = rows.largest_chunk(size), head.weight.shape[0]
    return torch.empty(shape, dtype=head.acc, device=head.weight.device)


def linear_cross_entropy(
    x: Tensor,
    head: Head,
    target: Tensor,
    ignore_index: int,
    chunking: Chunking,
    scales: Scales,
    metrics: bool,
    needs: tuple[bool, bool, bool],
) -> Loss:
    """Summed loss, the gradients of that sum, and metrics.

    Args:
        x: (N, d).
        head: the projection, weight (V, d).
        target: (N,) or (N, K), int64 or int32.
        ignore_index: target value that takes no part; rows of nothing else are never read.
        chunking: rows of a chunk and a bound on those that take part.
        scales: factors of the terms. Without metrics, rows that they leave nothing of are skipped.
        metrics: whether ``logp`` and ``argmax`` are wanted.
        needs: which of the gradients of ``x``, weight and bias are wanted; the others are empty.
    """
    valid = columns(check_targets(target, ignore_index, head.weight.shape[0]))
    several = valid.shape[1] != 1
    nll = smooth = None  # (N, K) and (N,): 0 at ignored ones
    if several or scales.nll is not None:
        given = valid if scales.nll is None else columns(scales.nll)
        nll = only(given, valid, head.acc)
    if scales.smooth is not None:
        smooth = only(scales.smooth, valid.any(1), head.acc)
    rows = select_rows(live_rows(valid, nll, smooth, keep=metrics or scales.lse_sq is not None))
    chunking.check_composed(head, rows.count)
    sums = None if smooth is None else ClassSums(head, scales.class_weight)
    size = chunk_rows(chunking.chunk_size, head)
    grads = Gradients(x, head, rows, needs, sums)
    buffer = chunk_buffer(head, rows, size)
    loop = _Loop(head, buffer, scales.lse_sq, sums, any(needs), metrics)
    logp = buffer.new_zeros(valid.shape if metrics else (0,))
    argmax = torch.full(x.shape[:1] if metrics else (0,), -1, device=x.device)
    for part in rows.chunks(size):
        x_c = take(x, part, head.acc)
        t = take(columns(target), part, torch.int64)
        if several:
            t = t.masked_fill(~take(valid, part, torch.bool), 0)
        z = buffer[: t.shape[0]]
        head.product(x_c, z)
        up = Upstream(nll=take_any(nll, part), smooth=take_any(smooth, part))
        factor = loop.chunk(x_c, z, t, up)
        if any(needs):
            grads.add(part, x_c, z, factor, up.smooth)
        if metrics:
            logp[part], argmax[part] = torch.cat(loop.logp), torch.cat(loop.argmax)
            loop.logp, loop.argmax = [], []
    if metrics:
        logp = only(logp, valid, head.acc).view(target.shape)
    return Loss(loop.loss, *grads.result(), loop.lse_sq, logp, argmax)


def live_rows(valid: Tensor, nll: Tensor | None, smooth: Tensor | None, keep: bool) -> Tensor:
    """Rows (N,) that take part: with a valid target and, unless ``keep``, some factor not 0."""
    if keep or nll is None:
        return valid.any(1)
    live = (nll != 0).any(1)
    return live if smooth is None else live | (smooth != 0)


class _Loop:
    """Running sums of the loop and its treatment of one chunk."""

    def __init__(
        self,
        head: Head,
        buffer: Tensor,
        z_scale: Tensor | None,
        sums: ClassSums | None,
        gradient: bool,
        metrics: bool,
    ) -> None:
        self.head, self.z_scale, self.sums = head, z_scale, sums
        self.gradient, self.metrics = gradient, metrics
        self.scratch = cap_scratch(buffer, head)
        self.loss = buffer.new_zeros(())
        self.lse_sq = torch.zeros_like(self.loss)
        self.logp: list[Tensor] = []  # of the chunk's blocks, with metrics
        self.argmax: list[Tensor] = []

    def chunk(self, x: Tensor, z: Tensor, t: Tensor, up: Upstream) -> Tensor | None:
        """Add the losses of a chunk ``x`` (C, d); ``z`` (C, V), the product, turns into their
        gradient up to ``gradient_scale`` and the row factor (C,) that is returned (None for 1)."""
        capped, sums = self.head.softcap > 0, self.sums
        class_sums: Tensor | None = None  # (C,) of the block; without a cap the block is the chunk
        if sums is not None and not capped:
            class_sums = sums.of_rows(x)
        factors: list[Tensor] = []
        for block in row_slices(z, capped):
            u, t_b, up_b = z[block], t[block], up[block]
            p = logits_of(u, self.head, self.scratch)
            if sums is not None and capped:
                class_sums = sums.of_logits(p)
            soft = softmax_in_place(p, t_b, self.metrics)
            self.loss += _weighted(-soft.logp, up_b.nll)
            if sums is not None and class_sums is not None:
                self.loss += _weighted(sums.weighted_nll(soft, class_sums), up_b.smooth)
            if self.z_scale is not None:
                lse_sq = soft.lse.square().sum()
                self.lse_sq += lse_sq
                self.loss += lse_sq * self.z_scale
                up_b = Upstream(up_b.nll, up_b.smooth, soft.lse * (2 * self.z_scale))
            if self.metrics:
                assert soft.argmax is not None
                self.logp.append(soft.logp)
                self.argmax.append(soft.argmax)
            if not self.gradient:
                continue
            factor = logit_gradient_(p, soft, t_b, up_b, sums, capped)
            if capped:
                capped_gradient_(u, p)
            if factor is not None:
                factors.append(factor)
        return torch.cat(factors) if factors else None


def _weighted(values: Tensor, factor: Tensor | None) -> Tensor:
    """Sum of ``values`` times ``factor``; a factor of 0 leaves nothing of an infinite value."""
    if factor is None:
        return values.sum()
    return torch.where(factor == 0, 0, values * factor).sum()
