"""The softmax kernel over rows of logits, below the head's drivers: against float64, in every way
a row can be held, with poison around it, and by the bytes it moves."""

from __future__ import annotations

import emulation
import pytest
import torch
from attention_cases import on
from head_cases import KERNELS
from row_cases import (
    LARGE_BYTES,
    RESIDENCIES,
    SCHEDULES,
    SOFTMAX_INPUTS,
    SOFTMAX_RESULTS,
    WORD,
    Rows,
    bytes_of,
    cluster_barriers,
    device,
    long_classes,
    operator,
    softmax_rows,
)

HALVES = (torch.bfloat16, torch.float16)
# Of stored values and of the gradient over them.
PAIRS = [(torch.float32, torch.float32), *((torch.float32, h) for h in HALVES)]
PAIRS += [(h, h) for h in HALVES]
each_pair = pytest.mark.parametrize("dtypes", PAIRS, ids=lambda d: f"{d[0]}-{d[1]}")
each_residency = pytest.mark.parametrize("residency", RESIDENCIES)


def truth(values, target, scaling=(1.0, 0.0, 1.0), **inputs):
    """Every result and the gradient in float64, by autograd."""
    a = values.double().requires_grad_()
    given = {name: t.double() for name, t in inputs.items() if t is not None}
    z = (a + given["bias"] if "bias" in given else a) * scaling[0]
    if scaling[1] > 0:
        z = scaling[1] * torch.tanh(z / scaling[1])
    z = z / scaling[2]
    logp, lse = z.log_softmax(1), z.logsumexp(1)
    weight = given.get("class_weight", torch.ones(values.shape[1], dtype=torch.float64))
    found = {"logp": logp.gather(1, target), "lse": lse}
    found["entropy"] = -torch.where(logp.exp() == 0, 0, logp.exp() * logp).sum(1)
    found["class_sum"] = torch.where(weight == 0, 0, weight * logp).sum(1)
    found["log_sum_sq"] = (2 * logp).logsumexp(1)
    loss = -(found["logp"] * given.get("dnll", torch.ones_like(target))).sum()
    loss = loss - (found["class_sum"] * given.get("dsmooth", 0)).sum()
    loss = loss + (lse * given.get("dlse", 0)).sum() + (lse**2 * given.get("lse_sq_scale", 0)).sum()
    loss = loss + (found["entropy"] * given.get("dentropy", 0)).sum()
    (found["gradient"],) = torch.autograd.grad(loss, a)
    found = {name: value.detach() for name, value in found.items()}
    return found | {"argmax": z.argmax(1)}


def options_of(rows, classes, targets):
    """Every input and result at once."""
    given = {
        "bias": torch.randn(classes),
        "class_weight": torch.rand(classes) * (torch.rand(classes) > 0.2),
        "dnll": torch.randn(rows, targets),
        "dsmooth": torch.rand(rows) * 0.1,
        "dlse": torch.randn(rows) * 0.1,
        "dentropy": torch.randn(rows),
        "lse_sq_scale": torch.tensor(0.003),
    }
    return given, {"scaling": (-1.3, 20.0, 0.7), "wanted": SOFTMAX_RESULTS}


def assert_true(found, want, live=slice(None)):
    """Values near 1e-5 of their size plus 1; gradients to their dtype's rounding of a row's top."""
    for name, got in found.items():
        got, expected = got[live], want[name][live]
        if name == "argmax":
            assert torch.equal(got, expected), name
            continue
        assert got.isfinite().all(), name
        if name != "gradient":
            error = (got - expected).abs() / (1 + expected.abs())
            assert error.max() < 1e-5, f"{name} is off by {error.max():.1e}"
            continue
        rounding = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[got.dtype]
        scale = expected.abs().amax(1, keepdim=True) + 1e-3
        error = ((got.double() - expected).abs() / scale).max()
        assert error < rounding, f"gradient in {got.dtype} is off by {error:.1e} of its row's top"


def logits(rows, classes, dtype, spread=3.0):
    return (torch.randn(rows, classes) * spread).to(dtype)


# --- against float64 ------------------------------------------------------------------------------


