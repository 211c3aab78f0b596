"""linear_cross_entropy inside autograd: frozen and tied operands, repeated backward, layouts."""

import gc
import weakref

import pytest
import torch
from head_cases import (
    GRADIENT_TOLERANCE,
    REDUCTIONS,
    check,
    dtypes_of,
    loss_of,
    problem,
)

import varstream as vs
from varstream.testing import assert_exact, peak_memory


def test_graph_is_freed_without_the_collector():
    p = problem()
    gc.disable()
    try:
        loss = loss_of(p, "sum")
        node = weakref.ref(loss.grad_fn)
        del loss
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_frozen_operands(backend, reduction, frozen):
    p = problem(ignored=[3]).on(backend, dtypes_of(backend)[0])
    tolerance = 1e-12 if backend.exact else GRADIENT_TOLERANCE
    wanted = torch.autograd.grad(p.dense_loss(reduction).sum(), p.leaves)
    for i in frozen:
        p.leaves[i].requires_grad_(False)
    loss = loss_of(p, reduction, chunk_size=5).sum()
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    for i, leaf in enumerate(p.leaves):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_exact(leaf.grad, wanted[i], tolerance)


def test_frozen_weight_costs_no_weight_gradient():
    p = problem(64, 16, 4000, dtype=torch.float32, bias=False)
    p.weight.requires_grad_(False)
    assert peak_memory(lambda: loss_of(p, chunk_size=8).backward()) < p.weight.nbytes


def test_without_gradients():
    p = problem()
    with torch.no_grad():
        loss = loss_of(p)
    assert not loss.requires_grad
    assert_exact(loss, p.dense_loss("mean"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tied_weight_and_accumulation(backend, reduction):
    p = problem(bias=False).on(backend, dtypes_of(backend)[0])
    tolerance = 1e-12 if backend.exact else GRADIENT_TOLERANCE
    tokens = backend.here(torch.randint(0, 23, (16,)))

    def run(head):
        embedded = torch.nn.functional.embedding(tokens, p.weight) * 0.5
        return head(embedded).sum() * 3

    ours = run(
        lambda x: vs.linear_cross_entropy(x, p.weight, p.target, reduction=reduction, chunk_size=5)
    )
    theirs = run(
        lambda x: torch.nn.functional.cross_entropy(x @ p.weight.t(), p.target, reduction=reduction)
    )
    (wanted,) = torch.autograd.grad(theirs, p.weight)
    ours.backward(retain_graph=True)
    assert_exact(p.weight.grad, wanted, tolerance)
    ours.backward()
    assert_exact(p.weight.grad, 2 * wanted, tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_backward(backend, reduction):
    p = problem().on(backend, dtypes_of(backend)[0])
    loss = loss_of(p, reduction).sum()
    first = torch.autograd.grad(loss, p.leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, p.leaves, torch.full_like(loss, 2.0))
    for a, k, b in zip(first, kept, second, strict=True):
        assert torch.equal(a, k)
        assert_exact(b, 2 * a)  # a power of two: no rounding
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, p.leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_second_derivative(reduction):
    p = problem()
    (grad,) = torch.autograd.grad(loss_of(p, reduction).sum(), p.input, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), p.weight)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strided_inputs(backend, reduction):
    def every_other(t):
        """The same values at twice the stride, NaN between them; the last axis isn't contiguous."""
        return torch.stack([t, torch.full_like(t, torch.nan)], 1).flatten(0, 1)[::2]

    def strided(q):
        x, weight = every_other(q.input.t()).t(), every_other(q.weight)
        bias, target = every_other(q.bias), q.target.repeat_interleave(2)[::2]
        assert not any(t.is_contiguous() for t in (x, weight, bias, target))
        return loss_of(type(q)(x, weight, bias, target), reduction, chunk_size=5)

    check(backend, problem(16, 9, 23), strided, lambda q: q.dense_loss(reduction))


def test_expanded_input(backend):
    def spread(q):
        return type(q)(q.input.expand(16, 9), q.weight, q.bias, q.target.expand(16))

    p = problem(1)
    check(
        backend, p, lambda q: loss_of(spread(q)), lambda q: spread(q).dense_loss("mean"), ratio=3.0
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_int32_targets(backend, reduction):
    p = problem(ignored=[0, 5]).on(backend, dtypes_of(backend)[0])
    expected = loss_of(p, reduction)
    p.target = p.target.int()
    assert torch.equal(loss_of(p, reduction), expected)


def test_autocast_casts_like_a_linear_layer():
    p = problem(dtype=torch.float32)
    low = p.cast(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(p)
    assert torch.equal(loss, loss_of(low))
    loss.backward()
    assert p.weight.grad.dtype == torch.float32
