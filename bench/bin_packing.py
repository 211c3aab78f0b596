"""Benchmark of the bin packers: ``python -m bench.bin_packing``.

A million document lengths, from a Python list (as a tokenised data set gives them) to bins. Bins
are checked before anything is timed; fill is compared with the lower bound that no packing beats.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np

from bench import timing
from varstream import batching

# name, median length, sigma of its logarithm, longest, capacity
CASES = [
    ("sft", 300, 1.0, 4096, 4096),
    ("long_tail", 500, 1.2, 262144, 262144),
]
PACKERS = (batching.best_fit_decreasing, batching.first_fit_decreasing, batching.next_fit)
BARS = {"seconds": 0.15, "over_lower_bound": 0.0005}  # best fit on "sft"


def documents(median: float, sigma: float, longest: int, count: int) -> list[int]:
    """Lognormal lengths, cut at 1 and ``longest``."""
    lengths = np.random.default_rng(0).lognormal(np.log(median), sigma, count)
    return np.clip(lengths.astype(np.int64), 1, longest).tolist()


def check(packing: batching.Packing) -> None:
    """Every document once, no bin above its capacity."""
    count = len(packing.lengths)
    assert np.array_equal(np.sort(packing.order), np.arange(count)), "a document is lost or doubled"
    assert packing.tokens.max() <= packing.capacity, "a bin is too full"


def main() -> None:
    """Measure all cases, print and store."""
    parser = argparse.ArgumentParser(description="Time the bin packers.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--no-store", action="store_true", help="only print")
    options = parser.parse_args()
    report: dict[str, Any] = {"environment": timing.environment(), "documents": options.count}
    report["cases"] = {}
    for name, median, sigma, longest, capacity in CASES:
        lengths = documents(median, sigma, longest, options.count)
        packings = {p.__name__: p(lengths, capacity) for p in PACKERS}
        for packing in packings.values():
            check(packing)
        runs = {p.__name__: partial(p, lengths, capacity) for p in PACKERS}
        seconds = timing.paired(runs, options.rounds)
        result = report["cases"][name] = {
            packer: {
                "seconds": timing.summary(seconds[packer]),
                "fill": packing.fill,
                "over_lower_bound": len(packing.bins) / packing.lower_bound - 1,
                "depth": packing.depth,
            }
            for packer, packing in packings.items()
        }
        print(f"{name}: {options.count} documents, capacity {capacity}")
        for packer, numbers in result.items():
            print(
                f"  {packer:22} {numbers['seconds']['median'] * 1e3:6.1f} ms, fill "
                f"{numbers['fill']:.4%}, {numbers['over_lower_bound']:.4%} over the lower bound"
            )
    best = report["cases"]["sft"]["best_fit_decreasing"]
    reached = {
        "seconds": best["seconds"]["median"],
        "over_lower_bound": best["over_lower_bound"],
    }
    report["bars"] = timing.against(BARS.items(), reached)
    timing.print_bars(report["bars"])
    if not options.no_store:
        print(f"written: {timing.store('bin_packing', report)}")


if __name__ == "__main__":
    main()
