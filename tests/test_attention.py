"""varlen_attention against dense attention, one sequence at a time: in float64 on the CPU, by the
error-ratio rule where a kernel runs, emulated or on a GPU."""

import pytest
import torch
from attention_cases import (
    HEADS,
    OPTIONS,
    assert_backward,
    assert_forward,
    check,
    make,
    on,
)
from cases import LENGTH_PAIRS, LENGTHS, TILE_LENGTH_PAIRS, TILE_LENGTHS, cu_seqlens

import varstream as vs
from varstream.testing import assert_error_ratio, assert_exact, dense_attention, peak_memory


def named(cases):
    return {"argvalues": list(cases.values()), "ids": list(cases)}


SOME = {name: lengths for name, lengths in LENGTHS.items() if sum(lengths)}


@on("cpu", "cuda")
@pytest.mark.parametrize("options", **named(OPTIONS))
@pytest.mark.parametrize("pair", **named(LENGTH_PAIRS))
def test_against_a_prefix(backend, pair, options):
    check(backend, *pair, options)


@pytest.mark.parametrize("options", **named(OPTIONS))
@pytest.mark.parametrize("pair", **named(TILE_LENGTH_PAIRS))
def test_against_a_prefix_at_tile_edges(backend, pair, options):
    check(backend, *pair, options)


@on("cpu", "cuda")
@pytest.mark.parametrize("options", ["plain", "causal", "everything"])
@pytest.mark.parametrize("lengths", **named(SOME))
def test_awkward_lengths(backend, lengths, options):
    check(backend, lengths, lengths, OPTIONS[options])


SMALL = {name: SOME[name] for name in ("one", "primes", "holes")}


@pytest.mark.parametrize("options", ["plain", "causal", "everything"])
@pytest.mark.parametrize("lengths", **named(TILE_LENGTHS | SMALL))
def test_awkward_lengths_at_tile_edges(backend, lengths, options):
    check(backend, lengths, lengths, OPTIONS[options])


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "value_dim"),
    [(1, 8, 24), (4, 24, 8), (4, 128, 128), (2, 64, 96), (1, 72, 256), (4, 256, 40), (2, 200, 200)],
)
@pytest.mark.parametrize("options", ["causal", "sinks", "softcap"])
def test_head_shapes(backend, kv_heads, head_dim, value_dim, options):
    shape = {"kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    check(backend, [5, 20], [9, 20], OPTIONS[options], **shape)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (5, 1), (12, 4), (7, 7)])
@pytest.mark.parametrize("options", ["causal", "sinks", "softcap"])
def test_head_groups(backend, heads, kv_heads, options):
    check(backend, [1, 23, 1], [9, 50, 1], OPTIONS[options], heads=heads, kv_heads=kv_heads)


def test_alibi_slopes_of_groups(backend):
    """Three heads a group: a head's own slope, also where heads share a tile's rows."""
    options = {"alibi_slopes": torch.rand(2, 6).to(torch.bfloat16), "causal": True}
    check(backend, [1, 23], [9, 50], options, heads=6, kv_heads=2)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(backend, head_dim):
    check(backend, [2, 7], [3, 9], {}, head_dim=head_dim, value_dim=264 - head_dim)


@on("cpu")
def test_head_dims_of_no_kernel(backend):
    check(backend, [5, 20], [9, 20], OPTIONS["softcap"], kv_heads=2, head_dim=5, value_dim=3)


@pytest.mark.parametrize("lengths", [LENGTHS["none"], LENGTHS["empty"], [0, 0, 0]])
def test_nothing_at_all(backend, lengths):
    q = torch.randn(0, 4, 8, requires_grad=True, dtype=backend.dtypes[0])
    out, lse = backend.attention(q, q, q, cu_seqlens(lengths))
    assert out.shape == (0, 4, 8) and lse.shape == (4, 0)
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_no_keys_at_all(backend):
    q, k, v, _, inputs = make([3, 2], [0, 0], {}, dtype=backend.dtypes[0])
    sinks = torch.tensor([0.5, -1.0, -torch.inf, 0.0], dtype=q.dtype)
    cu = cu_seqlens([3, 2]), cu_seqlens([0, 0])
    out, lse = backend.attention(q, k, v, *cu)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), inputs))
    out, lse = backend.attention(q, k, v, *cu, sinks=sinks)
    assert (out == 0).all() and torch.equal(lse, sinks.to(lse.dtype)[:, None].expand(-1, 5))


