"""stream_layer with a small layer of our own: any chunk size, both orders, frozen parts, hooks,
errors."""

import pytest
import torch
from cases import CHUNKS, DOCUMENTS, LENGTHS, cu_seqlens
from hypothesis import given, settings
from hypothesis import strategies as st

import varstream as vs
from varstream.streaming.chunks import plan_chunks
from varstream.testing import assert_exact, dense_attention

D, HQ, HKV, HD = 16, 4, 2, 8


class Layer:
    """Attention with a residual and a position-dependent input, in plain functions."""

    def __init__(self):
        shapes = {
            "q": (D, HQ * HD),
            "k": (D, HKV * HD),
            "v": (D, HKV * HD),
            "o": (HQ * HD, D),
            "m": (D, D),
        }
        self.w = {
            n: (0.2 * torch.randn(s, dtype=torch.float64)).requires_grad_()
            for n, s in shapes.items()
        }
        self.params = list(self.w.values())
        self.kv_rows = 0

    def kv(self, x, pos):
        self.kv_rows += x.shape[0]
        h = torch.tanh(x) + 0.01 * pos[:, None]
        return (h @ self.w["k"]).view(-1, HKV, HD), (h @ self.w["v"]).view(-1, HKV, HD)

    def rest(self, x, pos, attend):
        h = torch.tanh(x) + 0.01 * pos[:, None]
        y = x + attend((h @ self.w["q"]).view(-1, HQ, HD)).flatten(1) @ self.w["o"]
        return y + torch.tanh(y @ self.w["m"])

    def dense(self, x, pos, cu, **options):
        k, v = self.kv(x, pos)
        return self.rest(x, pos, lambda q: dense_attention(q, k, v, cu, causal=True, **options)[0])


def positions(lengths):
    return torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.arange(0)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("lengths", [DOCUMENTS, *LENGTHS.values()], ids=["documents", *LENGTHS])
def test_exact(lengths, chunk_size):
    if chunk_size == 1 and sum(lengths) > 100:
        chunk_size = 3
    layer, cu = Layer(), cu_seqlens(lengths)
    x = torch.randn(sum(lengths), D, dtype=torch.float64, requires_grad=True)
    y = vs.stream_layer(layer.kv, layer.rest, x, cu, params=layer.params, chunk_size=chunk_size)
    assert y.shape == x.shape
    if sum(lengths) == 0:
        y.sum().backward()
        assert all((p.grad == 0).all() for p in layer.params)
        return
    want = layer.dense(x, positions(lengths), cu)
    assert_exact(y, want)
    dy = torch.randn_like(y)
    got = torch.autograd.grad((y * dy).sum(), [x, *layer.params])
    expected = torch.autograd.grad((want * dy).sum(), [x, *layer.params])
    for g, w in zip(got, expected, strict=True):
        assert_exact(g, w)


@pytest.mark.parametrize(
    "options",
    [
        {"window": (3, 0)},
        {"softcap": 2.0},
        {"softmax_scale": 0.2},
        {"alibi_slopes": torch.rand(HQ)},
    ],
)
def test_attention_options(options):
    layer, cu = Layer(), cu_seqlens(DOCUMENTS)
    x = torch.randn(sum(DOCUMENTS), D, dtype=torch.float64, requires_grad=True)
    y = vs.stream_layer(layer.kv, layer.rest, x, cu, params=layer.params, chunk_size=7, **options)
    want = layer.dense(x, positions(DOCUMENTS), cu, **options)
    assert_exact(y, want)
    got = torch.autograd.grad(y.square().sum(), [x, *layer.params])
    expected = torch.autograd.grad(want.square().sum(), [x, *layer.params])
    for g, w in zip(got, expected, strict=True):
        assert_exact(g, w)


def test_kv_work_does_not_grow_with_the_number_of_chunks():
    rows = {}
    for chunk_size in (1000, 8):
        layer = Layer()
        x = torch.randn(sum(DOCUMENTS), D, dtype=torch.float64, requires_grad=True)
        y = vs.stream_layer(
            layer.kv,
            layer.rest,
            x,
            cu_seqlens(DOCUMENTS),
            params=layer.params,
            chunk_size=chunk_size,
        )
        y.sum().backward()
        rows[chunk_size] = layer.kv_rows
    assert rows[8] == rows[1000] == 3 * sum(DOCUMENTS)  # forward, backward, its way back


