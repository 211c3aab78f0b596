"""The bin packers, a million lengths from a Python list to bins, and balance between ranks.

Bins are checked (every document once, none too full or too loaded) before anything is timed; the
number of bins is compared with the lower bound that no packing beats.
"""

from __future__ import annotations

import bisect
import heapq
import math
from functools import partial
from typing import Any

import numpy as np
import torch

from varstream import batching

from ..case import Bar, Case, Peer, Setup, Shape


def documents(shape: Shape, seed: int) -> list[int]:
    """Lognormal lengths, cut at 1 and the longest."""
    sigma = shape["sigma_percent"] / 100
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(np.log(shape["median"]), sigma, shape["documents"])
    return np.clip(lengths.astype(np.int64), 1, shape["longest"]).tolist()


def python_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing in plain Python: the free spaces that occur, sorted, and the open bins of
    each; a document goes into the smallest space that holds it."""
    bins: list[list[int]] = []
    spaces: list[int] = []
    by_space: dict[int, list[int]] = {}
    for document in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[document]
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            chosen, space = len(bins), capacity
            bins.append([])
        else:
            space = spaces[place]
            chosen = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        bins[chosen].append(document)
        left = space - length
        if left:
            if left not in by_space:
                by_space[left] = []
                bisect.insort(spaces, left)
            by_space[left].append(chosen)
    return bins


def _verify(lengths: list[int], capacity: int, found: Any) -> float:
    """0 if every document is in one bin and no bin too full, else infinity."""
    bins = list(getattr(found, "bins", found))
    order = np.concatenate([np.asarray(b, dtype=np.int64) for b in bins])
    if not np.array_equal(np.sort(order), np.arange(len(lengths))):
        return math.inf
    starts = np.cumsum([0, *(len(b) for b in bins[:-1])])
    tokens = np.add.reduceat(np.asarray(lengths)[order], starts)
    return 0.0 if tokens.max() <= capacity else math.inf


def _figures(ours: batching.Packing) -> dict[str, float]:
    return {
        "fill": ours.fill,
        "over_lower_bound": len(ours.bins) / ours.lower_bound - 1,
        "depth": ours.depth,
    }


def _build(packer: Any, shape: Shape, device: torch.device, seed: int) -> Setup:
    lengths, capacity = documents(shape, seed), shape["capacity"]
    return Setup(
        runs={
            "varstream": partial(packer, lengths, capacity),
            "python": partial(python_best_fit, lengths, capacity),
        },
        verify=partial(_verify, lengths, capacity),
        figures=lambda peaks, ours: _figures(ours),
    )


def python_longest_first(lengths: list[int], bins: int) -> list[list[int]]:
    """Longest processing time first in plain Python: a heap of loads."""
    chosen: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    for document in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        load, number = heap[0]
        chosen[number].append(document)
        heapq.heapreplace(heap, (load + lengths[document], number))
    return chosen


def _build_balance(method: str, shape: Shape, device: torch.device, seed: int) -> Setup:
    lengths, ranks = documents(shape, seed), shape["ranks"]
    # What both methods guarantee: no load is above the mean by more than the largest cost.
    most = math.ceil(sum(lengths) / ranks) + max(lengths)

    def figures(ours: batching.Balance) -> dict[str, float]:
        return {"largest_over_mean": float(ours.loads.max() / ours.loads.mean())}

    return Setup(
        runs={
            "varstream": partial(batching.balance, lengths, ranks, method=method),
            "python": partial(python_longest_first, lengths, ranks),
        },
        verify=partial(_verify, lengths, most),
        figures=lambda peaks, ours: figures(ours),
    )


LENGTHS = {
    "sft": {"median": 300, "sigma_percent": 100, "longest": 4096, "capacity": 4096},
    "long_tail": {"median": 500, "sigma_percent": 120, "longest": 262144, "capacity": 262144},
}
BARS = (Bar("seconds", 0.15), Bar("over_lower_bound", 0.0005))


def _case(packer: Any, lengths: str) -> Case:
    best = packer is batching.best_fit_decreasing
    return Case(
        f"batching/{lengths}_{packer.__name__}",
        f"batching.{packer.__name__}",
        {"documents": 1_000_000, **LENGTHS[lengths]},
        partial(_build, packer),
        {"documents": 500},
        dtype="int64",
        peers=(Peer("python"),) if best else (),
        bars=BARS if best and lengths == "sft" else (),
        reference="",
        tolerance=0.0,
        memory=False,
        note="python: the same best fit in plain Python" if best else "",
    )


PACKERS = (
    batching.best_fit_decreasing,
    batching.first_fit_decreasing,
    batching.lpfhp,
    batching.next_fit,
)
CASES = (
    *(_case(packer, lengths) for lengths in LENGTHS for packer in PACKERS),
    *(
        Case(
            f"batching/balance_{method}",
            "batching.balance",
            {"documents": 100_000, **LENGTHS["sft"], "ranks": 64},
            partial(_build_balance, method),
            {"documents": 500, "ranks": 7},
            dtype="int64",
            peers=(Peer("python"),),
            reference="",
            tolerance=0.0,
            memory=False,
            note="python: longest first with a heap",
        )
        for method in ("lpt", "karmarkar_karp")
    ),
)
