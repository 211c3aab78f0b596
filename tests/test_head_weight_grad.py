"""``weight_grad``: the weight's gradient added to a buffer of the caller's, and to no other."""

from contextlib import nullcontext

import pytest
import torch
from emulation import emulated
from head_cases import (
    EVERYTHING,
    FEATURES,
    REDUCTIONS,
    SCALINGS,
    Problem,
    dense,
    loss_of,
    options_of,
    problem,
    several_targets,
    shrink_blocks,
    token_weight,
)

import varstream as vs
from varstream.testing import assert_error_ratio, assert_exact

FLOAT = 2e-6  # relative error of float32 sums against float64 here
SETS = {
    "none": (),
    **{name: (name,) for name in FEATURES},
    "smoothed_cap": ("smoothing", "softcap"),
    "weighted_smoothing": ("smoothing", "class_weight"),
    "all": EVERYTHING,
}
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
each_kernel = pytest.mark.parametrize(
    "kernels",
    [nullcontext, pytest.param(emulated, marks=pytest.mark.emulated)],
    ids=["composed", "emulated"],
)
each_set = pytest.mark.parametrize("names", SETS.values(), ids=SETS)


def buffer_of(p: Problem, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A buffer (V, d) that isn't empty: what is in it must stay."""
    return torch.randn(p.weight.shape).to(dtype or p.acc)


def upstream_of(loss):
    return torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape) + 0.3


def backward(loss):
    loss.backward(upstream_of(loss))


def gradients(loss, p):
    return torch.autograd.grad(loss, p.leaves, upstream_of(loss))


def assert_added(p: Problem, loss, expected, tolerance=1e-12, start=None, buffer=None):
    """Loss, gradients of input and bias, and the buffer's growth."""
    assert_exact(loss, expected, tolerance, "loss")
    wanted = gradients(expected, p)
    backward(loss)
    assert p.weight.grad is None
    assert_exact(buffer, start + wanted[1], tolerance, "weight_grad")
    found = [p.input.grad] if p.bias is None else [p.input.grad, p.bias.grad]
    for ours, theirs in zip(found, (wanted[0], *wanted[2:]), strict=True):
        assert_exact(ours, theirs, tolerance)


# --- the ordinary gradient, in a buffer -----------------------------------------------------------


@each_reduction
@each_set
@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
def test_every_option(monkeypatch, reduction, names, several):
    shrink_blocks(monkeypatch)
    p = problem(ignored=[0, 3, 15])
    p = several_targets(p) if several else p
    options = options_of(p, names)
    start = buffer_of(p)
    buffer = start.clone()
    loss = loss_of(p, reduction, chunk_size=5, weight_grad=buffer, **options)
    assert torch.equal(buffer, start)  # nothing is added before the backward
    assert_added(p, loss, dense(p, reduction, **options), start=start, buffer=buffer)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_logprobs(scaling):
    """With entropy, LSE and their sums, by any upstream gradient."""
    p = problem(ignored=[2, 7])
    start = buffer_of(p)
    buffer = start.clone()
    options = {"linear_bias": p.bias, "return_stats": True, "chunk_size": 6, **scaling}
    found = vs.token_logprobs(p.input, p.weight, p.target, weight_grad=buffer, **options)
    plain = vs.token_logprobs(p.input, p.weight, p.target, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    totals = [sum((upstream_of(v) * v).sum() for v in stats[:3]) for stats in (found, plain)]
    assert_added(p, *totals, start=start, buffer=buffer)


@pytest.mark.emulated
@each_reduction
@each_set
def test_every_option_in_row_kernels(reduction, names):
    p = problem(ignored=[0, 3, 15], dtype=torch.float32)
    options = options_of(p, names)
    wide = p.cast(torch.float64)
    expected = dense(wide, reduction, **options)
    wanted = gradients(expected, wide)
    start = buffer_of(p)
    buffer = start.clone()
    with emulated():
        loss = loss_of(p, reduction, chunk_size=5, weight_grad=buffer, **options)
        backward(loss)
    assert_exact(loss, expected, FLOAT)
    assert_exact(buffer, start + wanted[1], FLOAT)
    assert_exact(p.input.grad, wanted[0], FLOAT)
    assert_exact(p.bias.grad, wanted[2], 10 * FLOAT)  # sums of probabilities that cancel
    assert p.weight.grad is None


@each_kernel
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["float32_buffer", "low_buffer"])
@each_reduction
def test_low_precision(kernels, low, own, reduction):
    """A buffer in the weight's dtype is rounded once a chunk, a float32 one never."""
    p = problem(32, 16, 40, ignored=[3], dtype=low)
    wide = p.cast(torch.float64)
    exact = gradients(wide.dense_loss(reduction), wide)[1]
    plain = gradients(p.dense_loss(reduction), p)[1]
    buffer = torch.zeros(p.weight.shape, dtype=low if own else torch.float32)
    with kernels():
        backward(loss_of(p, reduction, chunk_size=16, weight_grad=buffer))
    assert_error_ratio(buffer.to(low), plain, exact, 2.0, "weight_grad")
    assert p.input.grad.dtype == low


