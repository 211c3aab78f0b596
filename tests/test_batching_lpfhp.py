"""Longest-pack-first histogram packing: best fit on counts of equal lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varstream import batching


def contents(packing, lengths):
    """The lengths in each bin, as a sorted list of sorted tuples."""
    return sorted(tuple(sorted(lengths[i] for i in b)) for b in packing.bins)


@settings(deadline=None, max_examples=150)
@given(st.sets(st.integers(1, 64), max_size=40), st.none() | st.integers(1, 5))
def test_is_best_fit_where_all_lengths_differ(lengths, depth):
    lengths = sorted(lengths)
    ours = batching.lpfhp(lengths, 64, depth)
    assert contents(ours, lengths) == contents(
        batching.best_fit_decreasing(lengths, 64, depth), lengths
    )


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 30), max_size=150), st.integers(30, 40))
def test_no_two_bins_would_fit_into_one(lengths, capacity):
    """The any-fit property, hence at most twice the optimum."""
    packing = batching.lpfhp(lengths, capacity)
    tokens = np.sort(packing.tokens)
    assert len(tokens) < 2 or tokens[0] + tokens[1] > capacity
    assert len(packing.bins) <= max(2 * packing.lower_bound, 1)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 30), max_size=150), st.integers(1, 6))
def test_depth_wastes_no_bins(lengths, depth):
    """Of the bins below the depth limit no two fit into one."""
    packing = batching.lpfhp(lengths, 30, depth)
    depths = np.diff(packing.offsets)
    tokens = np.sort(packing.tokens[depths < depth])
    assert len(tokens) < 2 or tokens[0] + tokens[1] > 30


def test_equal_lengths_go_together_and_keep_their_order():
    packing = batching.lpfhp([3, 4, 3, 3, 4, 3, 3], 10)
    assert sorted(b.tolist() for b in packing.bins) == [[0, 2, 3], [1, 4], [5, 6]]
    one = batching.lpfhp([2] * 10, 10)
    assert [b.tolist() for b in one.bins] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [b.tolist() for b in batching.lpfhp([0, 0, 0], 1, 2).bins] == [[0, 1], [2]]


def test_deterministic():
    lengths = np.random.default_rng(0).integers(0, 512, 5000)
    one, two = (batching.lpfhp(lengths, 512) for _ in range(2))
    assert np.array_equal(one.order, two.order) and np.array_equal(one.offsets, two.offsets)


@pytest.mark.parametrize("capacity", [512, 4096, 2**31 - 1])
def test_fill(capacity):
    draws = np.random.default_rng(1).lognormal(np.log(250), 0.8, 200_000)
    lengths = np.clip(draws.astype(np.int64), 1, 512)
    packing = batching.lpfhp(lengths, capacity)
    best = batching.best_fit_decreasing(lengths, capacity)
    assert len(packing.bins) <= 1.01 * len(best.bins)
    assert np.bincount(packing.order).tolist() == [1] * len(lengths)