@pytest.mark.parametrize("trained", ["q", "k", "v", "o", "m"])
@pytest.mark.parametrize("input_grad", [False, True])
def test_frozen_parts(trained, input_grad):
    layer, cu = Layer(), cu_seqlens(DOCUMENTS)
    for name, w in layer.w.items():
        w.requires_grad_(name == trained)
    x = torch.randn(sum(DOCUMENTS), D, dtype=torch.float64, requires_grad=input_grad)
    y = vs.stream_layer(layer.kv, layer.rest, x, cu, params=layer.params, chunk_size=7)
    want = layer.dense(x, positions(DOCUMENTS), cu)
    wanted = [layer.w[trained], *([x] if input_grad else [])]
    got = torch.autograd.grad(y.square().sum(), wanted)
    for g, w in zip(got, torch.autograd.grad(want.square().sum(), wanted), strict=True):
        assert_exact(g, w)


def test_hooks_fire_once_with_the_whole_gradient():
    layer, cu = Layer(), cu_seqlens(DOCUMENTS)
    x = torch.randn(sum(DOCUMENTS), D, dtype=torch.float64)
    calls = []

    def double(grad):
        calls.append(grad.clone())
        return 2 * grad

    layer.w["q"].register_hook(double)
    layer.w["q"].register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    vs.stream_layer(
        layer.kv, layer.rest, x, cu, params=layer.params, chunk_size=7
    ).square().sum().backward()
    want = layer.dense(x, positions(DOCUMENTS), cu).square().sum()
    layer.w["q"]._backward_hooks.clear()
    (expected,) = torch.autograd.grad(want, [layer.w["q"]])
    assert len(calls) == 2
    assert_exact(calls[0], expected)
    assert_exact(calls[1], 2 * expected)


def test_low_precision_sums_in_float32():
    """A bfloat16 weight's gradient over many chunks is as good as over one."""
    weight = (0.1 * torch.randn(D, D)).bfloat16().requires_grad_()
    x = torch.randn(512, D).bfloat16()
    errors = []
    exact = (x.double().t() @ torch.ones(512, D, dtype=torch.float64)).float()
    for chunk_size in (512, 1):
        y = vs.stream_layer(
            lambda x, _: (x.view(-1, 1, D), x.view(-1, 1, D)),
            lambda x, _, attend: x @ weight,
            x,
            cu_seqlens([512]),
            params=[weight],
            chunk_size=chunk_size,
        )
        (grad,) = torch.autograd.grad(y.sum(), weight)
        errors.append((grad.float() - exact).norm() / exact.norm())
    assert errors[1] <= 1.5 * errors[0] + 1e-4


def test_nan_in_a_neighbour_reaches_nobody():
    layer, cu = Layer(), cu_seqlens([6, 30, 7])
    clean = torch.randn(43, D, dtype=torch.float64)
    dirty = clean.clone()
    dirty[6:36] = torch.nan
    keep = [*range(6), *range(36, 43)]
    results = []
    for x in (clean, dirty):
        x = x.requires_grad_()
        y = vs.stream_layer(layer.kv, layer.rest, x, cu, params=layer.params, chunk_size=10)
        (dx,) = torch.autograd.grad(y[keep].sum(), x)
        results.append((y[keep], dx[keep]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=8), st.integers(1, 20))
def test_chunk_plan(lengths, chunk_size):
    cu = cu_seqlens(lengths).tolist()
    document = [b for b, n in enumerate(lengths) for _ in range(n)]
    if not document:
        assert [(c.begin, c.end) for c in plan_chunks(cu, chunk_size)] == [(0, 0)]
        return
    rows = []
    for chunk in plan_chunks(cu, chunk_size):
        rows += range(chunk.begin, chunk.end)
        assert chunk.key_begin == cu[document[chunk.begin]]  # not row 0: the first document touched
        pieces = zip(chunk.cu_q, chunk.cu_q[1:], chunk.cu_k, chunk.cu_k[1:], strict=False)
        for q0, q1, k0, k1 in pieces:
            if q1 == q0:
                continue
            b = document[chunk.begin + q0]
            assert document[chunk.begin + q1 - 1] == b
            assert chunk.key_begin + k0 == cu[b]
            assert chunk.key_begin + k1 == chunk.begin + q1  # keys end where the queries do
    assert rows == list(range(sum(lengths)))