def test_a_float32_buffer_keeps_what_rounding_would_lose():
    p = problem(dtype=torch.bfloat16, bias=False)
    wide = p.cast(torch.float64)
    (_, exact) = gradients(wide.dense_loss("sum"), wide)
    start = 500 * torch.ones(p.weight.shape)
    fine, coarse = start.clone(), start.bfloat16()
    for buffer in (fine, coarse):
        backward(loss_of(p, "sum", weight_grad=buffer))
    assert_exact(fine - start, exact, 1e-3)
    assert ((coarse.float() - start - exact).norm() / exact.norm()) > 0.1


# --- calls and backwards --------------------------------------------------------------------------


@each_reduction
def test_accumulates_over_calls(reduction):
    p, buffer, wanted = problem(), torch.zeros(23, 9, dtype=torch.float64), 0
    for rows in (slice(0, 5), slice(5, 16)):
        part = Problem(p.input[rows], p.weight, p.bias, p.target[rows])
        wanted = wanted + gradients(part.dense_loss(reduction), p)[1]
        backward(loss_of(part, reduction, weight_grad=buffer))
    assert_exact(buffer, wanted)


@each_reduction
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_whoever_is_trained(reduction, frozen):
    """The buffer is asked for by name, so the backward runs where nothing else is trained."""
    p = problem(ignored=[3])
    wanted = gradients(p.dense_loss(reduction), p)
    for i in frozen:
        p.leaves[i].requires_grad_(False)
    buffer = torch.zeros_like(p.weight, requires_grad=False)
    backward(loss_of(p, reduction, chunk_size=5, weight_grad=buffer))
    assert_exact(buffer, wanted[1])
    for i, leaf in enumerate(p.leaves):
        if i == 1 or i in frozen:
            assert leaf.grad is None
        else:
            assert_exact(leaf.grad, wanted[i])


@each_reduction
def test_a_second_backward_adds_again(reduction):
    p = problem()
    wanted = gradients(p.dense_loss(reduction), p)[1]
    buffer = torch.zeros_like(wanted)
    loss = loss_of(p, reduction, weight_grad=buffer)
    loss.backward(upstream_of(loss), retain_graph=True)
    assert_exact(buffer, wanted)
    backward(loss)
    assert_exact(buffer, 2 * wanted)
    with pytest.raises(RuntimeError, match="second time"):
        backward(loss)


@each_reduction
def test_no_second_derivative(reduction):
    """Not even of a sum in which something else has one."""
    p = problem()
    loss = loss_of(p, reduction, weight_grad=torch.zeros_like(p.weight, requires_grad=False))
    grads = torch.autograd.grad(loss.sum(), (p.input, p.bias), create_graph=True)
    for grad in grads:
        total = grad.square().sum() + p.input.square().sum() + p.bias.sum()
        for leaf in (p.input, p.bias):
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(total, leaf, retain_graph=True)


