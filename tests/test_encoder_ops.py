"""An encoder layer's row-wise parts: exact in float64, no worse than torch in low precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import varstream as vs
from varstream.reference import encoder as reference
from varstream.testing import assert_error_ratio, assert_exact, peak_memory

norm_op = torch.ops.varstream.bias_residual_layer_norm
gelu_op = torch.ops.varstream.linear_bias_gelu


def norm_inputs(shape, dtype=torch.float64, leave_out=()):
    """x, bias, residual, weight, ln_bias; those left out are None."""
    sizes = {
        "x": shape,
        "bias": shape[-1:],
        "residual": shape,
        "weight": shape[-1:],
        "ln_bias": shape[-1:],
    }
    made = {n: (2 * torch.randn(s, dtype=torch.float64) + 0.5).to(dtype) for n, s in sizes.items()}
    return [None if name in leave_out else t.requires_grad_() for name, t in made.items()]


def plain_norm(x, bias, residual, weight, ln_bias, eps=1e-5):
    z = x if bias is None else x + bias
    z = z if residual is None else z + residual
    return F.layer_norm(z, z.shape[-1:], weight, ln_bias, eps)


def gelu_inputs(shape, out, dtype=torch.float64, bias=True):
    sizes = (shape, (out, shape[-1]), (out,))
    made = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    return made if bias else [*made[:2], None]


def plain_gelu(x, weight, bias, approximate="none"):
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def gradients(y, leaves, dy):
    return torch.autograd.grad(y, [t for t in leaves if t is not None], dy)


def assert_same(ours, plain, leaves):
    assert_exact(ours, plain)
    dy = torch.randn_like(plain)
    pairs = zip(gradients(ours, leaves, dy), gradients(plain, leaves, dy), strict=True)
    for got, want in pairs:
        assert got.shape == want.shape
        assert_exact(got, want)


NORM_SHAPES = [(0, 8), (1, 1), (1, 8), (17, 7), (5,), (2, 3, 5, 4), (31, 96)]
LEFT_OUT = [(), ("bias",), ("residual",), ("weight",), ("ln_bias",)]
LEFT_OUT += [("bias", "residual"), ("weight", "ln_bias"), ("bias", "residual", "weight", "ln_bias")]


@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm_equals_dense(shape):
    leaves = norm_inputs(shape)
    ours = vs.ops.bias_residual_layer_norm(*leaves, 1e-5)
    assert ours.is_contiguous() and ours.dtype == torch.float64
    assert_same(ours, plain_norm(*leaves), leaves)


@pytest.mark.parametrize("leave_out", LEFT_OUT, ids="-".join)
def test_norm_without_some_inputs(leave_out):
    leaves = norm_inputs((9, 6), leave_out=leave_out)
    assert_same(vs.ops.bias_residual_layer_norm(*leaves, 1e-5), plain_norm(*leaves), leaves)


def test_norm_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 20)
    for rows in (4, 5, 11):  # blocks of 5 rows
        leaves = norm_inputs((rows, 4))
        assert_same(vs.ops.bias_residual_layer_norm(*leaves, 1e-5), plain_norm(*leaves), leaves)


def test_norm_of_strided_inputs():
    x, bias, residual, weight, ln_bias = norm_inputs((12, 10))
    leaves = [x, bias, residual, weight, ln_bias]
    views = [x.t()[:6], bias[::2], residual.t()[4:], weight[::2], ln_bias[1::2]]
    views = [v if v.shape[-1] == 12 else torch.cat([v, v, v[:2]]) for v in views]
    assert_same(vs.ops.bias_residual_layer_norm(*views, 1e-5), plain_norm(*views), leaves)


def test_norm_computes_only_wanted_gradients():
    for wanted in range(5):
        leaves = norm_inputs((6, 4))
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == wanted)
        (got,) = torch.autograd.grad(
            vs.ops.bias_residual_layer_norm(*leaves, 1e-5).square().sum(), leaves[wanted]
        )
        (want,) = torch.autograd.grad(plain_norm(*leaves).square().sum(), leaves[wanted])
        assert_exact(got, want)


def test_norm_of_one_tensor_as_input_and_residual():
    x, _, _, weight, ln_bias = norm_inputs((7, 5))
    ours = vs.ops.bias_residual_layer_norm(x, None, x, weight, ln_bias, 1e-5)
    assert_same(ours, plain_norm(x, None, x, weight, ln_bias), [x, weight, ln_bias])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_norm_error_ratio(dtype):
    low = norm_inputs((200, 64), dtype)
    exact = [t.detach().double().requires_grad_() for t in low]
    ours, plain = vs.ops.bias_residual_layer_norm(*low, 1e-5), plain_norm(*low)
    want = plain_norm(*exact)
    assert ours.dtype == dtype
    assert_error_ratio(ours, plain, want)
    dy = torch.randn_like(want)
    for got, torchs, true in zip(
        gradients(ours, low, dy.to(dtype)),
        gradients(plain, low, dy.to(dtype)),
        gradients(want, exact, dy.to(dtype).double()),
        strict=True,
    ):
        assert got.dtype == dtype
        assert_error_ratio(got, torchs, true)


def test_norm_rows_do_not_touch():
    leaves = [t.detach() for t in norm_inputs((5, 4))]
    clean = vs.ops.bias_residual_layer_norm(*leaves, 1e-5)
    leaves[0][3] = torch.nan
    leaves[2][1] = torch.inf
    dirty = vs.ops.bias_residual_layer_norm(*leaves, 1e-5)
    assert torch.equal(dirty[[0, 2, 4]], clean[[0, 2, 4]])
    assert dirty[[1, 3]].isnan().all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (13, 7), (5,), (2, 3, 4), (3, 0)], ids=str)
def test_gelu_equals_dense(shape, approximate):
    for bias in (True, False):
        leaves = gelu_inputs(shape, 6, bias=bias)
        ours = vs.ops.linear_bias_gelu(*leaves, approximate=approximate)
        assert_same(ours, plain_gelu(*leaves, approximate), leaves)


def test_gelu_without_features():
    leaves = gelu_inputs((3, 4), 0)
    assert_same(vs.ops.linear_bias_gelu(*leaves), plain_gelu(*leaves), leaves)


def test_gelu_of_strided_inputs():
    x, weight, bias = gelu_inputs((8, 6), 8)
    views = x.t()[:, ::2], weight[:, :4], bias
    assert_same(vs.ops.linear_bias_gelu(*views), plain_gelu(*views), [x, weight, bias])


def test_gelu_computes_only_wanted_gradients():
    for wanted in range(3):
        leaves = gelu_inputs((6, 4), 5)
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i == wanted)
        (got,) = torch.autograd.grad(vs.ops.linear_bias_gelu(*leaves).sum(), leaves[wanted])
        (want,) = torch.autograd.grad(plain_gelu(*leaves).sum(), leaves[wanted])
        assert_exact(got, want)


def test_gelu_without_a_kept_pre_activation_has_gradients_too():
    leaves = gelu_inputs((6, 4), 5)
    y, pre = gelu_op(*leaves, "none", False)
    assert pre.numel() == 0
    assert_same(y, plain_gelu(*leaves), leaves)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gelu_error_ratio(dtype, approximate):
    low = gelu_inputs((100, 48), 64, dtype)
    exact = [t.detach().double().requires_grad_() for t in low]
    ours = vs.ops.linear_bias_gelu(*low, approximate=approximate)
    plain, want = plain_gelu(*low, approximate), plain_gelu(*exact, approximate)
    assert ours.dtype == dtype
    assert_error_ratio(ours, plain, want)
    dy = torch.randn_like(want).to(dtype)
    grads = (
        gradients(ours, low, dy),
        gradients(plain, low, dy),
        gradients(want, exact, dy.double()),
    )
    for got, torchs, true in zip(*grads, strict=True):
        assert got.dtype == dtype
        assert_error_ratio(got, torchs, true)


def test_memory():
    """Without gradients GELU takes the product's memory; the norm keeps no sum."""
    x, weight, bias = (t.detach().float() for t in gelu_inputs((512, 32), 256))
    product = 512 * 256 * 4
    assert peak_memory(lambda: vs.ops.linear_bias_gelu(x, weight, bias)) < 1.2 * product
    plain = peak_memory(lambda: plain_gelu(x, weight, bias))
    assert plain >= 2 * product  # the measure would see a second buffer
    leaves = norm_inputs((512, 256), torch.float32)
    kept = []
    peak_memory(lambda: kept.append(vs.ops.bias_residual_layer_norm(*leaves, 1e-5)))
    saved = [t for t in kept[0].grad_fn.saved_tensors if t is not None]
    owned = {t.data_ptr() for t in leaves if t is not None}
    extra = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in owned)
    assert extra == 2 * 512 * 4  # mean and rstd


