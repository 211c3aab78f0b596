"""``max_rows``, ``validate`` and ``logits_dtype`` of the head: the caller's word on rows, targets
and the logits' bytes."""

from contextlib import nullcontext

import pytest
import torch
from emulation import emulated
from head_cases import (
    EVERYTHING,
    IGNORE,
    REDUCTIONS,
    dense,
    loss_of,
    options_of,
    problem,
    several_targets,
)

import varstream as vs
from varstream.cross_entropy import loss as driver
from varstream.testing import assert_error_ratio, assert_exact

FLOAT = 2e-6
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)

# --- the caller's bound ---------------------------------------------------------------------------


def run(p, reduction, **options):
    """Loss and gradients, log-probabilities, entropy, LSE and theirs."""
    loss = loss_of(p, reduction, **options)
    shared = {k: v for k, v in options.items() if k in ("chunk_size", "max_rows", "softcap")}
    stats = vs.token_logprobs(
        p.input, p.weight, p.target, linear_bias=p.bias, return_stats=True, **shared
    )
    weigh = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    total = (loss * weigh).sum() + sum((v * (i + 1)).sum() for i, v in enumerate(stats[:3]))
    return [loss, *stats, *torch.autograd.grad(total, p.leaves)]


@each_reduction
@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("names", [(), EVERYTHING], ids=["plain", "all"])
@pytest.mark.parametrize("spare", [0, 1, 20])
def test_bound_on_the_cpu(reduction, several, names, spare):
    p = problem(ignored=[0, 5, 6, 15])
    p = several_targets(p) if several else p
    options = options_of(p, names) | {"chunk_size": 5}
    rows = int((p.target != IGNORE).view(16, -1).any(1).sum())
    wanted = run(p, reduction, **options)
    for ours, theirs in zip(
        run(p, reduction, max_rows=rows + spare, **options), wanted, strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.emulated
@each_reduction
@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("names", [(), EVERYTHING], ids=["plain", "all"])
@pytest.mark.parametrize("spare", [0, 3, 20])
def test_bound_in_row_kernels(reduction, several, names, spare):
    p = problem(ignored=[0, 5, 6, 15], dtype=torch.float32)
    p = several_targets(p) if several else p
    options = options_of(p, names)
    rows = int((p.target != IGNORE).view(16, -1).any(1).sum())
    with emulated():
        wanted = run(p, reduction, chunk_size=5, **options)
        found = run(p, reduction, chunk_size=5, max_rows=rows + spare, **options)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_exact(ours, theirs, 3e-6)
    assert_exact(found[0], dense(p.cast(torch.float64), reduction, **options), 3e-6)


@each_reduction
def test_too_small_a_bound_is_an_error_on_the_cpu(reduction):
    p = problem(ignored=[0, 5])
    message = "max_rows must bound the rows that take part, 14 of them, got 13"
    with pytest.raises(ValueError, match=message):
        loss_of(p, reduction, max_rows=13)
    with pytest.raises(ValueError, match=message):
        vs.token_logprobs(p.input, p.weight, p.target, max_rows=13)
    assert loss_of(p, reduction, max_rows=14).isfinite().all()


@pytest.mark.emulated
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("into_buffer", [False, True], ids=["autograd", "weight_grad"])
@pytest.mark.parametrize("bound", [0, 5, 13])
@each_reduction
def test_too_small_a_bound_makes_nan_in_row_kernels(reduction, bound, into_buffer, smoothing):
    """Every float result says so, whatever a loss is made of."""
    p = problem(ignored=[0, 5], dtype=torch.float32)
    options = {"label_smoothing": smoothing, "max_rows": bound, "chunk_size": 4}
    if into_buffer:
        options["weight_grad"] = torch.zeros(23, 9)
    with emulated():
        loss = loss_of(p, reduction, **options)
        stats = vs.token_logprobs(p.input, p.weight, p.target, max_rows=bound, return_stats=True)
        loss.sum().backward()  # no error, no access out of bounds
    valid = p.target != IGNORE
    assert loss.isnan().all() if reduction != "none" else loss[valid].isnan().all()
    for name in ("logp", "entropy", "lse", "log_sum_sq_probs", "mean_logits"):
        assert getattr(stats, name)[valid].isnan().all(), name


@pytest.mark.parametrize(
    "kernels",
    [nullcontext, pytest.param(emulated, marks=pytest.mark.emulated)],
    ids=["composed", "emulated"],
)
@each_reduction
def test_a_bound_of_nothing(kernels, reduction):
    p = problem(ignored=[*range(16)], dtype=torch.float32)
    with kernels():
        found = run(p, reduction, max_rows=0)
    assert not found[0].any() and not any(grad.any() for grad in found[-3:])


@pytest.mark.parametrize(
    "value, error, message",
    [
        (-1, ValueError, "max_rows must be >= 0, got -1"),
        (3.0, TypeError, "max_rows must be an int, got float"),
        (True, TypeError, "max_rows must be an int, got bool"),
    ],
)
def test_bounds_that_are_none(value, error, message):
    p = problem()
    with pytest.raises(error, match=message):
        loss_of(p, max_rows=value)
    with pytest.raises(error, match=message):
        vs.token_logprobs(p.input, p.weight, p.target, max_rows=value)


@pytest.mark.emulated
@pytest.mark.parametrize("max_rows", [None, 13, 16])
def test_inert_rows_reach_nothing(max_rows):
    """NaN in ignored rows, walked or not."""
    p = problem(ignored=[0, 5, 15], dtype=torch.float32)
    with emulated():
        wanted = run(p, "sum", chunk_size=4)
        with torch.no_grad():
            p.input[~p.valid] = torch.nan
        found = run(p, "sum", chunk_size=4, max_rows=max_rows)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_exact(ours, theirs, FLOAT)


# --- validate -------------------------------------------------------------------------------------


def with_bad_target():
    p = problem(dtype=torch.float32)
    p.target[4] = 23
    return p


BAD = r"target must hold classes in \[0, 23\) or ignore_index=-100, got 23 at row 4"


@pytest.mark.parametrize("validate", [False, True])
def test_targets_are_checked_on_the_cpu_always(validate):
    p = with_bad_target()
    with pytest.raises(ValueError, match=BAD):
        loss_of(p, validate=validate)
    with pytest.raises(ValueError, match=BAD):
        vs.token_logprobs(p.input, p.weight, p.target, validate=validate)


@pytest.mark.emulated
@each_reduction
def test_targets_are_checked_in_row_kernels_when_asked(reduction):
    """Unchecked, their own loss is NaN, and nothing is read out of bounds."""
    p = with_bad_target()
    with emulated():
        loss = loss_of(p, reduction)
        logp = vs.token_logprobs(p.input, p.weight, p.target)
        with pytest.raises(ValueError, match=BAD):
            loss_of(p, reduction, validate=True)
        with pytest.raises(ValueError, match=BAD):
            vs.token_logprobs(p.input, p.weight, p.target, validate=True)
    wrong = torch.arange(16) == 4
    assert torch.equal(logp.isnan(), wrong)
    assert torch.equal(loss.isnan(), wrong) if reduction == "none" else loss.isnan()


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_validate_is_a_bool(value):
    p = problem()
    message = f"validate must be a bool, got {type(value).__name__}"
    with pytest.raises(TypeError, match=message):
        loss_of(p, validate=value)
    with pytest.raises(TypeError, match=message):
        vs.token_logprobs(p.input, p.weight, p.target, validate=value)


# --- the dtype of the logits ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, asked, message",
    [
        (
            torch.float64,
            torch.float32,
            r"None, torch.float64 or the dtype of input \(torch.float64\)",
        ),
        (
            torch.float32,
            torch.bfloat16,
            r"None, torch.float32 or the dtype of input \(torch.float32\)",
        ),
        (
            torch.bfloat16,
            torch.float16,
            r"None, torch.float32 or the dtype of input \(torch.bfloat16\)",
        ),
        (torch.bfloat16, "bfloat16", "got 'bfloat16'"),
        (torch.bfloat16, torch.bfloat16, "None or torch.float32 here: only the CUDA kernels of .*"),
    ],
)
def test_logits_dtypes_that_are_refused(dtype, asked, message):
    p = problem(dtype=dtype)
    with pytest.raises(ValueError, match=f"logits_dtype must be {message}|{message}"):
        loss_of(p, logits_dtype=asked)
    with pytest.raises(ValueError, match="logits_dtype must be"):
        vs.token_logprobs(p.input, p.weight, p.target, logits_dtype=asked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_default_by_its_name(dtype):
    p = problem(dtype=dtype)
    assert torch.equal(loss_of(p, logits_dtype=p.acc), loss_of(p))


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_reduction
def test_low_logits(monkeypatch, reduction, dtype):
    """Half the buffer, the error of a plain head that rounds its logits."""
    p = problem(32, 16, 200, ignored=[3], dtype=dtype)
    wide = p.cast(torch.float64)
    made, asked = [], []

    class Watched(driver.ChunkBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self.padded.nbytes)

    def watched_rows(rows, width, classes, itemsize):
        asked.append(itemsize)
        return 16

    monkeypatch.setattr(driver, "ChunkBuffer", Watched)
    monkeypatch.setattr(driver, "chunk_rows", watched_rows)
    results = []
    with emulated():
        for options in ({"logits_dtype": dtype}, {}):
            loss = loss_of(p, reduction, **options)
            results.append([loss, *torch.autograd.grad(loss.sum(), p.leaves)])
    walks = 2 if reduction == "none" else 1
    assert asked == [2] * walks + [4] * walks
    assert made[:walks] == [16 * 256 * 2] * walks and made[walks:] == [16 * 256 * 4] * walks
    plain, exact = p.dense_loss(reduction), wide.dense_loss(reduction)
    plains = [plain.float(), *torch.autograd.grad(plain.sum(), p.leaves)]
    exacts = [exact, *torch.autograd.grad(exact.sum(), wide.leaves)]
    for got in results:
        for ours, theirs, best in zip(got, plains, exacts, strict=True):
            assert_error_ratio(ours, theirs, best)
