"""Every option of linear_cross_entropy against the contract written out densely, alone, in pairs
and all at once, and against torch's own functions."""

from itertools import combinations

import pytest
import torch
from head_cases import (
    FEATURES,
    IGNORED,
    REDUCTIONS,
    assert_same_loss,
    class_weight,
    dense,
    loss_of,
    problem,
    several_targets,
    shrink_blocks,
    token_weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from varstream.testing import assert_error_ratio, assert_exact, peak_memory

PAIRS = list(combinations(FEATURES, 2))
SETS = [(), *((name,) for name in FEATURES), *PAIRS, tuple(FEATURES)]
EVERYTHING = tuple(FEATURES)


def options_of(p, names):
    return {key: value for name in names for key, value in FEATURES[name](p).items()}


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("names", SETS, ids="+".join)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_dense(reduction, names, several):
    p = problem(17, ignored=[3, 16])
    p = several_targets(p) if several else p
    options = options_of(p, names)
    loss = loss_of(p, reduction, chunk_size=5, **options)
    assert_same_loss(p, loss, dense(p, reduction, **options))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inner_blocks(monkeypatch, reduction, softcap, bias):
    shrink_blocks(monkeypatch)
    p = several_targets(problem(17, bias=bias, ignored=[3]))
    options = options_of(p, EVERYTHING) | {"softcap": softcap}
    loss = loss_of(p, reduction, chunk_size=5, **options)
    assert_same_loss(p, loss, dense(p, reduction, **options))


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(0, 19),
    classes=st.sampled_from([1, 2, 7, 23]),
    number=st.sampled_from([None, 0, 1, 2, 5]),
    bias=st.booleans(),
    names=st.sets(st.sampled_from(sorted(FEATURES))),
    reduction=st.sampled_from(REDUCTIONS),
    chunk_size=st.sampled_from([1, 3, 4, 16, None]),
    ignored=st.sets(st.integers(0, 18)),
    normalizer=st.sampled_from([None, 7.5]),
    seed=st.integers(0, 1000),
)
def test_random_options(
    rows, classes, number, bias, names, reduction, chunk_size, ignored, normalizer, seed
):
    torch.manual_seed(seed)
    p = problem(rows, 6, classes, bias=bias, ignored=list(ignored))
    if number is not None:
        p = several_targets(p, number) if number else several_targets(p, 1)
        p.target = p.target[:, :number]
    options = options_of(p, names)
    if "weight" in options:
        options["weight"] = options["weight"].abs() + 0.1  # their sum must not be 0
    if reduction == "mean":
        options["normalizer"] = normalizer
    loss = loss_of(p, reduction, chunk_size=chunk_size, **options)
    assert_same_loss(p, loss, dense(p, reduction, **options), 1e-11)