# --- as torch operators ---------------------------------------------------------------------------


def test_gradcheck():
    for leave_out in LEFT_OUT:
        given = norm_inputs((3, 4), leave_out=leave_out)
        leaves = [t for t in given if t is not None]

        def norm(*tensors, given=given):
            rest = iter(tensors)
            full = [None if t is None else next(rest) for t in given]
            return vs.ops.bias_residual_layer_norm(*full, 1e-5)

        assert torch.autograd.gradcheck(norm, leaves)
    for approximate in ("none", "tanh"):
        assert torch.autograd.gradcheck(
            lambda *t, a=approximate: vs.ops.linear_bias_gelu(*t, a), gelu_inputs((3, 4), 5)
        )


@pytest.mark.parametrize("leave_out", [(), ("bias", "residual"), ("weight", "ln_bias")])
def test_opcheck_norm(leave_out):
    leaves = norm_inputs((2, 3, 4), leave_out=leave_out)
    torch.library.opcheck(norm_op.default, (*leaves, 1e-5))
    plain = [None if t is None else t.detach() for t in leaves]
    _, mean, rstd = norm_op(*plain, 1e-5)
    need = [t is not None for t in (leaves[0], leaves[1], leaves[3], leaves[4])]
    given = (torch.randn(2, 3, 4, dtype=torch.float64), *plain[:4], mean, rstd, *need)
    torch.library.opcheck(torch.ops.varstream.bias_residual_layer_norm_bwd.default, given)


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck_gelu(keep):
    leaves = gelu_inputs((2, 3, 4), 5)
    torch.library.opcheck(gelu_op.default, (*leaves, "tanh", keep))
    x, weight, bias = (t.detach() for t in leaves)
    y, pre = gelu_op(x, weight, bias, "tanh", True)
    given = (torch.randn_like(y), x, weight, pre, "tanh", keep, True, keep)
    torch.library.opcheck(torch.ops.varstream.linear_bias_gelu_bwd.default, given)


