"""Numerics and memory of linear_cross_entropy with its options: error ratios, confident targets,
offsets, cancelling weights, banned classes."""

import pytest
import torch
from head_cases import (
    EVERYTHING,
    FEATURES,
    REDUCTIONS,
    assert_same_loss,
    check,
    check_loss,
    dense,
    dtypes_of,
    here,
    loss_of,
    options_of,
    problem,
    several_targets,
)

from varstream.testing import assert_error_ratio, assert_exact, peak_memory, relative_error


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("names", [*((n,) for n in list(FEATURES)[:4]), EVERYTHING], ids="+".join)
def test_error_ratio(backend, names, dtype, softcap):
    """At most twice plain PyTorch's error (gradients with softcap: three times)."""
    low = problem(67, 32, 301, dtype=dtype, ignored=[1, 2, 50]).on(backend, dtype)
    options = here(backend, options_of(low, names)) | {"softcap": softcap, "logit_scale": 1.0}
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
def test_confident_targets(backend, margin, names):
    """p(target) -> 1: what z-loss and smoothing leave must not drown in the rounding of 1."""
    p = problem(16, 16, 16, bias=False).on(backend, torch.float64)
    with torch.no_grad():
        p.weight.copy_(torch.eye(16, dtype=torch.float64))
        p.input.copy_(torch.eye(16, dtype=torch.float64)[p.target] * margin)
    options = here(backend, options_of(p, names))
    if "z_loss" in names:
        options["z_loss"] = 1e-4
    single, plain = p.cast(torch.float32), p.cast(torch.float32)
    results = []
    for q in (single, plain, p):
        loss = loss_of(q, chunk_size=5, **options) if q is single else dense(q, **options)
        results.append(torch.autograd.grad(loss, q.leaves))
    for ours, theirs, truth in zip(*results, strict=True):
        if backend.exact:
            assert_error_ratio(ours, theirs, truth)
        else:  # kernels sum in another order, and their exponentials are off by a few 1e-7
            allowed = max(3 * relative_error(theirs, truth), 1e-6)
            assert relative_error(ours, truth) <= allowed


@pytest.mark.parametrize("offset", [2.0**20, 2.0**24])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_common_offset_of_the_logits(backend, reduction, offset):
    """Exact logits far out in float32: the smoothed loss is a difference of such numbers."""
    p = several_targets(problem(16, 8, 23, bias=False)).on(backend, torch.float32)
    options = here(backend, options_of(p, ("class_weight", "smoothing", "token_weight")))
    with torch.no_grad():
        p.weight.copy_(torch.randint(-1, 2, p.weight.shape) * 2.0)
        p.input.copy_(torch.randint(-1, 2, p.input.shape).float())
        p.weight[:, 0], p.input[:, 0] = 1.0, 0.0
    plain = loss_of(p, reduction, chunk_size=5, **options)
    upstream = torch.rand_like(plain)
    (wanted,) = torch.autograd.grad(plain, p.weight, upstream)
    with torch.no_grad():
        p.input[:, 0] = offset
    moved = loss_of(p, reduction, chunk_size=5, **options)
    assert_exact(moved, plain, 1e-6)
    (grad,) = torch.autograd.grad(moved, p.weight, upstream)
    assert_exact(grad[:, 1:], wanted[:, 1:], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_row_factors_of_zero(backend, reduction, softcap, dtype):
    """Weights that cancel leave gradients at a row's targets only, or none at all."""
    tolerance = torch.finfo(dtype).eps * 16
    p = problem(4, bias=False)
    p.target = torch.tensor([[1, 2], [3, 4], [5, 5], [6, 7]])
    p = p.on(backend, dtype)
    factors = torch.tensor([[1.0, -1.0], [2.0, -2.0], [1.0, -1.0], [0.0, 0.0]], dtype=dtype)
    factors = backend.here(factors)
    options = {"token_weight": factors, "softcap": softcap}
    loss = loss_of(p, reduction, **options)
    assert_same_loss(p, loss, dense(p, reduction, **options), tolerance)
    weight = torch.cat([torch.ones(10), torch.full((10,), -1.0), torch.zeros(3)]).to(
        p.target.device, dtype
    )
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
def test_banned_classes(backend, reduction):
    """A bias of -inf gives no NaN: not with z-loss and weights, nor with smoothing where the class
    weighs nothing."""
    p = problem(9, ignored=[3])
    classes = banned(p)
    options = options_of(p, ("z_loss", "token_weight", "class_weight"))
    check_loss(backend, p, reduction, chunk_size=5, **options)
    options["weight"][classes] = 0.0
    options["label_smoothing"] = 0.2

    def finite(q):
        """With a probability of 0 all the same."""
        return type(q)(q.input, q.weight, q.bias.clamp(min=-1e3), q.target)

    moved = here(backend, options)
    check(
        backend,
        p,
        lambda q: loss_of(q, reduction, chunk_size=5, **moved),
        lambda q: dense(finite(q), reduction, **options),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_smoothing_over_a_banned_class_is_infinite_as_in_torch(backend, reduction):
    p = problem(9)
    banned(p)
    p = p.on(backend, dtypes_of(backend)[0])
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
        assert_exact(ours, theirs, 1e-12 if backend.exact else 1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_banned_target_of_weight_zero(backend, reduction):
    """Its infinite loss counts for nothing, though z-loss keeps the row."""
    p = problem(9)
    with torch.no_grad():
        p.bias[int(p.target[4])] = -torch.inf
    factors = (p.target != p.target[4]).double()
    options = {"token_weight": factors, "z_loss": 0.1}
    other = p.target.clone()
    other[factors == 0] = int(p.target[factors != 0][0])  # any class: its weight is 0
    moved = here(backend, options)
    check(
        backend,
        p,
        lambda q: loss_of(q, reduction, chunk_size=4, **moved),
        lambda q: dense(type(q)(q.input, q.weight, q.bias, other), reduction, **options),
    )


def test_bitwise_repeatable(backend):
    p = several_targets(problem(130, 33, 501, ignored=[5])).on(backend, torch.float32)
    options = here(backend, options_of(p, EVERYTHING))
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
