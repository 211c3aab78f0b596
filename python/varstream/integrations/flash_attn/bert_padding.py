"""``flash_attn.bert_padding``: padded batches to packed rows and back."""

from __future__ import annotations

import torch
from torch import Tensor

from varstream._checks import INTEGERS, check_int, check_mask_values, check_tensor, values_visible
from varstream.ops.packing import pack


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Keep the rows of ``hidden_states`` that the masks mark.

    Args:
        hidden_states: ``(B, S, ...)``.
        attention_mask: ``(B, S)``, bool, integer, or floating 0 and 1; nonzero marks a token in
            use.
        unused_mask: ``(B, S)``, of such a dtype; nonzero marks a token to keep that isn't in use
            (what ``seqused`` then leaves out). Must not mark a token of ``attention_mask``.

    Returns:
        Five values: the rows ``(total, ...)``; ``indices`` int64 ``(total,)``, their places in the
        flattened batch; ``cu_seqlens`` int32 ``(B+1,)``; ``max_seqlen`` int; ``seqused`` int32
        ``(B,)``, tokens in use per sequence.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.

    Source: ``flash_attn.bert_padding.unpad_input`` (FlashAttention 2.7 and later).
    """
    check_tensor("attention_mask", attention_mask, ndim=2, layout="(B, S)")
    used = attention_mask != 0
    kept = attention_mask
    if unused_mask is not None:
        shape, device = attention_mask.shape, attention_mask.device
        check_tensor("unused_mask", unused_mask, shape=shape, device=device, layout="(B, S)")
        spare = unused_mask != 0
        if values_visible(used, spare):
            check_mask_values("attention_mask", attention_mask)
            check_mask_values("unused_mask", unused_mask)
        if values_visible(used, spare) and bool((used & spare).any()):
            at = tuple((used & spare).nonzero()[0].tolist())
            raise ValueError(
                f"unused_mask must not mark a token of attention_mask, got both at {at}"
            )
        kept = used | spare
    packed = pack(hidden_states, kept)
    seqused = used.sum(1, dtype=torch.int32)
    return packed.values, packed.indices, packed.cu_seqlens, packed.max_seqlen, seqused


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Put packed rows ``(total, ...)`` back into ``(batch, seqlen, ...)``, zeros elsewhere.

    Args:
        hidden_states: ``(total, ...)``.
        indices: int64 or int32 ``(total,)``, from ``unpad_input``; each names its own row.
        batch: B of the result.
        seqlen: S of the result.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.
    """
    check_tensor("hidden_states", hidden_states)
    check_int("batch", batch, low=0)
    check_int("seqlen", seqlen, low=0)
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.reshape(batch, seqlen, *hidden_states.shape[1:])


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` ``(n,)`` of ``input`` ``(rows, ...)``: ``(n, ...)``, differentiable.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.
    """
    check_tensor("input", input)
    if input.dim() < 1:
        raise ValueError("input must have at least 1 dimension (rows, ...), got shape ()")
    indices = _check_indices(indices, None, input.shape[0], input.device)
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros ``(first_axis_dim, ...)`` whose rows ``indices`` ``(n,)`` are ``values``
    ``(n, ...)``; differentiable.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.
    """
    check_tensor("values", values)
    if values.dim() < 1:
        raise ValueError("values must have at least 1 dimension (n, ...), got shape ()")
    check_int("first_axis_dim", first_axis_dim, low=0)
    indices = _check_indices(indices, values.shape[0], first_axis_dim, values.device)
    return torch.ops.varstream.unpack(values, indices, first_axis_dim, 0.0)


def _check_indices(indices: Tensor, count: int | None, rows: int, device: torch.device) -> Tensor:
    check_tensor("indices", indices, shape=(count,), dtypes=INTEGERS, device=device)
    if values_visible(indices) and indices.numel():
        low, high = (int(value) for value in torch.aminmax(indices))
        if low < 0 or high >= rows:
            raise ValueError(
                f"indices must name rows from 0 to {rows - 1}, got {low if low < 0 else high}"
            )
    return indices.to(torch.int64)
