"""The FlashAttention faces: their signatures, and their results against dense attention."""

import inspect
from itertools import pairwise

import pytest
import torch
from cases import LENGTH_PAIRS, cu_seqlens

from varstream.integrations import flash_attn, flash_attn_3
from varstream.integrations.flash_attn import bert_padding
from varstream.testing import assert_error_ratio, assert_exact, dense_attention

REQUIRED = inspect.Parameter.empty
OPTIONS_2 = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("softcap", 0.0),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
]
OPTIONS_3 = [
    ("softmax_scale", None),
    ("causal", False),
    ("qv", None),
    ("q_descale", None),
    ("k_descale", None),
    ("v_descale", None),
    ("window_size", (-1, -1)),
    ("attention_chunk", 0),
    ("softcap", 0.0),
    ("num_splits", 1),
    ("pack_gqa", None),
    ("deterministic", False),
    ("sm_margin", 0),
    ("return_attn_probs", False),
]
LENGTHS_2 = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
USED = [("seqused_q", None), ("seqused_k", None)]
SIGNATURES = {  # of flash_attn 2.8 and of FlashAttention-3's flash_attn_interface
    flash_attn.flash_attn_func: (["q", "k", "v"], OPTIONS_2),
    flash_attn.flash_attn_kvpacked_func: (["q", "kv"], OPTIONS_2),
    flash_attn.flash_attn_qkvpacked_func: (["qkv"], OPTIONS_2),
    flash_attn.flash_attn_varlen_func: (
        ["q", "k", "v", *LENGTHS_2],
        [*OPTIONS_2, ("block_table", None)],
    ),
    flash_attn.flash_attn_varlen_kvpacked_func: (["q", "kv", *LENGTHS_2], OPTIONS_2),
    flash_attn.flash_attn_varlen_qkvpacked_func: (["qkv", "cu_seqlens", "max_seqlen"], OPTIONS_2),
    flash_attn.unpad_input: (["hidden_states", "attention_mask"], [("unused_mask", None)]),
    flash_attn.pad_input: (["hidden_states", "indices", "batch", "seqlen"], []),
    flash_attn.index_first_axis: (["input", "indices"], []),
    flash_attn.index_put_first_axis: (["values", "indices", "first_axis_dim"], []),
    flash_attn_3.flash_attn_func: (["q", "k", "v"], OPTIONS_3),
    flash_attn_3.flash_attn_varlen_func: (["q", "k", "v", *LENGTHS_2], [*USED, *OPTIONS_3]),
}
CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 2)},
    "causal_window": {"window_size": (4, 7), "causal": True},
    "softcap": {"softcap": 2.0, "causal": True},
    "scale": {"softmax_scale": 0.3},
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_signature(function):
    required, optional = SIGNATURES[function]
    want = [(name, REQUIRED) for name in required] + optional
    parameters = inspect.signature(function).parameters.values()
    assert [(p.name, p.default) for p in parameters] == want
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_bert_padding_is_a_module_of_its_own():
    assert bert_padding.unpad_input is flash_attn.unpad_input
    assert bert_padding.pad_input is flash_attn.pad_input


def make(rows, keys, heads=4, kv_heads=2, dtype=torch.float64):
    shapes = [(rows, heads, 8), (keys, kv_heads, 8), (keys, kv_heads, 8)]
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def dense(q, k, v, cu_q, cu_k, case, **more):
    renamed = {"window": case["window_size"]} if "window_size" in case else {}
    rest = {name: value for name, value in case.items() if name != "window_size"}
    return dense_attention(q, k, v, cu_q, cu_k, **renamed, **rest, **more)


def check(out, lse, want, want_lse, leaves, dead=torch.inf):
    """Results and gradients, those of the LSE included; ``dead`` is the LSE of unseeing rows."""
    blind = want_lse == -torch.inf
    assert (lse[blind] == dead).all()
    assert lse.dtype == torch.float64
    assert_exact(out, want, name="out")
    lse, want_lse = (x.masked_fill(blind, 0.0) for x in (lse, want_lse))
    assert_exact(lse, want_lse, name="lse")
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad([out, lse], leaves, [dout, dlse])
    expected = torch.autograd.grad([want, want_lse], leaves, [dout, dlse])
    for name, g, w in zip("qkv", got, expected, strict=False):
        assert_exact(g, w, name=f"d{name}")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("pair", ["more_queries", "one_query", "prefix"])
