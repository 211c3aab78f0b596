"""What only a GPU shows of the head's drivers: a captured step follows the targets of the replay,
and nothing waits for the device."""

from contextlib import contextmanager

import pytest
import torch
from head_cases import IGNORE

import varstream as vs
from varstream.testing import assert_exact

pytestmark = pytest.mark.gpu

ROWS, WIDTH, CLASSES, CHUNK = 300, 64, 1000, 128
BOUNDS = pytest.mark.parametrize("max_rows", [None, 280, ROWS], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def loss_step(x, weight, target, **options):
    """Every term of the loss."""
    factors = torch.linspace(0.5, 1.5, ROWS, device="cuda")
    return vs.linear_cross_entropy(
        x, weight, target, label_smoothing=0.1, z_loss=0.01, token_weight=factors, **options
    )


def plain_step(x, weight, target, **options):
    return vs.linear_cross_entropy(x, weight, target, **options)


def rowwise_step(x, weight, target, **options):
    return vs.linear_cross_entropy(x, weight, target, reduction="none", **options).sum()


def logprobs_step(x, weight, target, **options):
    stats = vs.token_logprobs(x, weight, target, return_stats=True, **options)
    return stats.logp.mean() + stats.entropy.mean() + stats.lse.mean()


STEPS = {"plain": plain_step, "all": loss_step, "none": rowwise_step, "logprobs": logprobs_step}
EACH = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def operands(dtype):
    """x (N, d), weight (V, d) that require gradients, and target (N,)."""
    made = [torch.randn(n, WIDTH, device="cuda", dtype=dtype) * 0.2 for n in (ROWS, CLASSES)]
    x, weight = (t.requires_grad_() for t in made)
    return x, weight, torch.randint(CLASSES, (ROWS,), device="cuda")


def fill(target, ignored):
    """New targets, ``ignored`` of them without a class."""
    target.random_(CLASSES)
    target[torch.randperm(ROWS, device="cuda")[:ignored]] = IGNORE


@contextmanager
def side_stream():
    """Where a capture is warmed up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@EACH
@DTYPES
@BOUNDS
@pytest.mark.parametrize("into_buffer", [False, True], ids=["autograd", "weight_grad"])
def test_a_cuda_graph_of_forward_and_backward(step, dtype, max_rows, into_buffer):
    """Replayed on other values and another number of rows that take part."""
    x, weight, target = operands(dtype)
    fill(target, 20)
    buffer = torch.zeros(CLASSES, WIDTH, device="cuda")
    options = {"chunk_size": CHUNK, "max_rows": max_rows}
    options |= {"weight_grad": buffer} if into_buffer else {}
    leaves = (x,) if into_buffer else (x, weight)

    def everything():
        loss = step(x, weight, target, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    with side_stream():
        for _ in range(3):
            everything()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything()
    for ignored in (20, 150, 299, ROWS):
        with torch.no_grad():
            x.normal_().mul_(0.2)
            weight.normal_().mul_(0.2)
        fill(target, ignored)
        buffer.zero_()
        graph.replay()
        found = [t.clone() for t in (*got, buffer)]
        buffer.zero_()
        for ours, eager in zip(found, [*everything(), buffer], strict=True):
            assert_exact(ours, eager, 1e-2 if dtype == torch.bfloat16 else 1e-5)
        assert found[1].any() == (ignored < ROWS)
        assert bool(found[-1].any()) == (into_buffer and ignored < ROWS)


@EACH
@DTYPES
@pytest.mark.parametrize("into_buffer", [False, True], ids=["autograd", "weight_grad"])
def test_nothing_waits_for_the_device_with_a_bound(step, dtype, into_buffer):
    x, weight, target = operands(dtype)
    fill(target, 20)
    options = {"chunk_size": CHUNK, "max_rows": 280}
    if into_buffer:
        options["weight_grad"] = torch.zeros(CLASSES, WIDTH, device="cuda")
    step(x, weight, target, **options).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, weight, target, **options).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@DTYPES
def test_too_small_a_bound_makes_nan(dtype):
    x, weight, target = operands(dtype)
    assert plain_step(x, weight, target, max_rows=ROWS - 1).isnan()
    assert plain_step(x, weight, target, max_rows=ROWS).isfinite()


def test_targets_are_checked_when_asked():
    x, weight, target = operands(torch.bfloat16)
    target[7] = CLASSES
    assert plain_step(x, weight, target).isnan()
    with pytest.raises(ValueError, match=f"got {CLASSES} at row 7"):
        plain_step(x, weight, target, validate=True)
