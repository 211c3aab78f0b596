"""The composed head on CUDA: same losses, log-probabilities and gradients as on the CPU."""

import pytest
import torch
from head_cases import SCALINGS, problem

import varstream as vs
from varstream.testing import assert_exact

pytestmark = pytest.mark.gpu


def results(p, device, reduction, scaling):
    leaves = [t.detach().to(device).requires_grad_() for t in p.leaves]
    x, weight, bias = leaves
    target = p.target.to(device)
    loss = vs.linear_cross_entropy(
        x, weight, target, linear_bias=bias, reduction=reduction, chunk_size=5, **scaling
    )
    logp, entropy = vs.token_logprobs(
        x, weight, target, linear_bias=bias, return_entropy=True, chunk_size=5, **scaling
    )
    factors = torch.arange(logp.numel(), device=device)
    total = (loss * 3).sum() + (logp * factors).sum() + (entropy * (factors - 4)).sum()
    return loss, logp, entropy, *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_the_cpu(reduction, scaling):
    p = problem(17, ignored=[0, 7, 16])
    wanted = results(p, "cpu", reduction, scaling)
    for got, want in zip(results(p, "cuda", reduction, scaling), wanted, strict=True):
        assert_exact(got.cpu(), want)
