"""The distillation kernel over pairs of rows of logits, below its driver: against float64, in every
way the rows can be held, with poison around them, and by the bytes it moves."""

from __future__ import annotations

import emulation
import pytest
import torch
from attention_cases import on
from head_cases import KERNELS
from row_cases import (
    LARGE_BYTES,
    PAIR_RESIDENCIES,
    SCHEDULES,
    WORD,
    Rows,
    bytes_of,
    cluster_barriers,
    device,
    long_classes,
    operator,
)

BETAS = [0.0, 0.1, 0.5, 1.0]
GRADIENTS = [torch.float32, torch.bfloat16, torch.float16]
LONG = long_classes(torch.float32)
PLAIN = (1.0, 1.0, 0.0, 1.0, 0.0)  # temperature, scale and softcap of student and teacher
SCALED = (0.7, -1.3, 20.0, 0.9, 15.0)
each_beta = pytest.mark.parametrize("beta", BETAS)
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
each_residency = pytest.mark.parametrize("residency", PAIR_RESIDENCIES)


def distillation_rows(
    backend, student, teacher, beta, *, gradient=None, count=None, first_row=0, scaling=PLAIN, **vec
):
    """The kernel over a pair of Rows: losses, which start as NaN, and the gradient if wanted."""
    losses = backend.here(torch.full(student.values.shape[:1], torch.nan))
    for rows in (student, teacher):
        rows.buffer = backend.here(rows.buffer)
    operator(backend, "distillation_rows_")(
        student.padded,
        teacher.padded,
        student.values.shape[1],
        first_row,
        None if count is None else backend.here(torch.tensor(count)),
        beta,
        *scaling,
        *(backend.here(vec.get(name)) for name in ("bias", "teacher_bias", "dloss")),
        gradient,
        losses,
    )
    for rows in (student, teacher):
        rows.buffer = rows.buffer.cpu()
        rows.assert_poison_stays()
    assert torch.equal(teacher.gradient(torch.float32).nan_to_num(), teacher.values.nan_to_num())
    found = {"losses": losses.cpu()}
    return found if gradient is None else found | {"gradient": student.gradient(gradient)}


def logp_of(values, bias, temperature, scale, softcap):
    z = (values if bias is None else values + bias.double()) * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(1)


def truth(student, teacher, beta, scaling=PLAIN, bias=None, teacher_bias=None, dloss=None):
    """Losses and the student's gradient in float64, by autograd."""
    a = student.double().requires_grad_()
    s = logp_of(a, bias, scaling[0], *scaling[1:3])
    t = logp_of(teacher.double(), teacher_bias, scaling[0], *scaling[3:])
    p, q = s.exp(), t.exp()
    m = torch.log((1 - beta) * p + beta * q)
    if beta == 0:
        terms = q * (t - s)
    else:
        terms = beta * q * (t - m) + (1 - beta) * p * (s - m) if beta < 1 else p * (s - t)
    losses = terms.sum(1)
    upstream = torch.ones_like(losses) if dloss is None else dloss.double()
    (gradient,) = torch.autograd.grad(losses, a, upstream)
    return {"losses": losses.detach(), "gradient": gradient}


def assert_true(found, want, live=slice(None)):
    losses, expected = found["losses"][live], want["losses"][live]
    assert ((losses - expected).abs() <= 1e-6 + 1e-4 * expected.abs()).all(), (losses, expected)
    if "gradient" not in found:
        return
    got, expected = found["gradient"][live], want["gradient"][live]
    rounding = {torch.float32: 1e-4, torch.bfloat16: 6e-3, torch.float16: 1e-3}[got.dtype]
    scale = expected.abs().amax(1, keepdim=True) + 1e-2  # of differences of logits near 10
    error = ((got.double() - expected).abs() / scale).max()
    assert error < rounding, f"gradient in {got.dtype} is off by {error:.1e} of its row's top"


def pair(rows, classes):
    student = torch.randn(rows, classes) * 1.5
    return student, student + torch.randn(rows, classes)


def options_of(rows, classes):
    given = {"bias": torch.randn(classes), "teacher_bias": torch.randn(classes)}
    return given | {"dloss": torch.randn(rows), "scaling": SCALED}


# --- against float64 ------------------------------------------------------------------------------


@on(*KERNELS)
@each_residency
@each_gradient
@each_beta
def test_a_long_pair_held_in_every_way(backend, beta, gradient, residency):
    student, teacher = pair(1, LONG)
    options = options_of(1, LONG) if beta in (0.0, 0.5) else {}
    want = truth(student, teacher, beta, **options)
    with device(backend, PAIR_RESIDENCIES[residency]):
        for wanted in (gradient, None):
            ours, theirs = Rows(student), Rows(teacher)
            found = distillation_rows(backend, ours, theirs, beta, gradient=wanted, **options)
            assert_true(found, want)
    assert torch.equal(ours.gradient(torch.float32), student)  # without a gradient it stays


@on(*KERNELS)
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 31, 1023, 1025, 2047, 2048, 2049, 4097])
@each_beta
def test_every_edge(backend, beta, classes):
    """Kept, in rings, and in clusters some of whose blocks have nothing to do."""
    student, teacher = pair(1, classes)
    options = options_of(1, classes) if classes % 2 else {}
    want = truth(student, teacher, beta, **options)
    for place, residency in enumerate(((LARGE_BYTES, 1), (66 << 10, 1), (20 << 10, 8))):
        if place == 2 and classes > 4096:
            continue
        gradient = GRADIENTS[place]
        with device(backend, residency):
            ours, theirs = Rows(student, extra=0), Rows(teacher, extra=0)
            found = distillation_rows(backend, ours, theirs, beta, gradient=gradient, **options)
        assert_true(found, want)


