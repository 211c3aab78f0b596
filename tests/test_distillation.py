"""objectives.distillation against dense autograd and TRL's formula; numerics, memory."""

import os
from dataclasses import dataclass

import pytest
import torch
from attention_cases import Backend, on
from head_cases import (
    CHUNK_SIZES,
    GRADIENT_TOLERANCE,
    IGNORED,
    KERNELS,
    ROWS,
    check,
    dtypes_of,
    here,
    turn,
)
from torch import Tensor

from varstream import objectives
from varstream.ops.linear_distillation import DistillationCall
from varstream.reference import distillation as reference
from varstream.testing import assert_error_ratio, assert_exact, peak_memory

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

BETAS = [0.0, 0.1, 0.5, 1.0]
SCALINGS = {
    "plain": {},
    "scale": {"logit_scale": 0.7, "teacher_logit_scale": -1.2},
    "temperature": {"temperature": 1.7},
    "softcap": {"softcap": 2.5},
    "teacher_softcap": {"teacher_softcap": 1.5},
    "all": {
        "logit_scale": -1.3,
        "softcap": 4.0,
        "temperature": 0.8,
        "teacher_logit_scale": 0.9,
        "teacher_softcap": 3.0,
    },
}


@dataclass
class Problem:
    """Student (N, d), (V, d), (V,), teacher (N, e), (V, e), (V,), mask (N,)."""

    student: tuple[Tensor, Tensor, Tensor | None]
    teacher: tuple[Tensor, Tensor, Tensor | None]
    mask: Tensor | None

    @property
    def leaves(self):
        return [t for t in self.student if t is not None]

    def cast(self, dtype):
        new = [[None if t is None else t.detach().to(dtype) for t in self.student]]
        new.append([None if t is None else t.to(dtype) for t in self.teacher])
        for t in new[0]:
            if t is not None:
                t.requires_grad_()
        return Problem(tuple(new[0]), tuple(new[1]), self.mask)

    def on(self, backend: Backend, dtype: torch.dtype):
        """The same values as new leaves of a dtype where the back end runs."""
        cast = self.cast(dtype)
        sides = [tuple(backend.here(t) for t in side) for side in (cast.student, cast.teacher)]
        student = tuple(None if t is None else t.detach().requires_grad_() for t in sides[0])
        return Problem(student, sides[1], backend.here(self.mask))

    def run(self, **options):
        (x, w, b), (y, v, c) = self.student, self.teacher
        return objectives.distillation(
            x, w, y, v, self.mask, linear_bias=b, teacher_bias=c, **options
        )

    def rows(self):
        rows = self.student[0].shape[0]
        return torch.ones(rows, dtype=torch.bool) if self.mask is None else self.mask

    def logits(self, scaling):
        return [
            head_logits(*side, scaling.get(prefix + "logit_scale", 1.0), scaling, prefix)
            for side, prefix in ((self.student, ""), (self.teacher, "teacher_"))
        ]

    def dense(self, beta=0.0, token_weight=None, reduction="mean", **scaling):
        """By ordinary autograd on whole logits; rows out of the mask are dropped first."""
        rows = self.rows()
        z, u = (logits[rows] for logits in self.logits(scaling))
        s, t = z.log_softmax(1), u.log_softmax(1)
        losses = dense_divergence(s, t, beta).sum(1)
        if token_weight is not None:
            losses = losses * token_weight[rows]
        if reduction == "none":
            return torch.zeros(rows.shape[0], dtype=losses.dtype).index_put((rows,), losses)
        return losses.sum() / (max(1, int(rows.sum())) if reduction == "mean" else 1)


def head_logits(x, weight, bias, scale, scaling, prefix):
    z = torch.nn.functional.linear(x, weight, bias) * scale
    cap = scaling.get(prefix + "softcap", 0.0)
    if cap:
        z = cap * torch.tanh(z / cap)
    return z / scaling.get("temperature", 1.0)


