"""From a Hugging Face batch to packed rows: which positions are real, where documents begin, what
each row predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varstream._checks import INTEGERS, check_cu_seqlens, check_mask_values, check_tensor


@dataclass(frozen=True)
class Rows:
    """The real positions of a ``(B, S)`` batch in document order.

    ``indices`` is None when every position is real: packing is a reshape then.
    """

    batch: int
    seqlen: int
    indices: Tensor | None  # int64 (n,), flat positions in (B * S)
    lengths: list[int]  # cumulative, one entry more than documents
    positions: Tensor  # int64 (n,)
    gaps: bool  # some document has masked positions between its real ones

    @property
    def total(self) -> int:
        return self.lengths[-1]

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) to (n, ...); positions outside are not read."""
        flat = x.flatten(0, 1)
        return flat if self.indices is None else torch.ops.varstream.pack(flat, self.indices)

    def unpack(self, x: Tensor) -> Tensor:
        """(n, ...) to (B, S, ...), zeros at positions that are not real."""
        if self.indices is not None:
            x = torch.ops.varstream.unpack(x, self.indices, self.batch * self.seqlen, 0.0)
        return x.unflatten(0, (self.batch, self.seqlen))


def make_rows(
    batch: int,
    seqlen: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
) -> Rows:
    """Find the documents of a batch the way transformers does.

    ``cu_seq_lens`` names them (batch 1). Otherwise each row of the batch is one, its real positions
    those the 2-D ``attention_mask`` marks; without a mask, ``position_ids`` that don't go on by 1
    begin a new document.

    Raises:
        TypeError, ValueError: a mask that isn't 2-D, lengths that don't fit, position ids of
            another shape.
    """
    positions = _positions(batch, seqlen, device, position_ids)
    if batch * seqlen == 0:
        return Rows(batch, seqlen, None, [0], positions.flatten(), False)
    if cu_seq_lens is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q needs a batch of 1 packed row, got batch {batch}")
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            raise ValueError("attention_mask must be None or all ones together with cu_seq_lens_q")
        cu = check_cu_seqlens("cu_seq_lens_q", cu_seq_lens, None, device)
        lengths = cu.tolist()
        if lengths[-1] != seqlen:
            raise ValueError(
                f"cu_seq_lens_q must end at the row's {seqlen} tokens, got {lengths[-1]}"
            )
        if position_ids is None:
            starts = torch.repeat_interleave(cu[:-1], cu.diff(), output_size=seqlen)
            positions = positions - starts
        return Rows(batch, seqlen, None, lengths, positions.flatten(), False)
    if attention_mask is not None:
        return _masked_rows(batch, seqlen, attention_mask, positions)
    starts = positions.diff(dim=1, prepend=positions[:, :1]) != 1
    starts[:, 0] = True
    begins = starts.flatten().nonzero().flatten().tolist()
    return Rows(batch, seqlen, None, [*begins, batch * seqlen], positions.flatten(), False)


def _positions(
    batch: int, seqlen: int, device: torch.device, position_ids: Tensor | None
) -> Tensor:
    """Position ids (B, S); the model's own default counts columns, padding or not."""
    if position_ids is None:
        return torch.arange(seqlen, device=device).expand(batch, seqlen)
    check_tensor(
        "position_ids", position_ids, ndim=2, dtypes=INTEGERS, device=device, layout="(B, S)"
    )
    if position_ids.shape[1] != seqlen or position_ids.shape[0] not in (1, batch):
        raise ValueError(
            f"position_ids must have shape ({batch}, {seqlen}), got {tuple(position_ids.shape)}"
        )
    return position_ids.expand(batch, seqlen)


