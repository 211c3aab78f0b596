"""What encoder layers share: where their rows are, attention over them, and what a layer is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from varstream.ops.attention import varlen_attention
from varstream.ops.attention_call import MAX_HEAD_DIM
from varstream.ops.relative_attention import relative_attention

_GAP_COLUMNS = 8  # a CUDA kernel's head dims are multiples of it
# Times softmax_scale below -1000 for every head dim, so that exp is 0 in float64 too; float16
# holds it.
_GAP_SCORE = -3e4


class EncoderLayer(Protocol):
    """One layer, checked and ready to run."""

    def run(self, x: Tensor, rows: Rows) -> Tensor:
        """Packed rows x (total, d) to the layer's output (total, d)."""


class SelfAttention(Protocol):
    """What a layer does between its input and its output projection."""

    def attend(self, x: Tensor, rows: Rows) -> Tensor:
        """Packed rows x (total, d) to heads one beside the other (total, H * Dv)."""


@dataclass(frozen=True)
class Rows:
    """Where the sequences of a packed batch are, and what all layers of a call share.

    Attributes:
        cu_seqlens: (B+1,) int32.
        max_seqlen: length of the longest sequence, or more.
        gaps: (total,) bool, rows that stand for padding: inside a sequence, where distances between
            tokens matter, and at a position 0 that a pooler or head reads. They see the tokens of
            their sequence, and nobody sees them. None where there are none.
        shared: what the family makes once a call; its layers know the order.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    gaps: Tensor | None = None
    shared: tuple[Tensor, ...] = ()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        dropout: float,
        window: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        """Attention within each sequence: q, k, v (total, H, D) to (total, H * D)."""
        out = varlen_attention(
            *self._hide_gaps(q, k),
            v,
            self.cu_seqlens,
            max_seqlen_q=self.max_seqlen,
            window=window,
            softmax_scale=scale,
            dropout_p=dropout,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        assert isinstance(out, Tensor)
        return out.flatten(1)

    def attend_relative(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        buckets: Tensor,
        scale: float,
        dropout: float,
        *,
        table: Tensor | None = None,
        key_table: Tensor | None = None,
        query_table: Tensor | None = None,
    ) -> Tensor:
        """The same with scores that know the distance of two tokens: ``buckets`` (2 M - 1,) has the
        row of ``table`` (R, H), ``key_table`` and ``query_table`` (R, H, D) for each."""
        q, k = self._hide_gaps(q, k)
        more = q.shape[-1] - v.shape[-1]
        if more:
            key_table, query_table = (
                None if t is None else torch.nn.functional.pad(t, (0, more))
                for t in (key_table, query_table)
            )
        return relative_attention(
            q,
            k,
            v,
            self.cu_seqlens,
            buckets,
            max_seqlen=self.max_seqlen,
            table=table,
            key_table=key_table,
            query_table=query_table,
            softmax_scale=scale,
            dropout_p=dropout,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        ).flatten(1)

    def _hide_gaps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k with columns (total, H, D + 8) in which a gap's key scores so low that its
        probability and its gradients are exactly 0; those of real keys get + 0."""
        if self.gaps is None:
            return q, k
        if q.shape[-1] + _GAP_COLUMNS > MAX_HEAD_DIM:
            raise ValueError(
                "attention_mask must have no holes, nor padding at a position 0 that is read, for "
                f"heads of {q.shape[-1]}, more than {MAX_HEAD_DIM - _GAP_COLUMNS}"
            )
        low = torch.zeros_like(q[..., :1]).expand(*q.shape[:2], _GAP_COLUMNS).clone()
        low[..., 0] = _GAP_SCORE
        flag = torch.zeros_like(low)
        flag[..., 0] = self.gaps[:, None].to(k.dtype)
        return torch.cat([q, low], -1), torch.cat([k, flag], -1)