BAD = {
    "x": ({"x": torch.zeros(3)}, "x must have 2 dimensions"),
    "cu": ({"cu_seqlens": cu_seqlens([4])}, "cu_seqlens must end at the number of rows 3, got 4"),
    "causal": ({"causal": False}, "causal must be True"),
    "chunk": ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
    "chunk_type": ({"chunk_size": "big"}, 'chunk_size must be an int or "auto"'),
    "x_dtype": ({"x": torch.zeros(3, D, dtype=torch.int64)}, "x must have dtype float64, float32"),
    "causal_type": ({"causal": 1}, "causal must be a bool, got int"),
    "one_tensor": ({"params": torch.zeros(2, 2)}, "params must be a list of tensors, got Tensor"),
    "no_tensor": ({"params": ["a"]}, r"params\[0\] must be a torch.Tensor, got str"),
    "named_params": (
        {"params": {"w": torch.zeros(2)}},
        "params must be a list of tensors, got dict",
    ),
    "no_params": ({"params": None}, "params must be a list of tensors, got NoneType"),
    "rest": ({"rest": lambda x, p, a: x[:1]}, "rest's result must have the chunk's 3 rows"),
    "kv": ({"kv": lambda x, p: (x[:1], x)}, "kv's k must have the chunk's 3 rows"),
    "kv_single": (
        {"kv": lambda x, p: x},
        r"kv must return the pair \(k, v\), got a tensor of shape",
    ),
    "kv_triple": ({"kv": lambda x, p: (x, x, x)}, r"the pair \(k, v\), got tuple of 3"),
    "dropout": ({"dropout_p": 0.1}, "stream_layer can't honour dropout_p"),
    "positions": ({"position_ids": torch.arange(4)}, "position_ids must have size 3"),
    "positions_dtype": (
        {"position_ids": torch.zeros(3)},
        "position_ids must have dtype int64, int32, got float32",
    ),
    "no_kv": ({"kv": None}, "kv must be a function, got NoneType"),
    "rest_type": ({"rest": "rest"}, "rest must be a function, got str"),
    "slopes_rows": (
        {"alibi_slopes": torch.zeros(1, HQ)},
        r"alibi_slopes must have 1 dimensions \(Hq,\), got shape \(1, 4\)",
    ),
    "slopes_heads": (
        {"alibi_slopes": torch.zeros(3)},
        r"alibi_slopes must have size 4 in dimension 0 \(Hq,\), got shape \(3,\)",
    ),
    "slopes_type": ({"alibi_slopes": [0.5] * HQ}, "alibi_slopes must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_errors(change, message):
    layer = Layer()
    arguments = {
        "kv": layer.kv,
        "rest": layer.rest,
        "x": torch.zeros(3, D, dtype=torch.float64),
        "cu_seqlens": cu_seqlens([3]),
        "params": layer.params,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        vs.stream_layer(**(arguments | change))


def test_functions_are_checked_before_any_work():
    layer = Layer()
    with pytest.raises(TypeError, match="rest must be a function, got NoneType"):
        vs.stream_layer(layer.kv, None, torch.zeros(3, D), cu_seqlens([3]), params=layer.params)
    assert layer.kv_rows == 0


@pytest.mark.parametrize("calls", [0, 2])
def test_attend_may_be_called_any_number_of_times(calls):
    layer, cu = Layer(), cu_seqlens([5, 9])
    x = torch.randn(14, D, dtype=torch.float64, requires_grad=True)

    def rest(x, pos, attend):
        y = x
        for i in range(calls):
            q = (torch.tanh(y) @ layer.w["q"]).view(-1, HQ, HD)
            y = y + (i + 1) * attend(q).flatten(1) @ layer.w["o"]
        return y @ layer.w["m"]

    k, v = layer.kv(x, positions([5, 9]))
    want = rest(x, None, lambda q: dense_attention(q, k, v, cu, causal=True)[0])
    leaves, dy = [x, *layer.params], torch.randn_like(want)
    expected = torch.autograd.grad(want, leaves, dy, materialize_grads=True)
    for chunk_size in (1, 4, 14):
        y = vs.stream_layer(layer.kv, rest, x, cu, params=layer.params, chunk_size=chunk_size)
        assert_exact(y, want)
        got = torch.autograd.grad(y, leaves, dy)
        for g, w in zip(got, expected, strict=True):
            assert_exact(g, w)


def test_params_may_be_walked_only_once():
    """``module.parameters()`` is what people have at hand."""
    layer, cu = Layer(), cu_seqlens([5, 9])
    x = torch.randn(14, D, dtype=torch.float64)
    results = []
    for params in (layer.params, iter(layer.params)):
        y = vs.stream_layer(layer.kv, layer.rest, x, cu, params=params, chunk_size=4)
        results.append(torch.autograd.grad(y.square().sum(), layer.params))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_stays_outside_compiled_graphs(recwarn):
    layer, cu = Layer(), cu_seqlens([5, 9])
    x = torch.randn(14, D, dtype=torch.float64, requires_grad=True)
    outside = []

    def run(x):
        return vs.stream_layer(
            layer.kv, layer.rest, x * 2, cu, params=layer.params, chunk_size=4
        ).square()

    def kv(x, pos):
        outside.append(not torch.compiler.is_compiling())
        return Layer.kv(layer, x, pos)

    want = torch.autograd.grad(run(x).sum(), [x, *layer.params])
    layer.kv = kv
    got = torch.autograd.grad(torch.compile(run, backend="eager")(x).sum(), [x, *layer.params])
    assert outside and all(outside)
    assert not [w for w in recwarn if "Dynamo" in str(w.message)]
    for g, w in zip(got, want, strict=True):
        assert_exact(g, w)


def test_gradients_that_autograd_shares_are_summed_apart():
    """One gradient tensor for two parameters, a parameter named twice, dy itself as a gradient."""
    cu = cu_seqlens([7])
    x = torch.randn(7, D, dtype=torch.float64)
    dy = torch.randn(7, D, dtype=torch.float64)
    w1, w2 = (torch.randn(D, D, dtype=torch.float64).requires_grad_() for _ in range(2))
    bias = torch.randn(1, D, dtype=torch.float64).requires_grad_()

    def kv(x, _):
        return x.view(-1, 1, D), x.view(-1, 1, D)

    def rest(x, _, attend):
        return x @ (w1 + w2) + bias

    expected = torch.autograd.grad(rest(x, None, None), [w1, w2, bias], dy)
    for chunk_size in (1, 2, 7):
        before = dy.clone()
        params = [w1, w2, bias, w1]
        y = vs.stream_layer(kv, rest, x, cu, params=params, chunk_size=chunk_size)
        got = torch.autograd.grad(y, [w1, w2, bias], dy)
        assert torch.equal(dy, before)
        for g, w in zip(got, expected, strict=True):
            assert_exact(g, w)


def test_parameters_changed_before_the_backward_are_noticed():
    layer = Layer()
    x = torch.randn(5, D, dtype=torch.float64)
    y = vs.stream_layer(layer.kv, layer.rest, x, cu_seqlens([5]), params=layer.params)
    with torch.no_grad():
        layer.w["q"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_rows_have_the_layers_width():
    kv = Layer().kv
    weight = torch.randn(D, 3, dtype=torch.float64).requires_grad_()
    x = torch.zeros(0, D, dtype=torch.float64)
    y = vs.stream_layer(kv, lambda x, *_: x @ weight, x, cu_seqlens([0]), params=[weight])
    assert y.shape == (0, 3)
    y.sum().backward()
    assert (weight.grad == 0).all()


def test_second_derivative_is_refused():
    layer = Layer()
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    y = vs.stream_layer(layer.kv, layer.rest, x, cu_seqlens([5]), params=layer.params, chunk_size=2)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