@pytest.mark.parametrize("version", [2, 3])
def test_varlen(pair, case, version):
    lq, lk = LENGTH_PAIRS[pair]
    q, k, v = make(sum(lq), sum(lk))
    cu = cu_seqlens(lq), cu_seqlens(lk)
    face = flash_attn if version == 2 else flash_attn_3
    call = (q, k, v, *cu, max(lq), max(lk))
    out, lse, *rest = face.flash_attn_varlen_func(*call, return_attn_probs=True, **case)
    assert rest == ([None] if version == 2 else [])
    assert lse.shape == (4, sum(lq))
    dead = torch.inf if version == 2 else -torch.inf
    check(out, lse, *dense(q, k, v, *cu, case), (q, k, v), dead)
    assert face.flash_attn_varlen_func(*call, **case).equal(out)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("version", [2, 3])
def test_padded(case, kv_heads, version):
    batch, rows, keys = 3, 5, 7 if version == 2 else 4
    q, k, v = make(batch * rows, batch * keys, kv_heads=kv_heads)
    padded = (x.unflatten(0, (batch, -1)) for x in (q, k, v))
    face = flash_attn if version == 2 else flash_attn_3
    out, lse, *_ = face.flash_attn_func(*padded, return_attn_probs=True, **case)
    assert out.shape == (batch, rows, 4, 8) and lse.shape == (batch, 4, rows)
    want = dense(q, k, v, cu_seqlens([rows] * batch), cu_seqlens([keys] * batch), case)
    dead = torch.inf if version == 2 else -torch.inf
    check(out.flatten(0, 1), lse.transpose(0, 1).flatten(1), *want, (q, k, v), dead)


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_padded_and_nothing_there(batch, rows, keys):
    q, k = torch.randn(batch, rows, 2, 8), torch.randn(batch, keys, 2, 8)
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, return_attn_probs=True)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == (batch, 2, rows) and (lse == torch.inf).all()


def test_alibi_slopes_of_each_sequence():
    slopes = torch.rand(2, 4, dtype=torch.float64)
    q, k, v = make(6, 10)
    padded = (x.unflatten(0, (2, -1)) for x in (q, k, v))
    out = flash_attn.flash_attn_func(*padded, alibi_slopes=slopes, causal=True)
    cu = cu_seqlens([3, 3]), cu_seqlens([5, 5])
    want, _ = dense_attention(q, k, v, *cu, alibi_slopes=slopes, causal=True)
    assert_exact(out.flatten(0, 1), want)


def test_packed_tensors():
    """The packed forms equal the plain ones, gradients too, for padded and packed batches."""
    qkv = torch.randn(2, 6, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unbind(2)
    cu, options = cu_seqlens([6, 6]), (0.0, 0.2, True, (3, 0), 1.5, None, True)
    want = flash_attn.flash_attn_func(q, k, v, *options)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    results = [
        flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), *options),
        flash_attn.flash_attn_qkvpacked_func(qkv, *options),
        flash_attn.flash_attn_varlen_func(*flat, cu, cu, 6, 6, *options),
        flash_attn.flash_attn_varlen_kvpacked_func(
            flat[0], torch.stack(flat[1:], 1), cu, cu, 6, 6, *options
        ),
        flash_attn.flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), cu, 6, *options),
    ]
    dout = torch.randn_like(want)
    (expected,) = torch.autograd.grad(want, qkv, dout, retain_graph=True)
    for result in results:
        assert result.reshape(want.shape).equal(want)
        (got,) = torch.autograd.grad(result.reshape(want.shape), qkv, dout, retain_graph=True)
        assert_exact(got, expected)


