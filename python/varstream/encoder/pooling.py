"""One vector a sequence from packed rows, without padding.

Each function takes a :class:`varstream.Packed` with values (total, d), as an encoder returns with
``output_packed=True``, and returns (B, d) in the values' dtype. Sequences without a token give 0.
Rows beyond the last sequence are left out. Differentiable in the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varstream._checks import FLOATING, acc_dtype, check_tensor
from varstream.ops.packing import Packed

__all__ = ["cls_pool", "max_pool", "mean_pool"]


def cls_pool(packed: Packed) -> Tensor:
    """The first row of each sequence: (B, d).

    Raises:
        TypeError, ValueError: ``packed`` is no Packed of rows (total, d).
    """
    values = _rows(packed)
    starts, ends = packed.cu_seqlens[:-1], packed.cu_seqlens[1:]
    first = starts.to(torch.int64).masked_fill(starts == ends, -1)
    return torch.ops.varstream.pack(values, first)


def mean_pool(packed: Packed) -> Tensor:
    """The mean over each sequence's rows, summed in float32 or float64: (B, d).

    Raises:
        TypeError, ValueError: ``packed`` is no Packed of rows (total, d).
    """
    values = _rows(packed)
    sums = values.new_zeros(
        (len(packed.cu_seqlens), values.shape[1]), dtype=acc_dtype(values.dtype)
    )
    sums = sums.index_add(0, _owners(packed), values.to(sums.dtype))[:-1]
    lengths = packed.cu_seqlens.diff().clamp(min=1)
    return (sums / lengths[:, None]).to(values.dtype)


def max_pool(packed: Packed) -> Tensor:
    """The largest value of each column over each sequence's rows: (B, d). Rows that share it share
    the gradient.

    Raises:
        TypeError, ValueError: ``packed`` is no Packed of rows (total, d).
    """
    values = _rows(packed)
    lowest = values.new_full((len(packed.cu_seqlens), values.shape[1]), -torch.inf)
    owners = _owners(packed)[:, None].expand_as(values)
    most = lowest.scatter_reduce(0, owners, values, "amax")[:-1]
    return most.masked_fill((packed.cu_seqlens.diff() == 0)[:, None], 0.0)


def _rows(packed: Packed) -> Tensor:
    if not isinstance(packed, Packed):
        raise TypeError(f"packed must be a varstream.Packed, got {type(packed).__name__}")
    return check_tensor(
        "packed.values", packed.values, ndim=2, dtypes=FLOATING, layout="(total, d)"
    )


def _owners(packed: Packed) -> Tensor:
    """The sequence of each row (total,), B for rows beyond the last."""
    rows = torch.arange(packed.values.shape[0], device=packed.cu_seqlens.device)
    return torch.searchsorted(packed.cu_seqlens[1:], rows, right=True)