# --- the ways agree -------------------------------------------------------------------------------


@on("emulated")
@each_gradient
@each_beta
def test_ways_of_holding_a_pair_agree(backend, beta, gradient):
    """Bit by bit where the sums are formed in the same order, to 1e-6 in clusters. Bytes: one read
    of both rows where they are held, else one for each pass; one write."""
    student, teacher = pair(1, LONG)
    options = options_of(1, LONG)
    found, read, barriers = {}, {}, {}
    row = -(-student.nbytes // WORD) * WORD
    for name, residency in PAIR_RESIDENCIES.items():
        with device(backend, residency):

            def call(name=name):
                rows = Rows(student), Rows(teacher)
                found[name] = distillation_rows(backend, *rows, beta, gradient=gradient, **options)

            read[name], written = bytes_of(call)
            barriers[name] = cluster_barriers()
            assert written == row * gradient.itemsize // 4
    passes = 2 if beta == 0 else 3
    assert read == {name: 2 * row * (passes if name == "ring" else 1) for name in read}
    assert 2 * row <= 1.05 * (student.nbytes + teacher.nbytes)
    assert barriers == {name: 3 * name.startswith("cluster") for name in barriers}
    for name, result in found["ring"].items():
        assert torch.equal(result, found["kept"][name]), name
    for way in ("cluster2", "cluster4", "cluster8"):
        same, result = found["kept"], found[way]
        assert torch.allclose(result["losses"], same["losses"], rtol=1e-6, atol=1e-6), way
        off = (result["gradient"].float() - same["gradient"].float()).abs().max()
        eps = 1e-6 if gradient == torch.float32 else torch.finfo(gradient).eps
        assert off <= 1e-7 + eps * same["gradient"].float().abs().max(), way


@on("emulated")
@each_residency
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_order_of_threads_is_nothing(backend, beta, residency):
    """Also where gradients of half the width cover values that others have yet to read."""
    student, teacher = pair(1, LONG)
    options, first = options_of(1, LONG), None
    try:
        for schedule in SCHEDULES:
            emulation.choose_schedule(schedule)
            with device(backend, PAIR_RESIDENCIES[residency]):
                rows = Rows(student), Rows(teacher)
                found = distillation_rows(backend, *rows, beta, gradient=torch.bfloat16, **options)
            first = first or found
            assert all(torch.equal(found[name], first[name]) for name in first), schedule
    finally:
        emulation.choose_schedule()
    assert_true(first, truth(student, teacher, beta, **options))


# --- rows and values that aren't right ------------------------------------------------------------


@on(*KERNELS)
@each_residency
@pytest.mark.parametrize("gradient", GRADIENTS[:2], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_rows_that_take_no_part(backend, beta, gradient, residency):
    clean, teacher = pair(3, LONG)
    options = options_of(3, LONG) | {"gradient": gradient}
    row = -(-LONG * 4 // WORD) * WORD
    with device(backend, PAIR_RESIDENCIES[residency]):
        whole = distillation_rows(backend, Rows(clean), Rows(teacher), beta, **options)
        for count, first_row, live in ((7, 5, 2), (-4, 9, 0), (99, 0, 3)):
            dead = torch.arange(3) >= live
            planted = options | {"dloss": options["dloss"].masked_fill(dead, torch.nan)}
            rows = [Rows(t.masked_fill(dead[:, None], torch.nan)) for t in (clean, teacher)]
            found, bounds = {}, {"count": count, "first_row": first_row}

            def call(rows=rows, found=found, planted=planted, bounds=bounds):
                found |= distillation_rows(backend, *rows, beta, **bounds, **planted)

            if backend.name == "emulated":
                read, written = bytes_of(call)
                passes = 1 if residency != "ring" else 2 if beta == 0 else 3
                assert read == live * 2 * row * passes
                assert written == 3 * row * gradient.itemsize // 4
            else:
                call()
            for name, result in found.items():
                assert torch.equal(result[:live], whole[name][:live]), name
                assert (result[live:] == 0).all(), name


@on(*KERNELS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@each_residency
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_garbage_stays_in_its_row(backend, side, residency, garbage):
    clean = pair(3, LONG)
    with device(backend, PAIR_RESIDENCIES[residency]):
        for beta in (0.0, 0.5):
            rows = [Rows(t) for t in clean]
            whole = distillation_rows(backend, *rows, beta, gradient=torch.bfloat16)
            planted = [t.clone() for t in clean]
            planted[side][1, 9000] = garbage
            rows = [Rows(t) for t in planted]
            found = distillation_rows(backend, *rows, beta, gradient=torch.bfloat16)
            for name, result in found.items():
                assert torch.equal(result[[0, 2]], whole[name][[0, 2]]), name
            assert found["losses"][1].isnan()


@on(*KERNELS)
@each_beta
def test_excluded_classes(backend, beta):
    """Those that both exclude by logits of -inf add nothing and have gradient 0."""
    student, teacher = pair(2, 300)
    out = torch.arange(300) % 3 == 0
    kept = [t[:, ~out] for t in (student, teacher)]
    want = truth(*kept, beta)
    rows = [Rows(t.masked_fill(out, -torch.inf)) for t in (student, teacher)]
    found = distillation_rows(backend, *rows, beta, gradient=torch.float32)
    assert (found["gradient"][:, out] == 0).all()
    found["gradient"] = found["gradient"][:, ~out]
    assert_true(found, want)


@on(*KERNELS)
@each_beta
def test_equal_rows_leave_exactly_nothing(backend, beta):
    student, _ = pair(2, 1000)
    rows = Rows(student), Rows(student)
    found = distillation_rows(backend, *rows, beta, gradient=torch.float32)
    assert not found["losses"].any() and not found["gradient"].any()