def test_compiles_whole_and_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def block(x, weight, bias, residual, scale, shift):
        h = vs.ops.linear_bias_gelu(x, weight, bias)
        return vs.ops.bias_residual_layer_norm(h, bias, residual, scale, shift, 1e-5)

    step = torch.compile(block, fullgraph=True, backend=counter)
    for i, rows in enumerate((5, 7, 2, 30)):
        shapes = ((rows, 4), (6, 4), (6,), (rows, 6), (6,), (6,))
        leaves = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
        got = torch.autograd.grad(step(*leaves).square().sum(), leaves)
        want = torch.autograd.grad(block(*leaves).square().sum(), leaves)
        for g, w in zip(got, want, strict=True):
            assert_exact(g, w)
        if i == 1:
            compiled = counter.frame_count
    assert counter.frame_count == compiled


def test_second_derivatives_are_refused():
    leaves = norm_inputs((3, 4))
    for y in (
        vs.ops.bias_residual_layer_norm(*leaves, 1e-5),
        vs.ops.linear_bias_gelu(leaves[0], torch.randn(5, 4, dtype=torch.float64)),
    ):
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            dx.sum().backward()


def test_autocast_follows_torch():
    linear, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = vs.ops.linear_bias_gelu(x, linear.weight, linear.bias)
        assert h.dtype == F.gelu(linear(x)).dtype == torch.bfloat16
        y = vs.ops.bias_residual_layer_norm(h, linear.bias, x, norm.weight, norm.bias, norm.eps)
        assert y.dtype == norm(h + x).dtype == torch.float32
        assert vs.ops.linear_bias_gelu(x.double(), linear.weight.double()).dtype == torch.float64
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in linear.parameters())


