"""varstream.nn: the head as modules, beside torch's."""

import copy
import io

import pytest
import torch
from head_cases import IGNORE, class_weight, dense, problem, token_weight

import varstream as vs
from varstream.nn import LinearCrossEntropy, LinearCrossEntropyLoss, TokenLogProbs
from varstream.testing import assert_exact

TORCH = getattr(torch.nn, "LinearCrossEntropyLoss", None)
needs_torch = pytest.mark.skipif(TORCH is None, reason="torch >= 2.13")
SETTINGS = {"z_loss": 0.02, "softcap": 5.0, "label_smoothing": 0.1, "temperature": 0.9}


def make(p, cls=LinearCrossEntropyLoss, **options):
    module = cls(9, 23, bias=True, dtype=p.input.dtype, **options)
    with torch.no_grad():
        module.linear.weight.copy_(p.weight)
        module.linear.bias.copy_(p.bias)
    return module


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_module(reduction):
    p = problem(ignored=[3])
    weight, factors = class_weight(p), token_weight(p)
    module = make(p, reduction=reduction, weight=weight, **SETTINGS)
    more = {"normalizer": 7.0} if reduction == "mean" else {}
    loss = module(p.input, p.target, token_weight=factors, **more)
    expected = dense(p, reduction, weight=weight, token_weight=factors, **more, **SETTINGS)
    assert_exact(loss, expected)
    loss.sum().backward()
    wanted = torch.autograd.grad(expected.sum(), p.leaves)
    found = (p.input.grad, module.linear.weight.grad, module.linear.bias.grad)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_exact(ours, theirs)
    assert module.weight.grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weightless_module(reduction):
    p = problem(ignored=[3])
    weight, factors = class_weight(p), token_weight(p)
    module = LinearCrossEntropy(reduction=reduction, weight=weight, **SETTINGS)
    assert not list(module.parameters())
    more = {"normalizer": 7.0} if reduction == "mean" else {}
    loss = module(p.input, p.weight, p.target, linear_bias=p.bias, token_weight=factors, **more)
    expected = dense(p, reduction, weight=weight, token_weight=factors, **more, **SETTINGS)
    assert_exact(loss, expected)
    wanted = torch.autograd.grad(expected.sum(), p.leaves)
    for ours, theirs in zip(torch.autograd.grad(loss.sum(), p.leaves), wanted, strict=True):
        assert_exact(ours, theirs)


def test_weight_tied_to_an_embedding():
    p = problem(bias=False)
    embedding = torch.nn.Embedding(23, 9, dtype=torch.float64)
    tokens = torch.randint(0, 23, (16,))
    module = LinearCrossEntropy(chunk_size=5)
    module(embedding(tokens), embedding.weight, p.target).backward()
    plain = torch.nn.functional.cross_entropy(embedding(tokens) @ embedding.weight.t(), p.target)
    assert_exact(embedding.weight.grad, torch.autograd.grad(plain, embedding.weight)[0])


def test_metrics_and_chunk_size_are_passed_on():
    p = problem(ignored=[3])
    module = make(p, return_metrics=True, chunk_size=3)
    loss, metrics = module(p.input, p.target)
    assert_exact(loss, dense(p))
    assert metrics.argmax[3] == -1
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        make(p, chunk_size=0)(p.input, p.target)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("own", [True, False], ids=["with_linear", "weightless"])
def test_weight_gradient_in_a_buffer(reduction, own):
    p = problem(ignored=[3])
    wanted = torch.autograd.grad(dense(p, reduction).sum(), p.leaves)
    if own:
        module = make(p, reduction=reduction, chunk_size=5)
        weight, bias = module.linear.weight, module.linear.bias
        weight.grad = torch.ones_like(weight)
        loss = module(p.input, p.target, weight_grad=weight.grad)
    else:
        weight, bias = p.weight, p.bias
        weight.grad = torch.ones_like(weight)
        module = LinearCrossEntropy(reduction=reduction, chunk_size=5)
        loss = module(p.input, weight, p.target, linear_bias=bias, weight_grad=weight.grad)
    loss.sum().backward()
    for ours, theirs in zip((p.input.grad, weight.grad - 1, bias.grad), wanted, strict=True):
        assert_exact(ours, theirs)
    with pytest.raises(ValueError, match="weight_grad must have size 23 in dimension 0"):
        module(*(p.input, p.target) if own else (p.input, weight, p.target), weight_grad=wanted[0])


def test_logprobs_weight_gradient_in_a_buffer():
    p = problem(ignored=[3])
    plain = vs.token_logprobs(p.input, p.weight, p.target).sum()
    (wanted,) = torch.autograd.grad(plain, p.weight)
    buffer = torch.zeros_like(wanted)
    TokenLogProbs()(p.input, p.weight, p.target, weight_grad=buffer).sum().backward()
    assert_exact(buffer, wanted)
    assert p.weight.grad is None


LOSSES = {
    "with_linear": (
        lambda p, **options: make(p, **options),
        lambda module, p, **given: module(p.input, p.target, **given),
    ),
    "weightless": (
        lambda p, **options: LinearCrossEntropy(**options),
        lambda module, p, **given: module(p.input, p.weight, p.target, **given),
    ),
    "logprobs": (
        lambda p, **options: TokenLogProbs(**options),
        lambda module, p, **given: module(p.input, p.weight, p.target, **given),
    ),
}


