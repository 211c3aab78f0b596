"""Objectives against per-sequence formulas, alone and through the head; rules, dtypes, errors."""

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import CASES, LENGTHS, batch

import varstream as vs
from varstream import objectives
from varstream.objectives.preference import log1mexp
from varstream.testing import assert_exact

ROWED = ("logp", "ref", "old", "token_advantage", "token_weight")


def assert_same(logp, loss, expected, tolerance=1e-12):
    assert loss.shape == () and loss.dtype == expected.dtype
    assert_exact(loss, expected, tolerance, "loss")
    (ours,) = torch.autograd.grad(loss, logp)
    (theirs,) = torch.autograd.grad(expected, logp)
    assert_exact(ours, theirs, tolerance, "gradient")


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_equals_formula(case, lengths, trained):
    call, formula = CASES[case]
    d = batch(lengths, trained)
    assert_same(d.logp, call(d.logp, d), formula(d))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=8).map(lambda x: x[: len(x) // 2 * 2]),
    trained=st.floats(0, 1),
    seed=st.integers(0, 1 << 30),
    case=st.sampled_from(sorted(CASES)),
)
def test_any_lengths_and_masks(lengths, trained, seed, case):
    torch.manual_seed(seed)
    d = batch(lengths, trained)
    if len(lengths) == d.rows:  # (B,) and (N,) are one shape: see test_batch_equal_to_rows
        return
    call, formula = CASES[case]
    assert_same(d.logp, call(d.logp, d), formula(d))


@pytest.mark.parametrize("case", CASES)
def test_through_the_head(case):
    """Gradients of hidden states and weight equal dense autograd over whole logits."""
    call, formula = CASES[case]
    d = batch(LENGTHS["ragged"])
    x = torch.randn(d.rows, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 7, dtype=torch.float64).mul(0.4).requires_grad_()
    target = torch.randint(0, 19, (d.rows,))
    dense = (x @ weight.t()).log_softmax(1).gather(1, target[:, None]).squeeze(1)
    reference = torch.randn(d.rows, dtype=torch.float64).mul(0.3)
    d.ref, d.old = dense.detach() + reference, dense.detach() - 0.5 * reference
    d.logp = dense
    expected = formula(d)
    logp = vs.token_logprobs(x, weight, target, chunk_size=5)
    loss = call(logp, d)
    assert_exact(loss, expected)
    ours = torch.autograd.grad(loss, (x, weight))
    for a, b in zip(ours, torch.autograd.grad(expected, (x, weight)), strict=True):
        assert_exact(a, b)


def test_batch_equal_to_rows():
    """A shape that is both (B,) and (N,) is taken as (B,)."""
    d = batch([2, 0], 1.0)
    loss = objectives.grpo(d.logp, d.mask, d.cu, advantages=torch.tensor([3.0, 5.0]))
    (grad,) = torch.autograd.grad(loss, d.logp)
    assert_exact(grad, torch.tensor([-0.75, -0.75]))


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", CASES)
def test_untrained_rows_never_leak(case, garbage):
    call, _ = CASES[case]
    d = batch(LENGTHS["primes"], 0.5)
    d.nll_mask &= d.mask
    planted = dataclasses.replace(d)
    for name in ROWED:
        value = getattr(d, name).detach().clone()
        value[~d.mask] = garbage
        setattr(planted, name, value)
    planted.logp.requires_grad_()
    clean = call(d.logp, d)
    loss = call(planted.logp, planted)
    assert torch.equal(clean, loss)
    grads = [torch.autograd.grad(a, b)[0] for a, b in ((clean, d.logp), (loss, planted.logp))]
    assert torch.equal(*grads) and grads[0].isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_per_sequence_arguments_of_untrained_sequences_never_leak(case):
    call, _ = CASES[case]
    d = batch([3, 2, 4, 3], 1.0)
    d.mask[3:5] = False
    clean = call(d.logp, d)
    d.advantage[1] = d.weight[1] = torch.nan
    assert torch.equal(clean, call(d.logp, d))
    assert torch.autograd.grad(call(d.logp, d), d.logp)[0].isfinite().all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", [[], [0, 0], [3, 2]], ids=str)
def test_nothing_trained_gives_zero_gradients(case, lengths):
    call, _ = CASES[case]
    d = batch(lengths, 0.0)
    d.nll_mask &= d.mask
    loss = call(d.logp, d)
    (grad,) = torch.autograd.grad(loss, d.logp)
    assert loss.isfinite() and grad.shape == d.logp.shape and not grad.any()
    if not lengths or case.startswith(
        ("sft", "dft", "orpo", "grpo", "dapo", "dr_", "cispo", "gspo")
    ):
        assert loss.item() == 0.0


def normalized(case, normalizer):
    """The objective's loss under another divisor, and the number it replaces."""
    d = batch(LENGTHS["primes"], 0.7)
    options = {
        "dpo": {"ref_logp": d.ref},
        "ipo": {"ref_logp": d.ref},
        "kto": {"ref_logp": d.ref, "labels": d.labels, "kl": 0.1},
        "dr_grpo": {"advantages": d.advantage, "max_length": 5},
    }.get(case, {"advantages": d.advantage} if case in POLICIES else {})
    function = getattr(objectives, case)
    args = (d.logp, d.mask) if case in ("sft", "dft") else (d.logp, d.mask, d.cu)
    return function(*args, **options), function(*args, normalizer=normalizer, **options), d


POLICIES = ("grpo", "dapo", "dr_grpo", "cispo", "gspo")
COUNTS = {
    **dict.fromkeys(("sft", "dft", "dapo", "cispo"), lambda d: int(d.mask.sum())),
    **dict.fromkeys(("grpo", "dr_grpo", "gspo", "kto"), lambda d: len(d.lengths)),
    **dict.fromkeys(("dpo", "ipo", "simpo"), lambda d: len(d.lengths) // 2),
}


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda x: torch.tensor([x])])
@pytest.mark.parametrize("case", COUNTS)
def test_normalizer(case, kind):
    plain, divided, d = normalized(case, kind(40))
    assert_same(d.logp, divided, plain * COUNTS[case](d) / 40)


