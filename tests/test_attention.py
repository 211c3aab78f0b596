"""varlen_attention against dense attention, one sequence at a time, in float64 and by the
error-ratio rule."""

import pytest
import torch
from cases import LENGTH_PAIRS, LENGTHS, cu_seqlens

import varstream as vs
from varstream.reference.philox import keep_scale, philox4x32
from varstream.testing import assert_error_ratio, assert_exact, dense_attention, peak_memory

HEADS = 4
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "left_window": {"window": (300, 0)},
    "right_window": {"window": (-1, 5)},
    "open_right": {"window": (20, -1)},
    "softcap": {"softcap": 2.0, "causal": True},
    "alibi": {"alibi_slopes": torch.linspace(0.1, 1, HEADS)},
    "sinks": {"sinks": True, "causal": True},
    "scale": {"softmax_scale": 0.3, "causal": True},
    "no_scale": {"softmax_scale": 0.0, "causal": True},
    "negative_scale": {"softmax_scale": -0.5, "causal": True},
    "everything": {
        "sinks": True,
        "softcap": 3.0,
        "window": (50, 0),
        "causal": True,
        "alibi_slopes": torch.linspace(0.1, 1, HEADS),
    },
}


def make(lq, lk, options, dtype=torch.float64, kv_heads=2, head_dim=16, value_dim=16):
    """q, k, v and the keywords of a case; sinks become a leaf that wants a gradient."""
    q = torch.randn(sum(lq), HEADS, head_dim, dtype=dtype).requires_grad_()
    k = torch.randn(sum(lk), kv_heads, head_dim, dtype=dtype).requires_grad_()
    v = torch.randn(sum(lk), kv_heads, value_dim, dtype=dtype).requires_grad_()
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.randn(HEADS, dtype=dtype).requires_grad_()
    inputs = [q, k, v, *([options["sinks"]] if "sinks" in options else [])]
    return q, k, v, options, inputs


def gradients(out, lse, inputs, dout, dlse):
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    loss = (out * dout).sum() + (finite * dlse).sum()
    return torch.autograd.grad(loss, inputs)


