"""Balanced assignment against exhaustive search and against its guarantees."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varstream import _C, batching

METHODS = ["lpt", "karmarkar_karp"]
COSTS = st.lists(st.integers(0, 60) | st.sampled_from([0, 1, 60]), max_size=40)


def optimum(costs, bins):
    """The smallest largest load there is, by trying every assignment."""
    best = sum(costs)
    for assignment in product(range(bins), repeat=max(len(costs) - 1, 0)):
        loads = [0] * bins
        for cost, bin_ in zip(costs, (0, *assignment), strict=False):
            loads[bin_] += cost
        best = min(best, max(loads))
    return best


@settings(deadline=None, max_examples=200)
@given(COSTS, st.integers(1, 9), st.sampled_from(METHODS))
def test_invariants(costs, bins, method):
    result = batching.balance(costs, bins, method=method)
    assert len(result.bins) == bins
    assert sorted(i for b in result.bins for i in b.tolist()) == list(range(len(costs)))
    assert all(b.tolist() == sorted(b.tolist()) and b.dtype == np.int64 for b in result.bins)
    loads = [sum(costs[i] for i in b) for b in result.bins]
    assert result.loads.tolist() == loads
    assert result.spread == max(loads) - min(loads) <= max(costs, default=0)
    assert len(costs) < bins or all(len(b) for b in result.bins)
    assert result.bound <= max(loads) + 1e-9
    mean = sum(costs) / bins
    if mean:
        assert result.imbalance == pytest.approx(max(loads) / mean)
        assert 1 <= result.bound_imbalance <= result.imbalance + 1e-12
        assert max(loads) <= mean + (1 - 1 / bins) * max(costs) + 1e-9
    else:
        assert result.imbalance == result.bound_imbalance == 1.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_against_the_optimum(costs, bins):
    best = optimum(costs, bins)
    results = {m: batching.balance(costs, bins, method=m) for m in METHODS}
    assert all(r.bound <= best <= r.loads.max() for r in results.values())
    assert results["lpt"].loads.max() <= (4 / 3 - 1 / (3 * bins)) * best + 1e-9
    if bins == 2:  # Fischetti and Martello (1987)
        assert results["karmarkar_karp"].loads.max() <= 7 / 6 * best + 1e-9


def naive_lpt(costs, bins):
    members, loads = [[] for _ in range(bins)], [0] * bins
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        best = min(range(bins), key=lambda b: (loads[b], len(members[b]), b))
        members[best].append(i)
        loads[best] += costs[i]
    return [sorted(m) for m in members]


def naive_differencing(costs, bins):
    """Sorted load vectors, joined largest with smallest, by the two largest spreads."""
    partials = [(c, i, [c] + [0] * (bins - 1)) for i, c in enumerate(costs)]
    while len(partials) > 1:
        partials.sort(key=lambda p: (-p[0], p[1]))
        (_, i, a), (_, _, b), *partials = partials
        loads = sorted((x + y for x, y in zip(a, reversed(b), strict=True)), reverse=True)
        partials.append((loads[0] - loads[-1], i, loads))
    return sorted(partials[0][2]) if partials else [0] * bins


@settings(deadline=None, max_examples=150)
@given(COSTS, st.integers(1, 9))
def test_lpt_equals_its_definition(costs, bins):
    result = batching.balance(costs, bins)
    assert [b.tolist() for b in result.bins] == naive_lpt(costs, bins)


@settings(deadline=None, max_examples=150)
@given(st.sets(st.integers(1, 10**6), max_size=30), st.integers(1, 3))
def test_differencing_equals_its_definition(costs, bins):
    """Up to ties between partial assignments of one spread, which may be joined in any order."""
    costs = sorted(costs)
    if bins == 1 or len(costs) <= bins:
        return
    spreads = naive_differencing(costs, bins)
    result = batching.balance(costs, bins, method="karmarkar_karp")
    assert sorted(result.loads.tolist()) == spreads or _has_ties(costs, bins)


def _has_ties(costs, bins):
    """Whether two partial assignments ever have the same spread."""
    partials = [(c, [c] + [0] * (bins - 1)) for c in costs]
    while len(partials) > 1:
        spreads = [s for s, _ in partials]
        if len(set(spreads)) < len(spreads):
            return True
        partials.sort(key=lambda p: -p[0])
        (_, a), (_, b), *partials = partials
        loads = sorted((x + y for x, y in zip(a, reversed(b), strict=True)), reverse=True)
        partials.append((loads[0] - loads[-1], loads))
    return False


def test_known_differencing():
    """Two bins of {8, 7, 6, 5, 4}: differencing ends at 16 and 14, LPT at 17 and 13."""
    costs = [8, 7, 6, 5, 4]
    assert sorted(batching.balance(costs, 2).loads.tolist()) == [13, 17]
    kk = batching.balance(costs, 2, method="karmarkar_karp")
    assert sorted(kk.loads.tolist()) == [14, 16]


@pytest.mark.parametrize("method", METHODS)
def test_large_and_deterministic(method):
    lengths = np.random.default_rng(0).lognormal(np.log(300), 1.0, 100_000).astype(np.int64)
    one, two = (batching.balance(lengths, 64, method=method) for _ in range(2))
    assert np.array_equal(one.order, two.order) and np.array_equal(one.offsets, two.offsets)
    assert one.imbalance < 1.0001


def test_differencing_is_closer_on_few_sequences():
    """On typical batches; in the mean over draws, not on each."""
    ratios = []
    for seed in range(20):
        lengths = np.random.default_rng(seed).lognormal(np.log(300), 1.0, 512).astype(np.int64)
        cost = batching.attention_cost(np.clip(lengths, 1, 4096), 4096)
        lpt, kk = (batching.balance(lengths, 32, cost, m).imbalance for m in METHODS)
        ratios.append((kk - 1) / (lpt - 1))
    assert np.mean(ratios) < 1


@pytest.mark.parametrize("method", METHODS)
def test_awkward_inputs(method):
    nothing = batching.balance([], 3, method=method)
    assert [len(b) for b in nothing.bins] == [0, 0, 0]
    assert (nothing.spread, nothing.imbalance, nothing.bound) == (0.0, 1.0, 0.0)
    few = batching.balance([5, 7], 4, method=method)
    assert sorted(len(b) for b in few.bins) == [0, 0, 1, 1]
    zeros = batching.balance([0] * 6, 3, method=method)
    assert all(len(b) for b in zeros.bins)
    one = batching.balance(torch.tensor([3, 1, 2]), np.int64(1), method=method)
    assert one.bins[0].tolist() == [0, 1, 2] and one.imbalance == 1.0
    mixed = batching.balance([9, 0, 0, 0], 4, method=method)
    assert all(len(b) == 1 for b in mixed.bins)


def test_bound_names_the_sequence_that_holds_up():
    result = batching.balance([100, 1, 1, 1], 2)
    assert result.bound == 100 and result.imbalance == result.bound_imbalance > 1.9
    pair = batching.balance([6, 6, 6], 2)  # some bin takes two
    assert pair.bound == 12 == pair.loads.max()
    assert "4 sequences in 2 bins, largest load 1.9417 of the mean, bound 1.9417" in repr(result)


def test_costs():
    lengths = [10, 1, 2, 3]
    by_call = batching.balance(lengths, 2, lambda n: n.astype(float) ** 2)
    by_array = batching.balance(lengths, 2, [100, 1, 4, 9])
    assert by_call.costs.tolist() == by_array.costs.tolist() == [100, 1, 4, 9]
    assert [b.tolist() for b in by_call.bins] == [[0], [1, 2, 3]]
    by_tensor = batching.balance(lengths, 2, torch.tensor([1.5, 0, 0, 1.5]))
    assert by_tensor.loads.tolist() == [1.5, 1.5]


def test_attention_cost():
    """One layer of Llama-3-8B: 436 MFLOP a token, as much for attention at about 53,000 tokens."""
    shape = {"hidden": 4096, "intermediate": 14336, "kv_hidden": 1024, "gated": True}
    one, two = batching.attention_cost([1, 2], **shape)
    scores = (two - 2 * one) / 2  # of n^2
    linear = one - scores
    assert scores == 8192 and linear == pytest.approx(436e6, rel=1e-3)
    assert linear / scores == pytest.approx(53_000, rel=0.01)
    full = batching.attention_cost([0, 7], 8, causal=False)
    assert full.tolist() == [0.0, 2 * 7 * 8 * (16 + 16 + 64) + 4 * 49 * 8]


BAD = [
    (ValueError, "lengths must be >= 0, got -2 at index 1", ([1, -2], 2), {}),
    (TypeError, "lengths must hold integers, got float64", ([0.5], 2), {}),
    (ValueError, "bins must be >= 1, got 0", ([1], 0), {}),
    (ValueError, "bins must be at most 16777216, got", ([1], 2**31), {}),
    (TypeError, "bins must be an int, got float", ([1], 2.0), {}),
    (ValueError, "method must be 'lpt' or 'karmarkar_karp', got 'kk'", ([1], 1), {"method": "kk"}),
    (TypeError, "method must be a str, got NoneType", ([1], 1), {"method": None}),
    (
        ValueError,
        r"cost must have one value per sequence, 2, got shape \(3,\)",
        ([1, 2], 1, [1, 2, 3]),
        {},
    ),
    (ValueError, "cost must be finite and >= 0, got -1.0 at index 1", ([1, 2], 1, [0, -1]), {}),
    (ValueError, "cost must be finite and >= 0, got nan at", ([1, 2], 1, [0, np.nan]), {}),
    (TypeError, "cost must hold numbers, got <U1", ([1], 1, ["a"]), {}),
]


@pytest.mark.parametrize(("error", "message", "args", "kwargs"), BAD)
def test_errors(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        batching.balance(*args, **kwargs)


@pytest.mark.parametrize("name", ["balance_lpt", "balance_karmarkar_karp"])
def test_compiled_errors(name):
    with pytest.raises(ValueError, match=r"bins must be 1 to 2\*\*31 - 1, got 0"):
        getattr(_C, name)(np.ones(3), 0)
    with pytest.raises(ValueError, match="costs must be finite and >= 0, got -1.0+ at index 1"):
        getattr(_C, name)(np.array([1.0, -1.0]), 2)


def test_attention_cost_errors():
    with pytest.raises(ValueError, match="lengths must be >= 0, got -1"):
        batching.attention_cost([-1], 8)
    with pytest.raises(ValueError, match="hidden must be >= 1, got 0"):
        batching.attention_cost([1], 0)
    with pytest.raises(TypeError, match="intermediate must be an int, got float"):
        batching.attention_cost([1], 8, intermediate=2.0)
    with pytest.raises(ValueError, match="kv_hidden must be >= 1, got 0"):
        batching.attention_cost([1], 8, kv_hidden=0)
    with pytest.raises(TypeError, match="gated must be a bool, got int"):
        batching.attention_cost([1], 8, gated=1)
    with pytest.raises(TypeError, match="causal must be a bool, got str"):
        batching.attention_cost([1], 8, causal="no")
