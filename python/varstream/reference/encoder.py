"""Row-wise parts of an encoder layer composed from ATen: bias + residual + LayerNorm, and linear +
bias + GELU, forward and backward.

Low precision is normalised in float32, block of rows by block of rows, so that no float32 copy of
the whole input exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from varstream._checks import acc_dtype

BLOCK_ELEMENTS = 2**20  # of a block of rows in acc dtype: 4 MiB in float32


def _blocks(rows: int, width: int) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // width)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _summed(x: Tensor, bias: Tensor | None, residual: Tensor | None, rows: slice) -> Tensor:
    """x + bias + residual of some rows (n, d), in acc dtype."""
    given = x[rows]
    z = given.to(acc_dtype(x.dtype))
    if bias is not None:
        z = z + bias
    if residual is None:
        return z
    fresh = bias is not None or z.dtype != given.dtype  # nobody else's memory
    return z.add_(residual[rows]) if fresh else z + residual[rows]


def layer_norm_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(x + bias + residual) over the last dimension.

    Args:
        x, residual: ``(n, d)`` of one dtype.
        bias, weight, ln_bias: ``(d,)`` in that dtype.

    Returns:
        y ``(n, d)`` in x's dtype; mean and rstd ``(n,)`` in acc dtype.
    """
    n, d = x.shape
    acc = acc_dtype(x.dtype)
    scale, shift = (None if t is None else t.to(acc) for t in (weight, ln_bias))
    if x.dtype == acc and n * d <= BLOCK_ELEMENTS:  # one block: nothing to put together
        z = _summed(x, bias, residual, slice(0, n))
        y, m, r = torch.native_layer_norm(z, [d], scale, shift, eps)
        return y, m.flatten(), r.flatten()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = x.new_empty(n, dtype=acc), x.new_empty(n, dtype=acc)
    for rows in _blocks(n, d):
        z = _summed(x, bias, residual, rows)
        part, m, r = torch.native_layer_norm(z, [d], scale, shift, eps)
        y[rows], mean[rows], rstd[rows] = part, m.flatten(), r.flatten()
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``layer_norm_forward``; the sum is formed again from the inputs.

    Args:
        need: whether the gradients of x (and residual), bias, weight and ln_bias are wanted.

    Returns:
        dx ``(n, d)``, dbias, dweight and dln_bias ``(d,)`` in x's dtype, summed in acc dtype; empty
        where not wanted. The gradient of the residual is dx.
    """
    n, d = x.shape
    need_x, need_bias, need_weight, need_shift = need
    acc = acc_dtype(x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    sums = [x.new_zeros(d if needed else 0, dtype=acc) for needed in need[1:]]
    scale = None if weight is None else weight.to(acc)
    # ATen forms the gradient of the shift only when told there is one.
    shift = x.new_zeros(d, dtype=acc)
    mask = [need_x or need_bias, need_weight, need_shift]
    for rows in _blocks(n, d):
        z = _summed(x, bias, residual, rows)
        stats = mean[rows, None], rstd[rows, None]
        dz, dw, db = torch.ops.aten.native_layer_norm_backward(
            dy[rows].to(acc), z, [d], *stats, scale, shift, mask
        )
        if need_x:
            dx[rows] = dz
        parts = dz.sum(0) if need_bias else None, dw, db
        for total, part, needed in zip(sums, parts, need[1:], strict=True):
            if needed:
                total += part
    dbias, dweight, dshift = (total.to(x.dtype) for total in sums)
    return dx, dbias, dweight, dshift


def linear_gelu_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    """gelu(x weight^T + bias) and, if wanted, the pre-activation.

    Args:
        x: ``(n, d)``.
        weight: ``(f, d)``.
        bias: ``(f,)``.

    Returns:
        y ``(n, f)``; pre ``(n, f)``, or empty: then y takes the memory of the product.
    """
    pre = torch.nn.functional.linear(x, weight, bias)
    if keep_pre:
        return torch.nn.functional.gelu(pre, approximate=approximate), pre
    return torch.ops.aten.gelu_(pre, approximate=approximate), x.new_empty(0)


def linear_gelu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    approximate: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``linear_gelu_forward``.

    Args:
        need: whether the gradients of x, weight and bias are wanted.

    Returns:
        dx ``(n, d)``, dweight ``(f, d)`` and dbias ``(f,)``; empty where not wanted.
    """
    dpre = torch.ops.aten.gelu_backward(dy, pre, approximate=approximate)
    return (
        dpre @ weight if need[0] else x.new_empty(0),
        dpre.t() @ x if need[1] else x.new_empty(0),
        dpre.sum(0) if need[2] else x.new_empty(0),
    )
