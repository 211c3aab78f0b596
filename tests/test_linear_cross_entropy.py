"""linear_cross_entropy against dense autograd: values, gradients, isolation, memory, bad input; in
float64 on the CPU, and in the kernels' dtypes where those run."""

import pytest
import torch
from attention_cases import on
from head_cases import (
    CHUNK_SIZES,
    IGNORED,
    KERNELS,
    REDUCTIONS,
    ROWS,
    SCALINGS,
    assert_same_loss,
    check,
    check_loss,
    dtypes_of,
    loss_of,
    problem,
    shrink_blocks,
    turn,
)

import varstream as vs
from varstream.testing import assert_error_ratio, assert_exact, peak_memory, relative_error


def against_torch(backend, p, reduction, chunk_size, dtypes=(), **scaling):
    """Both sides of a problem: ours, and torch's cross_entropy of all logits."""
    check(
        backend,
        p,
        lambda q: loss_of(q, reduction, chunk_size=chunk_size, **scaling),
        lambda q: q.dense_loss(reduction, **scaling),
        ratio=3.0 if scaling.get("softcap") else 2.0,
        dtypes=dtypes,
    )


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_dense(backend, reduction, rows, chunk_size):
    p = problem(rows, ignored=[0, 7])
    against_torch(backend, p, reduction, chunk_size, turn(backend, reduction, rows, chunk_size))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scalings_equal_dense(backend, reduction, scaling, bias):
    dtypes = turn(backend, reduction, scaling, bias)
    against_torch(backend, problem(17, bias=bias, ignored=[3]), reduction, 5, dtypes, **scaling)


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_equal_dense(backend, reduction, ignored):
    dtypes = turn(backend, reduction, ignored)
    against_torch(backend, problem(16, ignored=ignored), reduction, 4, dtypes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inner_blocks(monkeypatch, reduction, scaling, dtype):
    """Several blocks of the weight and of rows give what one gives."""
    p = problem(17, ignored=[3], dtype=dtype)
    whole = loss_of(p, reduction, chunk_size=5, **scaling)
    upstream = torch.rand_like(whole)
    wanted = torch.autograd.grad(whole, p.leaves, upstream)
    shrink_blocks(monkeypatch)
    split = loss_of(p, reduction, chunk_size=5, **scaling)
    assert_exact(split, whole, torch.finfo(p.acc).eps * 8)
    for a, b in zip(torch.autograd.grad(split, p.leaves, upstream), wanted, strict=True):
        assert_exact(a, b, torch.finfo(dtype).eps * 8)


@pytest.mark.parametrize("width, classes", [(1, 1), (1, 2), (300, 7), (300, 7001), (8, 31)])
def test_shapes_equal_dense(backend, width, classes):
    """One class, one feature, a width above 256 with bias, more classes than one weight block."""
    against_torch(backend, problem(13, width, classes, ignored=[2]), "mean", 6)


# Ends of a 16-byte word of 4 and of 8 logits, of a block's step of 2 words a thread.
EDGES = [3, 4, 5, 8, 9, 16, 2047, 2048, 2049, 4095, 4096, 4097]


@on(*KERNELS)
@pytest.mark.parametrize("classes", EDGES)
def test_edges_of_words_and_steps(backend, classes):
    against_torch(backend, problem(2, 24, classes), "sum", None)


@on(*KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [301, *EDGES])
def test_logits_in_the_dtype_of_the_inputs(backend, classes, dtype):
    """Rounded as plain PyTorch's are."""
    check(
        backend,
        problem(13 if classes == 301 else 2, 24, classes, ignored=[5]),
        lambda q: loss_of(q, "none", logits_dtype=dtype, chunk_size=5),
        lambda q: q.dense_loss("none"),
        dtypes=[dtype],
        rounded=True,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction):
    p = problem(5, 3, 4, ignored=[1])

    def run(x, weight, bias):
        return vs.linear_cross_entropy(
            x, weight, p.target, linear_bias=bias, reduction=reduction, softcap=3.0, chunk_size=2
        )

    assert torch.autograd.gradcheck(run, p.leaves)


@pytest.mark.parametrize("kind", ["int", "float", "0-d", "1-d", "int64"])
def test_normalizer_divides_the_sum(backend, kind):
    p = problem(ignored=[4])
    made = {
        "int": 37,
        "float": 37.0,
        "0-d": torch.tensor(37.0),
        "1-d": torch.tensor([37.0]),
        "int64": torch.tensor(37),
    }
    normalizer = backend.here(made[kind])
    ours = lambda q: loss_of(q, normalizer=normalizer)  # noqa: E731
    check(backend, p, ours, lambda q: q.dense_loss("sum") / 37)


def test_a_float_normalizer_keeps_the_precision_of_the_loss():
    p = problem()
    assert_same_loss(p, loss_of(p, normalizer=0.3), p.dense_loss("sum") / 0.3)


@pytest.mark.parametrize("normalizer", [0, torch.tensor(0), torch.tensor(-2.0)])
def test_a_normalizer_must_be_positive_where_rows_are_valid(normalizer):
    with pytest.raises(ValueError, match="normalizer must be above 0, got"):
        loss_of(problem(), normalizer=normalizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_weight": torch.zeros(3, 4)}, "linear_weight must have"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, "target must have size"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_direct_calls_are_checked(change, message):
    arguments = {
        "input": torch.zeros(5, 8, dtype=torch.float64),
        "linear_weight": torch.zeros(3, 8, dtype=torch.float64),
        "linear_bias": None,
        "target": torch.zeros(5, dtype=torch.int64),
        "ignore_index": -100,
        "logit_scale": 1.0,
        "softcap": 0.0,
        "temperature": 1.0,
        "chunk_size": 0,
        "max_rows": None,
        "logits_dtype": None,
    } | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.varstream.linear_cross_entropy(*arguments.values(), *[None] * 4, *[False] * 4)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.varstream.token_logprobs(*arguments.values(), None, *[False] * 4)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.varstream.token_logprobs_bwd(
            *[None] * 5, *arguments.values(), None, False, False, False
        )


@pytest.mark.parametrize("normalizer", [None, 0, 5, torch.tensor(0), torch.tensor(5.0)])
def test_all_ignored_gives_zero_loss_and_zero_gradients(backend, normalizer):
    for dtype in dtypes_of(backend):
        p = problem(ignored=IGNORED["all"]).on(backend, dtype)
        loss = loss_of(p, normalizer=backend.here(normalizer))
        assert loss.item() == 0.0
        for leaf, grad in zip(p.leaves, torch.autograd.grad(loss, p.leaves), strict=True):
            assert torch.equal(grad, torch.zeros_like(leaf))


def test_ignored_rows_of_none_are_plain_zero(backend):
    p = problem(ignored=[2, 9]).on(backend, dtypes_of(backend)[0])
    loss = loss_of(p, "none")
    assert not torch.signbit(loss[~p.valid]).any() and not loss[~p.valid].any()


def test_ignore_index_may_be_a_class(backend):
    p = problem()
    p.target[::3] = 5
    cross_entropy = torch.nn.functional.cross_entropy
    check(
        backend,
        p,
        lambda q: loss_of(q, ignore_index=5),
        lambda q: cross_entropy(q.logits(), q.target, ignore_index=5),
    )


def test_masked_classes_with_infinite_bias(backend):
    p = problem(bias=True)
    with torch.no_grad():
        p.bias[[c for c in range(23) if c not in set(p.target.tolist())][0]] = -torch.inf
    against_torch(backend, p, "mean", 5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_result_hardly_depends_on_chunk_size(backend, reduction):
    """The weight's gradient is summed over chunks in another order; a row's values not at all."""
    p = problem(61).on(backend, torch.float32)
    for size in (1, 4, 7, 16, None):
        whole = loss_of(p, reduction, chunk_size=100)
        assert_same_loss(p, loss_of(p, reduction, chunk_size=size), whole, 1e-6)


@on(*KERNELS)
def test_a_bound_on_the_rows(backend):
    """As many rows as said are walked, whatever their number turns out to be; too many: NaN."""
    p = problem(17, ignored=[0, 3, 16])
    for bound in (14, 15, 17, 400):
        for reduction in REDUCTIONS:
            check_loss(backend, p, reduction, chunk_size=4, max_rows=bound)
    q = p.on(backend, torch.float32)
    assert loss_of(q, max_rows=13).isnan()
    assert loss_of(q, "none", max_rows=13).isnan().any()


# --- numerics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_ratio(backend, dtype, softcap):
    """At most twice plain PyTorch's error (gradients with softcap: three times)."""
    low = problem(67, 32, 301, dtype=dtype, ignored=[1, 2, 50]).on(backend, dtype)
    exact = low.cast(torch.float64)
    plain = low.cast(dtype)
    results = []
    for p in (low, plain, exact):
        dense = p is not low
        loss = p.dense_loss("mean", softcap=softcap) if dense else loss_of(p, softcap=softcap)
        results.append((loss, *torch.autograd.grad(loss, p.leaves)))
    assert results[0][0].dtype == torch.float32
    for i, (ours, theirs, truth) in enumerate(zip(*results, strict=True)):
        ratio = 3.0 if i > 0 and softcap > 0 else 2.0
        assert i == 0 or ours.dtype == dtype
        assert_error_ratio(ours, theirs, truth, ratio)


@pytest.mark.parametrize("margin", [5.0, 15.0, 40.0])
def test_confident_targets(backend, margin):
    """p(target) -> 1: the gradient p - 1 must not be lost to a rounded p."""
    p = problem(16, 16, 16, bias=False).on(backend, torch.float64)
    with torch.no_grad():
        p.weight.copy_(torch.eye(16, dtype=torch.float64))
        p.input.copy_(torch.eye(16, dtype=torch.float64)[p.target] * margin)
    single = p.cast(torch.float32)
    loss = loss_of(single, chunk_size=5)
    plain = single.dense_loss("mean")
    for ours, theirs, truth in zip(
        torch.autograd.grad(loss, single.leaves),
        torch.autograd.grad(plain, single.leaves),
        torch.autograd.grad(p.dense_loss("mean"), p.leaves),
        strict=True,
    ):
        if backend.exact:
            assert_error_ratio(ours, theirs, truth)
            continue
        # Kernels sum in another order, and their exponentials are off by a few 1e-7.
        allowed = max(3 * relative_error(theirs, truth), 1e-6)
        assert relative_error(ours, truth) <= allowed


@pytest.mark.parametrize("offset", [2.0**20, 2.0**24])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_common_offset_of_the_logits(backend, reduction, offset):
    """Logits far out in float32, exactly representable: loss and dX as without the offset."""
    p = problem(16, 8, 23, bias=False).on(backend, torch.float32)
    with torch.no_grad():
        p.weight.copy_(torch.randint(-1, 2, p.weight.shape) * 2.0)
        p.input.copy_(torch.randint(-1, 2, p.input.shape).float())
        p.weight[:, 0], p.input[:, 0] = 1.0, 0.0
    plain = loss_of(p, reduction, chunk_size=5)
    upstream = torch.rand_like(plain)
    (wanted,) = torch.autograd.grad(plain, p.weight, upstream)
    with torch.no_grad():
        p.input[:, 0] = offset
    moved = loss_of(p, reduction, chunk_size=5)
    assert_exact(moved, plain, 1e-6)
    (grad,) = torch.autograd.grad(moved, p.weight, upstream)
    assert_exact(grad[:, 1:], wanted[:, 1:], 1e-5)


def test_underflowing_target_probability(backend):
    """p(target) = 0 in float32, yet its loss is the logits' gap."""
    x = backend.here(torch.tensor([[1.0]])).requires_grad_()
    weight = backend.here(torch.tensor([[500.0], [0.0]])).requires_grad_()
    loss = vs.linear_cross_entropy(x, weight, backend.here(torch.tensor([1])))
    assert loss.item() == 500.0
    assert torch.autograd.grad(loss, x)[0].item() == 500.0


def test_bitwise_repeatable(backend):
    p = problem(130, 33, 501, ignored=[5]).on(backend, torch.float32)
    runs = []
    for _ in range(2):
        loss = loss_of(p, chunk_size=32)
        runs.append((loss, *torch.autograd.grad(loss, p.leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- isolation, memory ----------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("ignored", [k for k in IGNORED if k != "none"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_are_never_read(backend, reduction, ignored, garbage):
    p = problem(ignored=IGNORED[ignored]).on(backend, dtypes_of(backend)[-1])
    clean = loss_of(p, reduction, chunk_size=4)
    upstream = torch.randn_like(clean)
    wanted = torch.autograd.grad(clean, p.leaves, upstream)
    with torch.no_grad():
        p.input[~p.valid] = garbage
        if reduction == "none":
            upstream[~p.valid] = garbage
    planted = loss_of(p, reduction, chunk_size=4)
    assert torch.equal(clean, planted)
    for a, b in zip(wanted, torch.autograd.grad(planted, p.leaves, upstream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", [[], [0, 100, 1023]])
def test_never_holds_all_logits(reduction, ignored):
    p = problem(1024, 32, 2000, dtype=torch.float32, bias=False, ignored=ignored)
    upstream = torch.ones(()) if reduction != "none" else torch.rand(1024)

    def run():
        return torch.autograd.grad(loss_of(p, reduction, chunk_size=64), p.leaves, upstream)

    run()
    gradients = p.input.nbytes + p.weight.nbytes
    logits = 1024 * 2000 * 4
    assert peak_memory(run) - gradients < 0.15 * logits


def test_automatic_chunks_stay_small():
    """The default holds 512 rows of logits at most."""
    p = problem(4096, 8, 2000, dtype=torch.float32, bias=False)
    run = lambda: torch.autograd.grad(loss_of(p), p.leaves)  # noqa: E731
    gradients = p.input.nbytes + p.weight.nbytes
    assert peak_memory(run) - gradients < 0.15 * 4096 * 2000 * 4
