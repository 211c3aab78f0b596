"""What every objective shares: trained tokens, sums over sequences, the divisor of a mean.

Objectives take per-token log-probabilities of packed rows, ``logp`` (N,), and work in their
accumulation dtype: float64 for float64, else float32. Nothing is read back from a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varstream._checks import (
    FLOATING,
    acc_dtype,
    check_cu_seqlens,
    check_normalizer,
    check_tensor,
)

Normalizer = int | float | Tensor | None


@dataclass(frozen=True)
class Tokens:
    """Checked log-probabilities and the rows that are trained."""

    logp: Tensor  # (N,) acc dtype, 0 at rows that aren't trained
    mask: Tensor  # (N,) bool

    @property
    def count(self) -> Tensor:
        """Number of trained tokens ()."""
        return self.mask.sum()

    def keep(self, values: Tensor) -> Tensor:
        """``values`` (N,) in acc dtype, 0 at rows that aren't trained, whatever they hold there.

        A product with the mask would let NaN through, in the result and in the gradient.
        """
        return torch.where(self.mask, values.to(self.logp.dtype), 0.0)

    def constant(self, name: str, value: Any) -> Tensor:
        """A per-token argument (N,), floating, detached."""
        device = self.logp.device
        shape = (self.logp.shape[0],)
        check_tensor(name, value, shape=shape, dtypes=FLOATING, device=device, layout="(N,)")
        return self.keep(value.detach())


@dataclass(frozen=True)
class Sequences(Tokens):
    """The same rows as ``batch`` sequences."""

    offsets: Tensor  # (B+1,) int64

    @property
    def batch(self) -> int:
        return self.offsets.shape[0] - 1

    def sum(self, values: Tensor) -> Tensor:
        """Sums (B,) of ``values`` (N,) over the trained tokens of each sequence.

        One segmented reduction: unlike atomic additions it repeats bitwise on a GPU. It adds one
        value after the other, so in float32 a long sequence would lose digits.
        """
        total = torch.segment_reduce(
            self.keep(values).double(), "sum", offsets=self.offsets, unsafe=True, initial=0
        )
        return total.to(self.logp.dtype)

    @property
    def lengths(self) -> Tensor:
        """Trained tokens of each sequence (B,), in acc dtype."""
        return self.sum(torch.ones_like(self.logp, requires_grad=False))

    def mean(self, values: Tensor) -> Tensor:
        """Means (B,) over the trained tokens of each sequence; 0 where there are none."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """``values`` (B,), constants, at the rows of their sequence: (N,)."""
        rows = torch.arange(self.logp.shape[0], device=self.offsets.device)
        index = torch.searchsorted(self.offsets[1:], rows, right=True)
        # Rows past the last sequence, which only a GPU's unchecked offsets can leave, read a 0.
        return torch.cat([values, values.new_zeros(1)])[index]

    def per_sequence(self, name: str, value: Any) -> Tensor:
        """An argument (B,) or (N,), floating, detached, as (N,)."""
        check_tensor(name, value, ndim=1, dtypes=FLOATING, device=self.logp.device)
        rows = self.logp.shape[0]
        if value.shape[0] == self.batch:
            return self.keep(self.spread(value.detach().to(self.logp.dtype)))
        if value.shape[0] == rows:
            return self.keep(value.detach())
        raise ValueError(
            f"{name} must have shape (B,) = ({self.batch},) or (N,) = ({rows},), "
            f"got {tuple(value.shape)}"
        )


def widened(logp: Any) -> Tensor:
    """Check ``logp`` (N,) floating and return it in acc dtype."""
    check_tensor("logp", logp, ndim=1, dtypes=FLOATING, layout="(N,)")
    return logp.to(acc_dtype(logp.dtype))


def tokens(logp: Any, mask: Any) -> Tokens:
    """Check ``logp`` (N,) floating and ``mask`` (N,) bool."""
    logp = widened(logp)
    mask = check_mask("mask", mask, logp)
    return Tokens(torch.where(mask, logp, 0.0), mask)


def check_mask(name: str, mask: Any, rows: Tensor) -> Tensor:
    """Check a mask (N,) over the first dimension of ``rows``."""
    shape, device = (rows.shape[0],), rows.device
    return check_tensor(name, mask, shape=shape, dtypes=(torch.bool,), device=device, layout="(N,)")


def sequences(logp: Any, mask: Any, cu_seqlens: Any) -> Sequences:
    """Check packed rows: as ``tokens``, and ``cu_seqlens`` (B+1,) int32 over all N rows."""
    rows = tokens(logp, mask)
    cu = check_cu_seqlens("cu_seqlens", cu_seqlens, rows.logp.shape[0], rows.logp.device)
    return Sequences(rows.logp, rows.mask, cu.long())


def average(
    total: Tensor, count: int | Tensor, normalizer: Normalizer, name: str = "normalizer"
) -> Tensor:
    """``total`` () over ``normalizer`` or, without one, over ``count``; ``total / 1`` if that is 0.

    Raises:
        TypeError: ``normalizer`` is no number and no tensor.
        ValueError: it isn't above 0 though something is counted, or has several elements.
    """
    count = torch.full_like(total, count, requires_grad=False) if isinstance(count, int) else count
    if normalizer is None:
        return total / count.clamp(min=1)
    return total / check_normalizer(normalizer, count, total, name)