def test_dropout_draws_from_torch():
    q = torch.randn(1, 64, 2, 8)
    torch.manual_seed(1)
    first = flash_attn.flash_attn_func(q, q, q, dropout_p=0.5)
    second = flash_attn.flash_attn_func(q, q, q, dropout_p=0.5)
    torch.manual_seed(1)
    assert flash_attn.flash_attn_func(q, q, q, dropout_p=0.5).equal(first)
    assert not first.equal(second)
    ones = torch.ones_like(q)  # a row of values all 1 sums its dropped, rescaled probabilities
    mean = flash_attn.flash_attn_func(q, q, ones, dropout_p=0.5).mean()
    assert 0.9 < mean < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    lq, lk = [5, 17, 1], [9, 17, 30]
    q, k, v = make(sum(lq), sum(lk), dtype=dtype)
    cu = cu_seqlens(lq), cu_seqlens(lk)
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, *cu, 17, 30, causal=True, return_attn_probs=True
    )
    assert out.dtype == dtype and lse.dtype == torch.float32
    plain, _ = dense_attention(q, k, v, *cu, causal=True)
    exact, _ = dense_attention(q.double(), k.double(), v.double(), *cu, causal=True)
    assert_error_ratio(out, plain, exact)


def test_maximum_lengths_may_be_tensors():
    q, k, v = make(5, 5)
    cu = cu_seqlens([2, 3])
    want = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 3, 3)
    longest = cu.diff().max()
    assert flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest).equal(want)


def test_compiled_whole():
    """One graph, forward and backward, for each face; seqused needs no look at the values."""
    q, k, v = make(6, 9)
    cu = cu_seqlens([2, 4]), cu_seqlens([5, 4])
    used = torch.tensor([1, 4], dtype=torch.int32)

    def step(q, k, v):
        second = flash_attn.flash_attn_varlen_func(q, k, v, *cu, 4, 5, causal=True)
        third = flash_attn_3.flash_attn_varlen_func(q, k, v, *cu, 4, 5, used)
        whole = flash_attn.flash_attn_func(q[None], k[None], v[None], return_attn_probs=True)
        return second + third + whole[0][0] + whole[1].sum()

    dout = torch.randn(6, 4, 8, dtype=torch.float64)
    want = torch.autograd.grad(step(q, k, v), (q, k, v), dout)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v), dout)
    torch.compiler.reset()
    for g, w in zip(got, want, strict=True):
        assert_exact(g, w)


# --- FlashAttention-3's own arguments -------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_in_use(case):
    """seqused cuts both sides; what it cuts off is never read."""
    lq, lk = [4, 0, 6, 3], [5, 2, 9, 3]
    used_q, used_k = torch.tensor([3, 0, 6, 0]).int(), torch.tensor([5, 1, 4, 2]).int()
    q, k, v = make(sum(lq), sum(lk))
    cu = cu_seqlens(lq), cu_seqlens(lk)
    keep_q, keep_k = (
        torch.cat(
            [torch.arange(a, a + n) for (a, _), n in zip(pairwise(c.tolist()), used, strict=True)]
        )
        for c, used in zip(cu, (used_q.tolist(), used_k.tolist()), strict=True)
    )
    with torch.no_grad():
        for x, keep in ((q, keep_q), (k, keep_k), (v, keep_k)):
            lost = torch.ones(x.shape[0], dtype=torch.bool)
            lost[keep] = False
            x[lost] = torch.nan
    out, lse = flash_attn_3.flash_attn_varlen_func(
        q, k, v, *cu, 6, 9, used_q, used_k, return_attn_probs=True, **case
    )
    live = [x[keep] for x, keep in ((q, keep_q), (k, keep_k), (v, keep_k))]
    short = cu_seqlens(used_q.tolist()), cu_seqlens(used_k.tolist())
    want, want_lse = dense(*live, *short, case)
    unused = torch.ones(sum(lq), dtype=torch.bool)
    unused[keep_q] = False
    assert (out[unused] == 0).all() and (lse[:, unused] == -torch.inf).all()
    check(out[keep_q], lse[:, keep_q], want, want_lse, (q, k, v), -torch.inf)