def test_normalizers_of_both_terms():
    d = batch(LENGTHS["primes"])
    tokens = sum(s.numel() for s in d.sequences(d.logp)[::2])
    for function, weight in ((objectives.cpo, 1.0), (objectives.orpo, 1.0)):
        nll = -sum(s.sum() for s in d.sequences(d.logp)[::2])
        plain = function(d.logp, d.mask, d.cu)
        other = function(d.logp, d.mask, d.cu, normalizer=12, nll_normalizer=50)
        expected = (plain - weight * nll / tokens) * 3 / 12 + weight * nll / 50
        assert_same(d.logp, other, expected)


def test_normalizer_over_micro_batches():
    """Two micro-batches under the whole batch's normaliser add up to the whole batch."""
    d = batch(LENGTHS["primes"])
    whole = objectives.dapo(d.logp, d.mask, d.cu, advantages=d.advantage)
    split = int(d.cu[4])
    parts = []
    for rows, seqs in ((slice(0, split), slice(0, 4)), (slice(split, None), slice(4, None))):
        cu = d.cu[seqs.start : (seqs.stop or 6) + 1] - d.cu[seqs.start]
        parts.append(
            objectives.dapo(
                d.logp[rows],
                d.mask[rows],
                cu,
                advantages=d.advantage[seqs],
                normalizer=d.mask.sum(),
            )
        )
    assert_same(d.logp, sum(parts), whole)


def test_zero_normalizer_without_trained_tokens():
    logp = torch.zeros(3, requires_grad=True)
    loss = objectives.sft(logp, torch.zeros(3, dtype=torch.bool), normalizer=torch.tensor(0))
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, logp)[0].any()


def test_constants_get_no_gradient():
    d = batch(LENGTHS["primes"])
    for name in ("ref", "old", "advantage", "weight"):
        getattr(d, name).requires_grad_()
    kl = torch.tensor(0.3, requires_grad=True)
    normalizer = torch.tensor(3.0, requires_grad=True)
    loss = CASES["grpo"][0](d.logp, d) + objectives.kto(
        d.logp, d.mask, d.cu, ref_logp=d.ref, labels=d.labels, kl=kl, normalizer=normalizer
    )
    loss.backward()
    given = (d.ref, d.old, d.advantage, d.weight, kl, normalizer)
    assert all(t.grad is None for t in given) and d.logp.grad.any()


