"""Metrics, row statistics, the LSE's gradient, and several targets a row in token_logprobs."""

import pytest
import torch
from head_cases import (
    CHUNK_SIZES,
    FEATURES,
    IGNORE,
    REDUCTIONS,
    SCALINGS,
    check,
    dense,
    dtypes_of,
    here,
    loss_of,
    problem,
    several_targets,
    shrink_blocks,
)

import varstream as vs
from varstream.ops.linear_cross_entropy import CrossEntropyMetrics
from varstream.ops.token_logprobs import TokenStats
from varstream.testing import assert_error_ratio, assert_exact, peak_memory


def run(p, **options):
    return vs.token_logprobs(p.input, p.weight, p.target, linear_bias=p.bias, **options)


def dense_stats(p, **scaling):
    """``TokenStats`` from all logits, ordinary autograd, without a word about ignored rows."""
    z = p.logits(**scaling)
    logp = z.log_softmax(-1)
    target = p.target.long() if p.target.dim() == 2 else p.target.long()[:, None]
    rows = (target != IGNORE).any(1)
    picked = torch.where(target != IGNORE, logp.gather(1, target.clamp(min=0)), 0.0)
    argmax = torch.where(rows, z.argmax(1), -1)
    return TokenStats(
        picked.view(p.target.shape),
        -(logp.exp() * logp).sum(1) * rows,
        z.logsumexp(1) * rows,
        (2 * logp).logsumexp(1) * rows,
        z.mean(1) * rows,
        argmax,
        ((target == argmax[:, None]) & rows[:, None]).view(p.target.shape),
    )


def against_dense(backend, p, outputs=slice(3), scaling=None, **options):
    """Some of the differentiable outputs by both sides, under random upstream gradients."""
    scaling = scaling or {}
    check(
        backend,
        p,
        lambda q: run(q, return_stats=True, **options, **scaling)[outputs],
        lambda q: dense_stats(q, **scaling)[outputs],
        ratio=3.0 if scaling.get("softcap") else 2.0,
    )


def assert_same_stats(p, found, expected, tolerance=1e-12):
    for name, ours, theirs in zip(TokenStats._fields, found, expected, strict=True):
        if theirs.is_floating_point():
            assert_exact(ours, theirs, tolerance, name)
        else:
            assert torch.equal(ours, theirs), name


def assert_same_gradients(p, found, expected, tolerance=1e-12):
    upstream = [torch.randn_like(e) for e in expected]
    grads = torch.autograd.grad(found, p.leaves, upstream, retain_graph=True)
    wanted = torch.autograd.grad(expected, p.leaves, upstream, retain_graph=True)
    for name, ours, theirs in zip(("input", "weight", "bias"), grads, wanted, strict=False):
        assert_exact(ours, theirs, tolerance, name)


# --- token_logprobs -------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_stats_equal_dense(backend, scaling, bias, several):
    p = problem(17, bias=bias, ignored=[0, 3])
    p = several_targets(p) if several else p
    against_dense(backend, p, scaling=scaling, chunk_size=5)
    for dtype in dtypes_of(backend):
        q = p.on(backend, dtype)
        found = run(q, return_stats=True, chunk_size=5, **scaling)
        assert isinstance(found, TokenStats)
        assert [t.requires_grad for t in found] == [True] * 3 + [False] * 4
        expected = dense_stats(p.cast(dtype).cast(torch.float64), **scaling)
        found = TokenStats(*(t.cpu() for t in found))
        assert_same_stats(q, found, expected, 1e-12 if backend.exact else 1e-5)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_some_outputs_alone(backend, wanted, softcap):
    p = several_targets(problem(17, ignored=[3]))
    options = {"return_stats": True, "chunk_size": 5, "softcap": softcap}

    def ours(q):
        found = run(q, **options)
        return [found[i] for i in wanted]

    def theirs(q):
        found = dense_stats(q, softcap=softcap)
        return [found[i] for i in wanted]

    check(backend, p, ours, theirs, ratio=3.0 if softcap else 2.0)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("rows", [0, 1, 13, 17])
