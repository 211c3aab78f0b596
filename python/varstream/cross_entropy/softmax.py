"""What the row kernels are asked for a chunk of logits: the call of ``softmax_rows_``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from varstream.cross_entropy.rows import DeviceRows
from varstream.reference.head import Head


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.to(torch.float32).contiguous()


@dataclass(frozen=True)
class RowTerms:
    """Upstream gradients of what rows yield, (N, ...) or in the rows' order; None is 0."""

    nll: Tensor | None = None  # (N, K) of -log p(target), all ones if None
    smooth: Tensor | None = None  # (N,) of sum_c w_c (-log p_c)
    lse: Tensor | None = None  # (N,)
    entropy: Tensor | None = None  # (N,)

    def gathered(self, rows: DeviceRows) -> RowTerms:
        parts = (_float(p) for p in (self.nll, self.smooth, self.lse, self.entropy))
        return RowTerms(*(None if p is None else rows.gather(p) for p in parts))

    def chunk(self, part: slice) -> list[Tensor | None]:
        """dnll, dsmooth, dlse, dentropy of rows ``part`` of the order."""
        parts = (self.nll, self.smooth, self.lse, self.entropy)
        return [None if p is None else p[part] for p in parts]


@dataclass
class RowValues:
    """What the kernels write for rows in order; absent ones aren't wanted."""

    logp: Tensor | None = None  # (B, K)
    lse: Tensor | None = None  # (B,)
    entropy: Tensor | None = None
    class_sum: Tensor | None = None
    log_sum_sq: Tensor | None = None
    argmax: Tensor | None = None  # int64

    @classmethod
    def empty(cls, rows: DeviceRows, targets: int, wanted: set[str]) -> RowValues:
        """0 (argmax -1) until a chunk is done."""
        count, device = rows.bound, rows.order.device
        made: dict[str, Tensor] = {}
        for name in wanted:
            shape = (count, targets) if name == "logp" else (count,)
            dtype = torch.int64 if name == "argmax" else torch.float32
            fill = -1 if name == "argmax" else 0
            made[name] = torch.full(shape, fill, dtype=dtype, device=device)
        return cls(**made)

    def chunk(self, part: slice) -> list[Tensor | None]:
        parts = (
            self.logp,
            self.lse,
            self.entropy,
            self.class_sum,
            self.log_sum_sq,
            self.argmax,
        )
        return [None if p is None else p[part] for p in parts]


@dataclass(frozen=True)
class SoftmaxCall:
    """The row kernels' arguments that don't change from chunk to chunk."""

    head: Head
    rows: DeviceRows
    target: Tensor  # (B, K) int64, in order
    terms: RowTerms  # in order
    values: RowValues
    class_weight: Tensor | None = None  # (V,) float32
    lse_sq_scale: Tensor | None = None  # () float32
    gradient: torch.dtype | None = None
    bias: Tensor | None = field(init=False)  # (V,) float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", _float(self.head.bias))

    def run(self, part: slice, logits: Tensor) -> None:
        """Rows ``part`` of the order, whose logits (C, V and more) become their gradient."""
        self._launch(
            part,
            logits,
            self.terms.chunk(part),
            self.lse_sq_scale,
            self.gradient,
            self.values.chunk(part),
        )

    def sum_shard(self, part: slice, logits: Tensor, sums: Tensor, target_z: Tensor) -> None:
        """Where the head's weight is a shard: the sums (C, 7) over its classes of logits, which
        stay, and the targets' logits (C, K), 0 of targets that are -1."""
        none, nothing = RowTerms().chunk(part), RowValues().chunk(part)
        self._launch(part, logits, none, None, None, nothing, (sums, target_z, None))

    def shard_gradient(self, part: slice, logits: Tensor, given: Tensor) -> None:
        """The logits of a shard become their gradient; ``given`` (C, 3) is over all shards: the
        largest logit, the sum of exponentials relative to it and the row factor but for the
        targets' part."""
        terms, nothing = self.terms.chunk(part), RowValues().chunk(part)
        self._launch(part, logits, terms, None, self.gradient, nothing, (None, None, given))

    def _launch(
        self,
        part: slice,
        logits: Tensor,
        terms: list[Tensor | None],
        lse_sq_scale: Tensor | None,
        gradient: torch.dtype | None,
        values: list[Tensor | None],
        shard: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    ) -> None:
        torch.ops.varstream.softmax_rows_(
            logits,
            self.head.weight.shape[0],
            part.start,
            self.rows.count,
            self.target[part],
            self.head.logit_scale,
            self.head.softcap,
            self.head.temperature,
            self.bias,
            self.class_weight,
            *terms,
            lse_sq_scale,
            gradient,
            *values,
            *shard,
        )
