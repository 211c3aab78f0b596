"""Prepacked prompts: what one variable-length forward gives equals the prompts one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, make_model

import varstream as vs
from varstream import batching
from varstream.testing import assert_exact

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]


def test_one_row_in_the_given_order():
    p = batching.prefill(PROMPTS)
    (row,) = p.rows
    assert row.input_ids.tolist() == [list(range(5, 16))]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1]]
    assert row.cu_seqlens.tolist() == [0, 3, 4, 9, 11] and row.cu_seqlens.dtype == torch.int32
    assert row.max_seqlen == 5 and type(row.max_seqlen) is int
    assert row.prompts.tolist() == [0, 1, 2, 3] and row.last.tolist() == [2, 3, 8, 10]
    assert p.lengths.tolist() == [3, 1, 5, 2] and (p.batch, p.seqlen) == (4, 5)
    inputs = row.model_inputs()
    assert inputs["cu_seq_lens_q"] is row.cu_seqlens and inputs["max_length_k"] == 5
    assert set(inputs) == {
        *("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k"),
        *("max_length_q", "max_length_k"),
    }


@st.composite
def batches(draw):
    """(mask (B, S) with a real token in every row, capacity or None, first position)."""
    batch, seqlen = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    mask = draw(
        st.lists(
            st.lists(st.booleans(), min_size=seqlen, max_size=seqlen).filter(any),
            min_size=batch,
            max_size=batch,
        )
    )
    mask = torch.tensor(mask)
    longest = int(mask.sum(1).max())
    return mask, draw(st.none() | st.integers(longest, 3 * longest)), draw(st.integers(0, 2))


@settings(deadline=None, max_examples=150)
@given(batches())
def test_round_trip(problem):
    """Every token once, within capacity; splitting, last tokens and unpacking find them again."""
    mask, capacity, first = problem
    ids = torch.arange(mask.numel()).view(mask.shape) + 100
    p = batching.prefill(ids, mask, capacity=capacity, first_position=first)
    columns = [row.input_ids[0] for row in p.rows]
    assert sorted(torch.cat(columns).tolist()) == ids[mask].tolist()
    assert sorted(torch.cat([r.prompts for r in p.rows]).tolist()) == list(range(len(mask)))
    for row, column in zip(p.rows, columns, strict=True):
        assert capacity is None or len(column) <= capacity
        starts = row.cu_seqlens.tolist()
        for k, prompt in enumerate(row.prompts.tolist()):
            part = slice(starts[k], starts[k + 1])
            assert column[part].tolist() == ids[prompt][mask[prompt]].tolist()
            positions = row.position_ids[0, part].tolist()
            assert positions == list(range(first, first + int(mask[prompt].sum())))
        assert row.max_seqlen == max(b - a for a, b in zip(starts, starts[1:], strict=False))
    assert p.last_tokens(columns).tolist() == [
        int(i[m][-1]) for i, m in zip(ids, mask, strict=True)
    ]
    for got, i, m in zip(p.split(columns), ids, mask, strict=True):
        assert got.tolist() == i[m].tolist()
    assert torch.equal(p.unpack(columns, fill=-1), ids.masked_fill(~mask, -1))


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_forms_of_prompts_agree(kind):
    one = batching.prefill([kind(prompt) for prompt in PROMPTS], capacity=6)
    two = batching.prefill(lengths=kind([len(prompt) for prompt in PROMPTS]), capacity=6)
    assert all(row.input_ids is None for row in two.rows)
    assert "input_ids" not in two.rows[0].model_inputs()
    for a, b in zip(one.rows, two.rows, strict=True):
        assert torch.equal(a.position_ids, b.position_ids) and torch.equal(a.last, b.last)
        assert a.input_ids.dtype == torch.int64
    assert len(one.rows) == 2
    dense = batching.prefill(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32))
    assert dense.rows[0].input_ids.tolist() == [[1, 2, 3, 4]]
    assert dense.rows[0].input_ids.dtype == torch.int64


@pytest.mark.parametrize("capacity", [None, 9])
def test_next_token_logits_of_a_model(capacity):
    """A causal model on packed rows against the same model on each prompt alone."""
    model = make_model("llama").eval()
    mask = torch.arange(8) >= torch.tensor([0, 3, 7, 5, 1])[:, None]  # left padding, as generate's
    ids = torch.randint(VOCAB, mask.shape)
    p = batching.prefill(ids, mask, capacity=capacity)
    with torch.no_grad():
        hidden = [model(**r.model_inputs(), use_cache=False).logits[0] for r in p.rows]
        want = torch.cat([model(i[None, m]).logits[:, -1] for i, m in zip(ids, mask, strict=True)])
    assert len(p.rows) == (1 if capacity is None else 3)
    assert_exact(p.last_tokens(hidden), want, tolerance=1e-5)


def test_with_varlen_attention():
    """One attention call over the packed row; keys and values come back prompt by prompt."""
    p = batching.prefill(lengths=[4, 1, 6])
    (row,) = p.rows
    q, k, v = (torch.randn(11, 2, 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    out = vs.varlen_attention(q, k, v, row.cu_seqlens, max_seqlen_q=row.max_seqlen, causal=True)
    last = p.last_tokens(out)
    for b, (qs, ks, values) in enumerate(zip(*(p.split(t) for t in (q, k, v)), strict=True)):
        scores = torch.einsum("hd,khd->hk", qs[-1], ks) / 8**0.5
        assert_exact(last[b], torch.einsum("hk,khd->hd", scores.softmax(-1), values))
    padded = p.unpack(out)
    assert padded.shape == (3, 6, 2, 8) and (padded[1, 1:] == 0).all()
    (grad,) = torch.autograd.grad(last.sum() + padded.sum(), v)
    assert grad.isfinite().all() and grad.any()


BAD = [
    (ValueError, "exactly one of prompts and lengths must be given", (), {}),
    (ValueError, "exactly one of prompts and lengths", ([[1]],), {"lengths": [1]}),
    (ValueError, "prompt 1 must have at least one token, got none", ([[1], []],), {}),
    (ValueError, "prompt 0 must have at least one token, got none", (), {"lengths": [0, 2]}),
    (ValueError, "prompts must hold at least one prompt, got none", ([],), {}),
    (
        ValueError,
        "lengths must be at most the capacity 2, got 3 at index 0",
        ([[1] * 3],),
        {"capacity": 2},
    ),
    (TypeError, "capacity must be an int, got float", ([[1]],), {"capacity": 2.0}),
    (ValueError, "lengths must be >= 0, got -1 at index 0", (), {"lengths": [-1]}),
    (TypeError, "lengths must hold integers, got float64", (), {"lengths": [1.0]}),
    (TypeError, "prompts must be a tensor .* or a list of prompts, got str", ("abc",), {}),
    (TypeError, "prompt 0 must be a list, array or tensor of integers, got int", ([1, 2],), {}),
    (ValueError, r"prompts must have 2 dimensions \(B, S\)", (torch.ones(3).long(),), {}),
    (ValueError, "prompts must have dtype int64, int32, got float32", (torch.ones(1, 3),), {}),
    (
        ValueError,
        "attention_mask must come with prompts as a tensor",
        ([[1]], torch.ones(1, 1)),
        {},
    ),
    (
        ValueError,
        "attention_mask must have size 3 in dimension 1",
        (torch.ones(1, 3).long(), torch.ones(1, 2)),
        {},
    ),
    (ValueError, "first_position must be >= 0, got -1", ([[1]],), {"first_position": -1}),
]


@pytest.mark.parametrize(("error", "message", "args", "kwargs"), BAD)
def test_errors(error, message, args, kwargs):
    with pytest.raises(error, match=message):
        batching.prefill(*args, **kwargs)


def test_errors_on_the_way_back():
    p = batching.prefill(PROMPTS, capacity=6)
    sizes = [row.position_ids.shape[1] for row in p.rows]
    with pytest.raises(ValueError, match="values must hold one tensor per row, 2, got 1"):
        p.last_tokens(torch.zeros(sizes[0]))
    with pytest.raises(
        ValueError, match=rf"values\[1\] must have the {sizes[1]} tokens of its row"
    ):
        p.split([torch.zeros(sizes[0]), torch.zeros(1, sizes[1])])
    with pytest.raises(TypeError, match=r"values\[0\] must be a torch.Tensor, got list"):
        p.unpack([[1], [2]])
    with pytest.raises(TypeError, match="fill must be a number, got str"):
        p.unpack([torch.zeros(n) for n in sizes], fill="x")