@each_reduction
def test_without_gradients(reduction):
    p, buffer = problem(), torch.zeros(23, 9, dtype=torch.float64)
    with torch.no_grad():
        loss = loss_of(p, reduction, weight_grad=buffer)
    assert not loss.requires_grad and not buffer.any()
    assert_exact(loss, p.dense_loss(reduction))


def test_gradient_of_the_input_alone():
    """``autograd.grad`` adds to the buffer too: its backward runs."""
    p, buffer = problem(), torch.zeros(23, 9, dtype=torch.float64)
    wanted = gradients(p.dense_loss("mean"), p)
    loss = loss_of(p, weight_grad=buffer)
    (found,) = torch.autograd.grad(loss, p.input, upstream_of(loss))
    assert_exact(found, wanted[0])
    assert_exact(buffer, wanted[1])
    assert p.bias.grad is None
    loss = loss_of(p, weight_grad=buffer)  # the weight has no part in its graph
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(loss, p.weight)


@each_reduction
def test_metrics(reduction):
    p = problem(ignored=[3])
    options = options_of(p, EVERYTHING) | {"return_metrics": True}
    buffer = torch.zeros(23, 9, dtype=torch.float64)
    loss, metrics = loss_of(p, reduction, weight_grad=buffer, **options)
    expected, others = loss_of(p, reduction, **options)
    for ours, theirs in zip((loss, *metrics), (expected, *others), strict=True):
        assert_exact(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert not any(value.requires_grad for value in metrics)
    wanted = gradients(expected, p)[1]
    backward(loss)
    assert_exact(buffer, wanted)


@pytest.mark.parametrize("rows, ignored", [(0, []), (1, []), (1, [0]), (16, [*range(16)])])
@each_reduction
def test_few_rows(reduction, rows, ignored):
    p = problem(rows, ignored=ignored)
    start = buffer_of(p)
    buffer = start.clone()
    loss = loss_of(p, reduction, weight_grad=buffer, z_loss=0.1, label_smoothing=0.2)
    expected = dense(p, reduction, z_loss=0.1, label_smoothing=0.2)
    assert_added(p, loss, expected, start=start, buffer=buffer)
    if rows == len(ignored):
        assert torch.equal(buffer, start)


def test_normalizer():
    p, buffer = problem(), torch.zeros(23, 9, dtype=torch.float64)
    options = {"normalizer": torch.tensor(7), "token_weight": token_weight(p)}
    wanted = gradients(loss_of(p, **options), p)[1]
    backward(loss_of(p, weight_grad=buffer, **options))
    assert_exact(buffer, wanted)


@each_kernel
def test_autocast_with_float32_weights(kernels):
    """The operands are cast; the buffer is the float32 weight's own gradient."""
    p = problem(32, 16, 40, ignored=[3], dtype=torch.float32)
    wide, low = p.cast(torch.float64), p.cast(torch.bfloat16)
    exact = gradients(wide.dense_loss("mean"), wide)
    plain = gradients(low.dense_loss("mean"), low)
    p.weight.grad = torch.zeros_like(p.weight)
    given = p.weight.grad

    with kernels():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(p, weight_grad=p.weight.grad)
        backward(loss)
    assert p.weight.grad is given and given.dtype == p.input.grad.dtype == torch.float32
    assert_error_ratio(given, plain[1].float(), exact[1], 2.0, "weight_grad")
    assert_error_ratio(p.input.grad, plain[0].float(), exact[0], 2.0, "input")


# --- refusals -------------------------------------------------------------------------------------

REFUSED = {
    "type": (lambda p: [1.0], TypeError, "weight_grad must be a torch.Tensor, got list"),
    "shape": (
        lambda p: torch.zeros(9, 23),
        ValueError,
        r"weight_grad must have size 23 in dimension 0.*, got shape \(9, 23\)",
    ),
    "ndim": (
        lambda p: torch.zeros(23 * 9),
        ValueError,
        r"weight_grad must have 2 dimensions.*, got shape \(207,\)",
    ),
    "wide": (
        lambda p: torch.zeros(23, 9).double(),
        ValueError,
        "weight_grad must have dtype float32, bfloat16, got float64",
    ),
    "other_low": (
        lambda p: torch.zeros(23, 9).half(),
        ValueError,
        "weight_grad must have dtype float32, bfloat16, got float16",
    ),
    "device": (
        lambda p: torch.zeros(23, 9, device="meta"),
        ValueError,
        "weight_grad must be on cpu like the other tensors, got meta",
    ),
    "strides": (
        lambda p: torch.zeros(9, 23).t(),
        ValueError,
        r"weight_grad must be contiguous \(V, d\), got strides \(1, 23\)",
    ),
    "expanded": (
        lambda p: torch.zeros(1, 9).expand(23, 9),
        ValueError,
        r"weight_grad must be contiguous \(V, d\), got strides \(0, 1\)",
    ),
    "leaf": (
        lambda p: torch.zeros(23, 9, requires_grad=True),
        ValueError,
        "weight_grad must not require gradients, got requires_grad=True",
    ),
    "weight": (
        lambda p: p.weight.data,
        ValueError,
        "weight_grad must not share memory with linear_weight",
    ),
    "input": (
        lambda p: p.input.data.view(-1)[: 23 * 9].view(23, 9),
        ValueError,
        "weight_grad must not share memory with input",
    ),
    "bias": (
        lambda p: p.bias.data,
        ValueError,
        "weight_grad must not share memory with linear_bias",
    ),
}


@pytest.mark.parametrize("make, error, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("reduction", ["mean", "none", "logprobs"])
def test_refused_before_anything_is_written(reduction, make, error, message):
    p = problem(32, dtype=torch.bfloat16)
    shared = torch.zeros(24, 9).bfloat16()  # the bias lies behind the buffer's first element
    if message.endswith("bias"):
        p.bias = shared.view(-1)[5:28]
        p = Problem(p.input, p.weight, p.bias, p.target)
    given = shared[:23] if message.endswith("bias") else make(p)
    before = given.clone() if isinstance(given, torch.Tensor) else None
    with pytest.raises(error, match=message):
        if reduction == "logprobs":
            vs.token_logprobs(p.input, p.weight, p.target, linear_bias=p.bias, weight_grad=given)
        else:
            loss_of(p, reduction, weight_grad=given)
    if before is not None and not before.is_meta:
        assert torch.equal(given, before)


def test_buffers_beside_an_operand():
    """One allocation for weights and gradients, as optimisers make them, is not shared memory."""
    p = problem(dtype=torch.float32)
    flat = torch.zeros(2, 23, 9)
    flat[0] = p.weight.detach()
    loss_of(Problem(p.input, flat[0], p.bias, p.target), weight_grad=flat[1]).backward()
    assert torch.equal(flat[0], p.weight) and flat[1].any()


def test_refused_in_a_direct_call():
    p = problem()
    wrong = torch.zeros(9, 23, dtype=torch.float64)
    dlogp = torch.ones(16, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match="varstream::token_logprobs_bwd_accumulate: weight_grad must have size"
    ):
        torch.ops.varstream.token_logprobs_bwd_accumulate(
            *(dlogp, None, None, None, None),
            *(
                p.input.detach(),
                p.weight.detach(),
                None,
                p.target,
                -100,
                1.0,
                0.0,
                1.0,
                0,
                None,
                None,
            ),
            *(None, True, False, wrong),
        )


@pytest.mark.parametrize("needs", [(True, True), (False, False)], ids=["both", "neither"])
def test_opcheck(needs):
    draw = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    x, weight, bias, target = normal(6, 4), normal(9, 4), normal(9), torch.randint(9, (6,))
    call = (x, weight, bias, target, -100, 1.0, 0.0, 1.0, 0, None, None)
    upstream = (normal(6), None, None, None, None)
    op = torch.ops.varstream.token_logprobs_bwd_accumulate.default
    torch.library.opcheck(op, (*upstream, *call, None, *needs, normal(9, 4)))