def test_hints_change_nothing():
    q, k, v = make(5, 5)
    cu = cu_seqlens([2, 3])
    want = flash_attn_3.flash_attn_varlen_func(q, k, v, cu, cu, 3, 3)
    hints = {"num_splits": 0, "pack_gqa": True, "sm_margin": 8}
    assert flash_attn_3.flash_attn_varlen_func(q, k, v, cu, cu, 3, 3, **hints).equal(want)


# --- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_unpad_and_pad(kind):
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).to(kind)
    rows, indices, cu, longest, used = flash_attn.unpad_input(x, mask)
    assert rows.equal(x[mask.bool()])
    assert indices.tolist() == [1, 2, 4, 5] and indices.dtype == torch.int64
    assert cu.tolist() == [0, 3, 4, 4] and cu.dtype == torch.int32
    assert longest == 3 and isinstance(longest, int)
    assert used.tolist() == [3, 1, 0] and used.dtype == torch.int32
    back = flash_attn.pad_input(rows, indices, 3, 5)
    assert back.equal(x * mask.bool()[..., None])
    back.sum().backward()
    assert x.grad.equal(mask.bool()[..., None].expand_as(x).double())


def test_unused_tokens_are_kept_but_not_counted():
    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    spare = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    rows, indices, cu, longest, used = flash_attn.unpad_input(x, mask, spare)
    assert rows.equal(x.flatten(0, 1)[indices]) and indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert cu.tolist() == [0, 3, 7] and longest == 4 and used.tolist() == [2, 1]


def test_index_first_axis_and_back():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([4, 0, 2])
    rows = flash_attn.index_first_axis(x, at)
    assert rows.equal(x[at])
    back = flash_attn.index_put_first_axis(rows, at, 5)
    assert back[at].equal(rows) and (back[[1, 3]] == 0).all()
    back.sum().backward()
    assert x.grad[at].eq(1).all() and x.grad[[1, 3]].eq(0).all()
    twice = flash_attn.index_first_axis(x, torch.tensor([1, 1]))
    (grad,) = torch.autograd.grad(twice.sum(), x)
    assert grad[1].eq(2).all()


# --- errors ---------------------------------------------------------------------------------------

