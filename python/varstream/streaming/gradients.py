"""Parameter gradients of a streamed layer: summed over chunks, seen once by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from varstream._checks import acc_dtype


class GradientSums:
    """Sums of parameter gradients over chunks, in acc dtype."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self.sums: list[Tensor | None] = [None] * len(params)

    def backward(
        self,
        outputs: list[Tensor],
        grads: list[Tensor],
        x: Tensor,
        anchor: Tensor | None,
        dx: Tensor | None,
        add: bool,
    ) -> None:
        """Differentiate one chunk's outputs; write or add its input gradient into the rows dx."""
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        inputs = [t for t in (anchor, x if dx is not None else None) if t is not None]
        if pairs and (inputs or self.params):
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [*inputs, *self.params],
                [g for _, g in pairs],
                allow_unused=True,
            )
        else:
            found = (None,) * (len(inputs) + len(self.params))  # type: ignore[assignment]
        if dx is not None:
            part = found[len(inputs) - 1]
            if not add:
                dx.zero_() if part is None else dx.copy_(part)
            elif part is not None:
                dx.add_(part)
        for i, grad in enumerate(found[len(inputs) :]):
            if grad is None:
                continue
            total = self.sums[i]
            if total is None:
                # A copy: autograd may hand out one tensor for two parameters, or dy itself.
                self.sums[i] = grad.to(acc_dtype(grad.dtype), copy=True)
            else:
                total.add_(grad)

    def finish(self) -> list[Tensor]:
        """One gradient per parameter, in its dtype; zeros where no chunk used it."""
        return [
            torch.zeros_like(p) if total is None else total.to(p.dtype)
            for p, total in zip(self.params, self.sums, strict=True)
        ]


@contextmanager
def without_hooks(params: Sequence[Tensor]) -> Iterator[None]:
    """Lift tensor hooks off the parameters: they must see the summed gradient once, not every
    chunk's."""
    hooks = [(p, p._backward_hooks) for p in params if p._backward_hooks]
    for p, _ in hooks:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, saved in hooks:
            p._backward_hooks = saved
