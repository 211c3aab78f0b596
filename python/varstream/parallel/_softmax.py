"""The softmax of a chunk whose classes are spread over ranks: one small exchange.

Rank r turns its logits z (C, V_r) into ``e^(z - m_r)`` with its own row maximum m_r and sends, per
row, m_r, the sum of these exponentials, the targets' logits it holds and whatever sums over classes
are wanted: a few numbers in float64, which holds every float32 and class index as it is. Every rank
gathers all of them and merges them alike:

    m = max_r m_r,   sum_c e^(z_c - m) = sum_r e^(m_r - m) sum_(c of r) e^(z_c - m_r)

This is the sum one rank would form, in blocks: no factor is above 1, the largest is exactly 1, a
target's logit is its owner's and is rounded nowhere. One gather does what a maximum and a sum would
need two reductions for, and all ranks get the same bits.

Buffers have spare columns behind the V_r classes: a target that another rank holds points there, so
indexing needs no branches and can't hit a class. Nothing reads what stands there: no sum, no
product, and a target's logit is taken from its owner only.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from varstream.parallel._shards import Shards
from varstream.reference.head import (
    ClassSums,
    Head,
    Softmax,
    cap_scratch,
    logits_of,
    row_slices,
)
from varstream.reference.head_rows import Rows
from varstream.reference.token_logprobs import Wanted

_ALIGNMENT = 8  # columns of a buffer come in multiples of it: rows stay aligned


class ChunkValues(NamedTuple):
    """Values of a chunk's rows over all classes, and what this rank's probabilities need."""

    soft: Softmax
    base: Tensor  # (C,) what this rank's logits are lowered by before their exponential
    ratio: Tensor  # (C,) from these exponentials to probabilities
    class_sum: Tensor | None  # (C,) float64, sum_c w_c z_c
    entropy: Tensor | None  # (C,)
    log_sum_sq: Tensor | None  # (C,) log sum_c p_c^2

    def rows(self, block: slice) -> Softmax:
        """The softmax of some of the rows."""
        return Softmax(*(None if part is None else part[block] for part in self.soft))  # type: ignore[arg-type]


def shard_sums(head: Head, class_weight: Tensor | None, shards: Shards) -> ClassSums:
    """Sums over this rank's classes, whose ``total`` is that of all; ``class_weight`` (V,)."""
    sums = ClassSums(head, shards.own(class_weight))
    sums.total = float(shards.classes) if class_weight is None else class_weight.double().sum()
    return sums