@pytest.mark.parametrize("build, call", LOSSES.values(), ids=LOSSES)
def test_bound_dtype_and_validation_are_passed_on(build, call):
    """Each refused by name where it can't be honoured."""
    p = problem(dtype=torch.float32, ignored=[3])
    with pytest.raises(ValueError, match="max_rows must bound .* 15 of them, got 14"):
        call(build(p), p, max_rows=14)
    assert torch.equal(call(build(p), p, max_rows=15), call(build(p), p))
    with pytest.raises(ValueError, match="logits_dtype must be None, torch.float32"):
        call(build(p, logits_dtype=torch.float16), p)
    with pytest.raises(TypeError, match="validate must be a bool, got int"):
        call(build(p, validate=1), p)
    assert torch.equal(call(build(p, validate=True), p), call(build(p), p))


@pytest.mark.parametrize("options", [{}, {"return_entropy": True}, {"return_stats": True}], ids=str)
def test_logprobs_module(options):
    p = problem(ignored=[3])
    module = TokenLogProbs(softcap=4.0, temperature=0.7, logit_scale=1.2, chunk_size=5, **options)
    found = module(p.input, p.weight, p.target, linear_bias=p.bias)
    expected = vs.token_logprobs(
        p.input,
        p.weight,
        p.target,
        linear_bias=p.bias,
        softcap=4.0,
        temperature=0.7,
        logit_scale=1.2,
        chunk_size=5,
        **options,
    )
    pairs = zip(found, expected, strict=True) if options else [(found, expected)]
    assert all(torch.equal(a, b) for a, b in pairs)


# --- beside torch's module ------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_state_dicts_interchange(bias, weighted):
    p = problem(ignored=[3])
    options = {"bias": bias, "dtype": torch.float64, "label_smoothing": 0.1}
    options["weight"] = torch.rand(23, dtype=torch.float64) if weighted else None
    theirs, ours = TORCH(9, 23, **options), LinearCrossEntropyLoss(9, 23, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    assert_exact(ours(p.input, p.target), theirs(p.input, p.target))
    fresh = TORCH(9, 23, **options)
    fresh.load_state_dict(ours.state_dict())
    assert_exact(fresh(p.input, p.target), theirs(p.input, p.target))


@needs_torch
def test_same_initial_weights_and_constructor_as_torch():
    torch.manual_seed(3)
    theirs = TORCH(9, 23, bias=True)
    torch.manual_seed(3)
    ours = LinearCrossEntropyLoss(9, 23, bias=True)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@needs_torch
def test_repr_says_what_torchs_says():
    theirs = TORCH(9, 23, bias=True, ignore_index=IGNORE).extra_repr()
    ours = LinearCrossEntropyLoss(9, 23, bias=True)
    assert ours.extra_repr().replace(" ", "") == theirs.replace(" ", "")
    more = LinearCrossEntropyLoss(9, 23, z_loss=0.5, chunk_size=7).extra_repr()
    assert more.endswith("options=None, z_loss=0.5, chunk_size=7")
    more = LinearCrossEntropy(logits_dtype=torch.float16, validate=True).extra_repr()
    assert more.endswith("options=None, logits_dtype=torch.float16, validate=True")
    assert "logits_dtype=None, validate=False" in TokenLogProbs().extra_repr()


@needs_torch
def test_ignore_index_none_is_torchs_default():
    p = problem(ignored=[3])
    assert_exact(make(p, ignore_index=None)(p.input, p.target), dense(p))
    assert_exact(make(p, TORCH)(p.input, p.target), dense(p))


def test_moves_copies_pickles_and_compiles():
    p = problem(dtype=torch.float32, ignored=[3])
    module = make(p, weight=torch.rand(23), z_loss=0.01)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half.weight.dtype == half.linear.weight.dtype == torch.bfloat16
    assert half(p.input.bfloat16(), p.target).dtype == torch.float32
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(p.input, p.target), module(p.input, p.target))
    step = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_exact(step(p.input, p.target), module(p.input, p.target), 1e-6)


# --- refusals -------------------------------------------------------------------------------------

REFUSED = {
    "out_features": (
        dict(out_features=(4,)),
        ValueError,
        r"out_features must be \(\): K-dimensional losses are not supported, got \(4,\)",
    ),
    "reduction": (dict(reduction="avg"), ValueError, "reduction must be one of mean, sum, none"),
    "weight_shape": (
        dict(weight=torch.ones(22)),
        ValueError,
        r"weight must have size 23 in dimension 0 \(num_classes,\), got shape \(22,\)",
    ),
    "weight_type": (dict(weight=[1.0]), TypeError, "weight must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize("options, error, message", REFUSED.values(), ids=REFUSED)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        LinearCrossEntropyLoss(9, 23, **options)


def test_refusals_of_the_weightless_module():
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'avg'"):
        LinearCrossEntropy(reduction="avg")
    with pytest.raises(ValueError, match=r"weight must have 1 dimensions \(V,\)"):
        LinearCrossEntropy(weight=torch.ones(2, 2))
