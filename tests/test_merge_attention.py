"""merge_attention: values and gradients over split keys, empty parts, dead rows."""

import pytest
import torch
import torch._dynamo.testing
from cases import cu_seqlens

import varstream as vs
from varstream.testing import assert_error_ratio, assert_exact, dense_attention


def split(q, k, v, pieces):
    outs, lses = [], []
    for begin, end in pieces:
        out, lse = vs.varlen_attention(
            q,
            k[begin:end],
            v[begin:end],
            cu_seqlens([q.shape[0]]),
            cu_seqlens([end - begin]),
            return_lse=True,
        )
        outs.append(out)
        lses.append(lse)
    return vs.merge_attention(outs, lses)


@pytest.mark.parametrize(
    "pieces", [[(0, 12)], [(0, 5), (5, 12)], [(0, 1), (1, 1), (1, 11), (11, 12)]]
)
def test_merge_equals_one_call(pieces):
    leaves = [
        torch.randn(n, h, 8, dtype=torch.float64).requires_grad_()
        for n, h in ((7, 4), (12, 2), (12, 2))
    ]
    out, lse = split(*leaves, pieces)
    want, want_lse = dense_attention(*leaves, cu_seqlens([7]), cu_seqlens([12]))
    assert_exact(out, want)
    assert_exact(lse, want_lse)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), leaves)
    expected = torch.autograd.grad((want * dout).sum() + (want_lse * dlse).sum(), leaves)
    for g, w in zip(got, expected, strict=True):
        assert_exact(g, w)


def test_empty_parts_are_never_read():
    outs = [torch.randn(3, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(2)]
    lses = [torch.randn(2, 3, dtype=torch.float64) for _ in range(2)]
    lses[0][:, 0] = -torch.inf  # part 0 is empty on row 0, both on row 2
    lses[0][:, 2] = lses[1][:, 2] = -torch.inf
    with torch.no_grad():
        outs[0][0] = torch.nan
        outs[1][2] = torch.nan
    lses = [t.requires_grad_() for t in lses]
    out, lse = vs.merge_attention(outs, lses)
    assert_exact(out[0], outs[1][0])
    assert (out[2] == 0).all() and (lse[:, 2] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[:, :2].sum(), [*outs, *lses])
    assert all(g.isfinite().all() for g in grads)
    assert all((g[2] == 0).all() for g in grads[:2])


def test_large_gaps_do_not_overflow():
    outs = [torch.ones(1, 1, 2), torch.zeros(1, 1, 2)]
    out, lse = vs.merge_attention(outs, [torch.tensor([[500.0]]), torch.tensor([[-500.0]])])
    assert out.tolist() == [[[1.0, 1.0]]] and lse.item() == 500.0


def test_gradcheck():
    outs = [torch.randn(3, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]
    lses = [torch.randn(2, 3, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: vs.merge_attention(t[:3], t[3:]), (*outs, *lses))


def plain_merge(outs, lses):
    """The formula, every step in the dtype of the parts."""
    parts = torch.stack(lses)
    lse = parts.logsumexp(0)
    weights = (parts - lse).exp().transpose(1, 2)[..., None]
    return (torch.stack(outs) * weights).sum(0), lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Values and gradients against the formula in low precision, which rounds the LSEs too."""
    leaves = [torch.randn(37, 4, 8).to(dtype) for _ in range(3)]
    leaves += [torch.randn(4, 37).to(dtype) for _ in range(3)]
    dout, dlse = torch.randn(37, 4, 8).to(dtype), torch.randn(4, 37).to(dtype)

    def run(merge, cast_out, cast_lse):
        given = [t.to(cast_out) for t in leaves[:3]] + [t.to(cast_lse) for t in leaves[3:]]
        given = [t.detach().requires_grad_() for t in given]
        out, lse = merge(given[:3], given[3:])
        grads = torch.autograd.grad((out, lse), given, (dout.to(out.dtype), dlse.to(lse.dtype)))
        return out.detach(), lse.detach(), *grads

    got = run(vs.merge_attention, dtype, torch.float32)
    plain = run(plain_merge, dtype, dtype)
    exact = run(plain_merge, torch.float64, torch.float64)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    names = ("out", "lse", *(f"d{n}[{i}]" for n in ("outs", "lses") for i in range(3)))
    for name, ours, theirs, want in zip(names, got, plain, exact, strict=True):
        assert_error_ratio(ours, theirs, want, name=name)


def test_compiles_whole_and_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def merge(outs, lses):
        return vs.merge_attention(outs, lses)

    for rows in (5, 8, 13, 21):
        outs = [torch.randn(rows, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(2)]
        lses = [torch.randn(2, rows, dtype=torch.float64).requires_grad_() for _ in range(2)]
        lses[1].detach()[0, 0] = -torch.inf  # a part that sees nothing
        results = []
        for call in (merge, vs.merge_attention):
            out, lse = call(outs, lses)
            grads = torch.autograd.grad(out.square().sum() + lse.sum(), [*outs, *lses])
            results.append((out, lse, *grads))
        for got, want in zip(*results, strict=True):
            assert_exact(got, want)
    assert counter.frame_count <= 2  # the second length makes the first dimension symbolic


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "non-empty lists of one length, got 0 and 0"),
        ([torch.zeros(3, 2, 4)], [], "one length, got 1 and 0"),
        ([torch.zeros(3, 2, 4)], [torch.zeros(3, 2)], r"lses\[0\] must have size 2 in dimension 0"),
        (
            [torch.zeros(3, 2, 4)],
            [torch.zeros(2, 3).double()],
            r"lses\[0\] must have dtype float32",
        ),
        (
            [torch.zeros(3, 2, 4), torch.zeros(3, 2, 5)],
            [torch.zeros(2, 3)] * 2,
            r"outs\[1\] must have size 4",
        ),
    ],
)
def test_errors(outs, lses, message):
    with pytest.raises((TypeError, ValueError), match=message):
        vs.merge_attention(outs, lses)
