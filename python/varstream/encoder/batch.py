"""A call's padded batch, checked and packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varstream._checks import FLOATING, INTEGERS, check_tensor
from varstream.encoder.family import Family
from varstream.encoder.layer import Rows
from varstream.ops.packing import Packed, pack


@dataclass(frozen=True)
class Batch:
    """A packed batch.

    Attributes:
        packed: the real tokens; ``values`` are input ids (total,) or embeddings (total, d).
        columns: what the embeddings take, row by row of ``rows``; ``position_ids`` always.
        rows: the rows that layers run on: the real tokens, gaps between them where a family needs
            those, and padding at a position 0 that is read.
        real: (total,) int64, the real tokens among the rows; None where all are.
        first: (B,) int64, the row that a pooler or head reads of each sequence, -1 for a sequence
            without a token.
    """

    packed: Packed
    columns: dict[str, Tensor]
    rows: Rows
    real: Tensor | None
    first: Tensor

    def pick_real(self, x: Tensor) -> Tensor:
        """Rows x (rows, d) without the gaps."""
        return x if self.real is None else torch.ops.varstream.pack(x, self.real)

    def pick_first(self, x: Tensor) -> Tensor:
        """Of rows x (rows, d) the one at position 0 of each sequence (B, d), if that is read; else
        the first token's. 0 for a sequence without a token."""
        return torch.ops.varstream.pack(x, self.first)


def pack_batch(backbone: Any, family: Family, given: dict[str, Any], reads_first: bool) -> Batch:
    """Check and pack the arguments of an encoder's call.

    Raises:
        TypeError, ValueError: an argument that doesn't fit, by name; with ``reads_first``, where
            the family can't tell what its model gives on padding, also a mask that keeps tokens of
            a row but not its position 0.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given")
    if ids is not None:
        x = check_tensor("input_ids", ids, ndim=2, dtypes=INTEGERS, layout="(B, S)")
    else:
        x = check_tensor("inputs_embeds", embeds, ndim=3, dtypes=FLOATING, layout="(B, S, d)")
    shape = x.shape[:2]
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=x.device)
    packed = pack(x, mask)
    positions = given.get("position_ids")
    if positions is None:
        positions = family.positions(backbone, ids, embeds)
    else:
        check_tensor("position_ids", positions, dtypes=INTEGERS, device=x.device)
        if tuple(positions.shape) not in (tuple(shape), (1, shape[1])):
            raise ValueError(
                f"position_ids must have shape {tuple(shape)} or (1, {shape[1]}), "
                f"got {tuple(positions.shape)}"
            )
    padded = {"position_ids": positions.expand(shape)}
    if (types := given.get("token_type_ids")) is not None:
        check_tensor("token_type_ids", types, shape=shape, dtypes=INTEGERS, layout="(B, S)")
        padded["token_type_ids"] = types

    kept = _kept(mask != 0, family, reads_first)
    rows, gaps, real = (packed, None, None) if kept is None else _with_gaps(x, mask, packed, kept)
    columns = {
        name: torch.ops.varstream.pack(column.reshape(-1), rows.indices)
        for name, column in padded.items()
    }
    columns["input_ids" if ids is not None else "inputs_embeds"] = rows.values
    starts, ends = rows.cu_seqlens[:-1], rows.cu_seqlens[1:]
    first = starts.to(torch.int64).masked_fill(starts == ends, -1)
    return Batch(packed, columns, Rows(rows.cu_seqlens, rows.max_seqlen, gaps), real, first)


def _kept(real: Tensor, family: Family, reads_first: bool) -> Tensor | None:
    """The positions (B, S) that layers run on; None where these are the real tokens for sure."""
    odd = _padded_first(real, family) if reads_first else None
    if family.by_distance:
        seen = real.cumsum(1)  # (B, S) real tokens up to and including each position
        begun = seen > 0 if odd is None else (seen > 0) | odd[:, None]
        return begun & (seen - real.to(seen.dtype) < seen[:, -1:])
    if odd is None:
        return None
    kept = real.clone()
    kept[:, 0] |= odd
    return kept


def _padded_first(real: Tensor, family: Family) -> Tensor | None:
    """The sequences (B,) with tokens whose position 0, which a pooler or head reads, is padding;
    None where there are none.

    Raises:
        ValueError: there are, and the family can't tell what its model gives there.
    """
    if real.shape[1] == 0:
        return None
    odd = real.any(1) & ~real[:, 0]
    if not bool(odd.any()):
        return None
    if not family.reads_padding:
        raise ValueError(
            f"attention_mask must keep position 0, which the pooler or head reads, got padding "
            f"there in row {int(odd.nonzero()[0])}; pad on the right, or use the {family.prefix} "
            "encoder without a head"
        )
    return odd


def _with_gaps(
    x: Tensor, mask: Tensor, packed: Packed, kept: Tensor
) -> tuple[Packed, Tensor | None, Tensor | None]:
    """The batch with the positions ``kept`` (B, S), which of these rows are gaps, and where the
    real tokens are among them. Without gaps the packed batch as it is."""
    if int(kept.sum()) == packed.indices.shape[0]:
        return packed, None, None
    spans = pack(x, kept)
    gaps = (mask == 0).flatten()[spans.indices]
    values = spans.values
    if values.is_floating_point():  # may be anything in padding that nobody reads
        unread = gaps & (spans.indices % spans.seqlen != 0)
        values = values.masked_fill(unread[:, None], 0.0)
    return spans._replace(values=values), gaps, (~gaps).nonzero().squeeze(1)