def test_a_row_that_sees_nothing(backend):
    q, k, v, _, _ = make([3], [1], {}, dtype=backend.dtypes[0])
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=q.dtype)
    cu = cu_seqlens([3]), cu_seqlens([1])
    out, lse = backend.attention(q, k, v, *cu, causal=True)
    assert (out[:2] == 0).all() and (lse[:, :2] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[:, 2].sum(), [q, k, v])
    assert all(g.isfinite().all() for g in grads) and (grads[0][:2] == 0).all()
    out, lse = backend.attention(q, k, v, *cu, causal=True, sinks=sinks)
    assert (out[:2] == 0).all()
    assert_exact(lse[:, :2], sinks[:, None].expand(-1, 2))


SINKS = {
    "none": [-torch.inf] * HEADS,
    "some": [-torch.inf, 0.0, 30.0, -30.0],
    "large": [1e4, 50.0, -1e4, 1.0],
}


@pytest.mark.parametrize("sinks", **named(SINKS))
@pytest.mark.parametrize("options", ["plain", "causal"])
def test_sinks_of_any_size(backend, sinks, options):
    pair = [7, 66], [3, 70]
    for dtype in backend.dtypes:
        q, k, v, keywords, inputs = make(*pair, OPTIONS[options], dtype=dtype)
        cu = [cu_seqlens(lengths) for lengths in pair]
        acc = torch.float64 if backend.exact else torch.float32
        keywords["sinks"] = torch.tensor(sinks, dtype=acc, requires_grad=True)
        got = backend.attention(q, k, v, *cu, **keywords)
        assert_forward(backend, got, q, k, v, *cu, **keywords)
        assert_backward(backend, got, [*inputs, keywords["sinks"]], q, k, v, *cu, **keywords)


def test_alibi_slopes_per_sequence(backend):
    slopes = torch.rand(3, HEADS)
    check(backend, [5, 1, 40], [5, 2, 50], {"alibi_slopes": slopes, "causal": True})


@pytest.mark.parametrize("options", ["plain", "causal", "window", "softcap", "sinks"])
def test_seqused_k_hides_the_tail_even_if_it_is_nan(backend, options):
    lq, lk, used = [5, 7, 0, 30], [9, 12, 4, 140], [4, 12, 0, 71]
    cu = cu_seqlens(lq), cu_seqlens(lk)
    for dtype in backend.dtypes:
        q, k, v, keywords, inputs = make(lq, lk, OPTIONS[options], dtype=dtype)
        with torch.no_grad():
            for b, start in enumerate([0, 9, 21, 25]):
                for t in (k, v):
                    t[start + used[b] : start + lk[b]] = torch.nan
        keywords["seqused_k"] = torch.tensor(used, dtype=torch.int32)
        out, lse = backend.attention(q, k, v, *cu, **keywords)
        clean = [t.detach().nan_to_num(0.0).requires_grad_() for t in (q, k, v)]
        assert_forward(backend, (out, lse), *clean, *cu, **keywords)
        assert_backward(backend, (out, lse), inputs, *clean, *cu, **keywords)


@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
def test_nan_in_a_neighbour_reaches_nobody(backend, options):
    """The same bits, whatever the sequence between holds; 6, 90 and 7 rows share tiles' edges."""
    lengths = [6, 300 if backend.exact else 90, 7]
    inside = slice(6, 6 + lengths[1])
    keep = [*range(6), *range(inside.stop, sum(lengths))]
    dtype = backend.dtypes[0]
    q, k, v, keywords, inputs = make(lengths, lengths, OPTIONS[options], dtype=dtype)
    cu = cu_seqlens(lengths)
    dout = torch.randn(sum(lengths), HEADS, 16, dtype=dtype)

    def run():
        out, lse = backend.attention(q, k, v, cu, **keywords)
        return out, lse, *torch.autograd.grad((out * dout)[keep].sum(), inputs[:3])

    clean = run()
    with torch.no_grad():
        for t in (q, k, v):
            t[inside] = torch.nan
    dirty = run()
    assert torch.equal(clean[0][keep], dirty[0][keep])
    assert torch.equal(clean[1][:, keep], dirty[1][:, keep])
    for a, b in zip(clean[2:], dirty[2:], strict=True):
        assert torch.equal(a[keep], b[keep])


