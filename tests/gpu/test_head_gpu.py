"""The composed head on CUDA: same losses, log-probabilities and gradients as on the CPU."""

import pytest
import torch
from head_cases import FEATURES, SCALINGS, problem, several_targets

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


@pytest.mark.parametrize("several", [False, True], ids=["one_target", "several"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option_matches_the_cpu(reduction, softcap, several):
    p = problem(17, ignored=[0, 7, 16])
    p = several_targets(p) if several else p
    options = {key: value for feature in FEATURES.values() for key, value in feature(p).items()}
    options |= {"softcap": softcap, "reduction": reduction, "chunk_size": 5}
    found = []
    for device in ("cpu", "cuda"):
        x, weight, bias = (t.detach().to(device).requires_grad_() for t in p.leaves)
        moved = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in options.items()
        }
        target = p.target.to(device)
        loss, metrics = vs.linear_cross_entropy(
            x, weight, target, linear_bias=bias, return_metrics=True, **moved
        )
        stats = vs.token_logprobs(
            x, weight, target, linear_bias=bias, return_stats=True, softcap=softcap, chunk_size=5
        )
        total = (loss * 3).sum() + sum((t * (i + 1)).sum() for i, t in enumerate(stats[:3]))
        found.append((loss, *metrics, *stats, *torch.autograd.grad(total, (x, weight, bias))))
    for want, got in zip(*found, strict=True):
        assert_exact(got.cpu(), want)
