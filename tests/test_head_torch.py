"""The head's operators inside torch: opcheck, and compilation that is whole and happens once."""

import pytest
import torch
import torch._dynamo.testing
from head_cases import FEATURES, IGNORE, SCALINGS, dense, problem, several_targets

import varstream as vs
from varstream.testing import assert_exact

REDUCTIONS = ["mean", "sum", "none"]
NO_SCALING = {"logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0}
LENGTHS = (5, 7, 2, 31, 600)


def call_of(p, scaling):
    """The operators' arguments up to ``logits_dtype``."""
    scalars = NO_SCALING | SCALINGS[scaling]
    return (p.input, p.weight, p.bias, p.target, IGNORE, *scalars.values(), 5, None, None)


def assert_same(p, actual, expected):
    upstream = [torch.randn_like(e) for e in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_exact(ours, theirs)
    grads = torch.autograd.grad(actual, p.leaves, upstream)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, p.leaves, upstream), strict=True):
        assert_exact(ours, theirs)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("scaling", ["plain", "all"])
def test_opcheck_loss(scaling, needs):
    p = problem(ignored=[3])
    for leaf, need in zip(p.leaves, needs, strict=True):
        leaf.requires_grad_(need)
    call = call_of(p, scaling)
    op = torch.ops.varstream.linear_cross_entropy.default
    torch.library.opcheck(op, (*call, *[None] * 4, False, *needs))


@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("scaling", ["plain", "all"])
def test_opcheck_logprobs(scaling, return_entropy):
    call = call_of(problem(ignored=[3]), scaling)
    flags = (return_entropy, False, False, False)
    torch.library.opcheck(torch.ops.varstream.token_logprobs.default, (*call, None, *flags))


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("scaling", ["plain", "all"])
def test_opcheck_logprobs_backward(scaling, needs):
    p = problem(ignored=[3])
    call = call_of(p, scaling)
    with torch.no_grad():
        logp, entropy, *_ = torch.ops.varstream.token_logprobs(*call, None, True, *[False] * 3)
    saved = (entropy, *(t.detach() for t in p.leaves), *call[3:])
    upstream = torch.randn_like(logp), torch.randn_like(entropy), None, None
    torch.library.opcheck(
        torch.ops.varstream.token_logprobs_bwd.default, (*upstream, *saved, None, *needs)
    )


@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("scaling", ["plain", "all"])
def test_opcheck_loss_with_every_scale(scaling, metrics):
    p = several_targets(problem(ignored=[3]))
    # A positive loss, for opcheck's upstream gradient is its sign, and the backward scales in place
    # the gradients that the op has returned.
    scales = (torch.rand(23), torch.rand(16, 3), torch.rand(16), torch.tensor(0.3))
    scales = [s.double() for s in scales]
    op = torch.ops.varstream.linear_cross_entropy.default
    torch.library.opcheck(op, (*call_of(p, scaling), *scales, metrics, True, True, True))


