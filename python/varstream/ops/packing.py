"""Packed batches: padded ``(B, S, ...)`` tensors to rows of real tokens and back.

A packed batch is what FlashAttention's variable-length interface made customary: the rows of all
sequences one after another, and ``cu_seqlens``, where each sequence starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import varstream.reference.packing  # noqa: F401  (attaches the CPU kernels)
from varstream._arrays import int_array
from varstream._checks import (
    check_bool,
    check_device,
    check_int,
    check_mask_values,
    check_tensor,
    is_compiling,
    values_visible,
)
from varstream._load import autograd, fake_kernel

INT32_MAX = 2**31 - 1

_MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)


class Packed(NamedTuple):
    """A packed batch: the real tokens of ``batch`` sequences, one after another.

    Attributes:
        values: (total, ...), the rows in batch order.
        cu_seqlens: (batch + 1,) int32, where each sequence starts; the last entry is the number of
            real tokens.
        max_seqlen: the longest sequence, or the bound that the caller gave.
        indices: (total,) int64, row of the flattened padded batch that each packed row came from;
            -1 for an inert row, beyond the real tokens when ``max_tokens`` was given.
        batch: B of the padded batch.
        seqlen: S of the padded batch.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    indices: Tensor
    batch: int
    seqlen: int


def pack(
    x: Tensor,
    attention_mask: Tensor,
    *,
    max_tokens: int | None = None,
    max_seqlen: int | None = None,
    validate: bool = False,
) -> Packed:
    """Keep the rows of ``x`` that ``attention_mask`` marks as real.

    Padding may stand anywhere: left, right, in holes, whole sequences. Its values are never read
    and its gradient is exactly 0. Differentiable in ``x``.

    With both bounds given no device-to-host copy happens: ``values`` has ``max_tokens`` rows, of
    which those beyond the real tokens are zero with index -1. ``torch.compile(fullgraph=True)``
    needs both bounds, as the number of real tokens would otherwise be a value in the data.

    Args:
        x: (B, S, ...), any dtype.
        attention_mask: (B, S), bool, integer or floating; nonzero marks a real token. A
            floating mask holds 0 and 1 (additive masks are refused).
        max_tokens: rows to make room for, at least the number of real tokens.
        max_seqlen: upper bound on the number of real tokens of one sequence.
        validate: check values on CUDA too, at the price of a synchronisation. Unchecked, tokens
            past ``max_tokens`` are dropped from the end and ``cu_seqlens`` agrees.

    Returns:
        A :class:`Packed`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: shapes, dtypes or devices that don't fit, a bound that is too small.
    """
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have at least 2 dimensions (B, S, ...), got {tuple(x.shape)}")
    check_tensor(
        "attention_mask",
        attention_mask,
        shape=x.shape[:2],
        dtypes=_MASK_DTYPES,
        device=x.device,
        layout="(B, S)",
    )
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, low=0)
    if max_seqlen is not None:
        check_int("max_seqlen", max_seqlen, low=0)
    check_bool("validate", validate)
    batch, seqlen = x.shape[:2]
    if batch * seqlen > INT32_MAX:
        raise ValueError(f"x must have B * S < 2**31 for int32 cu_seqlens, got {batch} * {seqlen}")

    real = attention_mask != 0
    lengths = real.sum(1)  # (B,)
    if validate or values_visible(attention_mask):
        _check_mask_values(attention_mask, lengths, max_tokens, max_seqlen)
    if max_seqlen is None:
        max_seqlen = int(lengths.max()) if batch else 0
    if max_tokens is None:
        indices = real.flatten().nonzero().squeeze(1)
        cu = _running_total(lengths)
    else:
        indices = _bounded_indices(real, max_tokens)
        cu = _running_total(lengths).clamp(max=max_tokens)
    rows = x.reshape(batch * seqlen, *x.shape[2:])
    values = torch.ops.varstream.pack(rows, indices)
    return Packed(values, cu, max_seqlen, indices, batch, seqlen)