@pytest.mark.parametrize("number", [0, 1, 2, 9])
def test_several_targets_equal_dense(backend, number, rows, chunk_size):
    p = problem(rows, ignored=[0, 7])
    p = several_targets(p, max(number, 1))
    p.target = p.target[:, :number]
    dtypes = dtypes_of(backend)
    check(
        backend,
        p,
        lambda q: run(q, return_entropy=True, chunk_size=chunk_size),
        lambda q: dense_stats(q)[:2],
        dtypes=[dtypes[(rows + number) % len(dtypes)]],
    )


@pytest.mark.parametrize("scaling", ["plain", "all"])
def test_inner_blocks(monkeypatch, scaling):
    shrink_blocks(monkeypatch)
    p = several_targets(problem(17, ignored=[3]))
    found = run(p, return_stats=True, chunk_size=5, **SCALINGS[scaling])
    expected = dense_stats(p, **SCALINGS[scaling])
    assert_same_stats(p, found, expected)
    assert_same_gradients(p, found[:3], expected[:3])


def test_more_targets_than_classes(backend):
    """Every class is a target, so the log-probabilities of a row hold the whole distribution."""
    p = problem(5, 4, 6)
    p.target = torch.arange(6).repeat(5, 2)
    tolerance = 1e-12 if backend.exact else 1e-6
    for dtype in dtypes_of(backend):
        logp = run(p.on(backend, dtype), chunk_size=2).cpu()
        assert_exact(logp[:, :6].exp().sum(1), torch.ones(5, dtype=torch.float64), tolerance)
        assert_exact(logp[:, 6:], logp[:, :6])
    against_dense(backend, p, slice(1), chunk_size=2)


def test_gradcheck():
    p = several_targets(problem(4, 3, 5, ignored=[1]), 2)

    def call(x, weight, bias):
        q = type(p)(x, weight, bias, p.target)
        return run(q, return_stats=True, chunk_size=3, softcap=3.0)[:3]

    assert torch.autograd.gradcheck(call, p.leaves)


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_ratio(backend, dtype, softcap):
    low = several_targets(problem(67, 32, 301, dtype=dtype, ignored=[1, 50])).on(backend, dtype)
    upstream = [backend.here(u) for u in (torch.rand(67, 3), torch.rand(67), torch.rand(67))]
    results = []
    for p in (low, low.cast(dtype), low.cast(torch.float64)):
        compute = run(p, return_stats=True, softcap=softcap) if p is low else None
        outs = (compute or dense_stats(p, softcap=softcap))[:3]
        total = sum((o.double() * u).sum() for o, u in zip(outs, upstream, strict=True))
        results.append((*outs, *torch.autograd.grad(total, p.leaves)))
    for i, (ours, theirs, truth) in enumerate(zip(*results, strict=True)):
        assert_error_ratio(ours, theirs, truth, 3.0 if i > 2 and softcap > 0 else 2.0)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_ignored_targets_and_rows_take_no_part(backend, garbage):
    p = several_targets(problem(17, ignored=[0, 8, 16])).on(backend, dtypes_of(backend)[-1])
    clean = run(p, return_stats=True, chunk_size=4)
    upstream = [torch.randn_like(o) for o in clean[:3]]
    wanted = torch.autograd.grad(clean[:3], p.leaves, upstream)
    with torch.no_grad():
        p.input[~p.valid.any(1)] = garbage
        upstream[0][~p.valid] = garbage
        for u in upstream[1:]:
            u[~p.valid.any(1)] = garbage
    planted = run(p, return_stats=True, chunk_size=4)
    assert all(torch.equal(a, b) for a, b in zip(clean, planted, strict=True))
    for a, b in zip(wanted, torch.autograd.grad(planted[:3], p.leaves, upstream), strict=True):
        assert torch.equal(a, b)


