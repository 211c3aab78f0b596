"""The head's gradients being summed over chunks on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from varstream.cross_entropy.products import product_out
from varstream.cross_entropy.rows import DeviceRows


class Gradients:
    """Gradients of input (N, d), weight (V, d) and bias (V,); those not wanted are empty.

    ``weight_grad`` is a buffer of the caller's that the weight's gradient is added to instead.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        rows: DeviceRows,
        needs: tuple[bool, bool, bool],
        weight_grad: Tensor | None = None,
    ) -> None:
        self.need_input, self.need_weight, self.need_bias = needs
        self.weight_operand, self.rows = weight, rows
        self.input = x.new_zeros(x.shape if self.need_input else (0,))
        # The first chunk writes, so nothing is cleared.
        self.fresh = weight_grad is None
        if weight_grad is not None:
            self.weight = weight_grad
        else:
            shape = weight.shape if self.need_weight else (0,)
            self.weight = x.new_empty(shape, dtype=torch.float32)
        bias = weight.shape[:1] if self.need_bias else (0,)
        self.bias = x.new_zeros(bias, dtype=torch.float32)

    def add(self, part: slice, x: Tensor, g: Tensor) -> None:
        """Add a chunk: rows ``part`` of the order, their ``x`` (C, d) and ``g`` (C, V)."""
        if self.need_input:
            found = torch.empty_like(x)
            product_out(g, self.weight_operand, found)
            self._place(part, found)
        self._add_classes(x, g)

    def _place(self, part: slice, found: Tensor) -> None:
        """The input's gradient (C, d) of rows ``part`` of the order goes where they stand."""
        # A skipped row's product is 0 times a weight that may be infinite.
        found.masked_fill_(self.rows.index[part, None] < 0, 0)
        self.input.index_copy_(0, self.rows.order[part], found)

    def _add_classes(self, x: Tensor, g: Tensor) -> None:
        """A chunk's part of the gradients of weight and bias."""
        if self.need_weight:
            product_out(g.t(), x, self.weight, beta=0 if self.fresh else 1)
            self.fresh = False
        if self.need_bias:
            self.bias += g.sum(0, dtype=torch.float32)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three of them, to be called once."""
        if self.need_weight and self.fresh:  # no chunk came
            self.weight.zero_()
        for gradient in (self.input, self.weight, self.bias):
            self.rows.poison_(gradient)
        return self.input, self.weight, self.bias
