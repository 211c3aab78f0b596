"""Every option of linear_cross_entropy against the contract written out densely, alone, in pairs
and all at once, and against torch's own functions."""

from itertools import combinations

import pytest
import torch
from attention_cases import on
from head_cases import (
    EVERYTHING,
    FEATURES,
    GRADIENT_TOLERANCE,
    IGNORED,
    KERNELS,
    REDUCTIONS,
    assert_same_loss,
    check,
    check_loss,
    class_weight,
    dense,
    dtypes_of,
    here,
    loss_of,
    options_of,
    problem,
    several_targets,
    shrink_blocks,
    token_weight,
    turn,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from varstream.testing import assert_exact, peak_memory

PAIRS = list(combinations(FEATURES, 2))
ALONE = [(), *((name,) for name in FEATURES), EVERYTHING]


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("names", ALONE, ids="+".join)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_dense(backend, reduction, names, several):
    p = problem(17, ignored=[3, 16])
    p = several_targets(p) if several else p
    dtypes = () if names == EVERYTHING else turn(backend, reduction, names, several)
    check_loss(backend, p, reduction, dtypes, chunk_size=5, **options_of(p, names))


@on("cpu", "cuda")
@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pairs_equal_dense(backend, reduction, names, several):
    p = problem(17, ignored=[3, 16])
    p = several_targets(p) if several else p
    check_loss(backend, p, reduction, chunk_size=5, **options_of(p, names))


@on(*KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everything_over_logits_in_the_dtype_of_the_inputs(backend, reduction, dtype):
    p = several_targets(problem(17, ignored=[3, 16]))
    options = options_of(p, EVERYTHING)
    check(
        backend,
        p,
        lambda q: loss_of(q, reduction, chunk_size=5, logits_dtype=dtype, **here(backend, options)),
        lambda q: dense(q, reduction, **options),
        dtypes=[dtype],
        ratio=3.0,
        rounded=True,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inner_blocks(monkeypatch, reduction, softcap, bias):
    shrink_blocks(monkeypatch)
    p = several_targets(problem(17, bias=bias, ignored=[3]))
    options = options_of(p, EVERYTHING) | {"softcap": softcap}
    loss = loss_of(p, reduction, chunk_size=5, **options)
    assert_same_loss(p, loss, dense(p, reduction, **options))


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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
    backend, rows, classes, number, bias, names, reduction, chunk_size, ignored, normalizer, seed
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
    dtypes = dtypes_of(backend)
    if rows < 8 or classes < 7:  # plain PyTorch's few roundings may all be lucky
        dtypes = dtypes[:1]
    moved = here(backend, options)
    check(
        backend,
        p,
        lambda q: loss_of(q, reduction, chunk_size=chunk_size, **moved),
        lambda q: dense(q, reduction, **options),
        ratio=3.0 if "softcap" in names else 2.0,
        dtypes=[dtypes[seed % len(dtypes)]],
        tolerance=1e-11,
    )


def test_chunk_size_hardly_matters(backend):
    p = several_targets(problem(61, ignored=[7])).on(backend, torch.float32)
    options = here(backend, options_of(p, EVERYTHING)) | {"softcap": 0.0}
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
def test_all_ignored_gives_zeros(backend, reduction, names):
    p = problem(ignored=IGNORED["all"])
    for q in (p, several_targets(p)):
        options = here(backend, options_of(q, names))
        q = q.on(backend, dtypes_of(backend)[0])
        loss, metrics = loss_of(q, reduction, return_metrics=True, **options)
        assert not loss.any() and not torch.signbit(loss).any()
        assert metrics.z_loss == 0 and metrics.accuracy == 0
        assert (metrics.argmax == -1).all() and not metrics.logp.any()
        for leaf, grad in zip(q.leaves, torch.autograd.grad(loss.sum(), q.leaves), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_are_never_read(backend, reduction, softcap, garbage):
    p = several_targets(problem(ignored=IGNORED["ends"])).on(backend, dtypes_of(backend)[0])
    options = here(backend, options_of(p, EVERYTHING)) | {"softcap": softcap}
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
def test_rows_of_weight_zero_are_skipped(backend, reduction):
    """Not even read, yet they count in the divisor."""
    p = problem().on(backend, dtypes_of(backend)[0])
    tolerance = 1e-12 if backend.exact else GRADIENT_TOLERANCE
    factors = backend.here(torch.rand(16, dtype=torch.float64))
    factors[3:9] = 0.0
    wanted = dense(p, reduction, token_weight=factors)
    grads = torch.autograd.grad(wanted, p.leaves)
    with torch.no_grad():
        p.input[3:9] = torch.nan
    loss = loss_of(p, reduction, chunk_size=4, token_weight=factors)
    assert_exact(loss, wanted, tolerance)
    for ours, theirs in zip(torch.autograd.grad(loss, p.leaves), grads, strict=True):
        assert_exact(ours, theirs, tolerance)


# --- torch as a second oracle ---------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_torch(backend, reduction, weighted, label_smoothing):
    p = problem(17, ignored=[0, 8])
    weight = class_weight(p).abs() if weighted else None
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    cross_entropy = torch.nn.functional.cross_entropy

    def torch_loss(q):
        own = None if weight is None else weight.to(q.input.dtype)
        return cross_entropy(q.logits(), q.target, weight=own, **options)

    ours = lambda q: loss_of(q, chunk_size=5, weight=backend.here(weight), **options)  # noqa: E731
    if not weighted or backend.exact:
        check(backend, p, ours, torch_loss)
        return
    # Weights that are rounded with the logits are no weights of ours.
    check(backend, p, ours, torch_loss, dtypes=[torch.float32])


def test_weights_that_sum_to_zero_give_nan_as_in_torch(backend):
    p = problem().on(backend, dtypes_of(backend)[0])
    weight = torch.zeros(23, dtype=p.input.dtype, device=backend.device)
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


# --- operands in other forms ----------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_frozen_operands(backend, reduction, softcap, frozen):
    p = several_targets(problem(ignored=[3])).on(backend, dtypes_of(backend)[0])
    tolerance = 1e-12 if backend.exact else GRADIENT_TOLERANCE
    options = here(backend, options_of(p, EVERYTHING)) | {"softcap": softcap}
    wanted = torch.autograd.grad(dense(p, reduction, **options).sum(), p.leaves)
    for i in frozen:
        p.leaves[i].requires_grad_(False)
    loss_of(p, reduction, chunk_size=5, **options).sum().backward()
    for i, leaf in enumerate(p.leaves):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_exact(leaf.grad, wanted[i], tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tied_weight(backend, reduction):
    p = problem(bias=False).on(backend, dtypes_of(backend)[0])
    tokens = backend.here(torch.randint(0, 23, (16,)))
    options = here(backend, options_of(p, EVERYTHING))
    p.input = torch.nn.functional.embedding(tokens, p.weight) * 0.5
    expected = dense(p, reduction, **options).sum()
    (wanted,) = torch.autograd.grad(expected, p.weight, retain_graph=True)
    (found,) = torch.autograd.grad(loss_of(p, reduction, chunk_size=5, **options).sum(), p.weight)
    assert_exact(found, wanted, 1e-12 if backend.exact else GRADIENT_TOLERANCE)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_layouts_and_dtypes(backend, reduction):
    """Strided targets, int32, weights in other floating dtypes and layouts."""
    p = several_targets(problem(ignored=[2])).on(backend, dtypes_of(backend)[0])
    options = here(backend, options_of(p, EVERYTHING))
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
def test_one_column_is_one_target(backend, reduction):
    p = problem(ignored=[2]).on(backend, dtypes_of(backend)[0])
    options = here(backend, options_of(p, EVERYTHING))
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