@pytest.mark.parametrize("scaling", ["plain", "all"])
def test_opcheck_every_row_value(scaling):
    p = several_targets(problem(ignored=[3]))
    weight = torch.rand(23, dtype=torch.float64)
    call = (*call_of(p, scaling), weight, True, True, True, True)
    torch.library.opcheck(torch.ops.varstream.token_logprobs.default, call)
    with torch.no_grad():
        values = torch.ops.varstream.token_logprobs(*call)
    saved = (values[1], *(t.detach() for t in p.leaves), *call[3:12])
    upstream = [torch.randn_like(v) for v in values[:4]]
    torch.library.opcheck(
        torch.ops.varstream.token_logprobs_bwd.default, (*upstream, *saved, True, True, True)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_compiles_whole_and_once(reduction):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(x, weight, bias, target):
        return vs.linear_cross_entropy(
            x, weight, target, linear_bias=bias, reduction=reduction, softcap=6.0
        )

    for rows in LENGTHS:
        p = problem(rows, ignored=[1])
        compiled = step(*p.leaves, p.target)
        assert_same(p, (compiled,), (p.dense_loss(reduction, softcap=6.0),))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("return_entropy", [False, True])
def test_logprobs_compile_whole_and_once(return_entropy):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(x, weight, bias, target):
        outs = vs.token_logprobs(
            x, weight, target, linear_bias=bias, return_entropy=return_entropy, softcap=6.0
        )
        return outs if return_entropy else (outs,)

    for rows in LENGTHS:
        p = problem(rows, ignored=[1])
        compiled = step(*p.leaves, p.target)
        assert_same(p, compiled, p.dense_logprobs(softcap=6.0)[: 1 + return_entropy])
    assert counter.frame_count <= 2


def test_both_compile_with_inductor():
    p = problem(ignored=[1])
    count = torch.tensor(29)

    @torch.compile(fullgraph=True)
    def step(x, weight, bias, target, count):
        logp, entropy = vs.token_logprobs(x, weight, target, linear_bias=bias, return_entropy=True)
        loss = vs.linear_cross_entropy(
            x, weight, target, linear_bias=bias, normalizer=count, softcap=5.0
        )
        return loss + (logp.exp() + entropy).mean()

    logp, entropy = p.dense_logprobs()
    expected = p.dense_loss("sum", softcap=5.0) / 29 + (logp.exp() + entropy).mean()
    assert_same(p, (step(*p.leaves, p.target, count),), (expected,))


def test_values_of_targets_are_checked_inside_a_compiled_graph():
    p = problem()
    p.target[3] = 23
    step = torch.compile(vs.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"target must hold classes in \[0, 23\).*got 23 at row 3"):
        step(p.input, p.weight, p.target)


@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_option_compiles_whole_and_once(reduction, several):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight = torch.rand(23, dtype=torch.float64)
    names = ("smoothing", "z_loss", "softcap", "scaling")
    fixed = {key: value for name in names for key, value in FEATURES[name](None).items()}
    fixed["weight"] = weight

    @torch.compile(backend=counter, fullgraph=True)
    def step(x, linear_weight, bias, target, factors):
        return vs.linear_cross_entropy(
            x,
            linear_weight,
            target,
            linear_bias=bias,
            reduction=reduction,
            token_weight=factors,
            return_metrics=True,
            **fixed,
        )

    for rows in LENGTHS:
        p = problem(rows, ignored=[1])
        p = several_targets(p) if several else p
        factors = torch.randn(p.target.shape, dtype=torch.float64)
        loss, metrics = step(*p.leaves, p.target, factors)
        assert_same(p, (loss,), (dense(p, reduction, token_weight=factors, **fixed),))
        assert torch.equal(metrics.logp == 0, ~p.valid)
    assert counter.frame_count <= 2


def test_stats_compile_whole_and_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(x, weight, bias, target):
        return vs.token_logprobs(x, weight, target, linear_bias=bias, return_stats=True)

    for rows in LENGTHS:
        p = problem(rows, ignored=[1])
        found = step(*p.leaves, p.target)
        logp, entropy = p.dense_logprobs()
        lse = p.logits().logsumexp(1) * p.valid
        assert_same(p, found[:3], (logp, entropy, lse))
        assert torch.equal(found.is_top1, p.target == p.logits().argmax(1))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_meta_tensors(reduction):
    x, weight = (torch.randn(n, 3, device="meta", requires_grad=True) for n in (4, 5))
    target = torch.zeros(4, 2, dtype=torch.int64, device="meta")
    options = {"z_loss": 0.1, "label_smoothing": 0.1, "reduction": reduction}
    loss, metrics = vs.linear_cross_entropy(x, weight, target, return_metrics=True, **options)
    assert loss.shape == ((4, 2) if reduction == "none" else ())
    assert [m.shape for m in metrics] == [(), (), (4,), (4, 2)]
    loss.sum().backward()
    assert x.grad.shape == (4, 3) and weight.grad.shape == (5, 3)
    stats = vs.token_logprobs(x, weight, target, return_stats=True)
    assert [s.shape for s in stats] == [(4, 2), (4,), (4,), (4,), (4,), (4,), (4, 2)]
