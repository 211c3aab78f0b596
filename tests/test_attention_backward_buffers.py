"""The caller's buffers: gradients are added into dk, dv and dsinks, in any layout, and nowhere
else; what can't be added into is refused before anything is written."""

from __future__ import annotations

import pytest
import torch
from attention_cases import HEADS, OPTIONS, call_backward, call_kernel, case, int32, on
from cases import cu_seqlens

import varstream as vs
from varstream.testing import assert_exact

KV_HEADS = 2


def saved(backend, q, k, v, call):
    """dout, q, k, v, out, lse, dlse of a call."""
    out, lse = call_kernel(backend, q, k, v, call)
    return torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse)


def same(a, b) -> bool:
    """Bit by bit, so that NaN equals itself."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@on("emulated", "cuda")
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("options", ["plain", "causal", "everything"])
def test_what_is_added_is_what_is_returned(backend, options, deterministic):
    """In float32: rounded, it is the gradient that the other operator returns."""
    q, k, v, call = case(backend, [5, 0, 66], [9, 3, 130], OPTIONS[options], value_dim=24)
    call = call._replace(deterministic=deterministic)
    tensors = saved(backend, q, k, v, call)
    dq, *want = call_backward(backend, *tensors, call=call)
    shapes = k.shape, v.shape, (HEADS,)
    added = {}
    for start in ("zero", "some"):
        before = [torch.zeros(s) if start == "zero" else torch.randn(s) for s in shapes]
        buffers = [backend.here(t.clone()) for t in before]
        if "sinks" not in OPTIONS[options]:
            before, want, buffers[2] = before[:2], want[:2], None
        got = call_backward(backend, *tensors, call=call, buffers=buffers)
        if deterministic or backend.name == "emulated":
            assert torch.equal(got, dq)
        after = [t.cpu() for t in buffers if t is not None]
        added[start] = [a - b for a, b in zip(after, before, strict=True)]
    for zero, some, rounded in zip(added["zero"], added["some"], want, strict=True):
        assert torch.equal(zero.to(rounded.dtype), rounded)
        assert torch.allclose(zero, some, rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "rows_apart": lambda n, dim: torch.zeros(n, 2 * KV_HEADS, dim)[:, :KV_HEADS],
    "heads_of_a_larger": lambda n, dim: torch.zeros(n, 3 * KV_HEADS, dim)[:, 1 : 1 + KV_HEADS],
    "every_second_head": lambda n, dim: torch.zeros(n, 2 * KV_HEADS, dim)[:, ::2],
    "rows_of_a_larger": lambda n, dim: torch.zeros(n + 20, KV_HEADS, dim)[7 : n + 7],
    "heads_first": lambda n, dim: torch.zeros(KV_HEADS, n, dim).transpose(0, 1),
    "begins_odd": lambda n, dim: torch.zeros(n, KV_HEADS, dim + 2)[..., 1 : dim + 1],
    "odd_heads": lambda n, dim: torch.zeros(n, KV_HEADS, dim + 1)[..., :dim],
    "odd_rows": lambda n, dim: torch.zeros(n, KV_HEADS * dim + 1)[:, :-1].unflatten(1, (-1, dim)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_buffers_are_views_of_larger_ones(backend, layout):
    """The same sums as in compact ones, and nothing beside them."""
    dtype = backend.dtypes[0]
    acc = torch.float64 if backend.exact else torch.float32
    cu = [backend.here(cu_seqlens(n)) for n in ([5, 66], [9, 130])]
    q, k, v, _ = case(backend, [5, 66], [9, 130], {}, dtype=dtype, value_dim=24)
    q, k, v = (backend.here(t) for t in (q, k, v))
    out, lse = vs.varlen_attention(q, k, v, *cu, causal=True, return_lse=True)
    dout = torch.randn_like(out)

    def add(dk, dv):
        vs.varlen_attention_backward(dout, q, k, v, out, lse, *cu, causal=True, dk=dk, dv=dv)

    start = torch.randn(k.shape, dtype=acc), torch.randn(v.shape, dtype=acc)
    compact = [backend.here(t.clone()) for t in start]
    add(*compact)
    viewed, beside = [], []
    for t in start:
        view = layout(t.shape[0], t.shape[2])
        base = view._base.to(acc, copy=True).fill_(7.0)
        base = backend.here(base)
        view = base.as_strided(view.shape, view.stride(), view.storage_offset())
        view.copy_(t)
        viewed.append(view), beside.append(base)
    add(*viewed)
    for view, base, want in zip(viewed, beside, compact, strict=True):
        assert torch.equal(view, want)
        view.fill_(7.0)
        assert (base == 7.0).all()


@on("emulated", "cuda")
@pytest.mark.parametrize("options", ["plain", "causal", "everything"])
def test_what_nobody_sees_stays_untouched(backend, options):
    """Bit by bit: rows outside sequences, past seqused_k, before a window; NaN stays NaN."""
    q, k, v, call = case(backend, [20, 8, 2], [150, 20, 60], OPTIONS[options], torch.bfloat16)
    call = call._replace(
        cu_seqlens_q=int32(0, 20, 28),
        cu_seqlens_k=int32(0, 150, 170),
        seqused_k=int32(140, 0),
        window_left=5,
    )
    tensors = saved(backend, q, k, v, call)
    seen = slice(140 - 20 - 5, 140)  # causal or not: to the right all are seen
    before = [torch.full(t.shape, 3.0) for t in (k, v)]
    for t in before:
        t[140:] = -0.0  # nothing may be added, not even 0
        t[::3] = torch.nan
        t[seen] = 1.0
    dsinks = torch.zeros(HEADS) if "sinks" in OPTIONS[options] else None
    after = [backend.here(t.clone()) for t in before]
    buffers = *after, None if dsinks is None else backend.here(dsinks)
    call_backward(backend, *tensors, call=call, buffers=buffers)
    for a, b in zip(after, before, strict=True):
        a = a.cpu()
        assert (a[seen] != b[seen]).any(-1).all() and a[seen].isfinite().all()
        a[seen] = b[seen]
        assert same(a, b)


def test_nothing_to_add(backend):
    """No keys, no queries or no sequences: the buffers stay, dq is zero."""
    acc = torch.float64 if backend.exact else torch.float32
    for lq, lk in (([3, 2], [0, 0]), ([0], [7]), ([], []), ([0, 0], [5, 9])):
        q, k, v, call = case(backend, lq, lk, {})
        cu = [backend.here(cu_seqlens(n)) for n in (lq, lk)]
        q, k, v = (backend.here(t) for t in (q, k, v))
        out, lse = vs.varlen_attention(q, k, v, *cu, return_lse=True)
        buffers = [torch.randn(t.shape, dtype=acc, device=t.device) for t in (k, v)]
        kept = [t.clone() for t in buffers]
        dq = vs.varlen_attention_backward(
            torch.randn_like(out), q, k, v, out, lse, *cu, dk=buffers[0], dv=buffers[1]
        )
        assert dq.shape == q.shape and (dq == 0).all()
        assert all(torch.equal(a, b) for a, b in zip(buffers, kept, strict=True))


def test_parts_of_the_keys_add_up(backend):
    """Each part with the whole's out and LSE, as a ring or a shared prefix goes about it."""
    dtype = backend.dtypes[0]
    q, k, v, _ = (backend.here(t) for t in case(backend, [70], [200], {}, dtype=dtype))
    cu_q = backend.here(cu_seqlens([70]))
    cu = cu_q, backend.here(cu_seqlens([200]))
    out, lse = vs.varlen_attention(q, k, v, *cu, causal=True, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    acc = torch.float64 if backend.exact else torch.float32
    whole, parts = (
        [torch.zeros(t.shape, dtype=acc, device=t.device) for t in (k, v)] for _ in "ab"
    )

    def add(rows, causal, dk, dv):
        cu_k = backend.here(cu_seqlens([rows.stop - rows.start]))
        return vs.varlen_attention_backward(
            dout, q, k[rows], v[rows], out, lse, cu_q, cu_k, causal=causal, dlse=dlse, dk=dk, dv=dv
        )

    dq = add(slice(0, 200), True, *whole)
    found = [
        add(rows, causal, *(t[rows] for t in parts))
        for rows, causal in (
            (slice(0, 65), False),
            (slice(65, 130), False),
            (slice(130, 200), True),
        )
    ]
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert_exact(sum(t.double() for t in found), dq, tolerance)
    for a, b in zip(parts, whole, strict=True):
        assert_exact(a, b, 1e-12 if backend.exact else 5e-3)


# --- refused --------------------------------------------------------------------------------------

# Name of an argument, what takes its place, the message of Python and that of the operator. Buffers
# and results of a call with q (5, 4, 8) and k, v (5, 2, 8) in bfloat16.
REFUSED = {
    "dk_heads": ("dk", lambda t: t.new_zeros(5, 4, 8), "dk must have size 2", "dk must be float32"),
    "dk_rows": ("dk", lambda t: t.new_zeros(6, 2, 8), "dk must have size 5", "dk must be float32"),
    "dk_dims": ("dk", lambda t: t.new_zeros(5, 16), "dk must have 3 dim", "dk must be float32"),
    "dv_dtype": ("dv", lambda t: t.bfloat16(), "dv must have dtype float32", "dv must be float32"),
    "dsinks_shape": (
        "dsinks",
        lambda t: t.new_zeros(2),
        "dsinks must have",
        "dsinks must be float",
    ),
    "no_dsinks": ("dsinks", lambda t: None, "dsinks must be given", "dsinks must be given"),
    "dk_expanded": (
        "dk",
        lambda t: t[:1].expand(5, 2, 8),
        "dk must not be expanded",
        "dk must not be expanded or overlap itself",
    ),
    "dv_overlaps_itself": (
        "dv",
        lambda t: t.as_strided((5, 2, 8), (8, 8, 1)),
        "dv must hold each element once",
        "dv must not be expanded or overlap itself",
    ),
    "dk_strided": (
        "dk",
        lambda t: t.new_zeros(5, 8, 2).transpose(1, 2),
        None,
        "dk must be contiguous in its last dimension on CUDA, got stride 2",
    ),
    "lse_rows": ("lse", lambda t: t.new_zeros(4, 6), "lse must have size 5", "lse must be float32"),
    "lse_turned": ("lse", lambda t: t.t(), "lse must have size", "lse must be float32 of shape"),
    "lse_dtype": ("lse", lambda t: t.bfloat16(), "lse must have dtype", "lse must be float32"),
    "dlse_rows": ("dlse", lambda t: t.new_zeros(4, 4), "dlse must have size", "dlse must be float"),
    "out_dim": (
        "out",
        lambda t: t.new_zeros(5, 4, 16),
        "out must have size 8",
        "out must have q's",
    ),
    "out_dtype": ("out", lambda t: t.half(), "out must have dtype bfloat16", "out must have q's"),
    "dout_heads": ("dout", lambda t: t[:, :2], "dout must have size 4", "dout must have q's dtype"),
    "dout_dtype": ("dout", lambda t: t.float(), "dout must have dtype", "dout must have q's dtype"),
}


def arguments(backend):
    """Those of varlen_attention_backward; sinks are given."""
    q, k, v, call = case(
        backend, [5], [5], OPTIONS["sinks"], torch.bfloat16, head_dim=8, value_dim=8
    )
    dout, *_, out, lse, dlse = saved(backend, q, k, v, call)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": dlse}
    buffers = {"dk": torch.randn(5, 2, 8), "dv": torch.randn(5, 2, 8), "dsinks": torch.randn(4)}
    return {name: backend.here(t) for name, t in (tensors | buffers).items()}, call


def direct(backend, given, call):
    tensors = [given[name] for name in ("dout", "q", "k", "v", "out", "lse", "dlse")]
    buffers = [given[name] for name in ("dk", "dv", "dsinks")]
    return call_backward(backend, *tensors, call=call, buffers=buffers)


def public(backend, given, call):
    lengths = {name: backend.here(getattr(call, name)) for name in ("cu_seqlens_q", "sinks")}
    return vs.varlen_attention_backward(**given, **lengths, causal=True)


def assert_refused(backend, call, given, message, of_operator):
    """Both ways, and no buffer has changed."""
    buffers = [given[name] for name in ("dk", "dv", "dsinks") if given[name] is not None]
    before = [t.clone() for t in buffers]
    if message is not None:
        with pytest.raises(ValueError, match=message):
            public(backend, given, call)
    with pytest.raises(RuntimeError, match=f"(?s){of_operator}"):
        direct(backend, given, call)
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))