def check_exact(lq, lk, options, **shape):
    q, k, v, options, inputs = make(lq, lk, options, **shape)
    cu_q, cu_k = cu_seqlens(lq), cu_seqlens(lk)
    out, lse = vs.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **options)
    want, want_lse = dense_attention(q, k, v, cu_q, cu_k, **options)
    assert_exact(out, want, name="out")
    assert_exact(lse, want_lse, name="lse")
    dout = torch.randn_like(out)
    for dlse in (torch.zeros_like(lse), torch.randn_like(lse)):
        got = gradients(out, lse, inputs, dout, dlse)
        expected = gradients(want, want_lse, inputs, dout, dlse)
        for name, g, w in zip(("dq", "dk", "dv", "dsinks"), got, expected, strict=False):
            assert_exact(g, w, name=name)
        out, lse = vs.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **options)
        want, want_lse = dense_attention(q, k, v, cu_q, cu_k, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("pair", LENGTH_PAIRS.values(), ids=LENGTH_PAIRS)
def test_exact_against_a_prefix(pair, options):
    check_exact(*pair, options)


@pytest.mark.parametrize("options", ["plain", "causal", "everything"])
@pytest.mark.parametrize(
    "lengths",
    [v for v in LENGTHS.values() if sum(v)],
    ids=[k for k, v in LENGTHS.items() if sum(v)],
)
def test_exact_on_awkward_lengths(lengths, options):
    check_exact(lengths, lengths, OPTIONS[options])


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "value_dim"), [(1, 8, 24), (4, 24, 8), (2, 5, 3), (4, 128, 128)]
)
@pytest.mark.parametrize("options", ["causal", "sinks", "softcap"])
def test_head_shapes(kv_heads, head_dim, value_dim, options):
    shape = {"kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    check_exact([5, 20], [9, 20], OPTIONS[options], **shape)


@pytest.mark.parametrize("lengths", [LENGTHS["none"], LENGTHS["empty"]])
def test_nothing_at_all(lengths):
    q = torch.randn(0, 4, 8, requires_grad=True)
    out, lse = vs.varlen_attention(q, q, q, cu_seqlens(lengths), return_lse=True)
    assert out.shape == (0, 4, 8) and lse.shape == (4, 0)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_a_row_that_sees_nothing():
    q, k, v, _, _ = make([3], [1], {})
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    cu = cu_seqlens([3]), cu_seqlens([1])
    out, lse = vs.varlen_attention(q, k, v, *cu, causal=True, return_lse=True)
    assert (out[:2] == 0).all() and (lse[:, :2] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[:, 2].sum(), [q, k, v])
    assert all(g.isfinite().all() for g in grads) and (grads[0][:2] == 0).all()
    out, lse = vs.varlen_attention(q, k, v, *cu, causal=True, sinks=sinks, return_lse=True)
    assert (out[:2] == 0).all()
    assert_exact(lse[:, :2], sinks[:, None].expand(-1, 2))


def test_alibi_slopes_per_sequence():
    slopes = torch.rand(3, HEADS)
    check_exact([5, 1, 40], [5, 2, 50], {"alibi_slopes": slopes, "causal": True})


@pytest.mark.parametrize("options", ["plain", "causal", "window", "softcap", "sinks"])
def test_seqused_k_hides_the_tail_even_if_it_is_nan(options):
    lq, lk, used = [5, 7, 0], [9, 12, 4], [4, 12, 0]
    q, k, v, keywords, inputs = make(lq, lk, OPTIONS[options])
    with torch.no_grad():
        for b, start in enumerate([0, 9, 21]):
            for t in (k, v):
                t[start + used[b] : start + lk[b]] = torch.nan
    keywords["seqused_k"] = torch.tensor(used, dtype=torch.int32)
    cu = cu_seqlens(lq), cu_seqlens(lk)
    out, lse = vs.varlen_attention(q, k, v, *cu, return_lse=True, **keywords)
    clean = [t.detach().nan_to_num(0.0).requires_grad_() for t in (q, k, v)]
    want, want_lse = dense_attention(*clean, *cu, **keywords)
    assert_exact(out, want)
    assert_exact(lse, want_lse)
    dout, zero = torch.randn_like(out), torch.zeros_like(lse)
    got = gradients(out, lse, inputs[:3], dout, zero)
    expected = gradients(want, want_lse, clean, dout, zero)
    for g, w in zip(got, expected, strict=True):
        assert_exact(g, w)


@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
def test_nan_in_a_neighbour_reaches_nobody(options):
    lengths = [6, 300, 7]
    q, k, v, keywords, inputs = make(lengths, lengths, OPTIONS[options])
    cu = cu_seqlens(lengths)
    dout = torch.randn(sum(lengths), HEADS, 16, dtype=torch.float64)

    def run():
        out, lse = vs.varlen_attention(q, k, v, cu, return_lse=True, **keywords)
        return (
            out,
            lse,
            *torch.autograd.grad((out * dout)[[*range(6), *range(306, 313)]].sum(), inputs[:3]),
        )

    clean = run()
    with torch.no_grad():
        for t in (q, k, v):
            t[6:306] = torch.nan
    dirty = run()
    keep = [*range(6), *range(306, 313)]
    assert torch.equal(clean[0][keep], dirty[0][keep])
    assert torch.equal(clean[1][:, keep], dirty[1][:, keep])
    for a, b in zip(clean[2:], dirty[2:], strict=True):
        assert torch.equal(a[keep], b[keep])


def test_an_inert_tail_needs_the_maximum():
    q, k, v, _, inputs = make([10], [10], {})
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    with torch.no_grad():
        for t in (q, k, v):
            t[7:] = torch.nan
    out, lse = vs.varlen_attention(q, k, v, cu, max_seqlen_q=6, causal=True, return_lse=True)
    assert (out[7:] == 0).all() and (lse[:, 7:] == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), inputs):
        assert (grad[7:] == 0).all() and grad[:7].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ["plain", "causal", "softcap", "window", "sinks"])