# --- numerics, dtypes, devices --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_low_precision_is_computed_in_float32(case, dtype):
    call, formula = CASES[case]
    d = batch(LENGTHS["primes"], dtype=dtype)
    wide, exact = dataclasses.replace(d), dataclasses.replace(d)
    for name in (*ROWED, "advantage", "weight"):
        setattr(wide, name, getattr(d, name).detach().float())
        setattr(exact, name, getattr(d, name).detach().double())
    wide.logp.requires_grad_()
    exact.logp.requires_grad_()
    loss, same = call(d.logp, d), call(wide.logp, wide)
    assert loss.dtype == torch.float32 and torch.equal(loss, same)
    (grad,) = torch.autograd.grad(loss, d.logp)
    assert grad.dtype == dtype
    assert torch.equal(grad, torch.autograd.grad(same, wide.logp)[0].to(dtype))
    assert_exact(loss, formula(exact), 1e-5)


def test_long_sequences_keep_their_digits():
    """Sums of float32 log-probabilities are rounded once."""
    logp = -4 * torch.rand(100_000)
    cu, mask = vs.cu_seqlens([100_000, 0]), torch.ones(100_000).bool()
    loss = objectives.cpo(logp, mask, cu, beta=1.0, alpha=0.0)
    assert_exact(loss, -logp.double().sum(), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp(dtype):
    eps = torch.finfo(dtype).eps
    x = -torch.tensor([eps, 1e-5, 0.1, 0.69, 0.7, 3.0, 30.0, 90.0, 800.0], dtype=dtype)
    x.requires_grad_()
    wide = x.detach().double()
    exact = torch.where(wide < -1, torch.log1p(-wide.exp()), torch.log(-torch.expm1(wide)))
    torch.testing.assert_close(log1mexp(x).double(), exact, rtol=8 * eps, atol=0)
    (grad,) = torch.autograd.grad(log1mexp(x).sum(), x)
    slope = -1 / torch.expm1(-wide)
    torch.testing.assert_close(grad.double(), slope, rtol=64 * eps, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_of_certain_and_impossible_sequences(dtype):
    """p = 1 and p = 0 after rounding: finite loss and gradient."""
    cu = torch.tensor([0, 2, 4], dtype=torch.int32)
    for values in ([0.0, 0.0, -900.0, -900.0], [-900.0, -900.0, 0.0, 0.0]):
        logp = torch.tensor(values, dtype=dtype, requires_grad=True)
        loss = objectives.orpo(logp, torch.ones(4, dtype=torch.bool), cu)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logp)[0].isfinite().all()


def test_extreme_margins():
    """The logistic loss neither overflows nor loses its gradient at margins of 1e4."""
    cu = torch.tensor([0, 1, 2], dtype=torch.int32)
    logp = torch.tensor([-2e4, -1e4], requires_grad=True)
    loss = objectives.cpo(logp, torch.ones(2, dtype=torch.bool), cu, beta=1.0, alpha=0.0)
    assert loss.item() == 1e4
    assert torch.autograd.grad(loss, logp)[0].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_back_from_a_device(case):
    """On the meta device reading a value is an error."""
    call, _ = CASES[case]
    d = batch(LENGTHS["ragged"])
    moved = {
        f.name: value.detach().to("meta")
        for f in dataclasses.fields(d)
        if isinstance(value := getattr(d, f.name), torch.Tensor)
    }
    d = dataclasses.replace(d, **moved)
    d.logp.requires_grad_()
    loss = call(d.logp, d)
    (grad,) = torch.autograd.grad(loss, d.logp)
    assert loss.device.type == grad.device.type == "meta"


def test_offsets_that_end_early_on_a_device(monkeypatch):
    """Rows past the last sequence, which only unchecked offsets leave, take no part."""
    from varstream.objectives import _segments

    d = batch([3, 2, 4, 3], 1.0)
    monkeypatch.setattr(_segments, "check_cu_seqlens", lambda name, cu, total, device: cu)
    d.mask[-3:] = False
    longer = CASES["grpo"][0](d.logp, d)
    d.cu[-1] -= 3
    assert torch.equal(longer, CASES["grpo"][0](d.logp, d))


@pytest.mark.parametrize("case", ["orpo", "gspo"])
def test_compiles_whole_and_once(case):
    call, formula = CASES[case]
    torch._dynamo.reset()  # the cases share one code object
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    frames = []
    for lengths in ([3, 2, 4, 5], [7, 3, 2, 9], [3, 3, 8, 8], [2, 9, 4, 6]):
        d = batch(lengths)
        assert_same(d.logp, compiled(d.logp, d), formula(d))
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1] <= 2


