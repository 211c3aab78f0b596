"""Parameter gradients of a streamed layer: summed over chunks, seen once by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from varstream._checks import acc_dtype


class GradientSums:
    """Sums of parameter gradients over chunks, in acc dtype.

    While ``taken``, each parameter's gradient is added to its sum as soon as autograd has formed
    it, so that a chunk's gradients never exist all at once.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.sums: list[Tensor | None] = [None] * len(params)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within, gradients of the parameters go into the sums.

        Hooks of the parameters are lifted off: they must see the summed gradient once, not every
        chunk's.
        """
        hooks = [p._backward_hooks for p in self.params]
        for i, p in enumerate(self.params):
            p._backward_hooks = None
            p.register_hook(partial(self._take, i))
        try:
            yield
        finally:
            for p, saved in zip(self.params, hooks, strict=True):
                p._backward_hooks = saved

    def _take(self, index: int, grad: Tensor) -> Tensor:
        total = self.sums[index]
        if total is None:
            # A copy: autograd may hand out one tensor for two parameters, or dy itself.
            self.sums[index] = grad.to(acc_dtype(grad.dtype), copy=True)
        else:
            total.add_(grad)
        return grad.new_zeros(()).expand_as(grad)  # what autograd keeps until the chunk's end

    def backward(
        self,
        pairs: list[tuple[Tensor, Tensor]],
        x: Tensor | None = None,
        dx: Tensor | None = None,
    ) -> None:
        """Differentiate one chunk's outputs, given with their gradients; write x's into dx."""
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        inputs = [*self.params] if x is None or dx is None else [x, *self.params]
        part = None
        if pairs and inputs:
            part, *_ = torch.autograd.grad(
                [o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True
            )
        if dx is not None:
            dx.zero_() if part is None else dx.copy_(part)

    def finish(self) -> list[Tensor]:
        """One gradient per parameter, in its dtype; zeros where no chunk used it."""
        return [
            torch.zeros_like(p) if total is None else total.to(p.dtype)
            for p, total in zip(self.params, self.sums, strict=True)
        ]
