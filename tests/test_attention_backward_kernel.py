"""What only the attention backward's kernels promise, emulated or on a GPU: both tables of tiles,
lengths that lie, isolation, any layout, repeatable bits."""

from __future__ import annotations

import emulation
import pytest
import torch
from attention_cases import (
    GRADIENTS,
    HEADS,
    LIES,
    OPTIONS,
    assert_backward,
    assert_forward,
    assert_near,
    call_backward,
    call_kernel,
    case,
    check,
    gradients,
    int32,
    make,
    on,
)
from cases import cu_seqlens

from varstream.testing import dense_attention, peak_memory

SMALL_BYTES, LARGE_BYTES = 99 << 10, 163 << 10  # shared memory of a block


@pytest.fixture
def small_tiles(backend):
    """The emulated device has the shared memory of sm_86: tiles are those that fit it."""
    operators = torch.ops.varstream_emulated
    operators.set_shared_limit(SMALL_BYTES)
    yield
    operators.set_shared_limit(LARGE_BYTES)


def saved(backend, q, k, v, call):
    """dout, q, k, v, out, lse, dlse of a call."""
    out, lse = call_kernel(backend, q, k, v, call)
    return torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse)


def assert_same(backend, call, ours, others) -> None:
    """The same dq, dk, ... bit by bit; a GPU adds up dq in any order unless it is repeatable."""
    free = backend.name == "cuda" and not call.deterministic
    for name, a, b in zip(GRADIENTS, ours, others, strict=False):
        if free and name == "dq":
            assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2), name
        else:
            assert torch.equal(a, b), name


# --- tiles ----------------------------------------------------------------------------------------

DIMS = [(32, 32), (64, 64), (96, 80), (128, 128), (192, 128), (136, 192), (256, 256)]
EDGES = {"small": ([31, 33, 64, 1], [33, 31, 65, 130]), "large": ([63, 65, 1], [129, 64, 127])}


@on("emulated", "cuda")
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("dims", DIMS)
def test_the_large_tiles_at_their_edges(backend, dims, options):
    """Three heads a group: no tile of rows holds a whole number of queries."""
    shape = {"heads": 3, "kv_heads": 1, "head_dim": dims[0], "value_dim": dims[1]}
    options = OPTIONS[options] | ({"alibi_slopes": torch.rand(3)} if options != "plain" else {})
    check(backend, *EDGES["large"], options, **shape)


@on("emulated")
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("dims", DIMS)
def test_the_small_tiles_at_their_edges(backend, small_tiles, dims, options):
    shape = {"heads": 3, "kv_heads": 1, "head_dim": dims[0], "value_dim": dims[1]}
    options = OPTIONS[options] | ({"alibi_slopes": torch.rand(3)} if options != "plain" else {})
    check(backend, *EDGES["small"], options, **shape)


@on("emulated")
@pytest.mark.parametrize("dims", DIMS)
def test_the_tiles_follow_the_shared_memory(backend, dims):
    """Smaller tiles read the keys' fragments more often for the same products."""
    shape = {"heads": 1, "kv_heads": 1, "head_dim": dims[0], "value_dim": dims[1]}
    operators = torch.ops.varstream_emulated
    q, k, v, call = case(backend, [128], [128], {}, **shape)
    tensors, loads = saved(backend, q, k, v, call), []
    for limit in (LARGE_BYTES, SMALL_BYTES):
        operators.set_shared_limit(limit)
        operators.clear_instruction_counts()
        call_backward(backend, *tensors, call=call)
        loads.append(operators.instruction_count("barrier"))
    operators.set_shared_limit(LARGE_BYTES)
    assert loads[0] < loads[1]


@pytest.mark.parametrize("groups", [(2, 2), (5, 1), (8, 1), (6, 2)])
def test_groups_at_tile_edges(backend, groups):
    heads, kv_heads = groups
    options = {"causal": True, "window": (40, 0)}
    check(backend, [33, 7], [40, 130], options, heads=heads, kv_heads=kv_heads)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["plain", "causal", "softcap", "sinks"])
