"""The attention plan visits every visible score exactly once and no hidden one outside its edge
tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import varstream as vs
from varstream.reference import attention as reference
from varstream.reference.attention_plan import (
    CAUSAL,
    EDGE,
    FULL,
    plan_causal,
    plan_sequence,
    visible_range,
)


def visible(sq, sk, left, right):
    """All (row, key) pairs of the contract, one by one."""
    pairs = set()
    for i in range(sq):
        at = i + sk - sq
        for j in range(sk):
            if (left < 0 or j >= at - left) and (right < 0 or j <= at + right):
                pairs.add((i, j))
    return pairs


def covered(sq, sk, left, right, blocks):
    """Pairs that the plan computes and does not mask; fails on a pair that two tiles hold."""
    seen = []
    for block in blocks:
        for tile in block.tiles:
            for i in range(block.q0, block.q1):
                first, last = visible_range(i, sq, sk, left, right)
                for j in range(tile.k0, tile.k1):
                    hidden = {
                        FULL: False,
                        CAUSAL: j - tile.k0 > i - block.q0,
                        EDGE: not first <= j < last,
                    }[tile.kind]
                    if not hidden:
                        seen.append((i, j))
    assert len(seen) == len(set(seen))
    return set(seen)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 24),
    st.integers(0, 24),
    st.integers(-1, 26),
    st.integers(-1, 26),
    st.integers(1, 30),
    st.integers(1, 30),
    st.booleans(),
)
def test_plan_covers_the_visible_area(sq, sk, left, right, block_q, block_k, causal_tiles):
    blocks = plan_sequence(sq, sk, left, right, block_q, block_k, causal_tiles)
    assert covered(sq, sk, left, right, blocks) == visible(sq, sk, left, right)


@settings(max_examples=200, deadline=None)
@given(*[st.integers(0, 24)] * 2, *[st.integers(1, 30)] * 3)
def test_causal_plan_covers_the_visible_area(sq, sk, block_q, block_k, square_q):
    blocks = plan_causal(sq, sk, block_q, block_k, square_q)
    assert covered(sq, sk, -1, 0, blocks) == visible(sq, sk, -1, 0)
    seen = set()
    for block in blocks:  # a block says when its rows have results already
        rows = set(range(block.q0, block.q1))
        assert block.again == bool(rows & seen)
        seen |= rows


@pytest.mark.parametrize("causal_tiles", [True, False])
def test_work_is_proportional_to_the_visible_area(causal_tiles):
    n, window, block = 4096, 100, 64
    blocks = plan_sequence(n, n, window, 0, block, 512, causal_tiles)
    work = sum((b.q1 - b.q0) * (t.k1 - t.k0) for b in blocks for t in b.tiles)
    assert work <= n * (window + 1 + block)


def test_causal_tiles_are_squares_on_the_diagonal():
    blocks = plan_sequence(100, 260, -1, 0, 48, 10**9, True)
    for block in blocks:
        *_, tail = block.tiles
        assert tail.kind == CAUSAL
        assert tail.k1 - tail.k0 == block.q1 - block.q0


@pytest.mark.parametrize("length, batch, kv_heads", [(1, 3, 2), (7, 2, 4), (33, 5, 1)])
def test_sequences_of_one_length_run_as_a_batch(length, batch, kv_heads, monkeypatch):
    """The same as one after another, which lengths that differ by a row take."""
    draw = torch.Generator().manual_seed(5)
    q = torch.randn(batch * length, 4, 16, generator=draw, dtype=torch.float64).requires_grad_()
    k, v = (
        torch.randn(
            batch * length, kv_heads, 16, generator=draw, dtype=torch.float64
        ).requires_grad_()
        for _ in range(2)
    )
    cu = vs.cu_seqlens([length] * batch)
    up = torch.randn(q.shape, generator=draw, dtype=torch.float64)

    def run():
        out, lse = vs.varlen_attention(q, k, v, cu, return_lse=True)
        return out, lse, *torch.autograd.grad((out * up).sum(), (q, k, v))

    together = run()
    calls = []
    monkeypatch.setattr(reference, "even_length", lambda *args: calls.append(args) or 0)
    for ours, theirs in zip(together, run(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    assert len(calls) == 2
