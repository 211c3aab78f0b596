"""relative_attention against dense attention whose bias is formed entry by entry."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import LENGTHS, cu_seqlens

import varstream as vs
from varstream.reference import relative_attention as reference
from varstream.reference import relative_plan
from varstream.reference.philox import keep_scale
from varstream.reference.relative_plan import Limits, Piece, pieces, plan_groups
from varstream.testing import assert_error_ratio, assert_exact, peak_memory

HEADS, DIM, VALUE_DIM, ROWS = 3, 8, 4, 6
TERMS = {
    "none": (),
    "table": ("table",),
    "key": ("key_table",),
    "query": ("query_table",),
    "deberta": ("key_table", "query_table"),
    "all": ("table", "key_table", "query_table"),
}
SHAPES = {
    "table": (ROWS, HEADS),
    "key_table": (ROWS, HEADS, DIM),
    "query_table": (ROWS, HEADS, DIM),
}
# Sequences alone or together, whole or cut by heads and rows, with and without padded keys
LIMITS = {
    "device": relative_plan.CPU,
    "alone": Limits(1 << 22, 0),
    "together": Limits(1 << 22, 1 << 40),
    "by_heads": Limits(8 * 20 * 20, 1 << 40),
    "by_rows": Limits(8 * 20, 0),
}


@pytest.fixture(params=LIMITS.values(), ids=LIMITS)
def limits(request, monkeypatch):
    monkeypatch.setattr(reference, "CPU", request.param)
    monkeypatch.setattr(relative_plan, "FEWEST_ROWS", 3)


def make(lengths, terms=TERMS["all"], dtype=torch.float64, slack=0):
    """q, k, v, cu_seqlens, buckets and the tables by name; all floating ones want gradients."""
    total, longest = sum(lengths), max([1, *lengths]) + slack
    q, k = (torch.randn(total, HEADS, DIM, dtype=dtype).requires_grad_() for _ in range(2))
    v = torch.randn(total, HEADS, VALUE_DIM, dtype=dtype).requires_grad_()
    buckets = torch.randint(ROWS, (2 * longest - 1,))
    tables = {name: torch.randn(SHAPES[name], dtype=dtype).requires_grad_() for name in terms}
    return (q, k, v, cu_seqlens(lengths), buckets), tables


def dense(q, k, v, cu, buckets, *, scale=DIM**-0.5, p=0.0, rng_state=None, **tables):
    """The definition, one sequence at a time; rows of no sequence are 0."""
    outs, middle, ends = [], buckets.shape[0] // 2, cu.tolist()
    table, key, query = (tables.get(name) for name in SHAPES)
    for b, (begin, end) in enumerate(itertools.pairwise(ends)):
        at = torch.arange(end - begin)
        row = buckets[middle + at[None, :] - at[:, None]].long()
        qs, ks, vs_ = (t[begin:end].transpose(0, 1) for t in (q, k, v))
        scores = scale * qs @ ks.transpose(1, 2)
        if table is not None:
            scores = scores + table[row].permute(2, 0, 1)
        if key is not None:
            scores = scores + torch.einsum("hid,ijhd->hij", qs, key[row])
        if query is not None:
            scores = scores + torch.einsum("hjd,ijhd->hij", ks, query[row])
        weights = scores.softmax(-1) if end > begin else scores
        if p and end > begin:
            weights = weights * keep_scale(rng_state, p, b, torch.arange(HEADS), at, at)
        outs.append((weights @ vs_).transpose(0, 1))
    return torch.cat([*outs, v[ends[-1] :] * 0.0])


def gradients(out, dout, leaves):
    if not out.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def check(arguments, tables, dense_keywords=None, **keywords):
    """Out and every gradient are the dense ones."""
    out = vs.ops.relative_attention(*arguments, **tables, **keywords)
    want = dense(*arguments, **tables, **(dense_keywords or {}))
    assert_exact(out, want, name="out")
    leaves, dout = [*arguments[:3], *tables.values()], torch.randn_like(out)
    names = ["dq", "dk", "dv", *tables]
    for name, got, exact in zip(
        names, gradients(out, dout, leaves), gradients(want, dout, leaves), strict=True
    ):
        assert_exact(got, exact, name=name)


# --- against the definition -----------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), [7] * 5], ids=[*LENGTHS, "alike"])
def test_is_dense_attention(lengths, terms):
    lengths = [min(n, 90) for n in lengths]  # the definition forms (n, n, H, D)
    check(*make(lengths, terms))


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("lengths", [[20, 19, 19, 7, 20, 1, 0, 3], [31], [5] * 4])
def test_pieces_make_no_difference(limits, lengths, terms):
    check(*make(lengths, terms, slack=2))


def test_options_and_layouts():
    lengths = [5, 11, 4]
    arguments, tables = make(lengths, slack=3)
    check(arguments, tables, {"scale": -0.3}, softmax_scale=-0.3, deterministic=True)
    check(arguments, tables, {"scale": 0.0}, softmax_scale=0.0, validate=True, max_seqlen=11)
    q, k, v, cu, buckets = arguments
    check((q, k, v, cu, buckets.int()), tables)
    packed = torch.randn(20, 3, HEADS, DIM, dtype=torch.float64, requires_grad=True)
    wide = (*packed.unbind(1), cu, buckets)
    out = vs.ops.relative_attention(*wide, **tables)
    assert_exact(out, dense(*wide, **tables))
    dout = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, packed, dout)
    assert_exact(got, torch.autograd.grad(dense(*wide, **tables), packed, dout)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(limits, dtype):
    arguments, tables = make([20, 19, 3, 1, 12])
    *exact_qkv, cu, buckets = arguments
    dout = torch.randn(55, HEADS, VALUE_DIM, dtype=torch.float64)

    def run(function, to):
        leaves = [
            t.detach().to(dtype).to(to).requires_grad_() for t in (*exact_qkv, *tables.values())
        ]
        out = function(*leaves[:3], cu, buckets, **dict(zip(tables, leaves[3:], strict=True)))
        assert out.dtype == to
        grads = torch.autograd.grad(out, leaves, dout.to(dtype).to(to))
        assert [g.dtype for g in grads] == [to] * len(leaves)
        return out, *grads

    ours = run(vs.ops.relative_attention, dtype)
    plain, want = run(dense, dtype), run(dense, torch.float64)
    for name, *results in zip(["out", "dq", "dk", "dv", *tables], ours, plain, want, strict=True):
        assert_error_ratio(*results, name=name)


def test_tables_of_another_dtype_get_gradients_of_their_own():
    (q, k, v, cu, buckets), tables = make([4, 6])
    q, k, v = (t.detach().float() for t in (q, k, v))
    out = vs.ops.relative_attention(q, k, v, cu, buckets, **tables)
    assert out.dtype == torch.float32
    grads = torch.autograd.grad(out.sum(), list(tables.values()))
    assert [g.dtype for g in grads] == [torch.float64] * 3
    want = dense(q.double(), k.double(), v.double(), cu, buckets, **tables)
    assert_exact(out, want, tolerance=1e-6)


def test_frozen_parts_get_no_gradient():
    arguments, tables = make([4, 6])
    for frozen in tables.values():
        frozen.requires_grad_(False)
    out = vs.ops.relative_attention(*arguments, **tables)
    out.square().sum().backward()
    assert all(t.grad is not None for t in arguments[:3])
    tables["key_table"].requires_grad_()
    arguments = *(t.detach() for t in arguments[:3]), *arguments[3:]
    out = vs.ops.relative_attention(*arguments, **tables)
    (got,) = torch.autograd.grad(out.square().sum(), tables["key_table"])
    want = dense(*arguments, **tables)
    assert_exact(got, torch.autograd.grad(want.square().sum(), tables["key_table"])[0])


def test_nothing_outside_a_sequence_reaches_it(limits):
    lengths = [6, 20, 19, 5]
    arguments, tables = make(lengths)
    clean = vs.ops.relative_attention(*arguments, **tables).detach()
    cu, buckets = arguments[3:]
    bad = slice(6, 26)
    with torch.no_grad():
        poisoned = [
            torch.cat([t, t.new_full((7, *t.shape[1:]), torch.nan)]).requires_grad_()
            for t in arguments[:3]
        ]
        for t in poisoned:
            t[bad] = torch.nan
    out = vs.ops.relative_attention(*poisoned, cu, buckets, max_seqlen=20, **tables)
    assert out[bad].isnan().all() and not out[50:].any()
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, poisoned, dout)
    want = torch.autograd.grad(
        vs.ops.relative_attention(*arguments, **tables), arguments[:3], dout[:50]
    )
    for rows in (slice(0, 6), slice(26, 50)):
        assert_exact(out[rows], clean[rows])
        for got, exact in zip(grads, want, strict=True):
            assert_exact(got[rows], exact[rows])
    assert not any(g[50:].any() for g in grads)


# --- dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [[3, 0], [-(2**62) + 2**33 + 5, 2**40 + 3], [-1, -7]])
@pytest.mark.parametrize("p", [0.0001, 0.3, 0.97])
def test_dropout_draws_as_varlen_attention_and_replays(limits, p, state):
    rng_state = torch.tensor(state)
    arguments, tables = make([20, 0, 19, 7, 1])
    keywords = {"dropout_p": p, "rng_state": rng_state}
    check(arguments, tables, {"p": p, "rng_state": rng_state}, **keywords)
    q, k, v, cu, buckets = arguments
    out = vs.ops.relative_attention(q, k, v, cu, buckets, **keywords)
    assert_exact(out, vs.varlen_attention(q, k, v, cu, **keywords))


def test_dropout_follows_torch_seed():
    arguments, tables = make([9, 20])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(vs.ops.relative_attention(*arguments, dropout_p=0.5, **tables))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_repeats_bit_for_bit():
    arguments, tables = make([40, 33, 7] * 3, dtype=torch.float32)
    leaves = [*arguments[:3], *tables.values()]
    torch.set_num_threads(2)
    results = []
    for _ in range(2):
        out = vs.ops.relative_attention(*arguments, deterministic=True, **tables)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# --- plan and memory ------------------------------------------------------------------------------


def test_every_sequence_is_in_one_group():
    lengths = [9, 0, 30, 30, 29, 2, 1, 30, 0, 9]
    for limits in (*LIMITS.values(), Limits(2 * 3 * 30 * 30 * 8, 600)):
        groups = plan_groups(lengths, 3, 8, limits)
        members = [b for group in groups for b in group.members]
        assert sorted(members) == [b for b, n in enumerate(lengths) if n]
        for group in groups:
            sizes = [lengths[b] for b in group.members]
            assert group.length == sizes[0] == max(sizes)
            assert group.padded == (min(sizes) < group.length)
            scores = len(sizes) * 3 * group.length**2 * 8
            assert len(sizes) == 1 or scores <= limits.score_bytes
    groups = plan_groups(lengths, 3, 8, Limits(2 * 3 * 30 * 30 * 8, 600))
    # 30, 30, then 30 and the 29 that wastes 3 * 59; 9 and 9; 2 and 1
    assert [g.members for g in groups] == [[2, 3], [7, 4], [0, 9, 5, 6]]
    alone = plan_groups(lengths, 3, 8, LIMITS["alone"])
    assert [g.members for g in alone] == [[2, 3, 7], [4], [0, 9], [5], [6]]


def test_pieces_cover_a_group_within_the_budget():
    (whole,) = plan_groups([30, 30], 4, 8, LIMITS["alone"])
    assert list(pieces(whole, 4, 8, LIMITS["alone"])) == [Piece(0, 4, 0, 30)]
    (long,) = plan_groups([1000], 4, 8, LIMITS["alone"])
    for budget in (1 << 30, 2 * 1000 * 1000 * 8, 1000 * 300 * 8, 1):
        found = list(pieces(long, 4, 8, Limits(budget, 0)))
        cells = [(h, i) for c in found for h in range(c.h0, c.h1) for i in range(c.i0, c.i1)]
        assert sorted(cells) == [(h, i) for h in range(4) for i in range(1000)]
        floor = relative_plan.FEWEST_ROWS * 1000 * 8
        sizes = [(c.h1 - c.h0) * (c.i1 - c.i0) * 1000 * 8 for c in found]
        assert max(sizes) <= max(budget, floor)


def test_memory_is_linear(monkeypatch):
    monkeypatch.setattr(reference, "CPU", Limits(1 << 16, 1 << 14))

    def peak(n):
        arguments, tables = make([n], dtype=torch.float32)
        leaves = [*arguments[:3], *tables.values()]

        def call():
            out = vs.ops.relative_attention(*arguments, dropout_p=0.1, **tables)
            torch.autograd.grad(out.sum(), leaves)

        return peak_memory(call)

    short, long = peak(500), peak(2000)
    assert long < 4.2 * short
    assert long < 2000 * 2000 * 4  # not one head's scores


# --- registration ---------------------------------------------------------------------------------


def op_arguments(lengths, terms, dropout_p=0.3):
    (q, k, v, cu, buckets), tables = make(lengths, terms)
    rng_state = torch.tensor([5, 6]) if dropout_p else None
    given = [tables.get(name) for name in SHAPES]
    return q, k, v, cu, buckets, *given, rng_state, max([0, *lengths]), 0.3, dropout_p, False


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_opcheck(terms, dropout_p):
    arguments = op_arguments([5, 0, 3], terms, dropout_p)
    torch.library.opcheck(torch.ops.varstream.relative_attention.default, arguments)
    dout = torch.randn(8, HEADS, VALUE_DIM, dtype=torch.float64)
    for need in (True, False):
        given = [t.detach() if isinstance(t, torch.Tensor) else t for t in (dout, *arguments, need)]
        torch.library.opcheck(torch.ops.varstream.relative_attention_bwd.default, tuple(given))


def test_gradcheck():
    arguments, tables = make([3, 4, 1])

    def run(q, k, v, *given):
        named = dict(zip(tables, given, strict=True))
        return vs.ops.relative_attention(q, k, v, *arguments[3:], **named)

    assert torch.autograd.gradcheck(run, (*arguments[:3], *tables.values()))


def test_compiles_whole_and_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    buckets = torch.randint(ROWS, (99,))

    @torch.compile(fullgraph=True, backend=counter)
    def step(q, k, v, cu, longest, table, key_table, query_table):
        return vs.ops.relative_attention(
            q,
            k,
            v,
            cu,
            buckets,
            max_seqlen=longest,
            table=table,
            key_table=key_table,
            query_table=query_table,
        ).square()

    for i, lengths in enumerate(([5, 3], [7, 9], [2, 30], [11, 4], [6, 6])):
        (q, k, v, cu, _), tables = make(lengths)
        leaves = [q, k, v, *tables.values()]
        got = torch.autograd.grad(step(q, k, v, cu, max(lengths), *tables.values()).sum(), leaves)
        want = vs.ops.relative_attention(q, k, v, cu, buckets, **tables).square().sum()
        for g, w in zip(got, torch.autograd.grad(want, leaves), strict=True):
            assert_exact(g, w)
        if i == 1:
            compiled = counter.frame_count
    assert counter.frame_count == compiled


def test_second_derivative_is_refused():
    arguments, tables = make([3, 4])
    out = vs.ops.relative_attention(*arguments, **tables)
    (dq,) = torch.autograd.grad(out.square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.sum().backward()


def test_autocast_runs_in_the_autocast_dtype():
    (q, k, v, cu, buckets), tables = make([3, 4], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vs.ops.relative_attention(q, k.bfloat16(), v, cu, buckets, **tables)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert tables["key_table"].grad.dtype == torch.float32


# --- errors ---------------------------------------------------------------------------------------

CU, Q = cu_seqlens([5]), torch.zeros(5, 2, 8)
BUCKETS = torch.zeros(9, dtype=torch.int64)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "q_type": (TypeError, {"q": [1]}, "q must be a torch.Tensor, got list"),
    "q_dims": (ValueError, {"q": torch.zeros(5, 8)}, r"q must have 3 dimensions \(total, H, D\)"),
    "q_dtype": (ValueError, {"q": Q.int()}, "q must have dtype float64, .* got int32"),
    "k_shape": (ValueError, {"k": Q[:, :1]}, "k must have size 2 in dimension 1"),
    "v_rows": (ValueError, {"v": Q[:4]}, "v must have size 5 in dimension 0"),
    "v_width": (ValueError, {"v": Q[..., :0]}, "v must have a head dim of at least 1, got 0"),
    "mix": (ValueError, {"v": Q.double()}, "v must have the dtype of q"),
    "device": (ValueError, {"k": Q.to("meta")}, "k must be on cpu like the other tensors"),
    "cu_dtype": (ValueError, {"cu_seqlens": CU.long()}, "cu_seqlens must have dtype int32"),
    "cu_start": (ValueError, {"cu_seqlens": i32(1, 5)}, "cu_seqlens must start at 0, got 1"),
    "cu_falls": (ValueError, {"cu_seqlens": i32(0, 4, 2, 5)}, "cu_seqlens must never fall"),
    "cu_total": (ValueError, {"cu_seqlens": i32(0, 4)}, "must end at the number of rows 5, got 4"),
    "cu_past": (
        ValueError,
        {"cu_seqlens": i32(0, 9), "max_seqlen": 9, "buckets": BUCKETS.repeat(3)},
        "cu_seqlens must not pass q's 5 rows, got 9",
    ),
    "max": (ValueError, {"max_seqlen": 4}, "max_seqlen must be at least the longest length 5"),
    "max_type": (TypeError, {"max_seqlen": 5.0}, "max_seqlen must be an int, got float"),
    "buckets_type": (TypeError, {"buckets": None}, "buckets must be a torch.Tensor"),
    "buckets_dtype": (ValueError, {"buckets": BUCKETS.float()}, "buckets must have dtype int64"),
    "buckets_dims": (ValueError, {"buckets": BUCKETS[None]}, r"buckets must have 1 dimensions"),
    "buckets_even": (ValueError, {"buckets": BUCKETS[:8]}, "odd number of entries .* got 8"),
    "buckets_few": (ValueError, {"buckets": BUCKETS[:7]}, r"at least 2 \* 5 - 1 entries.* got 7"),
    "buckets_high": (
        ValueError,
        {"buckets": BUCKETS + 4},
        "buckets must be between 0 and the tables' last row 3, got 4",
    ),
    "buckets_low": (ValueError, {"buckets": BUCKETS - 1}, "last row 3, got -1"),
    "table_shape": (
        ValueError,
        {"table": torch.zeros(4, 3)},
        r"table must have size 2 in dimension 1 \(R, H\), got shape \(4, 3\)",
    ),
    "table_dtype": (ValueError, {"table": torch.zeros(4, 2).int()}, "table must have dtype"),
    "key_shape": (
        ValueError,
        {"key_table": torch.zeros(4, 2, 9)},
        r"key_table must have size 8 in dimension 2 \(R, H, D\)",
    ),
    "query_rows": (
        ValueError,
        {"query_table": torch.zeros(5, 2, 8)},
        r"query_table must have 4 rows like table, got shape \(5, 2, 8\)",
    ),
    "no_rows": (ValueError, {"table": torch.zeros(0, 2)}, "table must have at least one row"),
    "scale": (ValueError, {"softmax_scale": float("inf")}, "softmax_scale must be finite"),
    "dropout": (ValueError, {"dropout_p": 1.0}, "dropout_p must be below 1"),
    "dropout_low": (ValueError, {"dropout_p": -0.1}, "dropout_p must be >= 0"),
    "rng": (ValueError, {"rng_state": torch.zeros(3).long()}, "rng_state must have size 2"),
    "deterministic": (TypeError, {"deterministic": 1}, "deterministic must be a bool, got int"),
    "validate": (TypeError, {"validate": None}, "validate must be a bool, got NoneType"),
}


@pytest.mark.parametrize(("error", "change", "message"), BAD.values(), ids=BAD)
def test_errors_name_argument_contract_and_value(error, change, message):
    arguments = {
        "q": Q,
        "k": Q,
        "v": Q,
        "cu_seqlens": CU,
        "buckets": BUCKETS,
        "table": torch.zeros(4, 2),
    }
    vs.ops.relative_attention(**arguments)
    with pytest.raises(error, match=message):
        vs.ops.relative_attention(**(arguments | change))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (3, i32(0, 6, 5), "cu_seqlens must never fall"),
        (3, i32(0, 5, 90), "must not pass q's 8 rows"),
        (4, torch.full((9,), 99), "buckets must be between 0 and"),
        (8, None, "rng_state must be given"),
        (9, 2, "max_seqlen must be at least the longest length 5"),
    ],
)
def test_direct_calls_are_checked(place, value, message):
    arguments = list(op_arguments([5, 3], TERMS["all"]))
    arguments[place] = value
    with pytest.raises(RuntimeError, match=f"varstream::relative_attention: .*{message}"):
        torch.ops.varstream.relative_attention(*arguments)
    dout = torch.zeros(8, HEADS, VALUE_DIM, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"varstream::relative_attention_bwd: .*{message}"):
        torch.ops.varstream.relative_attention_bwd(dout, *arguments, True)


def test_the_backward_checks_dout():
    arguments = op_arguments([5, 3], TERMS["all"])
    with pytest.raises(RuntimeError, match="dout must have size 8 in dimension 0"):
        torch.ops.varstream.relative_attention_bwd(
            torch.zeros(7, HEADS, VALUE_DIM, dtype=torch.float64), *arguments, True
        )