def test_the_gradient_of_the_lse_alone(backend, options):
    lengths = [5, 66], [9, 130]
    cu = [cu_seqlens(n) for n in lengths]
    for dtype in backend.dtypes:
        q, k, v, keywords, inputs = make(*lengths, OPTIONS[options], dtype=dtype)
        out, lse = backend.attention(q, k, v, *cu, **keywords)
        zero = torch.zeros_like(out)
        assert_backward(backend, (zero, lse), inputs, q, k, v, *cu, dout=zero, **keywords)


@pytest.mark.parametrize("sink", [-torch.inf, 0.5])
def test_the_gradient_of_sinks_where_rows_see_nothing(backend, sink):
    """Such a row's LSE is its sink: dsinks is the sum of dlse, or 0 where there is no sink."""
    dtype = backend.dtypes[0]
    sinks = torch.full((HEADS,), sink, dtype=dtype, requires_grad=True)
    q, k, v, _, inputs = make([7, 3], [0, 1], {"causal": True}, dtype=dtype)
    cu = cu_seqlens([7, 3]), cu_seqlens([0, 1])
    out, lse = backend.attention(q, k, v, *cu, causal=True, sinks=sinks)
    dlse = torch.randn_like(lse)
    dlse[:, 9] = 0.0  # the row that sees the key
    dout = torch.randn_like(out)
    dout[9] = 0.0
    *others, dsinks = gradients(out, lse, [*inputs, sinks], dout, dlse)
    assert all((g == 0).all() for g in others)
    want = dlse.sum(1) if sink == 0.5 else torch.zeros(HEADS)
    assert torch.allclose(dsinks.double(), want.double(), rtol=1e-2)


def test_keys_that_nobody_sees_get_no_gradient(backend):
    """Whole tiles of keys before a window, and after the last position that is seen."""
    lengths = [30, 200], [500, 3]
    cu = [cu_seqlens(n) for n in lengths]
    for dtype in backend.dtypes:
        q, k, v, _, inputs = make(*lengths, {}, dtype=dtype)
        got = backend.attention(q, k, v, *cu, causal=True, window=(20, 0))
        assert_backward(backend, got, inputs, q, k, v, *cu, causal=True, window=(20, 0))
        got = backend.attention(q, k, v, *cu, causal=True, window=(20, 0))
        _, dk, dv = torch.autograd.grad(got[0].sum(), inputs)
        assert (dk[:450] == 0).all() and (dv[:450] == 0).all() and (dv[450:500] != 0).all()


@on("emulated", "cuda")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_far_from_zero(backend, sign):
    """A row's own weight is at most 1; 2^-lse alone would overflow, or be nothing."""
    cu = [cu_seqlens(n) for n in ([70], [130])]
    for dtype in backend.dtypes:
        q, k, v, _, inputs = make([70], [130], {}, dtype=dtype)
        with torch.no_grad():
            q[..., 0], k[..., 0] = 100.0 * sign, 8.0
        got = backend.attention(q, k, v, *cu)
        assert got[1].abs().min() > 150.0
        assert_backward(backend, got, inputs, q, k, v, *cu)


# --- lengths that lie -----------------------------------------------------------------------------


@on("emulated", "cuda")
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lengths_that_lie_stay_inside_the_tensors(backend, lie, options):
    """Under sanitizers nothing outside is touched; everywhere the kernels come back."""
    q, k, v, call = case(backend, [30, 40, 20], [50, 40, 40], OPTIONS[options])
    tensors = saved(backend, q, k, v, call)
    dropout = {"dropout_p": 0.5, "rng_state": torch.tensor([1, 2])}
    for extra in ({}, dropout, {"deterministic": True}):
        lying = call._replace(**lie, **extra)
        dq, dk, dv, _ = call_backward(backend, *tensors, call=lying)
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    dk, dv, dsinks = (backend.here(torch.zeros(t.shape)) for t in (k, v, q[0, :, 0]))
    buffers = dk, dv, dsinks if options == "everything" else None
    assert call_backward(backend, *tensors, call=lying, buffers=buffers).shape == q.shape