def test_chunk_size_hardly_matters():
    p = several_targets(problem(61, dtype=torch.float32, ignored=[7]))
    options = options_of(p, EVERYTHING) | {"softcap": 0.0}
    for reduction in REDUCTIONS:
        for size in (1, 4, 7, 16):
            whole = loss_of(p, reduction, chunk_size=64, **options)
            assert_same_loss(p, loss_of(p, reduction, chunk_size=size, **options), whole, 2e-6)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, softcap):
    p = several_targets(problem(4, 3, 5, ignored=[1]), 2)
    options = options_of(p, EVERYTHING) | {"softcap": softcap}

    def run(x, weight, bias):
        q = type(p)(x, weight, bias, p.target)
        return loss_of(q, reduction, chunk_size=2, **options)

    assert torch.autograd.gradcheck(run, p.leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("names", [(), *PAIRS[:1], EVERYTHING], ids="+".join)
def test_all_ignored_gives_zeros(reduction, names):
    p = problem(ignored=IGNORED["all"])
    for q in (p, several_targets(p)):
        options = options_of(q, names)
        loss, metrics = loss_of(q, reduction, return_metrics=True, **options)
        assert not loss.any() and not torch.signbit(loss).any()
        assert metrics.z_loss == 0 and metrics.accuracy == 0
        assert (metrics.argmax == -1).all() and not metrics.logp.any()
        for leaf, grad in zip(q.leaves, torch.autograd.grad(loss.sum(), q.leaves), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_are_never_read(reduction, softcap, garbage):
    p = several_targets(problem(ignored=IGNORED["ends"]))
    options = options_of(p, EVERYTHING) | {"softcap": softcap}
    clean = loss_of(p, reduction, chunk_size=4, **options)
    upstream = torch.randn_like(clean)
    wanted = torch.autograd.grad(clean, p.leaves, upstream)
    with torch.no_grad():
        p.input[~p.valid.any(1)] = garbage
        options["token_weight"] = options["token_weight"].masked_fill(~p.valid, garbage)
        if reduction == "none":
            upstream = upstream.masked_fill(~p.valid, garbage)
    planted = loss_of(p, reduction, chunk_size=4, **options)
    assert torch.equal(clean, planted)
    for a, b in zip(wanted, torch.autograd.grad(planted, p.leaves, upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_of_weight_zero_are_skipped(reduction):
    """Not even read, yet they count in the divisor."""
    p = problem()
    factors = torch.rand(16, dtype=torch.float64)
    factors[3:9] = 0.0
    wanted = dense(p, reduction, token_weight=factors)
    grads = torch.autograd.grad(wanted, p.leaves)
    with torch.no_grad():
        p.input[3:9] = torch.nan
    loss = loss_of(p, reduction, chunk_size=4, token_weight=factors)
    assert_exact(loss, wanted)
    for ours, theirs in zip(torch.autograd.grad(loss, p.leaves), grads, strict=True):
        assert_exact(ours, theirs)


# --- torch as a second oracle ---------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_torch(reduction, weighted, label_smoothing):
    p = problem(17, ignored=[0, 8])
    options = {"weight": class_weight(p).abs() if weighted else None}
    options |= {"label_smoothing": label_smoothing, "reduction": reduction}
    expected = torch.nn.functional.cross_entropy(p.logits(), p.target, **options)
    assert_same_loss(p, loss_of(p, chunk_size=5, **options), expected)


def test_weights_that_sum_to_zero_give_nan_as_in_torch():
    p = problem()
    weight = torch.zeros(23, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(p.logits(), p.target, weight=weight)
    assert expected.isnan() and loss_of(p, weight=weight).isnan()


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch >= 2.13")
@pytest.mark.parametrize(
    "fields",
    [{}, {"batch_chunk_size": 5, "chunking_method": None}, {"acc_policy": "accurate"}],
    ids=str,
)
@pytest.mark.parametrize("retain", [False, True])
def test_options_equal_torch(fields, retain):
    p = problem(17, ignored=[0, 8])
    options = torch.nn.LinearCrossEntropyOptions(
        **fields, allow_retain_graph=retain, acc_dtype=torch.float64
    )
    expected = torch.nn.functional.linear_cross_entropy(
        p.input, p.weight, p.target, linear_bias=p.bias, ignore_index=None, options=options
    )
    loss = loss_of(p, options=options, ignore_index=None)
    assert_exact(loss, expected)
    wanted = torch.autograd.grad(expected, p.leaves, retain_graph=retain)
    for _ in range(1 + retain):
        found = torch.autograd.grad(loss, p.leaves, retain_graph=True)
        for ours, theirs in zip(found, wanted, strict=True):
            assert_exact(ours, theirs)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch >= 2.13")
def test_batch_chunk_size_is_the_chunk_size():
    p = problem(64, 16, 4000, dtype=torch.float32, bias=False)
    p.weight.requires_grad_(False)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8)
    small, same = (
        peak_memory(lambda k=keywords: loss_of(p, **k))
        for keywords in ({"options": options}, {"options": options, "chunk_size": 8})
    )
    assert small == same < peak_memory(lambda: loss_of(p)) / 2


# --- numerics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("names", [*((n,) for n in list(FEATURES)[:4]), EVERYTHING], ids="+".join)
def test_error_ratio(names, dtype, softcap):
    """At most twice plain PyTorch's error (gradients with softcap: three times)."""
    low = problem(67, 32, 301, dtype=dtype, ignored=[1, 2, 50])
    options = options_of(low, names) | {"softcap": softcap, "logit_scale": 1.0}
    if "weight" in options:
        options["weight"] = options["weight"].abs()
    results = []
    for p in (low, low.cast(dtype), low.cast(torch.float64)):
        loss = loss_of(p, chunk_size=16, **options) if p is low else dense(p, **options)
        results.append((loss, *torch.autograd.grad(loss, p.leaves)))
    (loss, *grads), (_, *plain), (true, *exact) = results
    assert loss.dtype == torch.float32
    assert_exact(loss, true, 2e-6)
    for ours, theirs, truth in zip(grads, plain, exact, strict=True):
        assert_error_ratio(ours, theirs, truth, 3.0 if softcap > 0 else 2.0)


CONFIDENT = [("z_loss",), ("smoothing",), ("z_loss", "token_weight")]


@pytest.mark.parametrize("names", CONFIDENT, ids="+".join)
@pytest.mark.parametrize("margin", [5.0, 15.0, 40.0, 90.0])
def test_confident_targets(margin, names):
    """p(target) -> 1: what z-loss and smoothing leave must not drown in the rounding of 1."""
    p = problem(16, 16, 16, bias=False)
    with torch.no_grad():
        p.weight.copy_(torch.eye(16, dtype=torch.float64))
        p.input.copy_(torch.eye(16, dtype=torch.float64)[p.target] * margin)
    options = options_of(p, names) | ({"z_loss": 1e-4} if "z_loss" in names else {})
    single, plain = p.cast(torch.float32), p.cast(torch.float32)
    results = []
    for q in (single, plain, p):
        loss = loss_of(q, chunk_size=5, **options) if q is single else dense(q, **options)
        results.append(torch.autograd.grad(loss, q.leaves))
    for ours, theirs, truth in zip(*results, strict=True):
        assert_error_ratio(ours, theirs, truth)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_common_offset_of_the_logits(reduction):
    """Exact logits around 2^24 in float32: the smoothed loss is a difference of such numbers."""
    p = several_targets(problem(16, 8, 23, bias=False, dtype=torch.float32))
    options = options_of(p, ("class_weight", "smoothing", "token_weight"))
    with torch.no_grad():
        p.weight.copy_(torch.randint(-1, 2, p.weight.shape) * 2.0)
        p.input.copy_(torch.randint(-1, 2, p.input.shape).float())
        p.weight[:, 0], p.input[:, 0] = 1.0, 0.0
    plain = loss_of(p, reduction, chunk_size=5, **options)
    upstream = torch.rand_like(plain)
    (wanted,) = torch.autograd.grad(plain, p.weight, upstream)
    with torch.no_grad():
        p.input[:, 0] = 2.0**24
    moved = loss_of(p, reduction, chunk_size=5, **options)
    assert_exact(moved, plain, 1e-6)
    (grad,) = torch.autograd.grad(moved, p.weight, upstream)
    assert_exact(grad[:, 1:], wanted[:, 1:], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_factors_of_zero(reduction, softcap, dtype):
    """Weights that cancel leave gradients at a row's targets only, or none at all."""
    tolerance = torch.finfo(dtype).eps * 16
    p = problem(4, bias=False, dtype=dtype)
    p.target = torch.tensor([[1, 2], [3, 4], [5, 5], [6, 7]])
    factors = torch.tensor([[1.0, -1.0], [2.0, -2.0], [1.0, -1.0], [0.0, 0.0]], dtype=dtype)
    options = {"token_weight": factors, "softcap": softcap}
    loss = loss_of(p, reduction, **options)
    assert_same_loss(p, loss, dense(p, reduction, **options), tolerance)
    weight = torch.cat([torch.ones(10), torch.full((10,), -1.0), torch.zeros(3)]).to(dtype)
    options = {"weight": weight, "label_smoothing": 1.0, "softcap": softcap}
    if reduction == "mean":
        options["normalizer"] = 3.0
    loss = loss_of(p, reduction, **options)
    assert_same_loss(p, loss, dense(p, reduction, **options), tolerance)


def banned(p):
    """Ban two classes that no row has as target; returns them."""
    classes = [c for c in range(23) if c not in set(p.target.view(-1).tolist())][:2]
    with torch.no_grad():
        p.bias[classes] = -torch.inf
    return classes


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_banned_classes(reduction):
    """A bias of -inf gives no NaN: not with z-loss and weights, nor with smoothing where the class
    weighs nothing."""
    p = problem(9, ignored=[3])
    classes = banned(p)
    options = options_of(p, ("z_loss", "token_weight", "class_weight"))
    loss = loss_of(p, reduction, chunk_size=5, **options)
    assert_same_loss(p, loss, dense(p, reduction, **options))
    options["weight"][classes] = 0.0
    smoothed = loss_of(p, reduction, chunk_size=5, label_smoothing=0.2, **options)
    finite = p.cast(torch.float64)  # with a probability of 0 all the same
    finite.bias = p.bias.detach().clamp(min=-1e3).requires_grad_()
    expected = dense(finite, reduction, label_smoothing=0.2, **options)
    assert_exact(smoothed, expected)
    upstream = torch.randn_like(smoothed)
    ours = torch.autograd.grad(smoothed, p.leaves, upstream)
    for a, b in zip(ours, torch.autograd.grad(expected, finite.leaves, upstream), strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_smoothing_over_a_banned_class_is_infinite_as_in_torch(reduction):
    p = problem(9)
    banned(p)
    loss = loss_of(p, reduction, label_smoothing=0.2)
    expected = torch.nn.functional.cross_entropy(
        p.logits(), p.target, label_smoothing=0.2, reduction=reduction
    )
    assert torch.equal(loss, expected) and (loss == torch.inf).all()
    for ours, theirs in zip(
        torch.autograd.grad(loss.sum(), p.leaves),
        torch.autograd.grad(expected.sum(), p.leaves),
        strict=True,
    ):
        assert_exact(ours, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_banned_target_of_weight_zero(reduction):
    """Its infinite loss counts for nothing, though z-loss keeps the row."""
    p = problem(9)
    with torch.no_grad():
        p.bias[int(p.target[4])] = -torch.inf
    factors = (p.target != p.target[4]).double()
    options = {"token_weight": factors, "z_loss": 0.1}
    loss = loss_of(p, reduction, chunk_size=4, **options)
    q = problem(9)
    q.input, q.weight, q.bias, q.target = p.input, p.weight, p.bias, p.target.clone()
    q.target[factors == 0] = int(p.target[factors != 0][0])  # any class: its weight is 0
    expected = dense(q, reduction, **options)
    assert_same_loss(q, loss, expected)


def test_bitwise_repeatable():
    p = several_targets(problem(130, 33, 501, dtype=torch.float32, ignored=[5]))
    options = options_of(p, EVERYTHING)
    runs = []
    for _ in range(2):
        loss = loss_of(p, chunk_size=32, **options)
        runs.append((loss, *torch.autograd.grad(loss, p.leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("names", [(), *((n,) for n in FEATURES), EVERYTHING], ids="+".join)
def test_peak_memory(names, several):
    """One chunk of an eighth of the rows, one weight block, and blocks that stay in the cache."""
    p = problem(1024, 64, 8000, dtype=torch.float32, bias=False)
    p = several_targets(p) if several else p
    options = options_of(p, names)

    def step():
        loss_of(p, chunk_size=128, **options).backward()
        p.input.grad = p.weight.grad = None

    step()
    beyond = peak_memory(step) - p.input.nbytes - p.weight.nbytes
    chunk = 128 * 8000 * 4
    cached = 2 << 20 if "softcap" in names else 0  # p beside u, a block of 2^19 elements
    assert beyond < chunk + cached + (256 << 10)


# --- operands in other forms ----------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_frozen_operands(reduction, softcap, frozen):
    p = several_targets(problem(ignored=[3]))
    options = options_of(p, EVERYTHING) | {"softcap": softcap}
    wanted = torch.autograd.grad(dense(p, reduction, **options).sum(), p.leaves)
    for i in frozen:
        p.leaves[i].requires_grad_(False)
    loss_of(p, reduction, chunk_size=5, **options).sum().backward()
    for i, leaf in enumerate(p.leaves):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_exact(leaf.grad, wanted[i])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tied_weight(reduction):
    p = problem(bias=False)
    tokens = torch.randint(0, 23, (16,))
    options = options_of(p, EVERYTHING)
    p.input = torch.nn.functional.embedding(tokens, p.weight) * 0.5
    expected = dense(p, reduction, **options).sum()
    (wanted,) = torch.autograd.grad(expected, p.weight, retain_graph=True)
    (found,) = torch.autograd.grad(loss_of(p, reduction, chunk_size=5, **options).sum(), p.weight)
    assert_exact(found, wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_layouts_and_dtypes(reduction):
    """Strided targets, int32, weights in other floating dtypes and layouts."""
    p = several_targets(problem(ignored=[2]))
    options = options_of(p, EVERYTHING)
    weight, factors = options["weight"].half(), options["token_weight"].bfloat16()
    options |= {"weight": weight.double(), "token_weight": factors.double()}
    expected = loss_of(p, reduction, chunk_size=5, **options)
    wide = torch.stack([p.target, p.target], 2).int()
    p.target = wide[:, :, 0]
    options["weight"] = torch.stack([weight, weight], 1)[:, 0]
    options["token_weight"] = torch.stack([factors.t(), factors.t()], 2)[:, :, 1].t()
    assert not p.target.is_contiguous() and not options["token_weight"].is_contiguous()
    assert torch.equal(loss_of(p, reduction, chunk_size=5, **options), expected)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction, softcap):
    """The operands are cast as for a linear layer, and nothing inside is."""
    p = several_targets(problem(dtype=torch.float32, ignored=[2]))
    options = options_of(p, EVERYTHING) | {"softcap": softcap}
    low = p.cast(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(p, reduction, **options)
        found = torch.autograd.grad(loss.sum(), p.leaves)
    expected = loss_of(low, reduction, **options)
    assert torch.equal(loss, expected)
    for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), low.leaves), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours.bfloat16(), theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_column_is_one_target(reduction):
    p = problem(ignored=[2])
    options = options_of(p, EVERYTHING)
    flat = loss_of(p, reduction, **options)
    options["token_weight"] = token_column = options["token_weight"][:, None]
    assert token_column.shape == (16, 1)
    p.target = p.target[:, None]
    column = loss_of(p, reduction, **options)
    assert torch.equal(column.view(flat.shape), flat)


def test_no_second_derivative():
    p = problem()
    options = options_of(p, EVERYTHING) | {"token_weight": token_weight(p)}
    for reduction in REDUCTIONS:
        loss = loss_of(p, reduction, **options).sum()
        (grad,) = torch.autograd.grad(loss, p.input, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.square().sum(), p.weight)