@on(*KERNELS)
@each_residency
@each_pair
def test_a_long_row_held_in_every_way(backend, dtypes, residency):
    values = logits(2, long_classes(dtypes[0]), dtypes[0])
    classes = values.shape[1]
    target = torch.tensor([[0, classes - 1, classes // 2], [classes // 3] * 3])
    for given, rest in (({}, {}), options_of(2, classes, 3)):
        want = truth(values, target, rest.get("scaling", (1.0, 0.0, 1.0)), **given)
        with device(backend, RESIDENCIES[residency]):
            found = softmax_rows(backend, Rows(values), target, gradient=dtypes[1], **given, **rest)
            assert_true(found, want)
            rows = Rows(values)  # without a gradient the values stay
            found = softmax_rows(backend, rows, target, **given, **rest)
            assert_true(found, want)
            assert torch.equal(rows.gradient(dtypes[0]), values)


# Ends of words and of steps of both word sizes, of one thread's second word.
CLASSES = [1, 2, 3, 4, 5, 7, 8, 9, 31, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8193]


@on(*KERNELS)
@pytest.mark.parametrize("classes", CLASSES)
@each_pair
def test_every_edge(backend, dtypes, classes):
    """Kept, in rings, and in clusters some of whose blocks have nothing to do."""
    values = logits(1, classes, dtypes[0])
    target = torch.randint(0, classes, (1, 2))
    given, rest = options_of(1, classes, 2)
    plain = classes % 2 == 0
    if plain:
        given, rest = {"dnll": given["dnll"]}, {}
    want = truth(values, target, rest.get("scaling", (1.0, 0.0, 1.0)), **given)
    for residency in ((LARGE_BYTES, 1), (34 << 10, 1), (12 << 10, 8)):
        if residency[1] == 8 and classes > 8192:
            continue
        with device(backend, residency):
            found = softmax_rows(
                backend, Rows(values, extra=0), target, gradient=dtypes[1], **given, **rest
            )
        assert_true(found, want)


@on(*KERNELS)
@pytest.mark.parametrize("option", ["dnll", "dsmooth", "dlse", "dentropy", "lse_sq_scale", "bias"])
def test_each_upstream_gradient_alone(backend, option):
    values, target = logits(3, 301, torch.float32), torch.randint(0, 301, (3, 1))
    given = {option: options_of(3, 301, 1)[0][option]}
    if option not in ("dnll", "bias"):
        given["dnll"] = torch.zeros(3, 1)
    found = softmax_rows(backend, Rows(values), target, gradient=torch.float32, **given)
    assert_true(found, truth(values, target, **given))


@on(*KERNELS)
@pytest.mark.parametrize("targets", [1, 7, 300, 1024])
def test_any_number_of_targets(backend, targets):
    """Duplicates among them: each class's entry holds the sum of theirs."""
    values, target = logits(2, 50, torch.float32), torch.randint(0, 50, (2, targets))
    given = {"dnll": torch.randn(2, targets)}
    found = softmax_rows(backend, Rows(values), target, gradient=torch.float32, **given)
    assert_true(found, truth(values, target, **given))


# --- the ways agree -------------------------------------------------------------------------------


@on("emulated")
@each_pair
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_ways_of_holding_a_row_agree(backend, dtypes, everything):
    """Bit by bit where the sums are formed in the same order; clusters form them in their own."""
    values = logits(1, long_classes(dtypes[0]), dtypes[0])
    classes = values.shape[1]
    target = torch.tensor([[5, classes - 1]])
    given, rest = options_of(1, classes, 2) if everything else ({}, {})
    found, barriers, read = {}, {}, {}
    for name, residency in RESIDENCIES.items():
        with device(backend, residency):

            def call(name=name):
                found[name] = softmax_rows(
                    backend, Rows(values), target, gradient=dtypes[1], **given, **rest
                )

            read[name], _ = bytes_of(call)
            barriers[name] = cluster_barriers()
    row = -(-values.nbytes // WORD) * WORD
    assert read == {name: row * (2 if name == "ring" else 1) for name in RESIDENCIES}
    assert barriers == {name: 2 * name.startswith("cluster") for name in RESIDENCIES}
    for name, result in found["ring"].items():
        assert torch.equal(result, found["kept"][name]), name
    for way in ("cluster2", "cluster4", "cluster8"):
        for name, result in found[way].items():
            same = found["kept"][name]
            if name == "argmax":
                assert torch.equal(result, same)
            elif name == "gradient" and dtypes[1] != torch.float32:
                top = same.float().abs().max()
                off = (result.float() - same.float()).abs().max()
                assert off <= torch.finfo(dtypes[1]).eps * top, way
            else:
                assert torch.allclose(result, same, rtol=1e-6, atol=1e-6), (way, name)


@on("emulated")
@each_residency
@pytest.mark.parametrize("dtypes", [PAIRS[0], PAIRS[1], PAIRS[3]], ids=str)
def test_the_order_of_threads_is_nothing(backend, dtypes, residency):
    values = logits(1, long_classes(dtypes[0]), dtypes[0])
    target = torch.tensor([[7, 7, values.shape[1] - 1]])
    given, rest = options_of(1, values.shape[1], 3)
    first = None
    try:
        for schedule in SCHEDULES:
            emulation.choose_schedule(schedule)
            with device(backend, RESIDENCIES[residency]):
                found = softmax_rows(
                    backend, Rows(values), target, gradient=dtypes[1], **given, **rest
                )
            first = first or found
            assert all(torch.equal(found[name], first[name]) for name in first), schedule
    finally:
        emulation.choose_schedule()


@on("emulated")
@pytest.mark.parametrize("residency", ["ring", "cluster8"])
def test_a_plain_row_narrowed_in_place(backend, residency):
    """Gradients of half the width cover values that other threads have yet to read."""
    values = logits(1, long_classes(torch.float32), torch.float32)
    target = torch.tensor([[11]])
    found = []
    try:
        for schedule in SCHEDULES:
            emulation.choose_schedule(schedule)
            with device(backend, RESIDENCIES[residency]):
                call = softmax_rows(backend, Rows(values), target, gradient=torch.bfloat16)
            found.append(call["gradient"])
    finally:
        emulation.choose_schedule()
    assert_true({"gradient": found[0]}, truth(values, target))
    assert all(torch.equal(g, found[0]) for g in found)


# --- rows, targets and values that aren't right ---------------------------------------------------


@on(*KERNELS)
@each_residency
@pytest.mark.parametrize("dtypes", [PAIRS[0], PAIRS[1], PAIRS[4]], ids=str)
def test_rows_that_take_no_part(backend, dtypes, residency):
    """They are zeros afterwards, were never read and change nothing of the others."""
    clean = logits(3, long_classes(dtypes[0]), dtypes[0])
    classes = clean.shape[1]
    target = torch.randint(0, classes, (3, 2))
    given, rest = options_of(3, classes, 2)
    rest["gradient"] = dtypes[1]
    row = -(-classes * dtypes[0].itemsize // WORD) * WORD
    with device(backend, RESIDENCIES[residency]):
        whole = softmax_rows(backend, Rows(clean), target, **given, **rest)
        for count, first_row, live in ((7, 5, 2), (-4, 9, 0), (99, 0, 3)):
            values = clean.clone()
            values[live:] = torch.nan
            planted = dict(given)
            for name in ("dnll", "dsmooth", "dlse", "dentropy"):
                planted[name] = given[name].clone()
                planted[name][live:] = torch.nan
            rows, found = Rows(values), {}

            def call(rows=rows, found=found, planted=planted, count=count, first_row=first_row):
                found |= softmax_rows(
                    backend, rows, target, count=count, first_row=first_row, **planted, **rest
                )

            if backend.name == "emulated":
                read, written = bytes_of(call)
                assert read == live * row * (2 if residency == "ring" else 1)
                assert written == 3 * row * dtypes[1].itemsize // dtypes[0].itemsize
            else:
                call()
            for name, result in found.items():
                assert torch.equal(result[:live], whole[name][:live]), name
                empty = -1 if name == "argmax" else 0
                assert (result[live:] == empty).all(), name


BAD_TARGETS = [-1, -100, 2**31, 2**40 + 3, 2**62, -(2**62), 2**63 - 1, -(2**63)]


@on(*KERNELS)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("residency", ["kept", "ring", "cluster8"])
@pytest.mark.parametrize("dtypes", [PAIRS[0], PAIRS[1], PAIRS[3]], ids=str)
def test_targets_outside_the_classes(backend, dtypes, residency, everything):
    """NaN for these alone; their shares of the gradient are dropped, and no memory is read."""
    values = logits(2, long_classes(dtypes[0]), dtypes[0])
    classes = values.shape[1]
    bad = [*BAD_TARGETS, classes, classes + 1, classes + 5000]
    target = torch.tensor([[3, *bad, classes - 1], [classes - 1, *[4] * len(bad), 17]])
    given, rest = options_of(2, classes, target.shape[1]) if everything else ({}, {})
    with device(backend, RESIDENCIES[residency]):
        found = softmax_rows(backend, Rows(values), target, gradient=dtypes[1], **given, **rest)
    valid = (target >= 0) & (target < classes)
    scaling = rest.get("scaling", (1.0, 0.0, 1.0))
    want = truth(values, target.where(valid, 0), scaling, **given)
    logp = found.pop("logp")
    assert torch.equal(logp.isnan(), ~valid)
    assert (logp - want.pop("logp"))[valid].abs().max() < 1e-4
    assert_true(found, want, slice(1, 2))
    assert found["gradient"].isfinite().all()
    # Each bad target's share was subtracted at class 0 of the truth.
    upstream = given.get("dnll", torch.ones_like(target, dtype=torch.float32))
    slope = scaling[0] / scaling[2]
    z = values[0, 0].double() + (given["bias"][0] if everything else 0)
    if scaling[1]:
        slope *= 1 - torch.tanh(z * scaling[0] / scaling[1]) ** 2
    want["gradient"][0, 0] += slope * upstream[0][~valid[0]].double().sum()
    assert_true(found, want)


@on(*KERNELS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@each_residency
def test_garbage_stays_in_its_row(backend, residency, garbage):
    clean = logits(3, long_classes(torch.float32), torch.float32)
    target = torch.randint(0, 17000, (3, 2))
    given, rest = options_of(3, clean.shape[1], 2)
    with device(backend, RESIDENCIES[residency]):
        whole = softmax_rows(backend, Rows(clean), target, gradient=torch.bfloat16, **given, **rest)
        for column in (0, 9000, 17000):
            values = clean.clone()
            values[1, column] = garbage
            found = softmax_rows(
                backend, Rows(values), target, gradient=torch.bfloat16, **given, **rest
            )
            for name, result in found.items():
                assert torch.equal(result[[0, 2]], whole[name][[0, 2]]), name
        rows = softmax_rows(backend, Rows(values), target, gradient=torch.float32)
        if garbage == -torch.inf:
            assert rows["gradient"].isfinite().all() and rows["gradient"][1, 17000] == 0
        else:
            assert rows["logp"][1].isnan().all() or rows["lse"][1] == torch.inf
            assert not rows["gradient"][1].isfinite().all()


@on(*KERNELS)
@pytest.mark.parametrize("way", ["logits", "bias"])
def test_excluded_classes(backend, way):
    """Logits of -inf: probability and gradient 0, and nothing in sums where their weight is 0."""
    values, target = logits(2, 300, torch.float32), torch.randint(150, 300, (2, 2))
    given, rest = options_of(2, 300, 2)
    rest["scaling"] = (1.0, 0.0, 0.7)
    out = torch.arange(300) % 3 == 0
    target += (target % 3 == 0).long()
    target[target == 300] = 298
    given["class_weight"][out] = 0.0
    finite = {**given, "bias": torch.where(out, -2e4, given["bias"])}
    want = truth(values, target, rest["scaling"], **finite)
    if way == "bias":
        given["bias"] = torch.where(out, -torch.inf, given["bias"])
    else:
        values = torch.where(out, -torch.inf, values)
    found = softmax_rows(backend, Rows(values), target, gradient=torch.float32, **given, **rest)
    assert (found["gradient"][:, out] == 0).all()
    assert_true(found, want)


@on(*KERNELS)
@pytest.mark.parametrize("offset", [2.0**20, 2.0**24])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_an_offset_of_a_row_costs_no_digits(backend, everything, offset):
    """Logits that are exact there: all but the log-sum-exp as without it, bit by bit."""
    values, target = torch.randint(-6, 7, (2, 5000)) * 2.0, torch.randint(0, 5000, (2, 1))
    given, rest = options_of(2, 5000, 1) if everything else ({}, {})
    for name in ("bias", "lse_sq_scale"):
        given.pop(name, None)
    rest["scaling"] = (1.0, 0.0, 1.0)
    rest["gradient"] = torch.float32
    plain = softmax_rows(backend, Rows(values), target, **given, **rest)
    moved = softmax_rows(backend, Rows(values + offset), target, **given, **rest)
    moved["lse"] -= offset
    assert (moved.pop("lse") - plain.pop("lse")).abs().max() <= offset * 2.0**-23
    assert all(torch.equal(moved[name], plain[name]) for name in plain)


@on(*KERNELS)
@pytest.mark.parametrize("gap", [1.0, 3.0, 7.0])
@each_pair
def test_the_entry_of_a_likely_target(backend, dtypes, gap):
    """p - 1 as near as its dtype holds it, never 1 subtracted from a rounded p."""
    values, target = logits(4, 40, dtypes[0], 0.5), torch.randint(0, 40, (4, 1))
    values.scatter_(1, target, gap + 3.0)
    scale = torch.full((4, 1), 2.0**-6)
    for given in ({}, {"dsmooth": torch.zeros(4)}):
        found = softmax_rows(backend, Rows(values), target, gradient=dtypes[1], dnll=scale, **given)
        want = truth(values, target, dnll=scale)["gradient"].gather(1, target)
        error = ((found["gradient"].gather(1, target) - want) / want).abs().max()
        assert error < (0.004 if dtypes[1] in HALVES else 1e-3), error


@on(*KERNELS)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_the_entry_of_a_certain_target(backend, everything):
    """Where the sum's own rounding is seen, the entry is still that of the log-probability."""
    values, target = logits(4, 40, torch.float32, 0.5), torch.randint(0, 40, (4, 1))
    values.scatter_(1, target, 15.0)
    given = {"dsmooth": torch.zeros(4)} if everything else {}
    found = softmax_rows(backend, Rows(values), target, gradient=torch.float32, **given)
    entry, want = found["gradient"].gather(1, target), torch.expm1(found["logp"].double())
    assert ((entry - want) / want).abs().max() < 1e-5
    assert (want.abs() < 1e-4).all() and want.any()


@on("emulated")
@each_pair
def test_targets_at_the_ends_of_all_memory(backend, dtypes):
    """Nothing stands before or behind these rows, which a sanitizer watches."""
    values = logits(3, 16, dtypes[0])
    target = torch.tensor([[-1, 0], [3, 16], [16, 15]])
    given, rest = options_of(3, 16, 2)
    logp = torch.full((3, 2), torch.nan)
    inputs = [given[name] for name in SOFTMAX_INPUTS]
    arguments = (16, 0, None, target, *rest["scaling"], *inputs, dtypes[1], logp, *[None] * 8)
    operator(backend, "softmax_rows_")(values, *arguments)
    assert torch.equal(logp.isnan(), (target < 0) | (target > 15))
    assert values.view(dtypes[1])[:, :16].isfinite().all()


@on(*KERNELS)
@each_residency
def test_the_argmax_is_the_first_of_equals(backend, residency):
    values = logits(1, long_classes(torch.float32), torch.float32)
    target = torch.zeros(1, 1, dtype=torch.int64)
    with device(backend, RESIDENCIES[residency]):
        for places in ([0], [17000], [4, 8, 9000], [4252, 16000], [1024, 1028], [12000, 3, 17000]):
            tied = values.clone()
            tied[0, places] = 50.0
            found = softmax_rows(backend, Rows(tied), target, wanted=("argmax",))
            assert found["argmax"].item() == min(places)


# --- bytes ----------------------------------------------------------------------------------------


@on("emulated")
@each_pair
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("residency", ["kept", "cluster2", "cluster4", "cluster8"])
def test_a_row_that_is_held_is_read_once(backend, residency, everything, dtypes):
    """The bar: at most 1.05 times one read and one write of the chunk; exactly so, the counter
    leaves out only a row's few targets and vectors of classes that stay in the cache."""
    values = logits(1, long_classes(dtypes[0]), dtypes[0])
    target = torch.tensor([[3, 2000]])
    given, rest = options_of(1, values.shape[1], 2) if everything else ({}, {})
    padded = -(-values.nbytes // WORD) * WORD
    with device(backend, RESIDENCIES[residency]):
        for gradient in (dtypes[1], None):
            read, written = bytes_of(
                lambda gradient=gradient: softmax_rows(
                    backend, Rows(values), target, gradient=gradient, **given, **rest
                )
            )
            stored = padded * (0 if gradient is None else gradient.itemsize) // dtypes[0].itemsize
            assert read <= 1.05 * values.nbytes and read >= values.nbytes
            assert written == stored