@on("emulated", "cuda")
@pytest.mark.parametrize("longest", [0, 1, 64, 10**6, 2**40])
@pytest.mark.parametrize("options", ["causal", "everything"])
def test_maxima_that_lie_change_nothing(backend, longest, options):
    """They bound the schedule's order, not what is computed."""
    q, k, v, call = case(backend, [3, 70, 1], [150, 70, 9], OPTIONS[options])
    call = call._replace(deterministic=True)
    tensors = saved(backend, q, k, v, call)
    want = call_backward(backend, *tensors, call=call)
    lying = call._replace(max_seqlen_q=longest, max_seqlen_k=longest)
    assert_same(backend, call, call_backward(backend, *tensors, call=lying), want)


# --- isolation ------------------------------------------------------------------------------------


@on("emulated", "cuda")
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("options", ["plain", "causal", "window", "everything"])
def test_nan_in_a_neighbour_reaches_nobody(backend, options, deterministic):
    """The same bits, whatever stands in the sequence between and whatever arrives for it."""
    lq, lk = [6, 90, 7], [70, 30, 9]
    q, k, v, call = case(backend, lq, lk, OPTIONS[options])
    call = call._replace(deterministic=deterministic)
    tensors = saved(backend, q, k, v, call)
    clean = call_backward(backend, *tensors, call=call)
    dout, q, k, v, out, lse, dlse = (t.clone() for t in tensors)
    for t in (dout, q, out):
        t[6:96] = torch.nan
    for t in (k, v):
        t[70:100] = torch.nan
    for t in (lse, dlse):
        t[:, 6:96] = torch.nan
    dirty = call_backward(backend, dout, q, k, v, out, lse, dlse, call=call)
    queries, keys = [*range(6), *range(96, 103)], [*range(70), *range(100, 109)]
    assert all(g.isnan().any() for g in dirty[:3])  # of the sequence itself
    ours, others = ([g[0][queries], g[1][keys], g[2][keys]] for g in (clean, dirty))
    assert_same(backend, call, ours, others)


@on("emulated", "cuda")
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_no_sequence_holds_is_not_read(backend, value, deterministic):
    """Tails of queries and keys, and keys past seqused_k: their gradients are 0, dsinks too."""
    q, k, v, call = case(backend, [3, 70, 20], [70, 20, 60], OPTIONS["sinks"])
    cu_q, cu_k, used = int32(0, 3, 73), int32(0, 70, 90), int32(66, 13)
    call = call._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, seqused_k=used)
    call = call._replace(deterministic=deterministic)
    tensors = saved(backend, q, k, v, call)
    assert (tensors[4][73:] == 0).all()
    clean = call_backward(backend, *tensors, call=call)
    dout, q, k, v, out, lse, dlse = (t.clone() for t in tensors)
    for t in (dout, q, out):
        t[73:] = value
    for t in (k, v):
        t[66:70] = t[83:] = value
    for t in (lse, dlse):
        t[:, 73:] = value
    dirty = call_backward(backend, dout, q, k, v, out, lse, dlse, call=call)
    assert_same(backend, call, clean, dirty)
    for dq, dk, dv, _ in (clean, dirty):
        assert (dq[73:] == 0).all() and dq.isfinite().all()
        for t in (dk, dv):
            assert (t[66:70] == 0).all() and (t[83:] == 0).all()


# --- layout ---------------------------------------------------------------------------------------


