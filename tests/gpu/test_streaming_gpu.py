"""On CUDA the composed attention and head serve streamed models: same results as on the CPU."""

import copy

import pytest
import torch
from cases import LENGTH_PAIRS, cu_seqlens
from models import loss_and_gradients, make_twin, packed_row

import varstream as vs
from varstream.testing import assert_exact, worst_gradient

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (9, 0), "softcap": 3.0}])
def test_attention_matches_the_cpu(options):
    lq, lk = LENGTH_PAIRS["prefix"]
    leaves = [
        torch.randn(n, h, 16, dtype=torch.float64).requires_grad_()
        for n, h in ((sum(lq), 4), (sum(lk), 2), (sum(lk), 2))
    ]
    on_gpu = [t.detach().cuda().requires_grad_() for t in leaves]
    cu = cu_seqlens(lq), cu_seqlens(lk)
    results = []
    for tensors, lengths in ((leaves, cu), (on_gpu, [c.cuda() for c in cu])):
        out, lse = vs.varlen_attention(*tensors, *lengths, return_lse=True, **options)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        results.append([out, lse, *grads])
    for got, want in zip(results[1], results[0], strict=True):
        assert_exact(got.cpu(), want)


def test_streamed_model_matches_the_cpu():
    model = vs.stream(make_twin(), chunk_size=7)
    inputs = packed_row([5, 1, 17, 9])
    loss, grads = loss_and_gradients(model, **inputs)
    expected = {name: grad.clone() for name, grad in grads.items()}
    on_gpu = copy.deepcopy(model).cuda()
    got, grads = loss_and_gradients(on_gpu, **{name: t.cuda() for name, t in inputs.items()})
    assert_exact(got.cpu(), loss)
    name, error = worst_gradient(((n, g.cpu()) for n, g in grads.items()), expected)
    assert error <= 1e-12, f"{name}: {error:.2e}"