def test_low_precision_error_ratio(dtype, options):
    pair = LENGTH_PAIRS["prefix"]
    cu = [cu_seqlens(lengths) for lengths in pair]
    q, k, v, keywords, inputs = make(
        *pair, OPTIONS[options], dtype=dtype, head_dim=64, value_dim=64
    )
    exact_in = [t.detach().double().requires_grad_() for t in inputs]
    dout = torch.randn(sum(pair[0]), HEADS, 64, dtype=dtype)

    def run(function, tensors):
        call = keywords | ({"sinks": tensors[3]} if len(tensors) > 3 else {})
        out, lse = function(*tensors[:3], *cu, **call)
        return out, *torch.autograd.grad((out * dout.to(out.dtype)).sum(), tensors)

    ours = run(lambda *a, **kw: vs.varlen_attention(*a, return_lse=True, **kw), inputs)
    plain, exact = run(dense_attention, inputs), run(dense_attention, exact_in)
    for name, a, p, e in zip(("out", "dq", "dk", "dv", "dsinks"), ours, plain, exact, strict=False):
        ratio = 3.0 if name != "out" and options == "softcap" else 2.0
        assert_error_ratio(a, p, e, ratio, name)


def test_results_have_the_promised_dtypes():
    for dtype, acc in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        q, k, v, _, _ = make([3], [3], {}, dtype=dtype)
        out, lse = vs.varlen_attention(q, k, v, cu_seqlens([3]), return_lse=True)
        assert out.dtype == dtype and lse.dtype == acc


def test_strided_inputs():
    qkv = torch.randn(12, 3, HEADS, 8, dtype=torch.float64)
    cu = cu_seqlens([5, 7])
    q, k, v = qkv.unbind(1)
    assert_exact(
        vs.varlen_attention(q, k, v, cu, causal=True),
        vs.varlen_attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, causal=True),
    )
    turned = torch.randn(12, 8, HEADS, dtype=torch.float64).transpose(
        1, 2
    )  # last dim not contiguous
    assert_exact(vs.varlen_attention(turned, k, v, cu), dense_attention(turned, k, v, cu)[0])


# --- dropout --------------------------------------------------------------------------------------


def test_philox_known_answers():
    """Known-answer vectors of Random123's philox4x32-10."""

    def words(*values):
        return [torch.tensor([v]) for v in values]

    zero = philox4x32(words(0, 0, 0, 0), (0, 0))
    assert [int(w) for w in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox4x32(words(*[0xFFFFFFFF] * 4), (0xFFFFFFFF, 0xFFFFFFFF))
    assert [int(w) for w in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
def test_dropout_is_exact_and_replays(options):
    lq, lk = [5, 30, 300], [5, 45, 300]
    q, k, v, keywords, inputs = make(lq, lk, OPTIONS[options])
    state, p = torch.tensor([123456789123, 7]), 0.3
    keep = [
        keep_scale(state, p, b, torch.arange(HEADS), torch.arange(n) + m - n, torch.arange(m))
        for b, (n, m) in enumerate(zip(lq, lk, strict=True))
    ]
    cu = cu_seqlens(lq), cu_seqlens(lk)
    out, lse = vs.varlen_attention(
        q, k, v, *cu, dropout_p=p, rng_state=state, return_lse=True, **keywords
    )
    want, want_lse = dense_attention(q, k, v, *cu, keep=keep, **keywords)
    assert_exact(out, want)
    assert_exact(lse, want_lse)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got, expected = (
        gradients(out, lse, inputs, dout, dlse),
        gradients(want, want_lse, inputs, dout, dlse),
    )
    for g, w in zip(got, expected, strict=True):
        assert_exact(g, w)


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


@pytest.mark.parametrize("options", ["causal", "softcap", "left_window"])
def test_memory_is_linear_in_the_length(options):
    """No score matrix: four times the tokens take about four times the memory, not sixteen."""

    def peak(n):
        q, k, v, keywords, inputs = make([n], [n], OPTIONS[options], dtype=torch.float32)
        cu = cu_seqlens([n])
        return peak_memory(
            lambda: torch.autograd.grad(vs.varlen_attention(q, k, v, cu, **keywords).sum(), inputs)
        )

    assert peak(8192) <= 4.5 * peak(2048)


def test_backward_is_bitwise_repeatable():
    torch.set_num_threads(4)
    q, k, v, keywords, inputs = make(
        [40, 300], [40, 300], OPTIONS["everything"], dtype=torch.float32
    )
    cu = cu_seqlens([40, 300])

    def run():
        out = vs.varlen_attention(q, k, v, cu, deterministic=True, **keywords)
        return torch.autograd.grad(out.square().sum(), inputs)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
