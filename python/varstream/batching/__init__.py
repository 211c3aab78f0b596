"""Batches from documents: bin packing of lengths and collation into packed rows."""

from varstream.batching.collator import PackedCollator
from varstream.batching.packing import (
    Bins,
    Packing,
    best_fit_decreasing,
    first_fit_decreasing,
    next_fit,
)

__all__ = [
    "Bins",
    "PackedCollator",
    "Packing",
    "best_fit_decreasing",
    "first_fit_decreasing",
    "next_fit",
]