@pytest.mark.parametrize("sinks", [False, True], ids=["plain", "sinks"])
def test_an_inert_tail_needs_the_maximum(backend, sinks):
    options = {"sinks": sinks} if sinks else {}
    q, k, v, keywords, inputs = make([150], [150], options, dtype=backend.dtypes[0])
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    with torch.no_grad():
        for t in (q, k, v):
            t[7:] = torch.nan
    out, lse = backend.attention(q, k, v, cu, max_seqlen_q=6, causal=True, **keywords)
    assert (out[7:] == 0).all() and (lse[:, 7:] == -torch.inf).all()
    assert out.isfinite().all() and lse[:, :7].isfinite().all()
    for grad in torch.autograd.grad(out.sum(), inputs[:3]):
        assert (grad[7:] == 0).all() and grad[:7].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", ["plain", "causal", "softcap", "window", "sinks"])
def test_low_precision_error_ratio(backend, dtype, options):
    """Gradients too: they show that a kernel's out and LSE serve the backward."""
    small = backend.name == "emulated"
    pair = (TILE_LENGTH_PAIRS if small else LENGTH_PAIRS)["prefix"]
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

    ours = run(backend.attention, inputs)
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


def test_strided_inputs(backend):
    qkv = backend.here(torch.randn(76, 3, HEADS, 8, dtype=backend.dtypes[0]))
    cu = cu_seqlens([5, 71])
    q, k, v = qkv.unbind(1)
    got = backend.attention(q, k, v, cu, causal=True)
    want = backend.attention(q.contiguous(), k.contiguous(), v.contiguous(), cu, causal=True)
    assert_exact(got[0], want[0])
    assert_exact(got[1], want[1])
    rows_last = qkv.transpose(0, 2).contiguous().transpose(0, 2)  # heads slowest
    got = backend.attention(*rows_last.unbind(1), cu, causal=True)
    assert_exact(got[0], want[0])


@on("cpu")
def test_a_strided_last_dimension(backend):
    k, v = (torch.randn(12, HEADS, 8, dtype=torch.float64) for _ in range(2))
    cu = cu_seqlens([5, 7])
    turned = torch.randn(12, 8, HEADS, dtype=torch.float64).transpose(1, 2)
    assert_exact(backend.attention(turned, k, v, cu)[0], dense_attention(turned, k, v, cu)[0])


@on("cpu")
@pytest.mark.parametrize("options", ["causal", "softcap", "left_window"])
def test_memory_is_linear_in_the_length(backend, options):
    """No score matrix: four times the tokens take about four times the memory, not sixteen."""

    def peak(n):
        q, k, v, keywords, inputs = make([n], [n], OPTIONS[options], dtype=torch.float32)
        cu = cu_seqlens([n])
        return peak_memory(
            lambda: torch.autograd.grad(vs.varlen_attention(q, k, v, cu, **keywords).sum(), inputs)
        )

    assert peak(8192) <= 4.5 * peak(2048)


def test_backward_is_bitwise_repeatable(backend):
    torch.set_num_threads(4)
    lengths = [40, 300 if backend.exact else 70]
    dtype = torch.float32 if backend.exact else torch.bfloat16
    q, k, v, keywords, inputs = make(lengths, lengths, OPTIONS["everything"], dtype=dtype)
    cu = cu_seqlens(lengths)

    def run():
        out, lse = backend.attention(q, k, v, cu, deterministic=True, **keywords)
        return out, lse, *torch.autograd.grad(out.square().sum(), inputs)

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
