"""token_logprobs against dense autograd: log-probabilities, entropies and their gradients."""

import pytest
import torch
from head_cases import (
    CHUNK_SIZES,
    GRADIENT_TOLERANCE,
    IGNORED,
    ROWS,
    SCALINGS,
    check,
    dtypes_of,
    problem,
    shrink_blocks,
)

import varstream as vs
from varstream.testing import assert_error_ratio, assert_exact, peak_memory


def run(p, return_entropy=True, **options):
    return vs.token_logprobs(
        p.input, p.weight, p.target, linear_bias=p.bias, return_entropy=return_entropy, **options
    )


def against_dense(backend, p, outputs=slice(2), scaling=None, **options):
    """Some of logp and entropy by both sides, under random upstream gradients."""
    scaling = scaling or {}
    check(
        backend,
        p,
        lambda q: run(q, **options, **scaling)[outputs],
        lambda q: q.dense_logprobs(**scaling)[outputs],
        ratio=3.0 if scaling.get("softcap") else 2.0,
    )


def assert_same(p, actual, expected, tolerance=1e-12):
    """Both outputs equal, and the gradients of every leaf under non-uniform upstream gradients."""
    upstream = [torch.randn_like(e) for e in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_exact(ours, theirs, tolerance)
    grads = torch.autograd.grad(actual, p.leaves, upstream)
    wanted = torch.autograd.grad(expected, p.leaves, upstream)
    for name, ours, theirs in zip(("input", "weight", "bias"), grads, wanted, strict=False):
        assert_exact(ours, theirs, tolerance, name)


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_equals_dense(backend, rows, chunk_size):
    against_dense(backend, problem(rows, ignored=[0, 7]), chunk_size=chunk_size)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_scalings_equal_dense(backend, scaling, bias):
    p = problem(17, bias=bias, ignored=[3])
    against_dense(backend, p, scaling=scaling, chunk_size=5)


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
def test_ignored_rows_equal_dense(backend, ignored):
    against_dense(backend, problem(16, ignored=ignored), chunk_size=4)


@pytest.mark.parametrize("scaling", ["plain", "all"])
@pytest.mark.parametrize("which", [0, 1], ids=["logp", "entropy"])
def test_one_output_alone(backend, which, scaling):
    p = problem(17, ignored=[3])
    against_dense(backend, p, slice(which, which + 1), SCALINGS[scaling], chunk_size=5)


def test_without_entropy(backend):
    def alone(q):
        logp = run(q, return_entropy=False, chunk_size=5)
        assert isinstance(logp, torch.Tensor)
        return logp

    check(backend, problem(ignored=[3]), alone, lambda q: q.dense_logprobs()[:1])


@pytest.mark.parametrize("width, classes", [(1, 1), (1, 2), (300, 7), (300, 7001)])
def test_shapes_equal_dense(backend, width, classes):
    against_dense(backend, problem(13, width, classes, ignored=[2]), chunk_size=6)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_inner_blocks(monkeypatch, scaling):
    """Several blocks of the weight and of rows."""
    shrink_blocks(monkeypatch)
    p = problem(17, ignored=[3])
    assert_same(p, run(p, chunk_size=5, **scaling), p.dense_logprobs(**scaling))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_gradcheck(softcap):
    p = problem(4, 3, 5, ignored=[1])

    def call(x, weight, bias):
        return vs.token_logprobs(
            x, weight, p.target, linear_bias=bias, softcap=softcap, return_entropy=True
        )

    assert torch.autograd.gradcheck(call, p.leaves)


def test_any_objective(backend):
    """A clipped policy-gradient term with an entropy bonus, built on top by ordinary autograd."""
    p = problem(ignored=[0, 9])
    old, advantage = torch.randn(16, dtype=torch.float64) - 3, torch.randn(16, dtype=torch.float64)

    def objective(q, logp, entropy):
        ratio = (logp - old.to(logp)).exp()
        clipped = ratio.clamp(0.8, 1.2)
        gain = torch.minimum(ratio * advantage.to(logp), clipped * advantage.to(logp))
        return -((gain + 0.01 * entropy) * q.valid).sum() / q.valid.sum()

    check(
        backend,
        p,
        lambda q: objective(q, *run(q, chunk_size=5)),
        lambda q: objective(q, *q.dense_logprobs()),
        ratio=3.0,  # which side of a clip is taken is rounded too
    )


# --- numerics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_ratio(backend, dtype, softcap):
    low = problem(67, 32, 301, dtype=dtype, ignored=[1, 2, 50]).on(backend, dtype)
    exact, plain = low.cast(torch.float64), low.cast(dtype)
    upstream = backend.here(torch.rand(67, dtype=torch.float64))
    results = []
    for p in (low, plain, exact):
        outs = run(p, softcap=softcap) if p is low else p.dense_logprobs(softcap=softcap)
        total = sum((o.double() * upstream).sum() for o in outs)
        results.append((*outs, *torch.autograd.grad(total, p.leaves)))
    assert results[0][0].dtype == results[0][1].dtype == torch.float32
    for i, (ours, theirs, truth) in enumerate(zip(*results, strict=True)):
        assert_error_ratio(ours, theirs, truth, 3.0 if i > 1 and softcap > 0 else 2.0)


@pytest.mark.parametrize("offset", [2.0**20, 2.0**24])
def test_common_offset_of_the_logits(backend, offset):
    """Exact logits far out in float32: the backward must not use an LSE rounded there."""
    p = problem(16, 8, 23, bias=False).on(backend, torch.float32)
    with torch.no_grad():
        p.weight.copy_(torch.randint(-1, 2, p.weight.shape) * 2.0)
        p.input.copy_(torch.randint(-1, 2, p.input.shape).float())
        p.weight[:, 0], p.input[:, 0] = 1.0, 0.0
    plain = run(p, chunk_size=5)
    upstream = [backend.here(torch.rand(16)), backend.here(torch.rand(16))]
    (wanted,) = torch.autograd.grad(plain, p.weight, upstream)
    with torch.no_grad():
        p.input[:, 0] = offset
    moved = run(p, chunk_size=5)
    for ours, theirs in zip(moved, plain, strict=True):
        assert_exact(ours, theirs, 1e-6)
    (grad,) = torch.autograd.grad(moved, p.weight, upstream)
    assert_exact(grad[:, 1:], wanted[:, 1:], 1e-5)


def test_certain_and_impossible_targets(backend):
    """p = 1 has entropy 0; p = 0 after underflow still has its log-probability."""
    x = backend.here(torch.tensor([[1.0], [1.0]])).requires_grad_()
    weight = backend.here(torch.tensor([[500.0], [0.0]])).requires_grad_()
    target = backend.here(torch.tensor([0, 1]))
    logp, entropy = vs.token_logprobs(x, weight, target, return_entropy=True)
    assert logp.tolist() == [0.0, -500.0] and entropy.tolist() == [0.0, 0.0]
    grads = torch.autograd.grad((logp + entropy).sum(), (x, weight))
    assert grads[0].tolist() == [[0.0], [-500.0]] and grads[1].tolist() == [[-1.0], [1.0]]


def test_bitwise_repeatable(backend):
    p = problem(130, 33, 501, ignored=[5]).on(backend, torch.float32)
    runs = []
    for _ in range(2):
        outs = run(p, chunk_size=32)
        runs.append((*outs, *torch.autograd.grad(sum(o.sum() for o in outs), p.leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- isolation, memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("ignored", [k for k in IGNORED if k != "none"])
def test_ignored_rows_are_never_read(backend, ignored, garbage):
    p = problem(ignored=IGNORED[ignored]).on(backend, dtypes_of(backend)[-1])
    clean = run(p, chunk_size=4)
    upstream = [torch.randn_like(o) for o in clean]
    wanted = torch.autograd.grad(clean, p.leaves, upstream)
    with torch.no_grad():
        p.input[~p.valid] = garbage
        for u in upstream:
            u[~p.valid] = garbage
    planted = run(p, chunk_size=4)
    assert all(torch.equal(a, b) for a, b in zip(clean, planted, strict=True))
    for a, b in zip(wanted, torch.autograd.grad(planted, p.leaves, upstream), strict=True):
        assert torch.equal(a, b)


def test_rows_without_upstream_gradient_are_skipped(backend):
    p = problem()
    mask = torch.arange(16) % 3 == 0
    check(
        backend,
        p,
        lambda q: (run(q, return_entropy=False, chunk_size=4) * backend.here(mask)).sum(),
        lambda q: (q.dense_logprobs()[0] * mask).sum(),
    )
    p = p.on(backend, dtypes_of(backend)[0])
    zero = torch.autograd.grad(run(p, return_entropy=False).sum() * 0, p.leaves)
    assert all(not g.any() for g in zero)


@pytest.mark.parametrize("return_entropy", [False, True])
def test_never_holds_all_logits(return_entropy):
    p = problem(1024, 32, 2000, dtype=torch.float32, bias=False)
    upstream = [torch.rand(1024) for _ in range(1 + return_entropy)]

    def step():
        outs = run(p, return_entropy, chunk_size=32)
        return torch.autograd.grad(outs, p.leaves, upstream)

    step()
    gradients = p.input.nbytes + p.weight.nbytes
    # beside the chunk (0.25 MB) the entropy keeps one block of 2 MB in the cache
    bound = 0.06 * 1024 * 2000 * 4 + return_entropy * (2 << 20)
    assert peak_memory(step) - gradients < bound


# --- autograd protocol ----------------------------------------------------------------------------


@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_frozen_operands(backend, frozen, return_entropy):
    p = problem(ignored=[3]).on(backend, dtypes_of(backend)[0])
    tolerance = 1e-12 if backend.exact else GRADIENT_TOLERANCE
    dense = p.dense_logprobs()[: 1 + return_entropy]
    wanted = torch.autograd.grad(sum(o.sum() for o in dense), p.leaves)
    for i in frozen:
        p.leaves[i].requires_grad_(False)
    outs = run(p, return_entropy, chunk_size=5)
    total = sum(o.sum() for o in (outs if return_entropy else [outs]))
    assert total.requires_grad == (len(frozen) < 3)
    if total.requires_grad:
        total.backward()
    for i, leaf in enumerate(p.leaves):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_exact(leaf.grad, wanted[i], tolerance)


def test_without_gradients():
    p = problem()
    with torch.no_grad():
        outs = run(p)
    for ours, theirs in zip(outs, p.dense_logprobs(), strict=True):
        assert not ours.requires_grad
        assert_exact(ours, theirs)


def test_second_backward(backend):
    p = problem().on(backend, dtypes_of(backend)[0])
    total = sum(o.sum() for o in run(p))
    first = torch.autograd.grad(total, p.leaves, retain_graph=True)
    second = torch.autograd.grad(total, p.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("which", [0, 1], ids=["logp", "entropy"])
def test_no_second_derivative(which):
    p = problem()
    (grad,) = torch.autograd.grad(run(p)[which].sum(), p.input, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), p.weight)


def test_strided_inputs_and_int32_targets(backend):
    def strided(q):
        x, weight = q.input.repeat_interleave(2, 1)[:, ::2], q.weight.t().contiguous().t()
        target = q.target.int().repeat_interleave(2)[::2]
        assert not any(t.is_contiguous() for t in (x, weight, target))
        return run(type(q)(x, weight, q.bias, target), chunk_size=5)

    check(backend, problem(16, 9, 23), strided, lambda q: q.dense_logprobs())


@pytest.mark.parametrize("bound", [14, 15, 400])
def test_a_bound_on_the_rows(backend, bound):
    p = problem(17, ignored=[0, 3, 16])
    against_dense(backend, p, chunk_size=4, max_rows=bound)


def test_more_rows_than_the_bound(backend):
    """An error where rows are counted on the host, NaN where they are not."""
    p = problem(17, ignored=[0, 3, 16]).on(backend, dtypes_of(backend)[0])
    if backend.exact:
        with pytest.raises(ValueError, match="max_rows must bound the rows.*14 of them, got 13"):
            run(p, max_rows=13)
    else:
        logp = run(p, return_entropy=False, max_rows=13)
        assert logp[p.valid].isnan().all() and not logp[~p.valid].any()
