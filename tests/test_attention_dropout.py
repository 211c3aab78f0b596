"""Dropout of varlen_attention: known Philox numbers, and a mask that every back end replays bit for
bit."""

import pytest
import torch
from attention_cases import HEADS, OPTIONS, assert_backward, assert_forward, make
from cases import cu_seqlens

import varstream as vs
from varstream.reference import philox
from varstream.reference.philox import keep_scale, philox4x32


def keep_factors(state, p, lq, lk):
    """Dropout factors (HEADS, n, m), one tensor a sequence."""
    return [
        keep_scale(state, p, b, torch.arange(HEADS), torch.arange(n) + m - n, torch.arange(m))
        for b, (n, m) in enumerate(zip(lq, lk, strict=True))
    ]


def test_philox_known_answers():
    """Known-answer vectors of Random123's philox4x32-10."""

    def words(*values):
        return [torch.tensor([v]) for v in values]

    zero = philox4x32(words(0, 0, 0, 0), (0, 0))
    assert [int(w) for w in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox4x32(words(*[0xFFFFFFFF] * 4), (0xFFFFFFFF, 0xFFFFFFFF))
    assert [int(w) for w in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
def test_dropout_is_exact_and_replays(backend, options):
    lq, lk = ([5, 30, 300], [5, 45, 300]) if backend.exact else ([5, 66], [5, 131])
    cu = cu_seqlens(lq), cu_seqlens(lk)
    state, p = torch.tensor([123456789123, 7]), 0.3
    keep = keep_factors(state, p, lq, lk)
    for dtype in backend.dtypes:
        q, k, v, keywords, inputs = make(lq, lk, OPTIONS[options], dtype=dtype)
        out, lse = backend.attention(q, k, v, *cu, dropout_p=p, rng_state=state, **keywords)
        assert_forward(backend, (out, lse), q, k, v, *cu, keep=keep, **keywords)
        assert_backward(backend, (out, lse), inputs, q, k, v, *cu, keep=keep, **keywords)


STATES = {"small": [3, 0], "wide": [-(2**62) + 2**33 + 5, 2**40 + 3], "negative": [-1, -7]}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("p", [0.0001, 0.5, 0.97])
def test_the_mask_is_philox_bit_for_bit(backend, state, p):
    """Scores of 0 and unit values: out (n, Hq, m) is the dropped probabilities themselves."""
    lq, lk, width = [3, 1, 35], [6, 2, 131], 136
    rng_state = torch.tensor(state)
    for dtype in backend.dtypes:
        q = torch.zeros(sum(lq), HEADS, 8, dtype=dtype)
        k = torch.randn(sum(lk), 1, 8, dtype=dtype)
        v = torch.cat([torch.eye(width, dtype=dtype)[:m] for m in lk]).unsqueeze(1)
        out, _ = backend.attention(
            q, k, v, cu_seqlens(lq), cu_seqlens(lk), dropout_p=p, rng_state=rng_state
        )
        row = 0
        for keep, n, m in zip(keep_factors(rng_state, p, lq, lk), lq, lk, strict=True):
            kept = out[row : row + n, :, :m].transpose(0, 1) != 0  # (Hq, n, m)
            assert torch.equal(kept, keep != 0)
            row += n


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("p", [0.0001, 0.5, 0.97])
def test_the_backward_replays_the_mask_bit_for_bit(backend, state, p):
    """Scores of 0 and unit dout: dv (m, H, n) is the dropped probabilities themselves."""
    lq, lk, width = [3, 1, 35], [6, 2, 131], 40
    cu, rng_state = (cu_seqlens(lq), cu_seqlens(lk)), torch.tensor(state)
    for dtype in backend.dtypes:
        q = torch.zeros(sum(lq), HEADS, 8, dtype=dtype)
        k = torch.randn(sum(lk), HEADS, 8, dtype=dtype)
        v = torch.randn(sum(lk), HEADS, width, dtype=dtype, requires_grad=True)
        dout = torch.cat([torch.eye(width, dtype=dtype)[:n] for n in lq]).unsqueeze(1)
        out, _ = backend.attention(q, k, v, *cu, dropout_p=p, rng_state=rng_state)
        (dv,) = torch.autograd.grad((out * dout).sum(), v)
        row = 0
        for keep, n, m in zip(keep_factors(rng_state, p, lq, lk), lq, lk, strict=True):
            weights = dv[row : row + m, :, :n].permute(1, 2, 0)  # (H, n, m)
            want = keep / m
            assert torch.equal(weights != 0, want != 0)
            assert torch.allclose(weights.double(), want, rtol=torch.finfo(dtype).eps)
            row += m


def test_dropout_follows_torch_seed_and_drops_p():
    q, k, v, _, _ = make([200], [200], {})
    ones = torch.ones_like(v)
    cu = cu_seqlens([200])
    torch.manual_seed(1)
    a = vs.varlen_attention(q, k, ones, cu, dropout_p=0.25)
    b = vs.varlen_attention(q, k, ones, cu, dropout_p=0.25)
    torch.manual_seed(1)
    c = vs.varlen_attention(q, k, ones, cu, dropout_p=0.25)
    assert torch.equal(a, c) and not torch.equal(a, b)
    assert abs(a.mean().item() - 1.0) < 0.01
    keep = keep_scale(
        torch.tensor([5, 0]), 0.25, 0, torch.arange(8), torch.arange(100), torch.arange(103)
    )
    assert abs((keep == 0).double().mean().item() - 0.25) < 0.01


def test_a_probability_next_to_one_keeps_the_largest_word(monkeypatch):
    """The threshold is a 32-bit word like those it is compared with."""
    largest = 2**32 - 1

    def all_ones(counter, key):
        return [torch.full_like(counter[0], largest) for _ in range(4)]

    monkeypatch.setattr(philox, "philox4x32", all_ones)
    p = 1.0 - 2.0**-53
    keep = keep_scale(torch.tensor([1, 2]), p, 0, *(torch.arange(n) for n in (2, 3, 5)))
    assert (keep == 1.0 / (1.0 - p)).all()


def test_the_seed_decides_where_a_kernel_runs(backend):
    q, k, v, _, _ = make([70], [70], {}, dtype=backend.dtypes[0])
    cu = cu_seqlens([70])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(backend.attention(q, k, v, cu, dropout_p=0.5)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