def test_gradients_of_views_of_one_tensor(backend):
    """q, k and v parts of a packed projection; out.sum() brings an expanded dout."""
    lengths = [5, 71]
    cu = cu_seqlens(lengths)
    qkv = torch.randn(76, 3, HEADS, 8, dtype=backend.dtypes[0], requires_grad=True)
    apart = [t.detach().clone().requires_grad_() for t in qkv.unbind(1)]
    found = []
    for tensors, leaves in ((qkv.unbind(1), [qkv]), (apart, apart)):
        out, _ = backend.attention(*tensors, cu, causal=True, deterministic=True)
        found.append(torch.autograd.grad(out.sum(), leaves))
    assert torch.equal(found[0][0], torch.stack(found[1], 1))


def views(t):
    """A tensor (rows, heads, dim) in layouts that a kernel can't all read as they are."""
    rows, heads, dim = t.shape
    heads_first = t.transpose(0, 1).contiguous().transpose(0, 1)
    dims_first = t.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    odd = torch.zeros(rows, heads, dim + 3, dtype=t.dtype)[..., 1 : dim + 1].copy_(t)
    begins_odd = torch.zeros(rows * heads * dim + 1, dtype=t.dtype)[1:].view_as(t).copy_(t)
    return {"heads_first": heads_first, "dims_first": dims_first, "odd": odd, "begin": begins_odd}


@on("emulated")
@pytest.mark.parametrize("layout", ["heads_first", "dims_first", "odd", "begin"])
def test_gradients_arrive_in_any_layout(backend, layout):
    q, k, v, call = case(backend, [5, 40], [9, 40], OPTIONS["sinks"], value_dim=24)
    dout, _, _, _, out, lse, dlse = tensors = saved(backend, q, k, v, call)
    want = call_backward(backend, *tensors, call=call)
    lse, dlse = (t.t().contiguous().t() for t in (lse, dlse))
    viewed = views(dout)[layout], q, k, v, views(out)[layout], lse, dlse
    assert_same(backend, call, call_backward(backend, *viewed, call=call), want)


@on("emulated", "cuda")
def test_expanded_tensors(backend):
    """Strides of 0 over heads or rows, in what is read."""
    q, k, v, call = case(backend, [5, 66], [5, 66], {"causal": True}, kv_heads=HEADS)
    call = call._replace(deterministic=True)
    q, k, v = (backend.here(t) for t in (q, k, v))  # a copy to there would not be expanded
    flat = q[:, :1].expand(-1, HEADS, -1), k[3:4].expand(71, -1, -1), v[3:4, :1].expand_as(v)
    compact = [t.contiguous() for t in flat]
    dout, _, _, _, out, lse, dlse = saved(backend, *compact, call)
    dout = backend.here(dout)[:1].expand_as(dout)
    want = call_backward(backend, dout.contiguous(), *compact, out, lse, dlse, call=call)
    got = call_backward(backend, dout, *flat, out, lse, dlse, call=call)
    assert_same(backend, call, got, want)


# --- repeatable bits ------------------------------------------------------------------------------


@on("emulated")
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_every_order_of_threads_gives_the_same_bits(backend, options):
    """All of deterministic=True; without it dK, dV and dsinks, the very same."""
    lengths = [70, 1, 0, 66]
    q, k, v, call = case(backend, lengths, lengths, OPTIONS[options], torch.bfloat16)
    call = call._replace(dropout_p=0.2, rng_state=torch.tensor([3, 4]))
    tensors = saved(backend, q, k, v, call)
    fixed, free = [], []
    for schedule in ("warp-greedy", "round-robin", "1", "2", "3"):
        emulation.choose_schedule(schedule)
        fixed.append(call_backward(backend, *tensors, call=call._replace(deterministic=True)))
        free.append(call_backward(backend, *tensors, call=call))
    for found in fixed[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, fixed[0], strict=True))
    for found in free:
        assert all(torch.equal(a, b) for a, b in zip(found[1:], fixed[0][1:], strict=True))
        assert torch.allclose(found[0].float(), fixed[0][0].float(), rtol=1e-2, atol=1e-2)


