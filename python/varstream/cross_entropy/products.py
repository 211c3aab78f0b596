"""The head's matrix products: low-precision operands, float32 sums, by torch.

``C`` rows of a chunk, hidden size ``d``, ``V`` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 64  # columns: rows of the buffer start on whole cache lines


def product_out(a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> None:
    """``out = beta * out + a b`` in the dtype of ``out``: that of a and b, or float32.

    Sums into float32 are in float32: a GPU widens what it writes only, elsewhere the operands are.
    Others follow torch's ``allow_bf16_reduced_precision_reduction`` as a plain product does.
    """
    if out.dtype != a.dtype and not out.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif beta == 0:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=beta, out=out)


class ChunkBuffer:
    """The one (C, V) buffer of a call: logits, and their gradient over them."""

    def __init__(self, rows: int, classes: int, like: Tensor, dtype: torch.dtype) -> None:
        columns = -(-classes // _ALIGNMENT) * _ALIGNMENT
        self.classes, self.low = classes, like.dtype
        self.padded = like.new_empty((rows, columns), dtype=dtype)

    def fill(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x`` (C, d), ``weight`` (V, d) -> the products with padded columns (C, V and more)."""
        padded = self.padded[: x.shape[0]]
        product_out(x, weight.t(), padded[:, : self.classes])
        return padded

    def gradient(self, rows: int) -> Tensor:
        """The gradient (C, V) that the row kernels left in the inputs' dtype."""
        return self.padded[:rows].view(self.low)[:, : self.classes]