def unpack(packed: Packed, values: Tensor | None = None, fill: float = 0.0) -> Tensor:
    """Put packed rows back into a padded batch.

    Differentiable in the values; the gradient of inert rows is exactly 0.

    Args:
        packed: what :func:`pack` returned.
        values: (total, ...) to unpack in place of ``packed.values``; any dtype and trailing sizes.
        fill: what padding holds in the result.

    Returns:
        (B, S, ...).

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: ``values`` has other rows than ``packed``, or the dtype can't hold ``fill``.
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"packed must be a varstream.Packed, got {type(packed).__name__}")
    total = packed.indices.shape[0]
    if values is None:
        values = packed.values
    check_tensor("values", values, device=packed.indices.device)
    if values.dim() < 1 or values.shape[0] != total:
        raise ValueError(
            f"values must have the {total} rows of packed (total, ...), got {tuple(values.shape)}"
        )
    fill = _check_fill(fill, values.dtype)
    rows = torch.ops.varstream.unpack(values, packed.indices, packed.batch * packed.seqlen, fill)
    return rows.reshape(packed.batch, packed.seqlen, *values.shape[1:])


def cu_seqlens(
    lengths: Sequence[int] | np.ndarray | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Cumulative lengths: where each sequence of a packed batch starts, and where the last ends.

    Args:
        lengths: (B,) sequence lengths >= 0: integers, an integer array or an integer tensor. Values
            are checked except for CUDA tensors, where that would cost a synchronisation.
        device: device of the result; default: that of a tensor ``lengths``, else the CPU.

    Returns:
        (B + 1,) int32, starting at 0.

    Raises:
        TypeError: ``lengths`` holds no integers.
        ValueError: a negative length, more than one dimension, a total past int32, or a device that
            torch doesn't know or doesn't have here.
    """
    if device is not None:
        device = _check_available(device)
    if isinstance(lengths, Tensor):
        counts = check_tensor("lengths", lengths, ndim=1, layout="(B,)")
        if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
            raise TypeError(f"lengths must hold integers, got {counts.dtype}")
        counts = counts.to(torch.int64)
    else:
        counts = torch.from_numpy(int_array("lengths", lengths))
    if values_visible(counts) and counts.numel():
        if int(counts.min()) < 0:
            at = int((counts < 0).nonzero()[0])
            raise ValueError(f"lengths must be >= 0, got {int(counts[at])} at index {at}")
        if float(counts.sum(dtype=torch.float64)) > INT32_MAX:
            raise ValueError(f"lengths must sum to less than 2**31, got {int(counts.sum())}")
    return _running_total(counts if device is None else counts.to(device))


def _check_available(device: Any) -> torch.device:
    """A device on which tensors can be made here."""
    checked = check_device("device", device)
    if not is_compiling():
        try:
            torch.empty(0, device=checked)
        except (RuntimeError, AssertionError):  # torch asserts that a backend was compiled in
            raise ValueError(f"device must be available here, got {str(device)!r}") from None
    return checked


def _running_total(lengths: Tensor) -> Tensor:
    """(B,) lengths -> (B + 1,) int32 starting at 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _bounded_indices(real: Tensor, max_tokens: int) -> Tensor:
    """Flat positions of the true entries of ``real`` (B, S), then -1: (max_tokens,), no sync."""
    seen = real.flatten().cumsum(0)  # (B * S,) real tokens up to and including each position
    wanted = torch.arange(1, max_tokens + 1, device=real.device)
    found = torch.searchsorted(seen, wanted)  # first position where the i-th token has been seen
    return found.where(found < seen.shape[0], -1)


def _check_mask_values(
    mask: Tensor, lengths: Tensor, max_tokens: int | None, max_seqlen: int | None
) -> None:
    check_mask_values("attention_mask", mask)
    total, longest = int(lengths.sum()), int(lengths.max()) if lengths.numel() else 0
    if max_tokens is not None and max_tokens < total:
        raise ValueError(f"max_tokens must be at least the {total} real tokens, got {max_tokens}")
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"max_seqlen must be at least the longest sequence, {longest}, got {max_seqlen}"
        )


def _check_fill(fill: Any, dtype: torch.dtype) -> float:
    if not isinstance(fill, (bool, int, float)):
        raise TypeError(f"fill must be a number, got {type(fill).__name__}")
    number = float(fill)
    if dtype == torch.bool:
        exact = number in (0.0, 1.0)
    elif dtype.is_floating_point or dtype.is_complex:
        exact = True
    else:
        limits = torch.iinfo(dtype)
        exact = number.is_integer() and limits.min <= number <= limits.max
    if not exact:
        raise ValueError(f"fill must be a value of the dtype of values ({dtype}), got {fill}")
    return number


@fake_kernel("pack")
def _pack_fake(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty((indices.shape[0], *x.shape[1:]))


@fake_kernel("unpack")
def _unpack_fake(values: Tensor, indices: Tensor, rows: int, fill: float) -> Tensor:
    return values.new_empty((rows, *values.shape[1:]))


def _pack_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices = inputs
    ctx.save_for_backward(indices)
    ctx.rows = x.shape[0]


@autograd("pack", setup_context=_pack_context)
def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    # Every row of x is named at most once, so its gradient is a scatter into zeros.
    return torch.ops.varstream.unpack(grad, indices, ctx.rows, 0.0), None  # x, indices


def _unpack_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


@autograd("unpack", setup_context=_unpack_context)
def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (indices,) = ctx.saved_tensors
    return torch.ops.varstream.pack(grad, indices), None, None, None  # values, indices, rows, fill
