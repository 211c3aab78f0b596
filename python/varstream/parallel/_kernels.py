"""The softmax of a chunk whose classes are spread over ranks, by the row kernels.

A first launch sums over this rank's classes, ``RowSums`` of ``csrc/cross_entropy/row_sums.cuh`` for
each row, and looks up the targets it holds. Every rank gathers all ranks' numbers and joins them
alike, in float64; what follows for all classes goes into the rows' values and, as three numbers a
row, into a second launch, which writes the gradient over the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from varstream import _load
from varstream.cross_entropy.chunk_rule import chunk_rows
from varstream.cross_entropy.rows import DeviceRows
from varstream.cross_entropy.softmax import RowTerms, RowValues, SoftmaxCall
from varstream.ops._head import HeadCall
from varstream.parallel._shards import Shards

_SUMS = 7  # numbers of a row: top, total, moment, squares, gap, weight, argmax as int32 bits


def serve(device: torch.device) -> bool:
    """Whether the row kernels run on a device's tensors."""
    return device.type == "cuda" and _load.has_cuda_kernel("softmax_rows_")


def chosen(x: Tensor) -> bool:
    """Whether a call with the input ``x`` goes through the row kernels, which know no float64."""
    return x.dtype != torch.float64 and serve(x.device)


def automatic_rows(call: HeadCall, classes: int) -> int:
    """Rows of a chunk; ``classes`` are the largest shard's, so every rank finds the same."""
    rows, width = call.input.shape
    bound = rows if call.max_rows is None else min(rows, call.max_rows)
    itemsize = (call.logits_dtype or torch.float32).itemsize
    return chunk_rows(bound, width, classes, itemsize)


class Joined(NamedTuple):
    """A chunk's row sums over all classes, (C,) float64; in rows that take no part all yield 0."""

    highest: Tensor  # the largest logit
    total: Tensor  # sum of e^(z - base)
    moment: Tensor | None  # sum of e^(z - base) (z - base)
    squares: Tensor | None  # sum of e^(2 (z - base))
    gap: Tensor | None  # sum of w (base - z)
    weight: Tensor | None  # sum of w
    argmax: Tensor | None  # int64
    below: Tensor  # (C, K) z_t - base

    @property
    def log_total(self) -> Tensor:
        return self.total.log()


