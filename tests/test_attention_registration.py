"""The attention ops as torch operators: opcheck, gradcheck, compilation, no second derivative,
argument errors."""

import pytest
import torch
from cases import cu_seqlens

import varstream as vs
from varstream.ops.attention_call import check_call
from varstream.testing import assert_exact


def make(lq=(5, 3), lk=(5, 9), **overrides):
    q = torch.randn(sum(lq), 4, 8, dtype=torch.float64)
    k, v = (
        torch.randn(sum(lk), 2, 8, dtype=torch.float64),
        torch.randn(sum(lk), 2, 8, dtype=torch.float64),
    )
    arguments = {
        "cu_seqlens_q": cu_seqlens(list(lq)),
        "cu_seqlens_k": cu_seqlens(list(lk)),
        "max_seqlen_q": None,
        "max_seqlen_k": None,
        "seqused_k": None,
        "causal": True,
        "window": (-1, -1),
        "softmax_scale": None,
        "softcap": 0.0,
        "alibi_slopes": None,
        "sinks": None,
        "dropout_p": 0.0,
        "deterministic": False,
        "rng_state": None,
    }
    return q, k, v, check_call(q, k, v, **(arguments | overrides))


EXTRAS = {
    "plain": {},
    "sinks": {"sinks": torch.randn(4, dtype=torch.float64)},
    "dropout": {
        "dropout_p": 0.2,
        "rng_state": torch.tensor([3, 4]),
        "seqused_k": torch.tensor([4, 9], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_opcheck_forward(extras):
    q, k, v, call = make(**extras)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.varstream.varlen_attention.default, (*leaves, *call))


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_opcheck_backward(extras):
    q, k, v, call = make(**extras)
    out, lse = torch.ops.varstream.varlen_attention(q, k, v, *call)
    given = (torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse), *call)
    torch.library.opcheck(torch.ops.varstream.varlen_attention_bwd.default, given)
    dsinks = None if call.sinks is None else torch.zeros_like(call.sinks)
    buffers = (torch.zeros_like(k), torch.zeros_like(v), dsinks)
    torch.library.opcheck(
        torch.ops.varstream.varlen_attention_bwd_accumulate.default, (*given, *buffers)
    )


DIRECT = {
    "falls": ({"cu_seqlens_q": torch.tensor([0, 6, 5], dtype=torch.int32)}, "never fall"),
    "past": ({"cu_seqlens_k": cu_seqlens([5, 90])}, "must not pass k's 14 rows"),
    "int64": ({"cu_seqlens_q": torch.tensor([0, 5, 8])}, "must have dtype int32"),
    "batch": ({"cu_seqlens_k": cu_seqlens([5])}, "must have 3 entries"),
    "seqused": ({"seqused_k": torch.tensor([9, 9], dtype=torch.int32)}, "between 0 and"),
    "rng": ({"dropout_p": 0.5}, "rng_state must be given"),
}


@pytest.mark.parametrize(("change", "message"), DIRECT.values(), ids=DIRECT)
def test_direct_calls_are_checked(change, message):
    q, k, v, call = make()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.varstream.varlen_attention(q, k, v, *call._replace(**change))


def test_direct_calls_check_heads_and_buffers():
    q, k, v, call = make()
    with pytest.raises(RuntimeError, match="q must have a multiple of k's 2 heads, got 3"):
        torch.ops.varstream.varlen_attention(q[:, :3], k, v, *call)
    out, lse = torch.ops.varstream.varlen_attention(q, k, v, *call)
    given = (torch.randn_like(out), q, k, v, out, lse, None, *call)
    with pytest.raises(RuntimeError, match="dk must have dtype float64, got float32"):
        torch.ops.varstream.varlen_attention_bwd_accumulate(
            *given, k.float(), torch.zeros_like(v), None
        )


def test_gradcheck():
    q, k, v, _ = make((2, 3), (3, 3))
    sinks = torch.randn(4, dtype=torch.float64)
    cu = cu_seqlens([2, 3]), cu_seqlens([3, 3])

    def run(q, k, v, sinks):
        return vs.varlen_attention(
            q, k, v, *cu, causal=True, softcap=2.0, sinks=sinks, return_lse=True
        )

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (q, k, v, sinks)])


def test_compiles_whole_and_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(q, k, v, cu, longest):
        out, lse = vs.varlen_attention(
            q, k, v, cu, max_seqlen_q=longest, causal=True, return_lse=True
        )
        return out.sum() + lse.sum()

    for i, lengths in enumerate(([5, 3], [7, 9], [2, 30], [11, 4], [6, 6])):
        leaves = [
            torch.randn(sum(lengths), h, 8, dtype=torch.float64).requires_grad_() for h in (4, 2, 2)
        ]
        loss = step(*leaves, cu_seqlens(lengths), max(lengths))
        got = torch.autograd.grad(loss, leaves)
        out, lse = vs.varlen_attention(*leaves, cu_seqlens(lengths), causal=True, return_lse=True)
        expected = torch.autograd.grad(out.sum() + lse.sum(), leaves)
        for g, w in zip(got, expected, strict=True):
            assert_exact(g, w)
        if i == 1:
            compiled = counter.frame_count
    assert counter.frame_count == compiled