@on("emulated", "cuda")
@pytest.mark.parametrize("options", ["causal", "everything"])
def test_a_repeatable_dq_is_as_near(backend, options):
    """Also where rows of a tile see nothing."""
    lengths = [5, 90, 66], [9, 31, 130]
    cu = [cu_seqlens(n) for n in lengths]
    for dtype in backend.dtypes:
        q, k, v, keywords, inputs = make(*lengths, OPTIONS[options], dtype=dtype, head_dim=72)
        got = backend.attention(q, k, v, *cu, deterministic=True, **keywords)
        assert_forward(backend, got, q, k, v, *cu, **keywords)
        assert_backward(backend, got, inputs, q, k, v, *cu, **keywords)


@on("emulated", "cuda")
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("dims", DIMS)
def test_a_repeatable_dq_at_tile_edges(backend, dims, options):
    """Tiles of 64 rows, and of 64 or 32 keys; a group's three heads share rows or don't."""
    shape = {"heads": 3, "kv_heads": 1, "head_dim": dims[0], "value_dim": dims[1]}
    options = OPTIONS[options] | ({"alibi_slopes": torch.rand(3)} if options != "plain" else {})
    for lengths in (([63, 65, 1], [65, 31, 33]), ([1, 22], [70, 33])):
        cu = [cu_seqlens(n) for n in lengths]
        for dtype in backend.dtypes:
            q, k, v, keywords, inputs = make(*lengths, options, dtype=dtype, **shape)
            got = backend.attention(q, k, v, *cu, deterministic=True, **keywords)
            assert_backward(backend, got, inputs, q, k, v, *cu, **keywords)


@on("emulated", "cuda")
def test_a_repeatable_dq_needs_no_sum_in_memory(backend):
    """float32 of q's shape is what the other way takes on top."""
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 64, "value_dim": 64}
    q, k, v, call = case(backend, [200], [200], {}, torch.bfloat16, **shape)
    tensors = [backend.here(t) for t in saved(backend, q, k, v, call)]
    call = call._replace(cu_seqlens_q=backend.here(call.cu_seqlens_q))
    peaks = [
        peak_memory(
            lambda d=d: call_backward(backend, *tensors, call=call._replace(deterministic=d)),
            backend.device,
        )
        for d in (False, True)
    ]
    assert peaks[0] - peaks[1] > 0.9 * 4 * q.numel()


@on("emulated", "cuda")
def test_no_rows_times_heads_past_31_bits(backend):
    q, k, v, call = case(backend, [1], [1], {}, heads=2, kv_heads=1)
    tall = [backend.here(t).expand(2**30, -1, -1) for t in (q, k, v)]
    lse = backend.here(torch.zeros(2, 1)).expand(-1, 2**30)
    with pytest.raises(RuntimeError, match=r"at most 2\^31 - 256 rows times heads .* 2147483648"):
        call_backward(backend, tall[0], *tall, tall[0], lse, None, call=call)


@on("emulated", "cuda")
def test_a_dense_case_in_one_go(backend):
    """The rule also on a single long sequence, where dq is the sum of many tiles of keys."""
    cu = cu_seqlens([300])
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 64, "value_dim": 64}
    q, k, v, _, inputs = make([300], [300], {}, dtype=torch.bfloat16, **shape)
    dout = torch.randn(300, 2, 64, dtype=torch.bfloat16)

    def grads(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        out, _ = function(*leaves, cu, cu)
        return torch.autograd.grad((out * dout.to(dtype)).sum(), leaves)

    ours, plain = grads(backend.attention, torch.bfloat16), grads(dense_attention, torch.bfloat16)
    for name, a, p, e in zip(
        ("dq", "dk", "dv"), ours, plain, grads(dense_attention, torch.float64), strict=True
    ):
        assert_near(a, p, e, 2.0, name)
