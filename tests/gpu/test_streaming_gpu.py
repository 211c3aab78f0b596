"""Streamed models on CUDA: float64 composed as on the CPU, bfloat16 in kernels, without a wait for
the device."""

import copy

import pytest
import torch
from cases import LENGTH_PAIRS, cu_seqlens
from models import loss_and_gradients, make_model, make_twin, packed_row

import varstream as vs
from varstream._load import has_cuda_kernel
from varstream.streaming import huggingface
from varstream.testing import (
    assert_error_ratio,
    assert_exact,
    float64_twin,
    relative_error,
    worst_gradient,
)

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


LENGTHS = [300, 5, 1, 170]
KERNELS = ("varlen_attention", "varlen_attention_bwd_accumulate")


@pytest.mark.parametrize("chunk_size", [64, 1000])
@pytest.mark.parametrize("family", ["llama", "qwen2_window", "qwen3_mqa"])
def test_streamed_bfloat16_model(family, chunk_size):
    assert all(has_cuda_kernel(name) for name in KERNELS)
    model = make_model(family).bfloat16().cuda()
    inputs = {name: t.cuda() for name, t in packed_row(LENGTHS).items()}
    exact, exact_grads = loss_and_gradients(float64_twin(model), **inputs, use_cache=False)
    plain, plain_grads = loss_and_gradients(copy.deepcopy(model), **inputs, use_cache=False)
    loss, grads = loss_and_gradients(vs.stream(model, chunk_size=chunk_size), **inputs)
    noise = torch.finfo(torch.bfloat16).eps / 8
    assert relative_error(loss, exact) <= 2.0 * relative_error(plain, exact) + noise
    for name, grad in grads.items():
        assert_error_ratio(grad, plain_grads[name], exact_grads[name], 2.0, name)


def test_a_streamed_step_does_not_wait_for_the_device(monkeypatch):
    """Once the batch is packed, which looks at its lengths."""
    model = vs.stream(make_model("qwen2_window").bfloat16().cuda(), chunk_size=100)
    inputs = {name: t.cuda() for name, t in packed_row(LENGTHS).items()}
    count = {"num_items_in_batch": sum(LENGTHS) - len(LENGTHS)}
    want, wanted = loss_and_gradients(model, **inputs, **count)
    wanted = {name: grad.clone() for name, grad in wanted.items()}
    packing = huggingface._rows

    def packed(*args):
        torch.cuda.set_sync_debug_mode("default")
        rows = packing(*args)
        torch.cuda.set_sync_debug_mode("error")
        return rows

    monkeypatch.setattr(huggingface, "_rows", packed)
    try:
        got, grads = loss_and_gradients(model, **inputs, **count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(got, want) <= 1e-6
    name, error = worst_gradient(grads.items(), wanted)
    assert error <= 2e-2, f"{name}: {error:.2e}"  # sums of dQ come in any order


def test_repeatable_where_torch_asks_for_it(monkeypatch):
    """The layers: embedding and head are other operators'."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    model = vs.stream(make_model().bfloat16().cuda(), chunk_size=100)
    positions = packed_row(LENGTHS)["position_ids"].cuda()
    x = torch.randn(1, sum(LENGTHS), 32, dtype=torch.bfloat16, device="cuda")
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        out = model.model(inputs_embeds=x, position_ids=positions).last_hidden_state
        out.square().sum().backward()
        found.append([p.grad for p in model.model.layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