def test_compiled_backward_primitive():
    q, k, v, _ = make((5,), (5,))
    cu = cu_seqlens([5])
    out, lse = vs.varlen_attention(q, k, v, cu, causal=True, return_lse=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(dout, dk, dv):
        dq = vs.varlen_attention_backward(
            dout, q, k, v, out, lse, cu, causal=True, max_seqlen_q=5, dk=dk, dv=dv
        )
        return dq * 2

    dout = torch.randn_like(out)
    buffers = [torch.ones_like(k), torch.ones_like(v)]
    again = [b.clone() for b in buffers]
    dq = step(dout, *buffers)
    want = vs.varlen_attention_backward(
        dout, q, k, v, out, lse, cu, causal=True, dk=again[0], dv=again[1]
    )
    assert_exact(dq, want * 2)
    assert_exact(buffers[0], again[0])


def test_second_derivative_is_refused():
    q, k, v, call = make()
    q.requires_grad_()
    out = vs.varlen_attention(q, k, v, call.cu_seqlens_q, call.cu_seqlens_k)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_autocast_runs_in_the_autocast_dtype():
    q, k, v = (torch.randn(5, 4, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vs.varlen_attention(q, k.bfloat16(), v, cu_seqlens([5])).dtype == torch.bfloat16


CU = cu_seqlens([5])
Q = torch.zeros(5, 4, 8)
BAD = {
    "q_type": (TypeError, {"q": [1]}, "q must be a torch.Tensor, got list"),
    "q_dims": (
        ValueError,
        {"q": torch.zeros(5, 8)},
        r"q must have 3 dimensions \(total_q, Hq, D\), got shape \(5, 8\)",
    ),
    "q_dtype": (
        ValueError,
        {"q": Q.int()},
        "q must have dtype float64, float32, bfloat16, float16, got int32",
    ),
    "mix": (ValueError, {"k": Q.double()}, "k must have the dtype of q"),
    "device": (
        ValueError,
        {"k": Q.to("meta")},
        "k must be on cpu like the other tensors, got meta",
    ),
    "head_dim": (ValueError, {"k": torch.zeros(5, 4, 16)}, "k must have q's head dim 8"),
    "heads": (
        ValueError,
        {"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)},
        "q must have a multiple of k's 3 heads, got 4",
    ),
    "v_rows": (ValueError, {"v": torch.zeros(6, 4, 8)}, "v must have size 5 in dimension 0"),
    "too_wide": (
        ValueError,
        {"q": torch.zeros(5, 4, 264), "k": torch.zeros(5, 4, 264)},
        "q must have a head dim from 1 to 256, got 264",
    ),
    "cu_dtype": (
        ValueError,
        {"cu_seqlens_q": CU.long()},
        "cu_seqlens_q must have dtype int32, got int64",
    ),
    "cu_start": (
        ValueError,
        {"cu_seqlens_q": torch.tensor([1, 5], dtype=torch.int32)},
        "cu_seqlens_q must start at 0, got 1",
    ),
    "cu_falls": (
        ValueError,
        {"cu_seqlens_q": torch.tensor([0, 4, 2, 5], dtype=torch.int32)},
        "cu_seqlens_q must never fall, got 4 then 2 at entry 2",
    ),
    "cu_total": (
        ValueError,
        {"cu_seqlens_q": torch.tensor([0, 4], dtype=torch.int32)},
        "cu_seqlens_q must end at the number of rows 5, got 4",
    ),
    "cu_past": (
        ValueError,
        {"cu_seqlens_q": torch.tensor([0, 9], dtype=torch.int32), "max_seqlen_q": 9},
        "cu_seqlens_q must not pass q's 5 rows, got 9",
    ),
    "cu_batch": (
        ValueError,
        {"cu_seqlens_k": cu_seqlens([2, 3])},
        "cu_seqlens_k must have 2 entries like cu_seqlens_q, got 3",
    ),
    "cu_missing": (
        ValueError,
        {"k": torch.zeros(6, 4, 8), "v": torch.zeros(6, 4, 8)},
        "cu_seqlens_k must be given",
    ),
    "max": (
        ValueError,
        {"max_seqlen_q": 4},
        "max_seqlen_q must be at least the longest length 5, got 4",
    ),
    "max_k": (
        ValueError,
        {"max_seqlen_k": 1},
        "max_seqlen_k must be at least the longest length 5, got 1",
    ),
    "validate": (TypeError, {"validate": 1}, "validate must be a bool, got int"),
    "max_type": (TypeError, {"max_seqlen_q": 4.5}, "max_seqlen_q must be an int, got float"),
    "seqused": (
        ValueError,
        {"seqused_k": torch.tensor([6], dtype=torch.int32)},
        "seqused_k must be between 0 and the sequence's 5 keys, got 6",
    ),
    "slopes": (
        ValueError,
        {"alibi_slopes": torch.zeros(3)},
        r"alibi_slopes must have shape \(4,\) or \(1, 4\), got \(3,\)",
    ),
    "sinks": (
        ValueError,
        {"sinks": torch.zeros(5)},
        r"sinks must have size 4 in dimension 0 \(Hq,\)",
    ),
    "window": (TypeError, {"window": 3}, "window must be a pair"),
    "window_low": (ValueError, {"window": (-2, 0)}, r"window\[0\] must be >= -1, got -2"),
    "softcap": (ValueError, {"softcap": -1.0}, "softcap must be >= 0.0, got -1.0"),
    "dropout": (ValueError, {"dropout_p": 1.0}, "dropout_p must be below 1"),
    "rng": (
        ValueError,
        {"rng_state": torch.zeros(3, dtype=torch.int64)},
        "rng_state must have size 2",
    ),
    "causal": (TypeError, {"causal": 1}, "causal must be a bool, got int"),
    "scale": (ValueError, {"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
}


@pytest.mark.parametrize(("error", "change", "message"), BAD.values(), ids=BAD)
def test_errors_name_argument_contract_and_value(error, change, message):
    arguments = {"q": Q, "k": Q, "v": Q, "cu_seqlens_q": CU} | change
    with pytest.raises(error, match=message):
        vs.varlen_attention(**arguments)