@dataclass(frozen=True)
class ShardedSoftmax:
    """A call of the row kernels for this rank's classes, and what it takes to join the ranks."""

    call: SoftmaxCall  # its targets are columns of this rank's logits, -1 for other ranks' classes
    shards: Shards

    @property
    def needs_moment(self) -> bool:
        return self.call.values.entropy is not None or self.call.terms.entropy is not None

    @property
    def needs_weight(self) -> bool:
        return self.call.values.class_sum is not None or self.call.terms.smooth is not None

    def run(self, part: slice, logits: Tensor) -> None:
        """Rows ``part`` of the order: their values, and their logits (C, V_r and more) turn into
        the gradient where that is wanted."""
        count, targets = logits.shape[0], self.call.target.shape[1]
        # One tensor is gathered: first the sums (C, 7), then the targets' logits (C, K).
        own = torch.empty(count * (_SUMS + targets), dtype=torch.float32, device=logits.device)
        sums, target_z = _split(own, count, targets)
        self.call.sum_shard(part, logits, sums, target_z)
        if self.call.values.argmax is not None:
            sums[:, 6].view(torch.int32).add_(self.shards.start)
        live = self.call.rows.index[part] >= 0
        joined = self._join(self.shards.gather(own), live, targets)
        self._write(part, joined)
        if self.call.gradient is not None:
            self.call.shard_gradient(part, logits, self._given(part, joined))

    def _join(self, ranks: Tensor, live: Tensor, targets: int) -> Joined:
        """Every rank's numbers (P, C (7 + K)) as ``RowSums::join`` does it."""
        count = live.shape[0]
        sums, target_z = _split(ranks.double(), count, targets)
        top, totals, moments, squares, gaps, weights, _ = sums.unbind(2)  # (P, C) each
        highest = top.amax(0)
        base = _base(highest)
        share = (top - base).exp()  # at most 1; 0 where a rank's classes are all banned
        # Sums are 0 in rows that take no part: with a total of 1 all that follows from them is 0.
        total = torch.where(live, (share * totals).sum(0), 1.0)
        moment = square = gap = weight = argmax = None
        if self.needs_moment or self.needs_weight:
            rise = base - _base(top)
            if self.needs_moment:
                moment = (share * (moments - totals * rise)).sum(0)
            if self.needs_weight:
                gap, weight = (gaps + weights * rise).sum(0), weights.sum(0)
        if self.call.values.log_sum_sq is not None:
            square = torch.where(live, (share.square() * squares).sum(0), 1.0)
        if self.call.values.argmax is not None:
            places = _split(ranks, count, targets)[0][:, :, 6].view(torch.int32)
            first = places.gather(0, top.argmax(0, keepdim=True))[0]
            argmax = torch.where(live, first.long(), -1)
        # A target's logit is its owner's, plus zeros.
        below = target_z.sum(0) - base[:, None]
        return Joined(highest, total, moment, square, gap, weight, argmax, below)

    def _write(self, part: slice, joined: Joined) -> None:
        """The rows' values that are wanted."""
        values, log_total = self.call.values, joined.log_total
        if values.logp is not None:
            values.logp[part] = joined.below - log_total[:, None]
        if values.lse is not None:
            values.lse[part] = joined.highest + log_total
        if values.entropy is not None:
            values.entropy[part] = _entropy(joined)
        if values.class_sum is not None:
            assert joined.gap is not None and joined.weight is not None
            values.class_sum[part] = -(joined.gap + joined.weight * log_total)
        if values.log_sum_sq is not None:
            assert joined.squares is not None
            values.log_sum_sq[part] = joined.squares.log() - 2 * log_total
        if values.argmax is not None:
            assert joined.argmax is not None
            values.argmax[part] = joined.argmax

    def _given(self, part: slice, joined: Joined) -> Tensor:
        """What the second launch is told, (C, 3): the largest logit, the total and
        ``s sum_c w_c + f' - h entropy``, the row factor but for the targets' part."""
        terms, scale = self.call.terms, self.call.lse_sq_scale
        rest = torch.zeros_like(joined.total)
        if terms.smooth is not None:
            assert joined.weight is not None
            rest = rest + terms.smooth[part] * joined.weight
        if terms.lse is not None:
            rest = rest + terms.lse[part]
        if scale is not None:
            rest = rest + 2 * scale * (joined.highest + joined.log_total)
        if terms.entropy is not None:
            rest = rest - terms.entropy[part] * _entropy(joined)
        return torch.stack([joined.highest, joined.total, rest], 1).float()


def sharded(
    call: HeadCall,
    shards: Shards,
    rows: DeviceRows,
    target: Tensor,
    terms: RowTerms,
    values: RowValues,
    *,
    class_weight: Tensor | None = None,
    lse_sq_scale: Tensor | None = None,
    gradient: torch.dtype | None = None,
) -> ShardedSoftmax:
    """``target`` (N, K) and ``class_weight`` (V,) of the whole head, ``terms`` (N, ...)."""
    own = shards.own(class_weight)
    ordered = terms.gathered(rows)
    softmax = SoftmaxCall(
        call.head(),
        rows,
        shards.column(rows.gather(target.long()), -1),
        ordered,
        values,
        None if own is None else own.float().contiguous(),
        None if lse_sq_scale is None else lse_sq_scale.float(),
        gradient,
    )
    return ShardedSoftmax(softmax, shards)


def _split(numbers: Tensor, count: int, targets: int) -> tuple[Tensor, Tensor]:
    """(..., C (7 + K)) -> the sums (..., C, 7) and the targets' logits (..., C, K)."""
    sums, target_z = numbers.split([count * _SUMS, count * targets], dim=-1)
    return sums.unflatten(-1, (count, _SUMS)), target_z.unflatten(-1, (count, targets))


def _entropy(joined: Joined) -> Tensor:
    assert joined.moment is not None
    return joined.log_total - joined.moment / joined.total


def _base(top: Tensor) -> Tensor:
    """What exponents are taken relative to: the largest logit, 0 where all are -inf."""
    return torch.where(top == float("-inf"), 0.0, top)