Q = torch.randn(4, 2, 8)
P = Q[None]
CU = cu_seqlens([1, 3])
VARLEN_2 = (flash_attn.flash_attn_varlen_func, (Q, Q, Q, CU, CU, 3, 3))
VARLEN_3 = (flash_attn_3.flash_attn_varlen_func, (Q, Q, Q, CU, CU, 3, 3))
PADDED_2 = (flash_attn.flash_attn_func, (P, P, P))
PADDED_3 = (flash_attn_3.flash_attn_func, (P, P, P))
USED_ONE = torch.ones(2, dtype=torch.int32)
ERRORS = [
    (*VARLEN_2, {"block_table": CU}, ValueError, "block_table must be None"),
    (*VARLEN_2, {"window_size": 3}, TypeError, "window_size must be a pair"),
    (*VARLEN_2, {"window_size": (-2, 0)}, ValueError, r"window_size\[0\] must be >= -1, got -2"),
    (*VARLEN_2, {"window_size": (0, None)}, TypeError, r"window_size\[1\] must be an int"),
    (*PADDED_2, {"dropout_p": 1.0}, ValueError, "dropout_p must be below 1"),
    (
        *PADDED_2,
        {"dropout_p": 0.5, "return_attn_probs": True},
        ValueError,
        "return_attn_probs must be False with dropout",
    ),
    (*PADDED_2, {"return_attn_probs": 1}, TypeError, "return_attn_probs must be a bool"),
    (*PADDED_2, {"causal": None}, TypeError, "causal must be a bool"),
    (PADDED_2[0], (Q, Q, Q), {}, ValueError, r"q must have 4 dimensions \(B, Sq, H, D\)"),
    (PADDED_2[0], (P, Q, Q), {}, ValueError, r"k must have 4 dimensions \(B, Sk, Hkv, D\)"),
    (PADDED_2[0], (P, P, P[:, :2]), {}, ValueError, "v must have size 4 in dimension 1"),
    (PADDED_2[0], (P, P, P.double()), {}, ValueError, "v must have the dtype of q"),
    (VARLEN_2[0], (Q, Q, Q, CU, None, 3, 3), {}, TypeError, "cu_seqlens_k must be a torch.Tensor"),
    (VARLEN_2[0], (Q, Q, Q, CU, CU, 2, 3), {}, ValueError, "max_seqlen_q must be at least"),
    (VARLEN_2[0], (Q, Q, Q, CU, CU, 3, None), {}, TypeError, "max_seqlen_k must be an int"),
    (VARLEN_2[0], (Q, Q, Q, CU.long(), CU, 3, 3), {}, ValueError, "cu_seqlens_q must have dtype"),
    (flash_attn.flash_attn_kvpacked_func, (P, P), {}, ValueError, "kv must have 5 dimensions"),
    (flash_attn.flash_attn_qkvpacked_func, (P,), {}, ValueError, "qkv must have 5 dimensions"),
    (
        flash_attn.flash_attn_varlen_kvpacked_func,
        (Q, Q, CU, CU, 3, 3),
        {},
        ValueError,
        "kv must have 4 dimensions",
    ),
    (
        flash_attn.flash_attn_varlen_qkvpacked_func,
        (torch.randn(4, 3, 2, 8), CU.long(), 3),
        {},
        ValueError,
        "cu_seqlens must have dtype int32",
    ),
    (*VARLEN_3, {"qv": Q}, ValueError, "qv must be None"),
    (*VARLEN_3, {"q_descale": Q}, ValueError, "q_descale must be None"),
    (*PADDED_3, {"k_descale": Q}, ValueError, "k_descale must be None"),
    (*PADDED_3, {"v_descale": Q}, ValueError, "v_descale must be None"),
    (*PADDED_3, {"attention_chunk": 4}, ValueError, r"attention_chunk must be 0 .* got 4"),
    (*PADDED_3, {"num_splits": -1}, ValueError, "num_splits must be >= 0"),
    (*PADDED_3, {"pack_gqa": 1}, TypeError, "pack_gqa must be a bool"),
    (*PADDED_3, {"sm_margin": 0.5}, TypeError, "sm_margin must be an int"),
    (*VARLEN_3, {"seqused_q": USED_ONE * 2}, ValueError, "seqused_q must be between 0 and .* 1 "),
    (*VARLEN_3, {"seqused_q": USED_ONE[:1]}, ValueError, "seqused_q must have size 2"),
    (*VARLEN_3, {"seqused_k": USED_ONE * 2}, ValueError, "seqused_k must be between 0 and .* 1 "),
    (flash_attn.unpad_input, (P, P), {}, ValueError, "attention_mask must have 2 dimensions"),
    (
        flash_attn.unpad_input,
        (P, torch.ones(1, 4), torch.ones(1, 4)),
        {},
        ValueError,
        r"unused_mask must not mark .* got both at \(0, 0\)",
    ),
    (
        flash_attn.unpad_input,
        (P, torch.ones(1, 4), torch.ones(1, 3)),
        {},
        ValueError,
        "unused_mask must have size 4",
    ),
    (
        flash_attn.unpad_input,
        (P, torch.tensor([[0.0, 0.0, 0.0, -1e9]]), torch.zeros(1, 4)),
        {},
        ValueError,
        "attention_mask of dtype torch.float32 must hold 0 and 1, got -1000000000.0",
    ),
    (
        flash_attn.pad_input,
        (Q, torch.arange(4), 1, 3),
        {},
        ValueError,
        "indices must name rows from 0 to 2, got 3",
    ),
    (flash_attn.pad_input, (Q, torch.arange(3), 1, 4), {}, ValueError, "indices must have size 4"),
    (flash_attn.pad_input, ([1], CU, 1, 1), {}, TypeError, "hidden_states must be a torch.Tensor"),
    (flash_attn.pad_input, (Q, torch.arange(4), -1, 4), {}, ValueError, "batch must be >= 0"),
    (
        flash_attn.index_first_axis,
        (Q, torch.tensor([-1])),
        {},
        ValueError,
        "indices must name rows from 0 to 3, got -1",
    ),
]


@pytest.mark.parametrize(("function", "args", "kwargs", "kind", "message"), ERRORS)
def test_errors(function, args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        function(*args, **kwargs)
