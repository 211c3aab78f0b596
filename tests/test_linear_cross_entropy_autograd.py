"""linear_cross_entropy inside autograd: frozen and tied operands, repeated backward, layouts."""

import gc
import weakref

import pytest
import torch
from head_cases import REDUCTIONS, assert_same_loss, loss_of, problem

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
def test_frozen_operands(reduction, frozen):
    p = problem(ignored=[3])
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
            assert_exact(leaf.grad, wanted[i])


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
def test_tied_weight_and_accumulation(reduction):
    p = problem(bias=False)
    tokens = torch.randint(0, 23, (16,))

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
    assert_exact(p.weight.grad, wanted)
    ours.backward()
    assert_exact(p.weight.grad, 2 * wanted)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_backward(reduction):
    p = problem()
    loss = loss_of(p, reduction).sum()
    first = torch.autograd.grad(loss, p.leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, p.leaves, torch.tensor(2.0, dtype=torch.float64))
    for a, k, b in zip(first, kept, second, strict=True):
        assert torch.equal(a, k)
        assert_exact(b, 2 * a)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, p.leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_second_derivative(reduction):
    p = problem()
    (grad,) = torch.autograd.grad(loss_of(p, reduction).sum(), p.input, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), p.weight)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strided_inputs(reduction):
    p = problem(16, 9, 23)
    x = torch.randn(9, 32, dtype=torch.float64).t()[::2].requires_grad_()
    weight = torch.randn(9, 23, dtype=torch.float64).t().requires_grad_()
    wide = torch.randint(0, 23, (32,))[::2]
    p.input, p.weight, p.target = x, weight, wide
    assert_same_loss(p, loss_of(p, reduction, chunk_size=5), p.dense_loss(reduction))


def test_expanded_input():
    p = problem()
    row = torch.randn(1, 9, dtype=torch.float64, requires_grad=True)
    p.input = row.expand(16, 9)
    loss, dense = loss_of(p), p.dense_loss("mean")
    assert_exact(loss, dense)
    assert_exact(torch.autograd.grad(loss, row)[0], torch.autograd.grad(dense, row)[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_int32_targets(reduction):
    p = problem(ignored=[0, 5])
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