def dense_divergence(s, t, beta):
    p, q = s.exp(), t.exp()
    if beta == 0:
        return q * (t - s)
    if beta == 1:
        return p * (s - t)
    m = ((1 - beta) * p + beta * q).log()
    return beta * q * (t - m) + (1 - beta) * p * (s - m)


def problem(rows=16, d=9, e=6, classes=23, *, bias=True, left_out=None, dtype=torch.float64):
    def side(width):
        return (
            torch.randn(rows, width, dtype=dtype),
            torch.randn(classes, width, dtype=dtype),
            torch.randn(classes, dtype=dtype) if bias else None,
        )

    mask = None
    if left_out is not None:
        mask = torch.ones(rows, dtype=torch.bool)
        mask[[r for r in left_out if r < rows]] = False
    student = side(d)
    for t in student:
        if t is not None:
            t.requires_grad_()
    return Problem(student, side(e), mask)


def against_dense(backend, p, options, dtypes=(), **walk):
    """Loss and gradients by both sides; ``options`` are the contract's, ``walk`` the chunks'."""
    moved = here(backend, options)
    check(
        backend,
        p,
        lambda q: q.run(**moved, **walk),
        lambda q: q.dense(**options),
        ratio=3.0 if options.get("softcap") else 2.0,
        dtypes=dtypes,
    )


def assert_same(p, loss, expected, tolerance=1e-12):
    assert_exact(loss, expected, tolerance, "loss")
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(loss, p.leaves, upstream)
    theirs = torch.autograd.grad(expected, p.leaves, upstream)
    for name, a, b in zip(("input", "weight", "bias"), ours, theirs, strict=False):
        assert_exact(a, b, tolerance, name)


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_equals_dense(backend, scaling, beta, reduction):
    p = problem(17, left_out=[3])
    options = {"beta": beta, "reduction": reduction, **scaling}
    dtypes = turn(backend, scaling, beta, reduction)
    against_dense(backend, p, options, dtypes, chunk_size=5)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_sizes(backend, rows, chunk_size):
    for beta, reduction in ((0.0, "none"), (0.3, "mean")):
        p = problem(rows, left_out=[0, 7])
        options, dtypes = {"beta": beta, "reduction": reduction}, turn(backend, rows, chunk_size)
        against_dense(backend, p, options, dtypes, chunk_size=chunk_size)


# Ends of a 16-byte word of logits, of a block's step of 2 words a thread, and of two steps.
EDGES = [3, 4, 5, 2047, 2048, 2049, 4097]


@on(*KERNELS)
@pytest.mark.parametrize("classes", EDGES)
@pytest.mark.parametrize("beta", BETAS)
def test_edges_of_words_and_steps(backend, beta, classes):
    p = problem(2, 8, 24, classes)
    against_dense(backend, p, {"beta": beta, "reduction": "sum"})


@pytest.mark.parametrize("left_out", IGNORED.values(), ids=IGNORED)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_masks(backend, beta, left_out):
    p = problem(bias=False, left_out=left_out)
    against_dense(backend, p, {"beta": beta}, chunk_size=4)


