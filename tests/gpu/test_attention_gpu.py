"""What only a GPU shows of attention's kernels: no synchronisation, streams, graphs, other devices,
many tiles, offsets past 32 bits. Their results are tested in tests/test_attention*.py, on every
back end."""

from __future__ import annotations

import pytest
import torch
from cases import cu_seqlens

import varstream as vs
from varstream import _C, _load
from varstream.testing import assert_error_ratio, dense_attention

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HEADS, KV_HEADS, DIM = 4, 2, 64


def tensors(rows: int, dim: int = DIM, device: str = DEVICE):
    """q, k, v of one packed batch, bfloat16."""
    return [
        torch.randn(rows, heads, dim, dtype=torch.bfloat16, device=device)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def every_option(batch: int):
    return {
        "causal": True,
        "window": (50, 0),
        "softcap": 3.0,
        "alibi_slopes": torch.rand(batch, HEADS, device=DEVICE),
        "sinks": torch.randn(HEADS, device=DEVICE),
        "dropout_p": 0.1,
        "rng_state": torch.tensor([5, 6], device=DEVICE),
    }


def gradients(q, k, v, cu, dout, **keywords):
    """out, dq, dk, dv and, where there are sinks, dsinks."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    if "sinks" in keywords:
        leaves.append(keywords["sinks"].detach().requires_grad_())
        keywords = keywords | {"sinks": leaves[3]}
    out = vs.varlen_attention(*leaves[:3], cu, **keywords)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def accumulated(q, k, v, cu, dout, dk, dv, **keywords):
    """dq; dk and dv are zeroed and added into."""
    out, lse = vs.varlen_attention(q, k, v, cu, return_lse=True, **keywords)
    dk.zero_(), dv.zero_()
    return vs.varlen_attention_backward(dout, q, k, v, out, lse, cu, dk=dk, dv=dv, **keywords)


def buffers(*tensors: torch.Tensor):
    return [torch.empty_like(t, dtype=torch.float32) for t in tensors]


def test_a_kernel_serves_half_precision_and_composed_calls_the_rest():
    for name in ("varlen_attention", "varlen_attention_bwd", "varlen_attention_bwd_accumulate"):
        assert _load.has_cuda_kernel(name)
    kernels = {"attention_forward", "tile_schedule", "attention_backward"}
    assert kernels <= set(_C.build_info()["kernels"])
    q, k, v = (t.double().requires_grad_() for t in tensors(9))
    cu = cu_seqlens([4, 5])
    out = vs.varlen_attention(q, k, v, cu.to(DEVICE), causal=True)
    on_cpu = [t.detach().cpu().requires_grad_() for t in (q, k, v)]
    want, _ = dense_attention(*on_cpu, cu, causal=True)
    assert torch.allclose(out.cpu(), want, rtol=1e-12, atol=1e-12)
    dout = torch.randn_like(want)
    expected = torch.autograd.grad(want, on_cpu, dout)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), dout.to(DEVICE)), expected, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", ["plain", "every"])
def test_no_synchronisation_and_current_stream(options):
    lengths = [70, 1, 0, 200]
    q, k, v = tensors(sum(lengths))
    dout = torch.randn_like(q)
    cu = cu_seqlens(lengths).to(DEVICE)
    keywords = every_option(len(lengths)) if options == "every" else {}
    keywords |= {"max_seqlen_q": 200, "max_seqlen_k": 200}

    def everything():
        return (
            *vs.varlen_attention(q, k, v, cu, return_lse=True, **keywords),
            *gradients(q, k, v, cu, dout, deterministic=True, **keywords),
            *gradients(q, k, v, cu, dout, **keywords),
        )

    want = everything()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            got = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    any_order = len(want) - (4 if options == "plain" else 5) + 1  # the last dq
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i == any_order:
            assert torch.allclose(a, b, rtol=2e-2, atol=1e-3)
        else:
            assert torch.equal(a, b), i


def test_no_synchronisation_into_the_callers_buffers():
    """A chunk of queries behind a prefix, as streaming calls it."""
    (q, *_), (_, k, v) = tensors(100), tensors(700)
    cu, cu_k = cu_seqlens([60, 40]).to(DEVICE), cu_seqlens([400, 300]).to(DEVICE)
    keywords = {"cu_seqlens_k": cu_k, "max_seqlen_q": 60, "max_seqlen_k": 400, "causal": True}
    dout, (dk, dv) = torch.randn_like(q), buffers(k, v)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dq = accumulated(q, k, v, cu, dout, dk, dv, **keywords)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = gradients(q, k, v, cu, dout, **keywords)[1:]
    assert torch.allclose(dq, found[0], rtol=2e-2, atol=1e-3)
    for buffer, gradient in zip((dk, dv), found[1:], strict=True):
        assert torch.equal(buffer.to(torch.bfloat16), gradient)


def test_a_cuda_graph_replays_on_other_lengths():
    """The tiles are listed on the device: a graph follows what cu_seqlens holds at the replay."""
    rows = 400
    q, k, v = tensors(rows)
    dout, sums = torch.randn_like(q), buffers(k, v)
    cu = cu_seqlens([100, 300]).to(DEVICE)
    keywords = {"max_seqlen_q": rows, "max_seqlen_k": rows, "causal": True}

    def everything(dk, dv):
        dq = accumulated(q, k, v, cu, dout, dk, dv, deterministic=True, **keywords)
        return *vs.varlen_attention(q, k, v, cu, return_lse=True, **keywords), dq, dk, dv

    for _ in range(3):
        everything(*sums)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = everything(*sums)
    for lengths in ([100, 300], [1, 399], [400, 0], [257, 60]):  # the last leaves an inert tail
        for t in (q, k, v, dout):
            t.normal_()
        cu.copy_(cu_seqlens(lengths))
        graph.replay()
        for a, b in zip(got, everything(*buffers(k, v)), strict=True):
            assert torch.equal(a, b)


def test_thousands_of_tiles_of_every_size():
    """One long sequence among thousands of short ones; each equals itself alone."""
    lengths = [1, 7, 128, 129, 0] * 1000 + [20_000] + [3] * 500
    q, k, v = tensors(sum(lengths))
    dout, cu = torch.randn_like(q), cu_seqlens(lengths)
    keywords = {"causal": True, "deterministic": True}
    found = gradients(q, k, v, cu.to(DEVICE), dout, **keywords)
    for b in (0, 1, 2, 3, 2498, 4999, 5000, 5001, 5500):
        rows = slice(int(cu[b]), int(cu[b + 1]))
        alone = cu_seqlens([lengths[b]]).to(DEVICE)
        want = gradients(q[rows], k[rows], v[rows], alone, dout[rows], **keywords)
        for got, one in zip(found, want, strict=True):
            assert torch.equal(got[rows], one)


def test_a_repeatable_backward_while_the_device_is_busy():
    """Blocks that run in another order give the same bits."""
    lengths = [3000, 1, 513, 128]
    q, k, v = tensors(sum(lengths))
    dout, cu = torch.randn_like(q), cu_seqlens(lengths).to(DEVICE)
    keywords = {"causal": True, "deterministic": True}
    want = gradients(q, k, v, cu, dout, **keywords)
    other, work = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    for _ in range(5):
        with torch.cuda.stream(other):
            work @ work
        for a, b in zip(gradients(q, k, v, cu, dout, **keywords), want, strict=True):
            assert torch.equal(a, b)
    torch.cuda.synchronize()


def test_low_precision_gradients_of_a_long_sequence():
    """dQ is a sum over two dozen tiles of keys, in any order."""
    lengths = [3000, 500]
    q, k, v = tensors(sum(lengths))
    cu = cu_seqlens(lengths).to(DEVICE)
    dout = torch.randn_like(q)

    def plain(dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
        out = dense_attention(*leaves, cu, causal=True)[0]
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    ours = gradients(q, k, v, cu, dout, causal=True)
    same, exact = plain(q.dtype), plain(torch.float64)
    for name, a, p, e in zip(("out", "dq", "dk", "dv"), ours, same, exact, strict=True):
        assert_error_ratio(a, p, e, 2.0, name)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q, k, v = tensors(200, device="cuda:1")
    dout, cu = torch.randn_like(q), cu_seqlens([150, 50])
    keywords = {"causal": True, "deterministic": True}
    found = gradients(q, k, v, cu.to("cuda:1"), dout, **keywords)
    want = gradients(*(t.to("cuda:0") for t in (q, k, v, cu, dout)), **keywords)
    for a, b in zip(found, want, strict=True):
        assert a.device == q.device and torch.equal(a.cpu(), b.cpu())


def zeros_but_for_the_end(last: int):
    """q, k, v and dout (rows, 128, 256) of 2.15e9 elements each, zero but for the last rows."""
    heads, dim = 128, 256
    rows = 2**31 // (heads * dim) + last
    size = (rows, heads, dim)
    found = [torch.zeros(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(4)]
    for t in found:
        t[-last:].normal_()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_offsets_past_32_bits(backward):
    """The last rows lie past 2^31 elements."""
    needed = 60 if backward else 28
    if torch.cuda.mem_get_info()[0] < needed * 2**30:
        pytest.skip(f"needs {needed} GiB of free GPU memory")
    last = 7
    q, k, v, dout = zeros_but_for_the_end(last)
    lengths = [q.shape[0] - last, last]
    cu, alone = cu_seqlens(lengths).to(DEVICE), cu_seqlens([last]).to(DEVICE)
    keywords = {"window": (16, 0)}  # keeps the long sequence cheap

    def results(q, k, v, dout, cu):
        if backward:
            return gradients(q, k, v, cu, dout, **keywords)
        with torch.no_grad():
            return (vs.varlen_attention(q, k, v, cu, **keywords),)

    want = results(*(t[-last:] for t in (q, k, v, dout)), alone)
    for got, one in zip(results(q, k, v, dout, cu), want, strict=True):
        assert torch.equal(got[-last:], one) and not got[:-last].any()
