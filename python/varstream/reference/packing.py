"""Row gather and scatter composed from ATen: the CPU kernels of ``pack`` and ``unpack``.

They also serve CUDA tensors when the build holds no CUDA kernels. On the CPU an index past the
padded rows is an error; on CUDA, where looking would cost a synchronisation, it counts as no row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varstream._load import composed_kernel


def check_rows(indices: Tensor, rows: int) -> bool:
    """Check ``indices`` (n,) against ``rows`` on the CPU; True when each is known to name a row."""
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(
            f"indices must be int64 of shape (n,), got {indices.dtype} {tuple(indices.shape)}"
        )
    if indices.device.type != "cpu":
        return False
    if indices.numel() == 0:
        return True
    low, high = torch.aminmax(indices)
    if high >= rows:
        raise ValueError(f"indices must be below the {rows} rows, got {int(high)}")
    return bool(low >= 0)


# Rows are moved as integers or complex numbers of their size: ATen can't index every dtype.
_WORDS = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
    16: torch.complex128,
}


def _words(tensor: Tensor) -> Tensor:
    return tensor.view(_WORDS[tensor.dtype.itemsize])


@composed_kernel("pack")
def pack(x: Tensor, indices: Tensor) -> Tensor:
    """``out[i] = x[indices[i]]``, zero rows for negative indices.

    Args:
        x: (rows, ...), any dtype.
        indices: (n,) int64.

    Returns:
        (n, ...), contiguous.
    """
    all_rows = check_rows(indices, x.shape[0])
    rows = _words(x.contiguous())
    if all_rows:
        return rows.index_select(0, indices).view(x.dtype)
    if x.shape[0] == 0:
        return x.new_zeros((indices.shape[0], *x.shape[1:]))
    valid = (indices >= 0) & (indices < x.shape[0])
    out = rows.index_select(0, indices.where(valid, 0))
    out.masked_fill_(~valid.view(-1, *[1] * (x.dim() - 1)), 0)
    return out.view(x.dtype)


@composed_kernel("unpack")
def unpack(values: Tensor, indices: Tensor, rows: int, fill: float) -> Tensor:
    """``out[indices[i]] = values[i]`` over rows of ``fill``; negative indices are skipped.

    Args:
        values: (n, ...), any dtype.
        indices: (n,) int64, distinct where not negative (of rows named twice, one wins).
        rows: rows of the result.
        fill: value of the rows that no index names.

    Returns:
        (rows, ...), contiguous.
    """
    if values.dim() < 1 or values.shape[0] != indices.shape[0]:
        raise ValueError(
            f"values must have one row per index, {indices.shape[0]}, got {tuple(values.shape)}"
        )
    if rows < 0:
        raise ValueError(f"rows must be >= 0, got {rows}")
    spare = 0
    if not check_rows(indices, rows):
        # One spare row takes what belongs nowhere.
        indices = indices.where((indices >= 0) & (indices < rows), rows)
        spare = 1
    out = values.new_full((rows + spare, *values.shape[1:]), fill)
    _words(out).index_copy_(0, indices, _words(values.contiguous()))
    return out[:rows]
