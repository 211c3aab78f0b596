"""The backward as a primitive: adds into the caller's buffers, takes parts of a larger call,
refuses bad buffers."""

import pytest
import torch
from cases import cu_seqlens

import varstream as vs
from varstream.testing import assert_exact, dense_attention


def make(lq, lk, dtype=torch.float64):
    q = torch.randn(sum(lq), 4, 8, dtype=dtype)
    k, v = torch.randn(sum(lk), 2, 8, dtype=dtype), torch.randn(sum(lk), 2, 8, dtype=dtype)
    return q, k, v


def test_adds_into_the_callers_buffers():
    lq, lk = [5, 30], [9, 30]
    q, k, v = make(lq, lk)
    cu = cu_seqlens(lq), cu_seqlens(lk)
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = vs.varlen_attention(q, k, v, *cu, causal=True, sinks=sinks, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, sinks)]
    want, want_lse = dense_attention(*leaves[:3], *cu, causal=True, sinks=leaves[3])
    expected = torch.autograd.grad((want * dout).sum() + (want_lse * dlse).sum(), leaves)
    buffers = {
        "dk": torch.randn_like(k),
        "dv": torch.randn_like(v),
        "dsinks": torch.randn_like(sinks),
    }
    before = {name: t.clone() for name, t in buffers.items()}
    dq = vs.varlen_attention_backward(
        dout, q, k, v, out, lse, *cu, causal=True, sinks=sinks, dlse=dlse, **buffers
    )
    assert_exact(dq, expected[0])
    for (name, buffer), grad in zip(buffers.items(), expected[1:], strict=True):
        assert_exact(buffer, before[name] + grad, name=name)


def test_a_chunk_against_its_prefix_in_two_parts():
    """Queries of a chunk, keys split in two: the global out and LSE make partial gradients add
    up."""
    q, k, v = make([6], [20])
    cu_q = cu_seqlens([6])
    out, lse = vs.varlen_attention(q, k, v, cu_q, cu_seqlens([20]), causal=True, return_lse=True)
    dout = torch.randn_like(out)
    whole = torch.zeros_like(k), torch.zeros_like(v)
    dq = vs.varlen_attention_backward(
        dout, q, k, v, out, lse, cu_q, cu_seqlens([20]), causal=True, dk=whole[0], dv=whole[1]
    )
    parts = torch.zeros_like(k), torch.zeros_like(v)
    dq_parts = torch.zeros_like(q)
    for rows, causal in ((slice(0, 14), False), (slice(14, 20), True)):
        dq_parts += vs.varlen_attention_backward(
            dout,
            q,
            k[rows],
            v[rows],
            out,
            lse,
            cu_q,
            cu_seqlens([rows.stop - rows.start]),
            causal=causal,
            dk=parts[0][rows],
            dv=parts[1][rows],
        )
    assert_exact(dq_parts, dq)
    assert_exact(parts[0], whole[0])
    assert_exact(parts[1], whole[1])


def test_low_precision_accumulates_in_float32():
    q, k, v = make([40], [40], torch.bfloat16)
    cu = cu_seqlens([40])
    out, lse = vs.varlen_attention(q, k, v, cu, causal=True, return_lse=True)
    dk, dv = torch.zeros(40, 2, 8), torch.zeros(40, 2, 8)
    dq = vs.varlen_attention_backward(
        torch.randn_like(out), q, k, v, out, lse, cu, causal=True, dk=dk, dv=dv
    )
    assert dq.dtype == torch.bfloat16 and dk.dtype == torch.float32 and dk.abs().sum() > 0


def _arguments():
    q, k, v = make([5], [5])
    cu = cu_seqlens([5])
    out, lse = vs.varlen_attention(q, k, v, cu, return_lse=True)
    return {
        "dout": torch.randn_like(out),
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "cu_seqlens_q": cu,
        "dk": torch.zeros_like(k),
        "dv": torch.zeros_like(v),
    }


BAD = {
    "dk_shape": (
        {"dk": torch.zeros(5, 4, 8, dtype=torch.float64)},
        "dk must have size 2 in dimension 1",
    ),
    "dv_dtype": ({"dv": torch.zeros(5, 2, 8)}, "dv must have dtype float64, got float32"),
    "dk_type": ({"dk": None}, "dk must be a torch.Tensor, got NoneType"),
    "lse_shape": (
        {"lse": torch.zeros(4, 6, dtype=torch.float64)},
        "lse must have size 5 in dimension 1",
    ),
    "dlse_dtype": ({"dlse": torch.zeros(4, 5)}, "dlse must have dtype float64"),
    "out_shape": (
        {"out": torch.zeros(5, 4, 9, dtype=torch.float64)},
        "out must have size 8 in dimension 2",
    ),
    "dsinks": (
        {"dsinks": torch.zeros(4, dtype=torch.float64)},
        "dsinks must be given exactly when sinks",
    ),
    "rng": ({"dropout_p": 0.1}, "rng_state must be the forward's dropout state"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_refused_before_anything_is_written(change, message):
    arguments = _arguments() | change
    with pytest.raises((TypeError, ValueError), match=message):
        vs.varlen_attention_backward(**arguments)
    for name in ("dk", "dv"):
        if name not in change:
            assert (arguments[name] == 0).all()


def test_buffers_that_cannot_be_added_into_are_refused():
    arguments = _arguments()
    wants_gradient = torch.zeros_like(arguments["dk"]).requires_grad_()
    with pytest.raises(ValueError, match="dk must not require a gradient"):
        vs.varlen_attention_backward(**(arguments | {"dk": wants_gradient}))
    expanded = torch.zeros(1, 2, 8, dtype=torch.float64).expand(5, 2, 8)
    with pytest.raises(ValueError, match="dv must not be expanded"):
        vs.varlen_attention_backward(**(arguments | {"dv": expanded}))
    rows = torch.zeros(5 * 8 + 8, dtype=torch.float64)
    woven = rows.as_strided((5, 2, 8), (8, 8, 1))  # a row's second head is the next row's first
    with pytest.raises(ValueError, match=r"dv must hold each element once.*strides \(8, 8, 1\)"):
        vs.varlen_attention_backward(**(arguments | {"dv": woven}))
    slopes = torch.zeros(5, 2, 8, dtype=torch.float64)
    shared = {"dv": slopes, "alibi_slopes": slopes[0, 0, : arguments["q"].shape[1]]}
    with pytest.raises(ValueError, match="dv must not share memory with alibi_slopes"):
        vs.varlen_attention_backward(**(arguments | shared))
    between = torch.zeros(5, 3, 2, 8, dtype=torch.float64)[:, 1]  # a view with gaps is fine
    vs.varlen_attention_backward(**(arguments | {"dv": between}))


def test_no_graph_is_recorded():
    arguments = _arguments()
    dq = vs.varlen_attention_backward(**(arguments | {"q": arguments["q"].requires_grad_()}))
    assert not dq.requires_grad and not arguments["dk"].requires_grad


def test_overlapping_buffers_are_refused():
    arguments = _arguments()
    both = torch.zeros(5, 2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="dv must not share memory with dk"):
        vs.varlen_attention_backward(**(arguments | {"dk": both, "dv": both}))
    with pytest.raises(ValueError, match="dk must not share memory with k"):
        vs.varlen_attention_backward(**(arguments | {"dk": arguments["k"]}))
