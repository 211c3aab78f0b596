"""Sequences to a fixed number of bins (ranks, micro-batches) so that all take equally long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from varstream import _C
from varstream._arrays import host_array, int_array
from varstream._checks import check_bool, check_int
from varstream.batching.packing import Bins

MOST_BINS = 2**24  # their loads are arrays
Cost = Callable[[np.ndarray], Any] | Sequence[float] | np.ndarray

_METHODS = {"lpt": _C.balance_lpt, "karmarkar_karp": _C.balance_karmarkar_karp}


@dataclass(frozen=True, eq=False, repr=False)
class Balance:
    """Which sequences go to which bin, and how even that is.

    Attributes:
        order: (n,) int64, sequence indices, bin after bin, in the given order within a bin.
        offsets: (bins + 1,) int64, where each bin starts in ``order``.
        costs: (n,) float64, what each sequence costs.
    """

    order: np.ndarray
    offsets: np.ndarray
    costs: np.ndarray

    @property
    def bins(self) -> Bins:
        """The bins, each an int64 array of sequence indices; with fewer sequences than bins some
        are empty (a rank still has to join collectives)."""
        return Bins(self.order, self.offsets)

    @cached_property
    def loads(self) -> np.ndarray:
        """(bins,) float64, the summed cost of each bin."""
        bins = len(self.bins)
        numbers = np.repeat(np.arange(bins), np.diff(self.offsets))
        return np.bincount(numbers, weights=self.costs[self.order], minlength=bins)

    @property
    def spread(self) -> float:
        """The largest load minus the smallest; at most the largest cost."""
        return float(self.loads.max() - self.loads.min())

    @property
    def imbalance(self) -> float:
        """The largest load over the mean: how much longer a step takes than a perfectly even one
        would, 1 or more; 1 when nothing costs anything."""
        return self._over_mean(self.loads.max())

    @property
    def bound(self) -> float:
        """What the largest load of no assignment can go below: the mean, the costliest sequence,
        and, as some bin must take two of the bins + 1 costliest, the two cheapest of those."""
        bins = len(self.bins)
        most = max(self._mean, self.costs.max(initial=0.0))
        if len(self.costs) > bins:
            costly = np.sort(self.costs)[::-1][: bins + 1]
            most = max(most, costly[-1] + costly[-2])
        return float(most)

    @property
    def bound_imbalance(self) -> float:
        """``bound`` over the mean. Well above 1, a single sequence holds the step up: only to split
        it (context parallelism) would help, no assignment does."""
        return self._over_mean(self.bound)

    @property
    def _mean(self) -> float:
        return float(self.costs.sum()) / len(self.bins)

    def _over_mean(self, load: float) -> float:
        return float(load) / self._mean if self._mean > 0 else 1.0

    def __repr__(self) -> str:
        return (
            f"Balance({len(self.costs)} sequences in {len(self.bins)} bins, largest load "
            f"{self.imbalance:.4f} of the mean, bound {self.bound_imbalance:.4f})"
        )


def balance(lengths: Any, bins: int, cost: Cost | None = None, method: str = "lpt") -> Balance:
    """Assign sequences to ``bins`` bins so that the largest load is small.

    Args:
        lengths: (n,) tokens of each sequence, at least 0: a list, array or tensor of integers.
        bins: number of bins, at least 1. With at least as many sequences as bins, none is empty.
        cost: what a sequence costs: a function from the lengths (n,) int64 to (n,), such as
            ``lambda n: attention_cost(n, hidden=4096)``, or the (n,) costs themselves, finite and
            at least 0. Default: its tokens. The choice matters more than the method.
        method: ``"lpt"``, longest processing time first, whose largest load is at most
            ``4/3 - 1/(3 bins)`` times the optimum; or ``"karmarkar_karp"``, largest differencing,
            which is mostly closer to even. Both are deterministic, and neither limits the tokens of
            a bin: balance packed rows, or check.

    Returns:
        A :class:`Balance` with bins, loads and how far they are from the best possible.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an unknown method, a number of bins out of range, costs of another shape,
            negative or not finite.

    Source: Graham (1969); Karmarkar and Karp (1982), differencing over any number of bins.
    """
    array = int_array("lengths", lengths)
    if array.size and array.min() < 0:
        at = int((array < 0).argmax())
        raise ValueError(f"lengths must be >= 0, got {array[at]} at index {at}")
    if isinstance(bins, np.integer):
        bins = int(bins)
    check_int("bins", bins, low=1)
    if bins > MOST_BINS:
        raise ValueError(f"bins must be at most {MOST_BINS}, got {bins}")
    if not isinstance(method, str):
        raise TypeError(f"method must be a str, got {type(method).__name__}")
    if method not in _METHODS:
        raise ValueError(f"method must be 'lpt' or 'karmarkar_karp', got {method!r}")
    costs = _costs(array, cost)
    bin_of = _METHODS[method](costs, bins)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(bin_of, minlength=bins))))
    return Balance(np.argsort(bin_of, kind="stable"), offsets, costs)


def attention_cost(
    lengths: Any,
    hidden: int,
    *,
    intermediate: int | None = None,
    kv_hidden: int | None = None,
    gated: bool = False,
    causal: bool = True,
) -> np.ndarray:
    """Floating point operations of one transformer layer's forward, sequence by sequence: its
    linear layers grow with the length, attention with the square.

    ``2 n hidden (2 hidden + 2 kv_hidden + m intermediate) + 4 n^2 hidden / (2 if causal else 1)``,
    with m = 3 for a gated feed-forward block, else 2. A backward costs about twice as much, so the
    proportions stay. Models of n layers of one kind need no factor: balance takes proportions.

    Args:
        lengths: (n,) tokens of each sequence: a list, array or tensor of integers.
        hidden: width of the model, at least 1 (queries of all heads together).
        intermediate: width of the feed-forward block, default ``4 * hidden``.
        kv_hidden: width of the keys of all key heads together, default ``hidden``.
        gated: whether the feed-forward block has a gate (Llama's has).
        causal: whether half of the scores are left out.

    Returns:
        (n,) float64.

    Raises:
        TypeError, ValueError: an argument breaks its contract; the message names it.
    """
    array = int_array("lengths", lengths).astype(np.float64)
    if array.size and array.min() < 0:
        raise ValueError(f"lengths must be >= 0, got {int(array.min())}")
    check_int("hidden", hidden, low=1)
    inner = 4 * hidden if intermediate is None else check_int("intermediate", intermediate, low=1)
    keys = hidden if kv_hidden is None else check_int("kv_hidden", kv_hidden, low=1)
    matrices = 3 if check_bool("gated", gated) else 2
    weights = hidden * (2 * hidden + 2 * keys + matrices * inner)
    scores = 4 * hidden / (2 if check_bool("causal", causal) else 1)
    return 2.0 * weights * array + scores * array**2


def _costs(lengths: np.ndarray, cost: Cost | None) -> np.ndarray:
    """(n,) float64, checked."""
    if cost is None:
        return lengths.astype(np.float64)
    values = host_array("cost", cost(lengths.copy()) if callable(cost) else cost)
    if values.shape != lengths.shape:
        raise ValueError(
            f"cost must have one value per sequence, {len(lengths)}, got shape {values.shape}"
        )
    values = values.astype(np.float64)
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"cost must be finite and >= 0, got {values[at]} at index {at}")
    return values