# --- errors ---------------------------------------------------------------------------------------

N, CU = 6, [0, 2, 6]
PAIRS = {"ref_logp": torch.zeros(N)}
GROUPS = {"advantages": torch.zeros(2)}
KTO = {"ref_logp": torch.zeros(N), "labels": torch.ones(2).bool(), "kl": 0.0}
ERRORS = {
    "logp_kind": ("sft", dict(logp=[0.0]), TypeError, "logp must be a torch.Tensor, got list"),
    "logp_ndim": ("sft", dict(logp=torch.zeros(2, 3)), ValueError, r"logp must have 1 dim.*\(N,\)"),
    "logp_dtype": ("sft", dict(logp=torch.zeros(N).long()), ValueError, "logp must have dtype"),
    "mask_shape": ("dft", dict(mask=torch.ones(5).bool()), ValueError, "mask must have size 6"),
    "mask_dtype": ("dft", dict(mask=torch.ones(N)), ValueError, "mask must have dtype bool"),
    "mask_device": (
        "sft",
        dict(mask=torch.ones(N, device="meta").bool()),
        ValueError,
        "mask must be on cpu",
    ),
    "normalizer": ("sft", dict(normalizer=0), ValueError, "normalizer must be above 0, got 0.0"),
    "normalizer_sign": ("sft", dict(normalizer=-3), ValueError, "normalizer must be >= 0.0"),
    "normalizer_nan": ("sft", dict(normalizer=torch.tensor(torch.nan)), ValueError, "above 0"),
    "normalizer_shape": ("sft", dict(normalizer=torch.ones(2)), ValueError, "one element"),
    "normalizer_kind": ("dft", dict(normalizer="3"), TypeError, "normalizer must be a number"),
    "nll_normalizer": (
        "cpo",
        dict(nll_normalizer=-1.0),
        ValueError,
        "nll_normalizer must be >= 0.0, got -1.0",
    ),
    "cu_dtype": ("dpo", dict(cu=torch.tensor(CU)), ValueError, "cu_seqlens must have dtype int32"),
    "cu_total": ("dpo", dict(cu=[0, 2, 5]), ValueError, "cu_seqlens must end at .* rows 6, got 5"),
    "cu_falls": ("dpo", dict(cu=[0, 7, 6]), ValueError, "cu_seqlens must never fall"),
    "odd": ("dpo", dict(cu=[0, 2, 4, 6]), ValueError, "even number of sequences.* got 3"),
    "odd_ipo": ("ipo", dict(cu=[0, 6]), ValueError, "even number of sequences.* got 1"),
    "odd_simpo": ("simpo", dict(cu=[0, 6]), ValueError, "even number of sequences"),
    "odd_cpo": ("cpo", dict(cu=[0, 6]), ValueError, "even number of sequences"),
    "odd_orpo": ("orpo", dict(cu=[0, 6]), ValueError, "even number of sequences"),
    "ref_shape": ("dpo", dict(ref_logp=torch.zeros(2)), ValueError, "ref_logp must have size 6"),
    "ref_dtype": ("ipo", dict(ref_logp=torch.ones(N).bool()), ValueError, "ref_logp must have dt"),
    "beta": ("dpo", dict(beta=0.0), ValueError, "beta must be above 0, got 0.0"),
    "beta_ipo": ("ipo", dict(beta=-1), ValueError, "beta must be above 0, got -1"),
    "beta_simpo": ("simpo", dict(beta="2"), TypeError, "beta must be a number, got str"),
    "beta_kto": ("kto", dict(beta=float("nan")), ValueError, "beta must be finite, got nan"),
    "smoothing": ("dpo", dict(label_smoothing=0.6), ValueError, "label_smoothing must be <= 0.5"),
    "smoothing_cpo": ("cpo", dict(label_smoothing=-0.1), ValueError, "label_smoothing must be >="),
    "average": ("dpo", dict(average_log_prob=1), TypeError, "average_log_prob must be a bool"),
    "gamma": ("simpo", dict(gamma=None), TypeError, "gamma must be a number, got NoneType"),
    "alpha": ("cpo", dict(alpha=-1.0), ValueError, "alpha must be >= 0.0, got -1.0"),
    "nll_mask": ("orpo", dict(nll_mask=torch.ones(3).bool()), ValueError, "nll_mask must have siz"),
    "labels_shape": ("kto", dict(labels=torch.ones(3).bool()), ValueError, "labels must have size"),
    "labels_dtype": ("kto", dict(labels=torch.ones(2)), ValueError, "labels must have dtype bool"),
    "kl_shape": ("kto", dict(kl=torch.ones(2)), ValueError, "kl must have one element, got shape"),
    "kl_kind": ("kto", dict(kl=None), TypeError, "kl must be a number, got NoneType"),
    "desirable": ("kto", dict(desirable_weight=-1), ValueError, "desirable_weight must be >= 0.0"),
    "undesirable": ("kto", dict(undesirable_weight=-1), ValueError, "undesirable_weight must be"),
    "advantages": (
        "grpo",
        dict(advantages=torch.ones(3)),
        ValueError,
        r"advantages must have shape \(B,\) = \(2,\) or \(N,\) = \(6,\), got \(3,\)",
    ),
    "advantages_ndim": ("grpo", dict(advantages=torch.ones(2, 1)), ValueError, "advantages must h"),
    "advantages_kind": ("dapo", dict(advantages=[1.0, 2.0]), TypeError, "advantages must be a tor"),
    "advantages_dtype": ("gspo", dict(advantages=torch.ones(2).int()), ValueError, "have dtype"),
    "weights": ("cispo", dict(token_weight=torch.ones(3)), ValueError, "token_weight must have sh"),
    "old": ("grpo", dict(old_logp=torch.ones(3)), ValueError, "old_logp must have size 6"),
    "ref": ("grpo", dict(ref_logp=torch.ones(3)), ValueError, "ref_logp must have size 6"),
    "kl_without_ref": ("dapo", dict(beta=0.04), ValueError, "ref_logp is needed with beta=0.04"),
    "beta_grpo": ("grpo", dict(beta=-0.04), ValueError, "beta must be >= 0.0, got -0.04"),
    "epsilon": ("grpo", dict(epsilon=-0.1), ValueError, "epsilon must be >= 0.0, got -0.1"),
    "epsilon_high": ("gspo", dict(epsilon_high=-0.1), ValueError, "epsilon_high must be >= 0.0"),
    "epsilon_cispo": ("cispo", dict(epsilon_high="4"), TypeError, "epsilon_high must be a number"),
    "delta": ("grpo", dict(delta=1.1), ValueError, r"delta must be above 1 \+ epsilon_high = 1.2"),
    "estimator": (
        "grpo",
        dict(kl_estimator="k4"),
        ValueError,
        "kl_estimator must be one of k1, k2",
    ),
    "correction": ("dr_grpo", dict(kl_correction=1), TypeError, "kl_correction must be a bool"),
    "length": ("dr_grpo", dict(max_length=0), ValueError, "max_length must be above 0, got 0"),
    "aggregation": ("cispo", dict(aggregation="mean"), ValueError, "aggregation must be token or"),
}


@pytest.mark.parametrize("name, changes, error, message", ERRORS.values(), ids=ERRORS)
def test_errors(name, changes, error, message):
    changes = dict(changes)
    options = {"kto": KTO, "dpo": PAIRS, "ipo": PAIRS}.get(name, {})
    options = GROUPS if name in POLICIES else options
    if name == "dr_grpo":
        options = options | {"max_length": 4}
    args = [changes.pop("logp", torch.zeros(N)), changes.pop("mask", torch.ones(N).bool())]
    if name not in ("sft", "dft"):
        cu = changes.pop("cu", CU)
        args.append(cu if isinstance(cu, torch.Tensor) else torch.tensor(cu, dtype=torch.int32))
    with pytest.raises(error, match=message):
        getattr(objectives, name)(*args, **(options | changes))