def _masked_rows(batch: int, seqlen: int, attention_mask: Any, positions: Tensor) -> Rows:
    check_tensor("attention_mask", attention_mask, device=positions.device)
    if tuple(attention_mask.shape) != (batch, seqlen):
        raise ValueError(
            f"attention_mask must be 2-D of shape ({batch}, {seqlen}), "
            f"got {tuple(attention_mask.shape)}; "
            "a streamed model can't honour masks over pairs of positions"
        )
    real = attention_mask != 0
    check_mask_values("attention_mask", attention_mask)
    counts = real.sum(1)
    lengths = [0, *counts.cumsum(0).tolist()]
    if lengths[-1] == batch * seqlen:
        return Rows(batch, seqlen, None, lengths, positions.flatten(), False)
    columns = torch.arange(seqlen, device=real.device)
    first = torch.where(real, columns, seqlen).amin(1)
    last = torch.where(real, columns, -1).amax(1)
    gaps = bool(((last - first + 1 != counts) & (counts > 0)).any())
    indices = real.flatten().nonzero().flatten()
    return Rows(batch, seqlen, indices, lengths, positions.flatten()[indices], gaps)


def documents_shown(
    attention_mask: Any, position_ids: Tensor | None, cu_seq_lens: Tensor | None
) -> tuple[Any, Tensor | None, bool]:
    """Mask and position ids from which transformers' own forward sees packed documents, and whether
    there are any.

    It looks for them in ``position_ids`` alone, and only without a mask and without a cache.
    """
    if cu_seq_lens is not None:
        if attention_mask is not None and bool((attention_mask != 0).all()):
            attention_mask = None
        if position_ids is None:
            cu = cu_seq_lens.long()
            starts = torch.repeat_interleave(cu[:-1], cu.diff())
            position_ids = (torch.arange(len(starts), device=cu.device) - starts)[None]
    if attention_mask is not None or position_ids is None:
        return attention_mask, position_ids, False
    return attention_mask, position_ids, bool((position_ids.diff(dim=-1) != 1).any())


def check_sequence_index(seq_idx: Any, rows: Rows) -> None:
    """``seq_idx`` (B, S) numbers the documents, as some collators add for recurrent layers; it must
    say what the rows say."""
    shape = (rows.batch, rows.seqlen)
    check_tensor("seq_idx", seq_idx, shape=shape, dtypes=INTEGERS, layout="(B, S)")
    index = rows.pack(seq_idx.long()[..., None]).flatten()
    begins = torch.zeros(rows.total, dtype=torch.bool, device=index.device)
    edges = [n for n in rows.lengths if n < rows.total]
    begins[_on_device(edges, index.device)] = True
    changes = index.diff() != 0
    columns = torch.arange(rows.batch * rows.seqlen, device=index.device) % rows.seqlen
    first = columns if rows.indices is None else columns[rows.indices]
    new_row = first[1:] < first[:-1] + 1  # a new row of the batch may keep the number
    if bool((changes & ~begins[1:]).any()) or bool((begins[1:] & ~changes & ~new_row).any()):
        raise ValueError("seq_idx must change where documents begin, and nowhere else")


def check_labels(name: str, labels: Any, rows: Rows) -> Tensor:
    """Labels must be integers (B, S)."""
    shape = (rows.batch, rows.seqlen)
    return check_tensor(name, labels, shape=shape, dtypes=INTEGERS, layout="(B, S)")


def shift_labels(labels: Tensor, rows: Rows, ignore_index: int = -100) -> Tensor:
    """What each row predicts: the label of the next position, within its document.

    Args:
        labels: ``(B, S)``, aligned with the inputs.

    Returns:
        ``(n,)``; the last row of a document, and a row whose next position isn't real, predict
        nothing.
    """
    flat = labels.flatten()
    targets = torch.full((rows.total,), ignore_index, dtype=torch.int64, device=labels.device)
    if rows.total == 0:
        return targets
    place = rows.indices
    if place is None:
        targets[:-1] = flat[1:]
    else:
        follows = place[1:] == place[:-1] + 1
        targets[:-1] = torch.where(follows, flat[place[1:]], ignore_index)
    ends = [
        end - 1 for begin, end in zip(rows.lengths, rows.lengths[1:], strict=False) if end > begin
    ]
    targets[_on_device(ends, labels.device)] = ignore_index
    return targets


def _on_device(values: list[int], device: torch.device) -> Tensor:
    """int64 (n,), copied without waiting for the device."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