def test_banned_classes(backend):
    """A bias of -inf: entropy and gradients as without the class, the mean of the logits -inf."""
    p = problem(9, ignored=[3]).on(backend, dtypes_of(backend)[0])
    tolerance = 1e-12 if backend.exact else 1e-5
    free = [c for c in range(23) if c not in set(p.target.tolist())]
    with torch.no_grad():
        p.bias[free[:2]] = -torch.inf
    found = run(p, return_stats=True, chunk_size=4)
    kept = [c for c in range(23) if c not in free[:2]]
    names = torch.full((23,), IGNORE).index_copy(0, torch.tensor(kept), torch.arange(21))
    names = {c: int(names[c]) for c in kept} | {IGNORE: IGNORE}
    q = problem(9, 9, 21)
    q.input, q.target = p.input, backend.here(torch.tensor([names[c] for c in p.target.tolist()]))
    q.weight, q.bias = p.weight[kept], p.bias[kept]
    expected = dense_stats(q)
    for name in ("logp", "entropy", "lse", "log_sum_sq_probs"):
        assert_exact(getattr(found, name), getattr(expected, name), tolerance, name)
    assert torch.equal(found.mean_logits == -torch.inf, p.valid)
    assert torch.equal(found.is_top1, expected.is_top1)
    assert_same_gradients(p, found[:3], expected[:3], tolerance)


def test_rows_without_upstream_gradient_are_skipped():
    """One chunk of the rows that are left, so the buffer is theirs."""
    p = problem(512, 8, 4000, dtype=torch.float32, bias=False)
    p.weight.requires_grad_(False)
    logp = run(p, chunk_size=512)
    upstream = torch.zeros(512)
    upstream[::64] = 1.0

    def step(u):
        torch.autograd.grad(logp, p.input, u, retain_graph=True)

    assert peak_memory(lambda: step(upstream)) * 8 < peak_memory(lambda: step(torch.ones(512)))


def test_stats_never_hold_all_logits():
    p = several_targets(problem(1024, 32, 2000, dtype=torch.float32, bias=False))

    def step():
        outs = run(p, return_stats=True, chunk_size=32)[:3]
        return torch.autograd.grad(outs, p.leaves, [torch.ones_like(o) for o in outs])

    step()
    beyond = peak_memory(step) - p.input.nbytes - p.weight.nbytes
    assert beyond < 0.06 * 1024 * 2000 * 4 + (2 << 20)


# --- metrics of the loss --------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("names", [(), tuple(FEATURES)], ids=["plain", "everything"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_metrics(backend, reduction, names, several):
    p = problem(17, ignored=[3, 16])
    p = several_targets(p) if several else p
    p = p.on(backend, dtypes_of(backend)[0])
    tolerance = 1e-12 if backend.exact else 1e-5
    options = {key: value for name in names for key, value in FEATURES[name](p).items()}
    options = here(backend, options)
    scaling = {k: options[k] for k in ("logit_scale", "softcap", "temperature") if k in options}
    loss, metrics = loss_of(p, reduction, chunk_size=5, return_metrics=True, **options)
    assert isinstance(metrics, CrossEntropyMetrics)
    assert_exact(loss, loss_of(p, reduction, chunk_size=5, **options))
    assert not any(m.requires_grad for m in metrics)
    expected = dense_stats(p, **scaling)
    assert torch.equal(metrics.argmax, expected.argmax)
    assert_exact(metrics.logp, expected.logp, tolerance)
    accuracy = expected.is_top1.sum() / p.valid.sum()
    assert_exact(metrics.accuracy, accuracy.double(), 1e-7)
    without = dense(p, reduction, **(options | {"z_loss": 0.0}))
    z_loss = (dense(p, reduction, **options) - without).sum()
    assert_exact(metrics.z_loss, z_loss, 1e-11 if backend.exact else 1e-5)
    found = torch.autograd.grad(loss.sum(), p.leaves)
    wanted = torch.autograd.grad(dense(p, reduction, **options).sum(), p.leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_exact(ours, theirs, tolerance)


def test_accuracy_counts(backend):
    p = problem(4, 3, 3, bias=False, ignored=[3]).on(backend, dtypes_of(backend)[0])
    with torch.no_grad():
        p.weight.copy_(torch.eye(3))
        p.input[:3] = torch.eye(3)
    p.target[:3] = torch.tensor([0, 1, 0])
    for reduction in REDUCTIONS:
        _, metrics = loss_of(p, reduction, return_metrics=True)
        assert metrics.argmax.tolist() == [0, 1, 2, -1]
        assert_exact(metrics.accuracy, torch.tensor(2 / 3, dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_metrics_without_gradients(reduction):
    p = problem(ignored=[3])
    with torch.no_grad():
        loss, metrics = loss_of(p, reduction, return_metrics=True, z_loss=0.1)
    assert not loss.requires_grad
    assert_exact(metrics.logp, dense_stats(p).logp)
