"""The head's results in float32, a block of rows after the other: what every way is checked
against, at shapes where all logits in float32 would fill a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .head_ways import Head, row_values

BLOCK_ROWS = 1024

# x (n, d), weight (V, d) and blocks of further tensors of rows to values (n,).
Values = Callable[..., Sequence[Tensor]]


def in_blocks(
    values: Values,
    x: Tensor,
    weight: Tensor,
    rows: Sequence[Tensor],
    upstream: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """The rows' values (N,), and the gradients of their sum times ``upstream`` of those of x and
    weight that require them; all in float32."""
    wide = weight.detach().float().requires_grad_(weight.requires_grad)
    columns: list[list[Tensor]] = []
    inputs: list[Tensor] = []
    total: Tensor | None = None
    for begin in range(0, x.shape[0], BLOCK_ROWS):
        block = slice(begin, begin + BLOCK_ROWS)
        part = x.detach()[block].float().requires_grad_(x.requires_grad)
        found = values(part, wide, *(t[block] for t in rows))
        columns.append([t.detach() for t in found])
        leaves = [t for t in (part, wide) if t.requires_grad]
        if not leaves:
            continue
        weights = [u[block] for u in upstream[: len(found)]]
        first, *rest = torch.autograd.grad(found, leaves, weights)
        inputs.append(first)
        if rest:
            total = rest[0] if total is None else total.add_(rest[0])
    gradients = [torch.cat(inputs)] if inputs else []
    if total is not None:
        gradients.append(total)
    return [torch.cat(column) for column in zip(*columns, strict=True)], gradients


def loss(h: Head, reduction: str) -> list[Tensor]:
    """The cross-entropy and its gradients, as ``head_ways.loss_and_gradients`` returns them."""

    def negative(x: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
        return [-row_values(x, weight, target, False)[0]]

    upstream = h.upstream[0]
    if reduction == "mean":
        upstream = h.valid / h.valid.sum()
    (losses,), gradients = in_blocks(negative, h.x, h.weight, [h.target], [upstream])
    return [(losses * upstream).sum() if reduction == "mean" else losses, *gradients]


def logprobs(h: Head, entropy: bool) -> list[Tensor]:
    """Log-probabilities and the rest, as ``head_ways.logprobs_and_gradients`` returns them."""

    def values(x: Tensor, weight: Tensor, target: Tensor) -> Sequence[Tensor]:
        return row_values(x, weight, target, entropy)

    found, gradients = in_blocks(values, h.x, h.weight, [h.target], h.upstream)
    return [*found, *gradients]
