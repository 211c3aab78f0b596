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
        rows: the rows that layers run on: the real tokens, and gaps between them where a family
            needs those.
        real: (total,) int64, the real tokens among the rows; None where all are.
    """

    packed: Packed
    columns: dict[str, Tensor]
    rows: Rows
    real: Tensor | None

    def pick_real(self, x: Tensor) -> Tensor:
        """Rows x (rows, d) without the gaps."""
        return x if self.real is None else torch.ops.varstream.pack(x, self.real)


def pack_batch(backbone: Any, family: Family, given: dict[str, Any], reads_first: bool) -> Batch:
    """Check and pack the arguments of an encoder's call.

    Raises:
        TypeError, ValueError: an argument that doesn't fit, by name; with ``reads_first`` also a
            mask that keeps tokens of a row but not its position 0.
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
    if reads_first:
        _check_first(mask)

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

    rows, gaps, real = _with_gaps(x, mask, packed) if family.by_distance else (packed, None, None)
    columns = {
        name: torch.ops.varstream.pack(column.reshape(-1), rows.indices)
        for name, column in padded.items()
    }
    columns["input_ids" if ids is not None else "inputs_embeds"] = rows.values
    return Batch(packed, columns, Rows(rows.cu_seqlens, rows.max_seqlen, gaps), real)


def _with_gaps(
    x: Tensor, mask: Tensor, packed: Packed
) -> tuple[Packed, Tensor | None, Tensor | None]:
    """The batch with padding between a row's first and last token kept, which of these rows are
    such gaps, and where the real tokens are among them. Without gaps the packed batch as it is."""
    real = mask != 0
    seen = real.cumsum(1)  # (B, S) real tokens up to and including each position
    inside = (seen > 0) & (seen - real.to(seen.dtype) < seen[:, -1:])
    if int(inside.sum()) == packed.indices.shape[0]:
        return packed, None, None
    spans = pack(x, inside)
    gaps = ~real.flatten()[spans.indices]
    values = spans.values
    if values.is_floating_point():  # may be anything in padding
        values = values.masked_fill(gaps[:, None], 0.0)
    return spans._replace(values=values), gaps, (~gaps).nonzero().squeeze(1)


def _check_first(mask: Tensor) -> None:
    """Refuse rows with real tokens whose position 0, which a pooler or head reads, is padding."""
    real = mask != 0
    if mask.shape[1] == 0:
        return
    odd = real.any(1) & ~real[:, 0]
    if bool(odd.any()):
        raise ValueError(
            f"attention_mask must keep position 0, which the pooler or head reads, got padding "
            f"there in row {int(odd.nonzero()[0])}; pad on the right, or use an encoder without a "
            "pooler"
        )