@pytest.mark.parametrize("d, e, classes", [(1, 3, 1), (1, 1, 2), (40, 7, 3001)])
def test_shapes(backend, d, e, classes):
    p = problem(13, d, e, classes)
    for beta in BETAS:
        against_dense(backend, p, {"beta": beta}, chunk_size=6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weight(backend, reduction):
    p = problem(left_out=[2, 3])
    weight = torch.randn(16, dtype=torch.float64)
    weight[5] = 0.0
    planted = weight.clone()
    planted[2] = torch.nan  # outside the mask
    planted = backend.here(planted)
    check(
        backend,
        p,
        lambda q: q.run(beta=0.3, token_weight=planted, reduction=reduction, chunk_size=5),
        lambda q: q.dense(0.3, weight.to(q.student[0].dtype), reduction),
    )


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_normalizer(backend, kind):
    p, normalizer = problem(left_out=[1]), backend.here(kind(37.0))
    ours = lambda q: q.run(normalizer=normalizer)  # noqa: E731
    check(backend, p, ours, lambda q: q.dense(reduction="sum") / 37)


def test_thin_functions():
    p = problem(left_out=[1])
    (x, w, b), (y, v, c) = p.student, p.teacher
    operands, options = (x, w, y, v, p.mask), {"linear_bias": b, "teacher_bias": c}
    assert_same(p, objectives.kl(*operands, **options), p.dense(0.0))
    assert_same(p, objectives.kl(*operands, reverse=True, **options), p.dense(1.0))
    assert_same(p, objectives.jsd(*operands, **options), p.dense(0.5))
    assert_same(p, objectives.jsd(*operands, beta=0.2, **options), p.dense(0.2))
    with pytest.raises(TypeError, match="beta"):
        objectives.kl(*operands, beta=0.5)
    with pytest.raises(TypeError, match="reverse must be a bool, got int"):
        objectives.kl(*operands, reverse=1)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_equals_trl(beta):
    from trl.experimental.gkd import GKDTrainer

    p = problem(18, left_out=[0, 4, 5, 17])
    labels = torch.where(p.mask, 1, -100).view(2, 9)
    for theirs, ours in (({}, {}), ({"num_items_in_batch": 40}, {"normalizer": 40})):
        logits = (z.view(2, 9, -1) for z in p.logits({}))
        expected = GKDTrainer.generalized_jsd_loss(*logits, labels, beta, 1.3, **theirs)
        assert_same(p, p.run(beta=beta, temperature=1.3, **ours), expected)


# --- numerics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_error_ratio(backend, dtype, softcap, beta):
    low = problem(67, 32, 24, 301, dtype=dtype, left_out=[1, 2, 50]).on(backend, dtype)
    exact, plain = low.cast(torch.float64), low.cast(dtype)
    results = []
    for p in (low, plain, exact):
        call = p.run if p is low else p.dense
        loss = call(beta=beta, softcap=softcap)
        results.append((loss, *torch.autograd.grad(loss, p.leaves)))
    assert results[0][0].dtype == torch.float32
    assert [g.dtype for g in results[0][1:]] == [dtype] * 3
    for i, (ours, theirs, truth) in enumerate(zip(*results, strict=True)):
        assert_error_ratio(ours, theirs, truth, 3.0 if i > 0 and softcap > 0 else 2.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("beta", BETAS)
def test_underflowed_probabilities(backend, beta, reduction):
    """Classes whose probability is 0 in the other's eyes, and far below the smallest number."""
    own = {"dtype": dtypes_of(backend)[0], "device": backend.device}
    x = torch.tensor([[1.0], [2.0]], **own, requires_grad=True)
    w = torch.tensor([[900.0], [0.0], [-900.0]], **own, requires_grad=True)
    y, v = torch.ones(2, 1, **own), -w.detach()
    loss = objectives.distillation(x, w, y, v, beta=beta, reduction=reduction)
    # All mass on class 0 for the student, on class 2 for the teacher
    gap = {0.0: [1800.0, 3600.0], 1.0: [1800.0, 1800.0]}
    h = torch.tensor(beta, dtype=torch.float64)
    entropy = (torch.special.entr(h) + torch.special.entr(1 - h)).item()
    expected = torch.tensor(gap.get(beta, [entropy] * 2), dtype=torch.float64)
    tolerance = 1e-12 if backend.exact else 1e-6
    assert_exact(loss.cpu(), expected if reduction == "none" else expected.mean(), tolerance)
    for grad in torch.autograd.grad(loss.sum(), (x, w)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_classes_both_exclude(backend, beta):
    """Vocabulary padding masked by -inf biases on both sides adds nothing and gets no gradient."""
    p = problem(5, classes=23).on(backend, dtypes_of(backend)[0])
    (x, w, b), (y, v, c) = p.student, p.teacher
    keep = torch.arange(23, device=backend.device) < 20
    padded = b.detach().masked_fill(~keep, -torch.inf).requires_grad_()
    loss = objectives.distillation(
        x,
        w,
        y,
        v,
        linear_bias=padded,
        teacher_bias=c.masked_fill(~keep, -torch.inf),
        beta=beta,
    )
    grads = torch.autograd.grad(loss, (x, w, padded))
    small = Problem((x, w, b), (y, v[keep], c[keep]), None)
    s = torch.nn.functional.linear(x, w[keep], b[keep]).log_softmax(1)
    t = torch.nn.functional.linear(*small.teacher).log_softmax(1)
    dense = dense_divergence(s, t, beta).sum(1).mean()
    tolerance = 1e-12 if backend.exact else GRADIENT_TOLERANCE
    assert_exact(loss, dense, tolerance)
    for a, b_ in zip(grads, torch.autograd.grad(dense, (x, w, b)), strict=True):
        assert_exact(a, b_, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (33, 1000), (2, 4099)])
def test_log_softmax_in_place(shape, dtype):
    z = torch.randn(shape, dtype=dtype) * 30 + 1000
    expected = z.log_softmax(1)
    reference._log_softmax_(z)
    assert torch.equal(z, expected)


def test_small_row_blocks(monkeypatch):
    monkeypatch.setitem(reference._BLOCK_ELEMENTS, "cpu", 50)
    p = problem(17, left_out=[3])
    for beta in BETAS:
        options = {"beta": beta, **SCALINGS["all"]}
        assert_same(p, p.run(chunk_size=7, **options), p.dense(**options))


def test_same_heads_have_no_divergence(backend):
    """To rounding on the CPU, exactly in the kernels."""
    for dtype in dtypes_of(backend):
        x, w = problem(bias=False).on(backend, dtype).leaves
        for beta in BETAS:
            loss = objectives.distillation(x, w, x, w, beta=beta)
            grads = torch.autograd.grad(loss, (x, w))
            most = 1e-14 if backend.exact else 0.0
            assert abs(loss.item()) <= most
            assert all(g.abs().max() <= most for g in grads)


# --- isolation, memory, autograd ------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_rows_out_of_the_mask_are_never_read(backend, garbage, beta, reduction):
    p = problem(left_out=[0, 5, 6, 15]).on(backend, dtypes_of(backend)[-1])

    def run():
        loss = p.run(beta=beta, reduction=reduction, chunk_size=4)
        upstream = torch.arange(1.0, 17).to(loss) if loss.dim() else None
        if upstream is not None:
            upstream[~p.mask] = garbage
        return loss, *torch.autograd.grad(loss, p.leaves, upstream)

    clean = run()
    with torch.no_grad():
        p.student[0][~p.mask] = garbage
        p.teacher[0][~p.mask] = garbage
    for a, b in zip(clean, run(), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(backend, reduction):
    for p in (problem(0), problem(4, left_out=range(4))):
        p = p.on(backend, dtypes_of(backend)[0])
        loss = p.run(reduction=reduction, beta=0.5)
        assert not loss.any() and loss.shape == ((p.rows().shape) if reduction == "none" else ())
        for grad, leaf in zip(torch.autograd.grad(loss.sum(), p.leaves), p.leaves, strict=True):
            assert grad.shape == leaf.shape and not grad.any()
        assert p.run(normalizer=torch.tensor(0.0)).item() == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("beta", BETAS)
def test_never_holds_all_logits(beta, reduction):
    p = problem(1024, 64, 64, 8000, dtype=torch.float32, bias=False)

    def step():
        loss = p.run(beta=beta, reduction=reduction, chunk_size=64)
        return torch.autograd.grad(loss.sum(), p.leaves)

    step()
    gradients = sum(leaf.nbytes for leaf in p.leaves)
    assert peak_memory(step) - gradients <= 0.15 * 1024 * 8000 * 4


def test_automatic_chunk_is_half():
    from varstream.reference.head import Head, auto_chunk_size

    head = Head(torch.zeros(8000, 1), None, 1.0, 0.0, 1.0)
    assert reference.chunk_rows(0, head) == auto_chunk_size(8000, 4) // 2 == 256
    assert reference.chunk_rows(7, head) == 7


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_frozen_operands(backend, frozen, reduction):
    p = problem(left_out=[3]).on(backend, dtypes_of(backend)[0])
    tolerance = 1e-12 if backend.exact else GRADIENT_TOLERANCE
    wanted = torch.autograd.grad(p.dense(0.5, reduction=reduction).sum(), p.leaves)
    for i in frozen:
        p.leaves[i].requires_grad_(False)
    loss = p.run(beta=0.5, reduction=reduction).sum()
    assert loss.requires_grad == (len(frozen) < 3)
    if loss.requires_grad:
        loss.backward()
    for i, leaf in enumerate(p.leaves):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_exact(leaf.grad, wanted[i], tolerance)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teacher_is_a_constant(reduction):
    p = problem()
    for t in p.teacher:
        t.requires_grad_()
    p.run(beta=0.5, reduction=reduction).sum().backward()
    assert all(t.grad is None for t in p.teacher)
    assert all(t.grad is not None for t in p.student)
    with torch.no_grad():
        assert not p.run().requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward(backend, reduction):
    p = problem().on(backend, dtypes_of(backend)[0])
    loss = p.run(beta=0.5, reduction=reduction).sum()
    first = torch.autograd.grad(loss, p.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, p.leaves, torch.full_like(loss, 2.0))
    for a, b in zip(first, second, strict=True):
        assert_exact(b, 2 * a)
    (grad,) = torch.autograd.grad(
        p.run(beta=0.5, reduction=reduction).sum(), p.student[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), p.student[1])


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(reduction, beta):
    p = problem(4, 3, 2, 5, left_out=[1])
    y, v, c = p.teacher

    def call(x, weight, bias):
        return objectives.distillation(
            x,
            weight,
            y,
            v,
            p.mask,
            linear_bias=bias,
            teacher_bias=c,
            beta=beta,
            softcap=3.0,
            reduction=reduction,
        )

    assert torch.autograd.gradcheck(call, p.leaves)


def raw(p, token_weight=None, beta=0.4):
    scalars = (beta, 1.2, 0.9, 0.0, 1.1, 2.0, 3)
    return DistillationCall(*p.student, *p.teacher, p.mask, token_weight, *scalars)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False,) * 3], ids=str)
