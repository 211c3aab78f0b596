"""Batches from documents: bin packing of lengths, balance between ranks, collation into packed
rows, prompts packed for a prefill."""

from varstream.batching.balancing import Balance, attention_cost, balance
from varstream.batching.collator import PackedCollator
from varstream.batching.histogram import lpfhp
from varstream.batching.packing import (
    Bins,
    Packing,
    best_fit_decreasing,
    first_fit_decreasing,
    next_fit,
)
from varstream.batching.prepacking import Prefill, PrefillRow, prefill

__all__ = [
    "Balance",
    "Bins",
    "PackedCollator",
    "Packing",
    "Prefill",
    "PrefillRow",
    "attention_cost",
    "balance",
    "best_fit_decreasing",
    "first_fit_decreasing",
    "lpfhp",
    "next_fit",
    "prefill",
]
