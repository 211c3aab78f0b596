"""The head's operators inside torch: opcheck, and compilation that is whole and happens once."""

import pytest
import torch
import torch._dynamo.testing
from head_cases import IGNORE, SCALINGS, problem

import varstream as vs
from varstream.testing import assert_exact

REDUCTIONS = ["mean", "sum", "none"]
NO_SCALING = {"logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0}
LENGTHS = (5, 7, 2, 31, 600)


def call_of(p, scaling):
    """The operators' arguments up to the chunk size."""
    scalars = NO_SCALING | SCALINGS[scaling]
    return (p.input, p.weight, p.bias, p.target, IGNORE, *scalars.values(), 5)


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