# --- errors ---------------------------------------------------------------------------------------

X, V = torch.zeros(3, 4), torch.zeros(4)
BAD_NORM = {
    "x_type": (TypeError, {"x": [1.0]}, "x must be a torch.Tensor, got list"),
    "x_dtype": (ValueError, {"x": X.int()}, "x must have dtype float64, .* got int32"),
    "x_dims": (ValueError, {"x": torch.zeros(())}, r"x must have at least 1 column .* got shape "),
    "no_columns": (ValueError, {"x": torch.zeros(3, 0)}, r"at least 1 column .* got shape \(3, 0"),
    "bias": (ValueError, {"bias": X}, r"bias must have 1 dimensions \(d,\), got shape \(3, 4\)"),
    "bias_size": (ValueError, {"bias": V[:3]}, "bias must have size 4 in dimension 0"),
    "residual": (ValueError, {"residual": X[:2]}, "residual must have size 3 in dimension 0 of x"),
    "weight": (TypeError, {"weight": 1.0}, "weight must be a torch.Tensor, got float"),
    "mixed": (ValueError, {"ln_bias": V.double()}, "ln_bias must have the dtype of x"),
    "device": (ValueError, {"weight": V.to("meta")}, "weight must be on cpu"),
    "eps": (ValueError, {"eps": -1.0}, "eps must be >= 0.0, got -1.0"),
    "eps_type": (TypeError, {"eps": None}, "eps must be a number, got NoneType"),
}


@pytest.mark.parametrize(("error", "change", "message"), BAD_NORM.values(), ids=BAD_NORM)
def test_norm_errors(error, change, message):
    given = {"x": X, "bias": V, "residual": X, "weight": V, "ln_bias": V, "eps": 1e-5} | change
    with pytest.raises(error, match=message):
        vs.ops.bias_residual_layer_norm(**given)


W = torch.zeros(5, 4)
BAD_GELU = {
    "x_type": (TypeError, {"x": None}, "x must be a torch.Tensor, got NoneType"),
    "x_dtype": (ValueError, {"x": X.long()}, "x must have dtype float64, .* got int64"),
    "x_dims": (ValueError, {"x": torch.zeros(())}, "x must have at least 1 dimension"),
    "weight": (ValueError, {"weight": W[:, :3]}, r"weight must have size 4 in dimension 1 \(f, d"),
    "weight_dims": (ValueError, {"weight": V}, r"weight must have 2 dimensions \(f, d\)"),
    "bias": (ValueError, {"bias": V}, r"bias must have size 5 in dimension 0 \(f,\)"),
    "mixed": (ValueError, {"weight": W.double()}, "weight must have the dtype of x"),
    "approximate": (ValueError, {"approximate": "sig"}, "must be 'none' or 'tanh', got 'sig'"),
    "kind": (TypeError, {"approximate": None}, "approximate must be a str, got NoneType"),
}


@pytest.mark.parametrize(("error", "change", "message"), BAD_GELU.values(), ids=BAD_GELU)
def test_gelu_errors(error, change, message):
    given = {"x": X, "weight": W, "bias": torch.zeros(5), "approximate": "none"} | change
    with pytest.raises(error, match=message):
        vs.ops.linear_bias_gelu(**given)


def test_direct_calls_are_checked():
    with pytest.raises(RuntimeError, match="residual must have size 3"):
        norm_op(X, V, X[:2], V, V, 1e-5)
    with pytest.raises(RuntimeError, match="bias must have size 5"):
        gelu_op(X, W, V, "none", True)
    ops = torch.ops.varstream
    with pytest.raises(RuntimeError, match="mean must have dtype float32, got float64"):
        ops.bias_residual_layer_norm_bwd(
            *(X, X, V, X, V, torch.zeros(3).double(), torch.zeros(3)), *[True] * 4
        )
    with pytest.raises(RuntimeError, match="pre must have size 5 in dimension 1"):
        ops.linear_bias_gelu_bwd(torch.zeros(3, 5), X, W, X, "none", True, True, True)