def test_opcheck(needs):
    p = problem(5, left_out=[1])
    op = torch.ops.varstream.linear_distillation.default
    torch.library.opcheck(op, (*raw(p), *needs))
    plain = Problem((*problem(5, bias=False).student,), p.teacher, None)
    # A positive sum: opcheck's upstream is its sign, and a backward may scale the op's own outputs.
    torch.library.opcheck(op, (*raw(plain, torch.rand(5).double()), *needs[:2], False))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles(reduction):
    p = problem(16, left_out=[3])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run():
        return p.run(beta=0.5, reduction=reduction, chunk_size=5).square().sum()

    assert_same(p, run(), p.dense(0.5, reduction=reduction).square().sum())


def test_autocast():
    p = problem(16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = p.run(beta=0.5)
    low = p.cast(torch.bfloat16)
    assert loss.item() == low.run(beta=0.5).item()
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, p.leaves))


def test_mixed_dtypes_of_student_and_teacher():
    p = problem(16, dtype=torch.float32)
    p.teacher = p.cast(torch.bfloat16).teacher
    wide = Problem(p.student, tuple(t.float() for t in p.teacher), None)
    assert p.run(beta=0.5).item() == wide.run(beta=0.5).item()


def test_direct_calls_are_checked():
    p = problem(5)
    bad = raw(p)._replace(beta=2.0)
    with pytest.raises(RuntimeError, match="varstream::linear_distillation: beta must be <= 1.0"):
        torch.ops.varstream.linear_distillation(*bad, False, False, False)
