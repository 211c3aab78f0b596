"""Floors: the part of the work that no implementation can leave out, timed in the same rounds.

A floor does less than the task, so a ratio to it near 1 is the best there is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A matrix product of this size runs at its device's full rate.
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


def head_products(x: Tensor, weight: Tensor, products: str) -> Callable[[], None]:
    """The head's matrix products over all rows, into outputs allocated and written before.

    Args:
        x: (N, d) rows that take part.
        weight: (V, d).
        products: one letter each, in order: ``z`` logits x W^T, ``x`` input gradient G W, ``w``
            weight gradient G^T x. ``zxw`` is a gradient formed in the forward, ``zzxw`` one that
            recomputes, ``zx`` a frozen head, ``z`` inference.
    """
    x, weight = x.detach(), weight.detach()
    logits = x.new_zeros(x.shape[0], weight.shape[0])
    dinput, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    steps = {
        "z": lambda: torch.mm(x, weight.t(), out=logits),
        "x": lambda: torch.mm(logits, weight, out=dinput),
        "w": lambda: torch.mm(logits.t(), x, out=dweight),
    }

    def run() -> None:
        for product in products:
            steps[product]()

    return run


def gemm_rate(
    flops: float, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], None], float]:
    """A square matrix product, and the factor from its time to that of ``flops`` operations at the
    same rate: the time the task would take if all of it ran like a large matrix product."""
    size = GEMM_SIZE[device.type]
    # Random numbers: a GPU's clock is higher over equal ones, which toggle fewer bits.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.zeros_like(a)

    def run() -> None:
        torch.mm(a, b, out=out)

    return run, flops / (2 * size**3)


def copy(moved_bytes: int, device: torch.device) -> Callable[[], None]:
    """A plain copy that moves so many bytes, half of them read and half written."""
    size = max(moved_bytes // 2, 1)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source).zero_()

    def run() -> None:
        target.copy_(source)

    return run