@on("emulated", "cuda")
@pytest.mark.parametrize(("name", "other", "message", "of_operator"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(backend, name, other, message, of_operator):
    given, call = arguments(backend)
    given[name] = other(given[name])
    assert_refused(backend, call, given, message, of_operator)


@on("emulated", "cuda")
def test_the_arguments_that_the_refusals_change_are_good(backend):
    given, call = arguments(backend)
    assert torch.equal(public(backend, given, call).cpu(), direct(backend, given, call))


@on("emulated", "cuda")
@pytest.mark.parametrize("other", ["dv", "q", "k", "v", "dout", "out", "lse", "dlse"])
@pytest.mark.parametrize("name", ["dk", "dsinks"])
def test_buffers_that_share_memory_are_refused(backend, name, other):
    """Also where only the last value of one is the first of the other."""
    given, call = arguments(backend)
    dtype, shape = given[other].dtype, given[other].shape
    size, taken = given[name].numel(), given[other].numel() * dtype.itemsize // 4
    memory = torch.zeros(size + taken - 1, device=given["q"].device)
    given[other] = memory[:taken].view(dtype).view(shape)
    given[name] = memory[taken - 1 :].view(given[name].shape)
    message = rf"(dv|{name}) must not share memory with ({name}|{other})"
    assert_refused(backend, call, given, message, "must not share memory")


@on("emulated", "cuda")
def test_buffers_that_share_memory_with_the_sinks_are_refused(backend):
    given, call = arguments(backend)
    memory = torch.zeros(4)
    call = call._replace(sinks=backend.here(memory))
    given["dsinks"] = call.sinks
    assert_refused(backend, call, given, "dsinks must not share memory", "must not share memory")


@on("cuda")
@pytest.mark.parametrize("name", ["dk", "dv", "dsinks", "lse", "out", "dout"])
def test_another_device_is_refused(backend, name):
    given, call = arguments(backend)
    given[name] = given[name].cpu()
    with pytest.raises(ValueError, match=name):
        public(backend, given, call)
    tensors = [given[n] for n in ("dout", "q", "k", "v", "out", "lse", "dlse")]
    operator = torch.ops.varstream.varlen_attention_bwd_accumulate
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of q"):
        operator(*tensors, *map(backend.here, call), *(given[n] for n in ("dk", "dv", "dsinks")))