class ShardSoftmax:
    """The buffer (C, V_r and spare columns) of a call and what happens in it."""

    def __init__(
        self,
        head: Head,
        shards: Shards,
        rows: Rows,
        size: int,
        sums: ClassSums | None = None,
        want: Wanted | None = None,
    ) -> None:
        self.head, self.shards, self.sums = head, shards, sums
        self.want = want or Wanted()
        self.classes = head.weight.shape[0]
        width = -(-(self.classes + 1) // _ALIGNMENT) * _ALIGNMENT
        device = head.weight.device
        self.buffer = torch.empty(rows.largest_chunk(size), width, dtype=head.acc, device=device)
        self.scratch = cap_scratch(self.buffer, head)
        self.capped = head.softcap > 0
        # A block's passes stay in the cache; a GPU would rather have few launches.
        self.split = self.capped or device.type == "cpu"
        self.names = ["peak", "total"]
        if sums is not None:
            self.names.append("class_sum")
        self.names += [n for n in ("entropy", "argmax", "log_sum_sq") if getattr(self.want, n)]
        # For logit_gradient_, which subtracts the class weights from whole rows of the buffer.
        self.wide_sums = sums
        if sums is not None and sums.weight is not None:
            self.wide_sums = copy.copy(sums)
            self.wide_sums.weight = torch.nn.functional.pad(sums.weight, (0, width - self.classes))

    def measure(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, ChunkValues]:
        """The products of a chunk ``x`` (C, d) in the buffer, the columns of ``target`` (C, K) in
        it, and the rows' values. Without a softcap the buffer then holds exponentials."""
        u = self.buffer[: x.shape[0]]
        self.head.product(x, u[:, : self.classes])
        t = self.shards.column(target, self.classes)
        class_sum = None
        if self.sums is not None and not self.capped:
            class_sum = self.sums.of_rows(x)
        parts = [
            self._of_block(u[b], t[b], None if class_sum is None else class_sum[b])
            for b in row_slices(u, self.split)
        ]
        return u, t, self._merge(torch.cat(parts), target)

    def probabilities(self, u: Tensor, values: ChunkValues, block: slice) -> Tensor:
        """Probabilities of a block of rows with their spare columns, from what ``measure`` left:
        in the buffer itself or, with a softcap, in the scratch that the next block overwrites."""
        p = logits_of(u[block], self.head, self.scratch)
        own = p[:, : self.classes]
        if self.capped:
            own.sub_(values.base[block, None]).exp_()
        own.mul_(values.ratio[block, None])
        return p

    def _of_block(self, u: Tensor, t: Tensor, class_sum: Tensor | None) -> Tensor:
        """This rank's numbers of some rows, (c, names + K) float64."""
        p = logits_of(u, self.head, self.scratch)
        z = p[:, : self.classes]
        found: dict[str, Tensor] = {}
        if self.want.argmax:
            found["peak"], index = z.max(1)
            found["argmax"] = index + self.shards.start
        else:
            found["peak"] = z.amax(1)
        picked = p.gather(1, t)
        if self.sums is not None:
            found["class_sum"] = self.sums.of_logits(z) if class_sum is None else class_sum
        z.sub_(_base(found["peak"])[:, None]).exp_()
        found["total"] = z.sum(1)
        if self.want.entropy:
            found["entropy"] = torch.special.entr(z).sum(1)
        if self.want.log_sum_sq:
            found["log_sum_sq"] = torch.linalg.vector_norm(z, dim=1).square()
        columns = [found[name].double() for name in self.names]
        return torch.cat([torch.stack(columns, 1), picked.double()], 1)

    def _merge(self, own: Tensor, target: Tensor) -> ChunkValues:
        """Values of all classes from every rank's ``own`` (C, names + K)."""
        acc = self.head.acc
        ranks = self.shards.gather(own)  # (P, C, names + K)
        count = len(self.names)
        field = dict(zip(self.names, ranks[:, :, :count].unbind(2), strict=True))
        peak = field["peak"].amax(0)
        share = (field["peak"] - peak).exp()  # at most 1; 0 where a rank's classes are all banned
        total = (share * field["total"]).sum(0)
        log_sum = total.log()
        at = ranks[:, :, count:].gather(0, self.shards.owner(target)[None])[0]
        argmax = entropy = log_sum_sq = None
        if self.want.argmax:
            leader = field["peak"].argmax(0, keepdim=True)
            argmax = field["argmax"].gather(0, leader)[0].long()
        if self.want.entropy:
            # sum_c e^(z_c - m) (m - z_c), of a rank's classes around its own maximum.
            below = field["entropy"] + field["total"] * (peak - field["peak"])
            below = torch.where(share == 0, 0.0, share * below).sum(0)
            entropy = (log_sum + below / total).to(acc)
        if self.want.log_sum_sq:
            squares = (share.square() * field["log_sum_sq"]).sum(0)
            log_sum_sq = (squares.log() - 2 * log_sum).to(acc)
        soft = Softmax((at - peak[:, None]).to(acc), log_sum.to(acc), peak.to(acc), argmax)
        rank = self.shards.rank
        return ChunkValues(
            soft,
            _base(field["peak"][rank]).to(acc),
            (share[rank] / total).to(acc),
            field["class_sum"].sum(0) if self.sums is not None else None,
            entropy,
            log_sum_sq,
        )


def _base(peak: Tensor) -> Tensor:
    """What logits with this maximum are lowered by: itself, or 0 where all are -inf."""
    return torch.where(peak == float("-inf"), 0.0, peak)
